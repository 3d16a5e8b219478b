"""What a response is worth, for the methods that learn from a reward of 0 or 1: by vote, by label, or by chance."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rlsc.config import Config
from megatron_rlsc.data import read_questions
from megatron_rlsc.evaluation.problems import Problem, read_problems
from megatron_rlsc.objective import METHODS
from megatron_rlsc.tokenizer import Tokenizer, load_tokenizer
from megatron_rlsc.types import Sample

PROCESSES = 2
"""That read and compare answers: rank 0's machine has others to feed."""


class NoJudge:
    """Of a method without rewards, and of ranks other than 0. A context manager."""

    def __enter__(self) -> NoJudge:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def rewards(self, samples: Sequence[Sample]) -> list[float] | None:
        """[B] of a step's samples, in order; None where rank 0 has them."""
        return None


class Coin(NoJudge):
    """1 with chance 1/2, by the seed of the request: the same when a step is made again (arXiv 2506.10947)."""

    def rewards(self, samples: Sequence[Sample]) -> list[float]:
        return [float(random.Random(f"{s.seed}:{s.group}:{s.sample}").random() < 0.5) for s in samples]


ANY = Problem(question="", answers=())
"""Of whose answers nothing is known: neither choices nor a unit."""


class Vote(NoJudge):
    """1 for the answer that most of the siblings give (TTRL, arXiv 2504.16084); of several that equally many give, for
    the first. A response without an answer has 0, and no vote."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from megatron_rlsc.evaluation.graders import Graders  # of the `eval` extra, which other methods do without

        self._tokenizer = tokenizer
        self._graders = Graders(PROCESSES)

    def __exit__(self, *error: object) -> None:
        self._graders.__exit__(*error)

    def rewards(self, samples: Sequence[Sample]) -> list[float]:
        answers = self._graders.answers([_text(sample, self._tokenizer) for sample in samples])
        groups: dict[int, dict[int, str]] = {}
        for place, (sample, answer) in enumerate(zip(samples, answers)):
            if answer is not None:
                groups.setdefault(sample.group, {})[place] = answer
        rewards = [0.0] * len(samples)
        for given in groups.values():
            texts = list(dict.fromkeys(given.values()))
            class_of = dict(zip(texts, self._graders.votes(texts, ANY)))
            winner = Counter(class_of[text] for text in given.values()).most_common(1)[0][0]
            for place, text in given.items():
                rewards[place] = float(class_of[text] == winner)
        return rewards


class Label(NoJudge):
    """1 for the right answer, by the labels of the prompt file."""

    def __init__(self, tokenizer: Tokenizer, problems: Mapping[int, Problem]) -> None:
        """`problems`: by `Sample.prompt_index`."""
        from megatron_rlsc.evaluation.graders import Graders

        self._tokenizer, self._problems = tokenizer, problems
        self._graders = Graders(PROCESSES)

    def __exit__(self, *error: object) -> None:
        self._graders.__exit__(*error)

    def rewards(self, samples: Sequence[Sample]) -> list[float]:
        texts = [_text(sample, self._tokenizer) for sample in samples]
        asked = [(text, self._problems[s.prompt_index], whole) for s, (text, whole) in zip(samples, texts)]
        return [float(grade.verdict == "right") for grade in self._graders.grade(asked, last_line=True)]


def read_labels(path: Path) -> dict[int, Problem]:
    """{line, from 0: problem} of a prompt file whose every line has an `answer`. Raises ValueError with the line where
    one has none."""
    return dict(zip(read_questions(path), read_problems(path), strict=True))


def open_judge(config: Config, model_dir: Path) -> NoJudge:
    """Rank 0's judge for the method, with its processes. Raises ValueError where the labels that it needs are missing.

    Args:
        model_dir: with the tokenizer.
    """
    match METHODS[config.objective.objective].reward:
        case "coin":
            return Coin()
        case "majority":
            return Vote(load_tokenizer(model_dir))
        case "label":
            return Label(load_tokenizer(model_dir), read_labels(config.data.data_path))
        case _:
            return NoJudge()


def _text(sample: Sample, tokenizer: Tokenizer) -> tuple[str, bool]:
    """(response, whether it is whole)"""
    text = tokenizer.decode(sample.response_token_ids, skip_special_tokens=True)
    return text, sample.finish_reason == "stop"
