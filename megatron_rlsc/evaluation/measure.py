"""What a model, in HF format, scores on problems with answers: greedy, and sampled at the training temperature."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megatron_rlsc.config import DataConfig
from megatron_rlsc.data import render
from megatron_rlsc.evaluation.generation import generate
from megatron_rlsc.evaluation.grading import grade
from megatron_rlsc.evaluation.problems import read_problems
from megatron_rlsc.tokenizer import load_tokenizer, stop_token_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Of one response to each problem."""

    accuracy: float
    """Percent of the problems answered right."""
    response_length: float
    """Mean tokens, the stop token included."""
    truncated: float
    """Percent of the responses cut at the limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Of one model on one set of problems."""

    problems: int
    """How many."""
    weights_sha256: dict[str, str]
    """{file: checksum} of what was measured."""
    greedy: Score
    sampled: Score


def measure(
    hf_dir: Path, data: DataConfig, *, temperature: float, max_response_length: int, batch_size: int, seed: int
) -> Measurement:
    """Measures the model of `hf_dir` on the problems of `data.data_path`, prompted as in training.

    Args:
        temperature: of the sampled responses.
        seed: of the same.

    Raises ValueError where the folder has no model, or the context no room for a prompt and its response.
    """
    weights = sorted(hf_dir.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{hf_dir} is no HF model: it has no *.safetensors")
    problems, tokenizer = read_problems(data.data_path), load_tokenizer(hf_dir)
    prompts = [tokenizer.encode(render(problem.question, data, tokenizer)) for problem in problems]
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype="auto", local_files_only=True).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    longest, context = max(map(len, prompts)), model.config.max_position_embeddings
    if longest + max_response_length > context:
        raise ValueError(
            f"the longest prompt has {longest} tokens and the context {context}: no room for --max-response-length "
            f"{max_response_length}"
        )
    stops = stop_token_ids(tokenizer, hf_dir)

    def score(temperature: float, title: str) -> Score:
        responses = generate(
            model,
            prompts,
            temperature=temperature,
            max_response_length=max_response_length,
            stop_token_ids=stops,
            batch_size=batch_size,
            seed=seed,
            title=title,
        )
        texts = [tokenizer.decode(response, skip_special_tokens=True) for response in responses]
        return Score(
            accuracy=_percent([grade(text, problem.answer) for text, problem in zip(texts, problems)]),
            response_length=sum(map(len, responses)) / len(responses),
            truncated=_percent([response[-1] not in stops for response in responses]),
        )

    return Measurement(
        problems=len(problems),
        weights_sha256={path.name: _sha256(path) for path in weights},
        greedy=score(0.0, "greedy"),
        sampled=score(temperature, f"T={temperature}"),
    )


def _percent(flags: Sequence[bool]) -> float:
    return 100 * sum(flags) / len(flags)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
