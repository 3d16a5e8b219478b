"""How good is the policy at problems that it is not trained on, every so many steps: asked while a step trains.

Between a step's rollout and the next push the sampler has nothing to do, and the weights of the step before: that is
when it answers. What the run waits for is what is left of the answers when the step has trained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Protocol, runtime_checkable

from megatron_rlsc.config import Config
from megatron_rlsc.data import render
from megatron_rlsc.evaluation.problems import Problem, read_problems
from megatron_rlsc.evaluation.statistics import accuracy, ladder, pass_at
from megatron_rlsc.rollout.client import BegunRollout
from megatron_rlsc.rollout.dispatch import NoReplicaLeftError
from megatron_rlsc.run_folder.names import HELD_OUT
from megatron_rlsc.tokenizer import Tokenizer, load_tokenizer
from megatron_rlsc.tracking import Timer, Tracker, lines_up_to
from megatron_rlsc.types import Progress, Prompt, Sample


@runtime_checkable
class Answers(Protocol):
    """A sampler that can be asked beside the steps."""

    def answer(self, prompts: Sequence[Prompt], version: str, *, samples: int = 1, step: int = 0) -> BegunRollout:
        """Responses of the weights of `version`, one greedy one each or `samples` as in training: begun, while the
        caller does something else. What is under way at one time is of different `step`s; training's are from 1 on."""


def read_held_out(config: Config, tokenizer: Tokenizer, *, max_prompt_tokens: int) -> list[tuple[Problem, Prompt]]:
    """The problems of --eval-data-path, asked as in training; none without it. Raises ValueError with the line of one
    that is malformed, or longer than the model's context leaves beside a response."""
    path = config.train.eval_data_path
    if path is None:
        return []
    found = []
    for index, problem in enumerate(read_problems(path)):
        text = render(problem.question, config.data, tokenizer)
        prompt = Prompt(index=index, text=text, token_ids=tuple(tokenizer.encode(text)))
        if len(prompt.token_ids) > max_prompt_tokens:
            raise ValueError(
                f"{path}: problem {index + 1} has {len(prompt.token_ids)} tokens, the model's context leaves "
                f"{max_prompt_tokens} beside a response (--eval-data-path)"
            )
        found.append((problem, prompt))
    return found


class NoHeldOut:
    """Of a run without --eval-interval, and of ranks other than 0. A context manager."""

    def __enter__(self) -> NoHeldOut:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def meanwhile(self, progress: Progress, timer: Timer) -> AbstractContextManager[None]:
        return nullcontext()

    def rewind(self, step: int) -> None:
        pass


class HeldOut(NoHeldOut):
    """Rank 0's; leaving it ends the processes that grade."""

    def __init__(
        self,
        config: Config,
        asked: Sequence[tuple[Problem, Prompt]],
        sampler: Answers,
        tokenizer: Tokenizer,
        tracker: Tracker,
        path: Path,
        *,
        start: int,
    ) -> None:
        """
        Args:
            asked: problems and their prompts.
            path: of the JSON lines, one an evaluation; those of steps past `start` are dropped.
            start: the last step that is done.
        """
        from megatron_rlsc.evaluation.graders import Graders  # of the `eval` extra, which other runs do without

        self._due, self._samples = config.train.evaluates_after, config.train.eval_samples
        self._asked, self._sampler, self._tokenizer, self._tracker = asked, sampler, tokenizer, tracker
        self._path = path
        self.rewind(start)
        self._graders = Graders(2)

    def __exit__(self, *error: object) -> None:
        self._graders.__exit__(*error)

    def rewind(self, step: int) -> None:
        """The run goes on from a step: what was said of later ones is dropped."""
        self._done = {line["step"] for line in lines_up_to(self._path, step)}

    def meanwhile(self, progress: Progress, timer: Timer) -> AbstractContextManager[None]:
        """Has the sampler answer for the length of the block, and waits for what is left then. The weights that it has
        must be those of `progress`, and none may be pushed inside."""
        if not self._due(progress.step) or progress.step in self._done:
            return nullcontext()
        return self._evaluated(progress, timer)

    @contextmanager
    def _evaluated(self, progress: Progress, timer: Timer) -> Iterator[None]:
        prompts = [prompt for _, prompt in self._asked]
        with self._sampler.answer(prompts, progress.version, samples=self._samples) as begun:
            yield
            with timer.phase("evaluate"):
                try:
                    groups = {group[0].group: group for group in begun.groups()}
                except NoReplicaLeftError:
                    self._tracker.say(f"no evaluation after step {progress.step}: its replicas were lost")
                    return
                if len(groups) == len(self._asked):  # fewer where the run is to end at once
                    self._log(progress.step, [sample for i in range(len(self._asked)) for sample in groups[i]])

    def _log(self, step: int, samples: Sequence[Sample]) -> None:
        """`samples`: those of each problem together."""
        texts = [self._tokenizer.decode(sample.response_token_ids, skip_special_tokens=True) for sample in samples]
        whole = [sample.finish_reason == "stop" for sample in samples]
        grades = self._graders.grade(
            [(text, self._asked[s.group][0], end) for text, s, end in zip(texts, samples, whole)], last_line=True
        )
        right, k = [grade.verdict == "right" for grade in grades], self._samples
        counts = [sum(right[i : i + k]) for i in range(0, len(right), k)]
        estimate = accuracy([count / k for count in counts], k)
        figures = {
            "held_out/accuracy": estimate.value,
            "held_out/accuracy_low": estimate.low,
            "held_out/accuracy_high": estimate.high,
            "held_out/response_length": sum(len(s.response_token_ids) for s in samples) / len(samples),
            "held_out/truncated_share": 1 - sum(whole) / len(samples),
            "held_out/no_verdict_share": sum(g.verdict not in ("right", "wrong") for g in grades) / len(grades),
        } | {
            f"held_out/pass_at_{n}": 100 * fmean(pass_at(n, samples=k, right=count) for count in counts)
            for n in ladder(k)[1:]
        }
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | figures) + "\n")
        self._tracker.log_figures(step, figures)
        self._tracker.say(
            f"held out, after step {step}: {estimate.value:.1f} % [{estimate.low:.1f}, {estimate.high:.1f}] of "
            f"{len(counts)} problems, length {figures['held_out/response_length']:.1f}"
        )


def open_held_out(config: Config, model_dir: Path, sampler: object, tracker: Tracker, *, start: int) -> NoHeldOut:
    """What the loop asks on this rank; `start` is the last step that is done."""
    if not config.train.eval_interval or not isinstance(sampler, Answers):
        return NoHeldOut()
    tokenizer = load_tokenizer(model_dir)
    asked = read_held_out(config, tokenizer, max_prompt_tokens=sys.maxsize)
    path = config.train.output_dir / HELD_OUT
    return HeldOut(config, asked, sampler, tokenizer, tracker, path, start=start)
