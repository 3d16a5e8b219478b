"""What every side is given: a model with random weights, and responses of drawn lengths. And what it gives back."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_rlsc.types import Sample

Lengths = Literal["long-tailed", "uniform"]
SIBLINGS = 16
PROMPT = 64, 128
MEDIAN, SPREAD, LONGEST = 64, 0.9, 256
"""Of long-tailed lengths: log-normal, and cut."""
UNIFORM = 96
"""About the mean of the others."""

BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.999), 1e-8, 0.01, 1.0
"""Of AdamW, which decays matrices alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Qwen2.5 model, in HF's names; tied, with heads of 64."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_key_value_heads: int = 2
    head_dim: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What a side is built of."""

    model: Path
    """The HF folder."""
    device: Literal["cpu", "cuda"] = "cpu"
    """On a GPU the model is in float32 as well."""
    lr: float = 0.0
    """At 0 every step is taken on the same weights, so that all of them can be compared; AdamW does its work."""
    temperature: float = 0.5
    alpha: float = 0.1
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of our side, by section of the recipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a step says."""

    loss: float
    """-mean over responses of (p_old + alpha) log p"""
    gradient_norm: float
    """Before clipping."""
    logprobs: list[float]
    """[B] log p of the responses, in ascending order: not every side keeps theirs."""


class Side(Protocol):
    """One program that trains."""

    def step(self, samples: list[Sample], micro_batch: int) -> Outcome:
        """Loss, gradient, clipping and AdamW; `micro_batch` responses at a time, where the side does not pack them."""

    def parameters(self) -> list[Any]:
        """Every torch.nn.Parameter, once."""

    def weights(self) -> dict[str, Any]:
        """Whole tensors by HF name, copied."""


def draw(lengths: Lengths, *, seed: int, vocabulary: int, groups: int = 1) -> list[Sample]:
    """A step's responses, 16 to each prompt; their tokens are random."""
    rng = random.Random(f"{lengths} {seed}")

    def response() -> int:
        return UNIFORM if lengths == "uniform" else min(LONGEST, max(1, round(MEDIAN * rng.lognormvariate(0, SPREAD))))

    prompts = [rng.randint(*PROMPT) for _ in range(groups)]
    return samples_of([(prompt, [response() for _ in range(SIBLINGS)]) for prompt in prompts], vocabulary, seed)


def samples_of(sizes: list[tuple[int, list[int]]], vocabulary: int, seed: int) -> list[Sample]:
    """Random tokens: of each group a prompt of so many, and responses of so many."""
    rng = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocabulary) for _ in range(count))

    samples = []
    for group, (prompt_length, responses) in enumerate(sizes):
        prompt = tokens(prompt_length)
        for number, length in enumerate(responses):
            samples.append(
                Sample(
                    group=group,
                    sample=number,
                    prompt_index=group,
                    prompt_token_ids=prompt,
                    response_token_ids=tokens(length),
                    rollout_logprobs=(0.0,) * length,
                    finish_reason="length",
                    seed=seed,
                    version="benchmark",
                )
            )
    return samples


def response_tokens(samples: list[Sample]) -> int:
    return sum(len(sample.response_token_ids) for sample in samples)


def write_model(shape: Shape, folder: Path, *, scale: float = 1.0) -> None:
    """As an HF folder; matrices multiplied by `scale` once they are drawn."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.hidden_size // shape.head_dim,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    model.save_pretrained(folder)
