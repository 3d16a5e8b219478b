"""When held-out problems are asked, and what becomes of answers that do not come. The sampler is played here, and
real in tests/test_train.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlsc.config import Config, DataConfig, TrainConfig
from megatron_rlsc.held_out import HeldOut, NoHeldOut, open_held_out, read_held_out
from megatron_rlsc.rollout.dispatch import NoReplicaLeftError
from megatron_rlsc.tokenizer import load_tokenizer
from megatron_rlsc.tracking import Timer, Tracker
from megatron_rlsc.types import Progress, Prompt, Sample

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "checkpoints" / "rlsc-tiny-base")
PROBLEMS = '{"problem": "1+1", "answer": 2}\n{"problem": "2+2", "answer": 5}\n'


class Played:
    """Answers with the sum, in the block's own time."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fails: Exception | None = None
        self.abandoned = False

    def answer(self, prompts: list[Prompt], version: str, *, samples: int) -> Played:
        self.log.append(f"asked {len(prompts)} of {version}")
        self._prompts, self._samples = prompts, samples
        return self

    def __enter__(self) -> Played:
        return self

    def __exit__(self, *error: object) -> None:
        self.log.append("left")

    def groups(self) -> Iterator[list[Sample]]:
        self.log.append("waited for")
        if self.fails:
            raise self.fails
        for i, prompt in enumerate(self._prompts):
            if self.abandoned and i:
                return
            total = sum(map(int, prompt.text[:-1].split("+")))
            texts = [f"\\boxed{{{total + j}}}" for j in range(self._samples)]
            yield [
                Sample(
                    group=i,
                    sample=j,
                    prompt_index=i,
                    prompt_token_ids=prompt.token_ids,
                    response_token_ids=(*TOKENIZER.encode(text), 256),
                    rollout_logprobs=(),
                    finish_reason="stop",
                    seed=0,
                    version="v",
                )
                for j, text in enumerate(texts)
            ]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "problems.jsonl"
    path.write_text(PROBLEMS)
    return Config(
        data=DataConfig(prompt_template="{problem}=", apply_chat_template=False),
        train=TrainConfig(eval_interval=2, eval_data_path=path, train_iters=5, output_dir=tmp_path),
    )


def watched(config: Config, base_model: Path, sampler: Played, start: int = 0) -> tuple[HeldOut, Tracker]:
    folder = config.train.output_dir
    tracker = Tracker(folder / "metrics.jsonl", folder / "tb", start=start, total=5, enabled=True)
    held_out = open_held_out(config, base_model, sampler, tracker, start=start)
    assert isinstance(held_out, HeldOut)
    return held_out, tracker


def rows(config: Config) -> list[dict[str, float]]:
    path = config.train.output_dir / "held_out.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def walk(held_out: NoHeldOut, sampler: Played, steps: range) -> Timer:
    timer = Timer()
    for step in steps:
        with held_out.meanwhile(Progress(step=step, version=f"v{step}"), timer):
            sampler.log.append(f"step {step + 1} trains")
    return timer


def test_it_is_asked_before_a_step_and_waited_for_after_it(config: Config, base_model: Path) -> None:
    sampler = Played()
    held_out, tracker = watched(config, base_model, sampler)
    with held_out, tracker:
        timer = walk(held_out, sampler, range(6))
    asked = [["asked 2 of v0", "step 1 trains", "waited for", "left"], ["step 2 trains"]]
    asked += [["asked 2 of v2", "step 3 trains", "waited for", "left"], ["step 4 trains"]]
    asked += [[f"asked 2 of v{step}", f"step {step + 1} trains", "waited for", "left"] for step in (4, 5)]
    assert sampler.log == [line for lines in asked for line in lines]
    assert list(timer.seconds) == ["evaluate"]
    assert [row["step"] for row in rows(config)] == [0, 2, 4, 5]
    assert {row["held_out/accuracy"] for row in rows(config)} == {50.0}


def test_several_samples_a_problem(config: Config, base_model: Path) -> None:
    """Answers 0, 1, 2 and 3 above the sum: the first is right of one problem, and the second of the other, whose answer
    is 5. pass@2 is 1 - (3 * 2) / (4 * 3)."""
    sampler = Played()
    held_out, tracker = watched(replace(config, train=replace(config.train, eval_samples=4)), base_model, sampler)
    with held_out, tracker:
        walk(held_out, sampler, range(1))
    (row,) = rows(config)
    assert [row[f"held_out/{name}"] for name in ("accuracy", "pass_at_2", "pass_at_4")] == [25, 50, 100]


def test_what_a_resumed_run_has_is_not_asked_again(config: Config, base_model: Path) -> None:
    for start, asked in ((0, [0, 2, 4, 5]), (4, [5]), (3, [4, 5])):
        sampler = Played()
        held_out, tracker = watched(config, base_model, sampler, start=start)
        with held_out, tracker:
            walk(held_out, sampler, range(start, 6))
        assert [line for line in sampler.log if line.startswith("asked")] == [f"asked 2 of v{step}" for step in asked]
        assert [row["step"] for row in rows(config)] == [0, 2, 4, 5]


def test_replicas_that_are_lost_cost_an_evaluation(
    config: Config, base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = Played()
    sampler.fails = NoReplicaLeftError("gone")
    held_out, tracker = watched(config, base_model, sampler)
    with held_out, tracker:
        walk(held_out, sampler, range(1))
    assert rows(config) == [] and "no evaluation after step 0" in capsys.readouterr().out


def test_a_run_that_ends_at_once_has_no_half_of_an_evaluation(config: Config, base_model: Path) -> None:
    sampler = Played()
    sampler.abandoned = True
    held_out, tracker = watched(config, base_model, sampler)
    with held_out, tracker:
        walk(held_out, sampler, range(1))
    assert rows(config) == []


def test_a_step_that_fails_is_no_evaluation(config: Config, base_model: Path) -> None:
    sampler = Played()
    held_out, tracker = watched(config, base_model, sampler)
    with held_out, tracker, pytest.raises(ZeroDivisionError), held_out.meanwhile(Progress(version="v"), Timer()):
        raise ZeroDivisionError
    assert rows(config) == [] and sampler.log == ["asked 2 of v", "left"]


def test_without_an_interval_nothing_is_asked(base_model: Path, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "m", tmp_path / "tb", start=0, total=1, enabled=False)
    assert type(open_held_out(Config(), base_model, Played(), tracker, start=0)) is NoHeldOut


def test_what_cannot_be_asked(config: Config, base_model: Path) -> None:
    tokenizer = load_tokenizer(base_model)
    with pytest.raises(ValueError, match=r"problem 1 has 4 tokens, the model's context leaves 3"):
        read_held_out(config, tokenizer, max_prompt_tokens=3)
    assert config.train.eval_data_path is not None
    config.train.eval_data_path.write_text('{"problem": "1+1"}\n')
    with pytest.raises(ValueError, match="line 1: `answer`"):
        read_held_out(config, tokenizer, max_prompt_tokens=100)
    for flags in ({"eval_interval": 2}, {"eval_data_path": Path("x")}):
        with pytest.raises(ValueError, match="give both"):
            TrainConfig(**flags)
