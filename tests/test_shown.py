"""Prompts that are shown: when they are asked, what is not waited for, and what is written. The sampler is played here,
and real in tests/test_train.py."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator

from megatron_rlsc.config import Config, DataConfig, TrainConfig
from megatron_rlsc.rollout.dispatch import NoReplicaLeftError
from megatron_rlsc.sampler import Replay
from megatron_rlsc.shown import NothingShown, Shown, open_shown
from megatron_rlsc.tokenizer import load_tokenizer
from megatron_rlsc.tracking import Tracker
from megatron_rlsc.types import Progress, Prompt, Sample

ROOT = Path(__file__).parents[1]
TOKENIZER = load_tokenizer(ROOT / "checkpoints" / "rlsc-tiny-base")


class Played:
    """Says the prompt backwards; of `slow` prompts only to who waits."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.refuses = self.loses = False
        self.slow: frozenset[int] = frozenset()

    def answer(self, prompts: list[Prompt], version: str, *, step: int) -> Played:
        if self.refuses:
            raise NoReplicaLeftError("gone")
        assert step < 0, "held-out problems are of step 0"
        self.log.append(f"asked {len(prompts)} of {version}")
        self._prompts = prompts
        return self

    def __enter__(self) -> Played:
        return self

    def __exit__(self, *error: object) -> None:
        self.log.append("left")

    def groups(self, *, seconds: float = float("inf")) -> Iterator[list[Sample]]:
        if self.loses:
            raise NoReplicaLeftError("gone")
        self.log.append("waited for" if seconds >= 1 else "looked at")
        for i, prompt in enumerate(self._prompts):
            if i in self.slow and seconds < 1:
                continue
            yield [
                Sample(
                    group=i,
                    sample=0,
                    prompt_index=i,
                    prompt_token_ids=prompt.token_ids,
                    response_token_ids=(*TOKENIZER.encode(prompt.text[::-1]), 256),
                    rollout_logprobs=(),
                    finish_reason="length" if i else "stop",
                    seed=0,
                    version="v",
                )
            ]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"problem": f"1+{i}"}) + "\n" for i in range(5)))
    return Config(
        data=DataConfig(data_path=path, prompt_template="{problem}=", apply_chat_template=False),
        train=TrainConfig(show_prompts=2, train_iters=3, output_dir=tmp_path),
    )


def walk(config: Config, base_model: Path, sampler: Played, *, start: int, end: int) -> None:
    """The steps after `start`, to `end`; after the last of the run once more, as the loop does."""
    folder = config.train.output_dir
    with Tracker(folder / "metrics.jsonl", folder / "tb", start=start, total=3, enabled=True) as tracker:
        shown = open_shown(config, base_model, sampler, tracker, start=start)
        assert isinstance(shown, Shown)
        for step in range(start, end + (end == 3)):
            with shown.meanwhile(Progress(step=step, version=f"v{step}")):
                sampler.log.append(f"step {step + 1} trains")


def lines(config: Config) -> list[tuple[int, list[str]]]:
    path = config.train.output_dir / "shown.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(row["step"], [answer["response"] for answer in row["answers"]]) for row in rows]


def texts(config: Config, tag: str) -> dict[int, str]:
    """As TensorBoard's server reads them; its older EventAccumulator hides no texts of a run that was resumed."""
    board = plugin_event_accumulator.EventAccumulator(str(config.train.output_dir / "tb")).Reload()
    events = board.Tensors(f"{tag}/text_summary")
    assert len({event.step for event in events}) == len(events), "a point is there twice"
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events}


def test_the_first_questions_are_asked_of_every_steps_weights(config: Config, base_model: Path) -> None:
    """While a step trains, and without waiting but for the first and the last; greedy, as Answers has it."""
    sampler = Played()
    walk(config, base_model, sampler, start=0, end=3)
    waits = ["waited for", "looked at", "looked at", "waited for"]
    asked = [[f"asked 2 of v{step}", f"step {step + 1} trains", wait, "left"] for step, wait in enumerate(waits)]
    assert sampler.log == [line for lines in asked for line in lines]
    assert lines(config) == [(step, ["=0+1", "=1+1"]) for step in range(4)]
    assert texts(config, "shown/1") == {
        step: "**prompt**\n\n    1+0=\n\n**answer, 5 tokens**\n\n    =0+1" for step in range(4)
    }
    assert "**answer, 5 tokens, cut**" in texts(config, "shown/2")[0]


def test_a_long_answer_is_left_out_but_of_the_base_and_of_the_last_step(config: Config, base_model: Path) -> None:
    sampler = Played()
    sampler.slow = frozenset({1})
    walk(config, base_model, sampler, start=0, end=3)
    both = ["=0+1", "=1+1"]
    assert lines(config) == [(0, both), (1, ["=0+1"]), (2, ["=0+1"]), (3, both)]


@pytest.mark.parametrize("which", ["refuses", "loses"])
def test_lost_replicas_cost_no_more_than_the_text(which: str, config: Config, base_model: Path) -> None:
    sampler = Played()
    setattr(sampler, which, True)
    walk(config, base_model, sampler, start=0, end=1)
    assert "step 1 trains" in sampler.log and lines(config) == []
    setattr(sampler, which, False)
    walk(config, base_model, sampler, start=1, end=2)
    assert lines(config) == [(1, ["=0+1", "=1+1"])]


def test_a_resumed_run_has_every_step_once(config: Config, base_model: Path) -> None:
    """Steps 0 to 2 were shown, and the checkpoint is of step 1: it is not asked again, step 2 is."""
    walk(config, base_model, Played(), start=0, end=3)
    time.sleep(1.1)  # an event file's name has its second
    sampler = Played()
    walk(config, base_model, sampler, start=1, end=3)
    assert [line for line in sampler.log if line.startswith("asked")] == ["asked 2 of v2", "asked 2 of v3"]
    assert [step for step, _ in lines(config)] == [0, 1, 2, 3]
    assert sorted(texts(config, "shown/1")) == [0, 1, 2, 3]


def test_a_step_that_fails_shows_nothing(config: Config, base_model: Path, tmp_path: Path) -> None:
    sampler = Played()
    with Tracker(tmp_path / "m", tmp_path / "tb", start=0, total=3, enabled=True) as tracker:
        shown = open_shown(config, base_model, sampler, tracker, start=0)
        with pytest.raises(ZeroDivisionError), shown.meanwhile(Progress(version="v")):
            raise ZeroDivisionError
    assert sampler.log == ["asked 2 of v", "left"] and lines(config) == []


def test_runs_that_show_nothing(config: Config, base_model: Path, tmp_path: Path) -> None:
    """Without --show-prompts, and of a journal that is replayed."""
    tracker = Tracker(tmp_path / "m", tmp_path / "tb", start=0, total=1, enabled=False)
    silent = Config(train=TrainConfig(show_prompts=0))
    assert type(open_shown(silent, base_model, Played(), tracker, start=0)) is NothingShown
    replay = Replay(ROOT / "tests" / "golden" / "journal", 5, vocab_size=260)
    assert type(open_shown(config, base_model, replay, tracker, start=0)) is NothingShown
    with pytest.raises(ValueError, match="show_prompts must not be negative"):
        TrainConfig(show_prompts=-1)
