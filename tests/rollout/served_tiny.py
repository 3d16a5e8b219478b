"""A tiny random Qwen2 that vLLM can serve, HF's word on its log-probabilities, and a client for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_rlsc.rollout.buckets import TensorSpec
from megatron_rlsc.rollout.client import RolloutClient
from megatron_rlsc.rollout.fleet import Fleet, Replica
from megatron_rlsc.types import Prompt, Sample

VOCAB_SIZE = 130
TEMPERATURE = 0.5
MAX_MODEL_LEN = 320


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A random HF Qwen2 and the folder that a sidecar serves it from: config alone."""

    model: Qwen2ForCausalLM
    folder: Path

    def weights(self) -> dict[str, torch.Tensor]:
        """HF name -> a copy; no `lm_head.weight` where it is tied."""
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def specs(self) -> list[TensorSpec]:
        """What a push of `weights()` consists of."""
        weights = self.weights().items()
        return [TensorSpec(name=name, dtype=value.dtype, shape=tuple(value.shape)) for name, value in weights]

    def step(self) -> None:
        """What an optimizer does: every weight moves."""
        with torch.no_grad():
            for value in self.model.parameters():
                value.add_(0.1 * torch.randn_like(value))

    @torch.no_grad()
    def logprobs(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        """[tokens, vocabulary] log_softmax(logits / T) after each token."""
        return torch.log_softmax(self.model(torch.tensor([token_ids])).logits[0] / TEMPERATURE, dim=-1)

    def largest_difference(self, samples: list[Sample]) -> float:
        """Of the sampler's log-probability of a response token from this model's."""
        worst = 0.0
        for sample in samples:
            logprobs = self.logprobs(sample.prompt_token_ids + sample.response_token_ids)
            positions = slice(len(sample.prompt_token_ids) - 1, sample.length - 1)
            expected = logprobs[positions].gather(1, torch.tensor(sample.response_token_ids)[:, None])[:, 0]
            worst = max(worst, (expected - torch.tensor(sample.rollout_logprobs)).abs().max().item())
        return worst


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": MAX_MODEL_LEN // 4}


def build_tiny(folder: Path, *, tied: bool, rope_parameters: dict[str, object] | None = None) -> TinyModel:
    # initializer_range 0.3: sharp enough that wrong weights show by whole nats. eos is what the model says first to
    # PROMPTS[0], so that a sidecar that minds its own eos is caught.
    torch.manual_seed(7)
    config = Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=64,
        head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        intermediate_size=96,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        rope_parameters=rope_parameters or {"rope_type": "default", "rope_theta": 1e4},
    )
    tiny = TinyModel(model=Qwen2ForCausalLM(config).float().eval(), folder=folder)
    eos = int(tiny.logprobs(PROMPTS[0].token_ids)[-1].argmax())
    config.eos_token_id = eos
    config.save_pretrained(folder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {eos}, "top_k": 1, "repetition_penalty": 2.0}}')
    return tiny


# The first is longer than a KV block, so that the prefix cache has something to keep.
PROMPTS = [
    Prompt(index=4, text="", token_ids=tuple(range(2, 130)) + tuple(range(2, 100))),
    Prompt(index=9, text="", token_ids=(11, 12, 13)),
    Prompt(index=2, text="", token_ids=(50, 40, 30, 20)),
]


@dataclass(frozen=True, kw_only=True)
class OneServerClient:
    """Asks one server, taken for a holder of any version that is wanted: what it answers is the test's matter."""

    fleet: Fleet
    client: RolloutClient

    def generate(self, prompts: Sequence[Prompt], *, step: int, version: str) -> list[Sample]:
        self.fleet.replicas[0].version = version
        return self.client.generate(prompts, step=step, version=version)


def build_client(
    sidecar_url: str, key: str, *, stop_token_ids: tuple[int, ...] = (3, 5), seed: int = 1
) -> OneServerClient:
    fleet = Fleet([Replica(index=0, url=sidecar_url, key=key)])
    return OneServerClient(fleet=fleet, client=build_fleet_client(fleet, stop_token_ids=stop_token_ids, seed=seed))


def build_fleet_client(fleet: Fleet, **arguments: Any) -> RolloutClient:
    """Four samples a prompt, of 24 tokens at most, unless the arguments say otherwise."""
    defaults = {
        "samples_per_prompt": 4,
        "temperature": TEMPERATURE,
        "max_response_length": 24,
        "stop_token_ids": (3, 5),
        "seed": 1,
        "timeout": 300,
    }
    return RolloutClient(fleet, **{**defaults, **arguments})
