"""The same few prompts, answered by every step's weights, for people to read: asked while the next step trains.

Nobody waits for a long answer: what has not ended when the step has trained is left out. Only the base's, and those
after the last step, which reports set side by side, are waited for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path

from megatron_rlsc.config import Config
from megatron_rlsc.data import read_questions, render
from megatron_rlsc.held_out import Answers
from megatron_rlsc.rollout.dispatch import NoReplicaLeftError
from megatron_rlsc.run_folder.names import SHOWN
from megatron_rlsc.tokenizer import Tokenizer, load_tokenizer
from megatron_rlsc.tracking import Tracker, lines_up_to
from megatron_rlsc.types import Progress, Prompt, Sample

WAIT_SHARE = 0.02
"""Of the seconds that a step trains: so long, and no longer, are late answers waited for."""
REQUESTS = -1
"""The `step` of their requests: 0 is that of held-out problems, which may be under way at the same time."""
PATIENCE_SECONDS = 60.0
"""For answers of the base, and of the weights after the last step."""


class NothingShown:
    """Of a run without --show-prompts or without a sampler, and of ranks other than 0."""

    def meanwhile(self, progress: Progress) -> AbstractContextManager[None]:
        return nullcontext()

    def rewind(self, step: int) -> None:
        pass


class Shown(NothingShown):
    """Rank 0's."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampler: Answers,
        tokenizer: Tokenizer,
        tracker: Tracker,
        path: Path,
        *,
        start: int,
        total: int,
    ) -> None:
        """
        Args:
            path: of the JSON lines, one a step; those of steps past `start` are dropped.
            start: the last step that is done.
            total: the last step to do.
        """
        self._prompts, self._sampler, self._tokenizer, self._tracker = prompts, sampler, tokenizer, tracker
        self._path, self._total = path, total
        self.rewind(start)

    def rewind(self, step: int) -> None:
        """The run goes on from a step: what was said of later ones is dropped."""
        self._done = {line["step"] for line in lines_up_to(self._path, step)}

    def meanwhile(self, progress: Progress) -> AbstractContextManager[None]:
        """Has the sampler answer for the length of the block. The weights that it has must be those of `progress`, and
        none may be pushed inside."""
        if progress.step in self._done:
            return nullcontext()
        return self._answered(progress)

    @contextmanager
    def _answered(self, progress: Progress) -> Iterator[None]:
        try:
            asked = self._sampler.answer(self._prompts, progress.version, step=REQUESTS)
        except NoReplicaLeftError:  # they were lost with the last of the step's samples
            yield
            return
        with asked as begun:
            start = time.perf_counter()
            yield
            needed = progress.step in (0, self._total)
            patience = PATIENCE_SECONDS if needed else WAIT_SHARE * (time.perf_counter() - start)
            samples: dict[int, Sample] = {}
            try:
                for (sample,) in begun.groups(seconds=patience):
                    samples[sample.group] = sample
            except NoReplicaLeftError:
                self._tracker.say(
                    f"not all shown prompts have an answer after step {progress.step}: replicas were lost"
                )
        self._log(progress.step, samples)

    def _log(self, step: int, samples: dict[int, Sample]) -> None:
        answers = []
        for place, sample in sorted(samples.items()):
            prompt = self._prompts[place].text
            response = self._tokenizer.decode(sample.response_token_ids, skip_special_tokens=True)
            tokens, end = len(sample.response_token_ids), sample.finish_reason
            answers.append({"prompt": prompt, "response": response, "finish_reason": end, "tokens": tokens})
            said = f"answer, {tokens} tokens" + (", cut" if end == "length" else "")
            self._tracker.log_text(step, f"shown/{place + 1}", {"prompt": prompt, said: response})
        if answers:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, "answers": answers}) + "\n")


def open_shown(config: Config, model_dir: Path, sampler: object, tracker: Tracker, *, start: int) -> NothingShown:
    """What the loop shows on this rank: the first questions of the prompt file; `start` is the last step done."""
    if not config.train.show_prompts or not isinstance(sampler, Answers):
        return NothingShown()
    tokenizer = load_tokenizer(model_dir)
    prompts = []
    for index, question in islice(read_questions(config.data.data_path).items(), config.train.show_prompts):
        text = render(question, config.data, tokenizer)
        prompts.append(Prompt(index=index, text=text, token_ids=tuple(tokenizer.encode(text))))
    path, total = config.train.output_dir / SHOWN, config.train.train_iters
    return Shown(prompts, sampler, tokenizer, tracker, path, start=start, total=total)
