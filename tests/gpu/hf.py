"""The reference: transformers' Qwen2 on the same weights, in float32 and in bfloat16.

What is measured is error against float32, and what it is held against is transformers' own in bfloat16: a bound in
absolute numbers would be a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.types import Sample

TEMPERATURE = 0.5


@dataclass(frozen=True, kw_only=True)
class Model:
    shape: ModelShape
    lengths: tuple[tuple[int, int], ...]
    """(prompt, response) tokens of each sample."""

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """Random weights by HF name, exact in bfloat16: no bias, norm or logit is a small matter."""
        generator = torch.Generator(device).manual_seed(0)
        state = {}
        for name, size in self.shape.hf_tensors().items():
            noise = torch.randn(size, generator=generator, device=device)
            if len(size) == 2:
                state[name] = noise.mul_(0.02 if "embed" in name or "lm_head" in name else size[1] ** -0.5).bfloat16()
            else:
                state[name] = noise.mul_(0.1).add_(1.0 if "norm" in name else 0.0).bfloat16()
        return state

    def samples(self) -> list[Sample]:
        generator = torch.Generator().manual_seed(0)

        def draw(count: int) -> tuple[int, ...]:
            return tuple(torch.randint(self.shape.vocab_size, (count,), generator=generator).tolist())

        return [
            Sample(
                group=i,
                sample=0,
                prompt_index=i,
                prompt_token_ids=draw(prompt),
                response_token_ids=draw(response),
                rollout_logprobs=(0.0,) * response,
                finish_reason="length",
                seed=0,
                version="",
            )
            for i, (prompt, response) in enumerate(self.lengths)
        ]

    @property
    def tokens(self) -> int:
        """Of all samples together."""
        return sum(map(sum, self.lengths))


def _shape(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, tied: bool
) -> ModelShape:
    return ModelShape(
        vocab_size=vocab,
        padded_vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=tied,
    )


UNEVEN = ((3, 70), (40, 1), (17, 33), (1, 5), (60, 128))
MODELS = {
    "two-layers": Model(shape=_shape(1003, 256, 512, 2, 4, 2, tied=False), lengths=UNEVEN),
    "0.5B": Model(shape=_shape(151936, 896, 4864, 24, 14, 2, tied=True), lengths=(*UNEVEN, (100, 412))),
    "1.5B": Model(shape=_shape(151936, 1536, 8960, 28, 12, 2, tied=True), lengths=(*UNEVEN, (100, 412))),
}
"""Of the last two the shapes are Qwen2.5's."""


def build(model: Model, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """transformers' model in that dtype, on the weights' device."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = model.shape
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.max_position_embeddings,
        rms_norm_eps=shape.rms_norm_eps,
        tie_word_embeddings=shape.tie_word_embeddings,
        rope_theta=shape.rope_theta,  # where transformers 4 looks, and 5
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
    )
    device = next(iter(state.values())).device
    with torch.device(device):
        hf = Qwen2ForCausalLM(config)
    hf.load_state_dict(state, strict=not shape.tie_word_embeddings)
    for parameter in hf.parameters():  # not hf.to: rotary frequencies stay in float32, as from_pretrained keeps them
        parameter.data = parameter.data.to(dtype)
    return hf


def token_logprobs(hf: Any, sample: Sample) -> Tensor:
    """[response] float32 log-probabilities at TEMPERATURE, of one sample alone."""
    device = next(hf.parameters()).device
    tokens = torch.tensor([sample.prompt_token_ids + sample.response_token_ids], device=device)
    logits = hf(tokens).logits[0, len(sample.prompt_token_ids) - 1 : -1].float() / TEMPERATURE
    return logits.log_softmax(-1).gather(1, tokens[0, len(sample.prompt_token_ids) :, None])[:, 0]


@torch.no_grad()
def all_logprobs(hf: Any, samples: Sequence[Sample]) -> Tensor:
    """[n] of all samples' responses, end to end."""
    return torch.cat([token_logprobs(hf, sample) for sample in samples])


def gradients(hf: Any, samples: Sequence[Sample], read: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Of -mean over the samples of sum log p, by HF name; each turned by `read` while its time has come."""
    for sample in samples:
        (-token_logprobs(hf, sample).sum() / len(samples)).backward()
    return {name: read(parameter.grad) for name, parameter in hf.named_parameters()}


def rms(tensor: Tensor) -> float:
    return tensor.float().square().mean().sqrt().item()
