"""What a response is worth, from real tokens and real grading. Not covered: what is learned of it (tests/policy)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlsc.config import Config, DataConfig, ObjectiveConfig
from megatron_rlsc.rewards import Coin, NoJudge, open_judge, read_labels
from megatron_rlsc.tokenizer import load_tokenizer
from megatron_rlsc.types import Sample


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blank line between the questions: a prompt's index is its line."""
    path = tmp_path_factory.mktemp("labels") / "problems.jsonl"
    problems = [{"problem": "1+1", "answer": 2.0}, {"problem": "half of 3", "answer": "\\frac{3}{2}"}]
    path.write_text("\n\n".join(map(json.dumps, problems)) + "\n")
    return path


def judged(base_model: Path, labels: Path, objective: str, *groups: tuple[int, list[str]]) -> list[float] | None:
    """The rewards of responses to prompts: (line, responses) each; one that ends in `...` was cut."""
    tokenizer = load_tokenizer(base_model)
    samples = [
        Sample(
            group=group,
            sample=i,
            prompt_index=line,
            prompt_token_ids=(1,),
            response_token_ids=tuple(tokenizer.encode(text.removesuffix("..."))),
            rollout_logprobs=(0.0,) * len(tokenizer.encode(text.removesuffix("..."))),
            finish_reason="length" if text.endswith("...") else "stop",
            seed=group,
            version="v",
        )
        for group, (line, texts) in enumerate(groups)
        for i, text in enumerate(texts)
    ]
    config = Config(objective=ObjectiveConfig(objective=objective), data=DataConfig(data_path=labels))  # type: ignore[arg-type]
    with open_judge(config, base_model) as judge:
        return judge.rewards(samples)


def test_the_majority_is_of_answers_and_not_of_texts(base_model: Path, labels: Path) -> None:
    """1/2 and 0.5 are one answer, given thrice; 2 twice; a cut response without a box gives none. A tie is the first's,
    and nothing is worth nothing."""
    half = ["\\boxed{\\frac12}", "so \\boxed{0.5}", "\\boxed{2}", "The answer is 2.", "\\boxed{1/2}", "it is 1/2..."]
    other = ["\\boxed{7}", "no idea what this could be"]
    tie, nothing = ["\\boxed{3}", "\\boxed{4}"], ["no", "none"]
    rewards = judged(base_model, labels, "ttrl", (0, half), (2, other), (0, tie), (2, nothing))
    assert rewards == [1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0]


def test_labels_are_those_of_the_prompt_s_line(base_model: Path, labels: Path) -> None:
    answers = ["\\boxed{2}", "\\boxed{1.5}", "\\boxed{3}"]
    assert judged(base_model, labels, "verified", (0, answers), (2, answers)) == [1, 0, 0, 0, 1, 0]


def test_a_coin_is_fair_and_falls_the_same_way_again(base_model: Path, labels: Path) -> None:
    """400 throws: the mean is within 4 standard deviations, 0.1, of a half."""
    groups = [(0, ["\\boxed{2}"] * 16)] * 25
    rewards = judged(base_model, labels, "random", *groups)
    assert rewards is not None and set(rewards) == {0.0, 1.0}
    assert sum(rewards) / 400 == pytest.approx(0.5, abs=0.1)
    assert len({tuple(rewards[i : i + 16]) for i in range(0, 400, 16)}) == 25
    assert judged(base_model, labels, "random", *groups) == rewards


def test_other_methods_have_no_judge(base_model: Path, labels: Path) -> None:
    assert judged(base_model, labels, "rlsc", (0, ["\\boxed{2}"])) is None
    assert isinstance(Coin(), NoJudge)


def test_a_line_without_an_answer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "1+1", "answer": 2}\n\n{"problem": "2+2"}\n')
    with pytest.raises(ValueError, match="line 3"):
        read_labels(path)
