"""Log-probabilities of an HF folder by transformers' own layers, one of them in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from megatron_rlsc.conversion.blocks import cut
from megatron_rlsc.conversion.hf import HFWeights
from megatron_rlsc.conversion.rules import EMBEDDING, FINAL_NORM, OUTPUT


@dataclass(frozen=True, kw_only=True, slots=True)
class HfForward:
    """A model in an HF folder, its weights cast to `dtype` and computed in float32."""

    weights: HFWeights
    config: Any
    dtype: torch.dtype

    def embed(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """[tokens, hidden] of each text."""
        return [torch.cat([self._rows(EMBEDDING.hf[0], int(i), int(i) + 1) for i in text]) for text in texts]

    @torch.no_grad()
    def layer(self, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        """The residual stream of each text behind a layer, from 0."""
        with torch.device("meta"):
            module = Qwen2DecoderLayer(self.config, index)
        prefix = f"model.layers.{index}."
        names = [name for name in self.weights.entries if name.startswith(prefix)]
        module.load_state_dict({name.removeprefix(prefix): self._tensor(name) for name in names}, assign=True)
        rotary = Qwen2RotaryEmbedding(self.config)
        found = []
        for text in hidden:
            positions = torch.arange(len(text))[None]
            out = module(
                text[None],
                attention_mask=None,  # of one text, unpadded: attention is causal
                position_ids=positions,
                position_embeddings=rotary(text[None], positions),
            )
            found.append((out[0] if isinstance(out, tuple) else out)[0])
        return found

    @torch.no_grad()
    def logprobs(self, hidden: Sequence[Tensor], texts: Sequence[Tensor]) -> list[Tensor]:
        """[tokens - 1] of each text: of every token but the first, after those before it."""
        shape = self.weights.shape
        with torch.device("meta"):
            norm = Qwen2RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        norm.load_state_dict({"weight": self._tensor(FINAL_NORM.hf[0])}, assign=True)
        stream = norm(torch.cat([text[:-1] for text in hidden]))
        targets = torch.cat([text[1:] for text in texts])
        name = (EMBEDDING if shape.tie_word_embeddings else OUTPUT).hf[0]
        total, chosen = torch.full((len(targets),), -math.inf), torch.zeros(len(targets))
        for start, stop in cut(shape.vocab_size, shape.hidden_size * 4):
            logits = stream @ self._rows(name, start, stop).T
            total = torch.logaddexp(total, logits.logsumexp(-1))
            here = (targets >= start) & (targets < stop)
            chosen[here] = logits[here].gather(1, targets[here, None] - start)[:, 0]
        return list((chosen - total).split([len(text) - 1 for text in texts]))

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.weights.rows(name, start, stop).to(self.dtype).float()

    def _tensor(self, name: str) -> Tensor:
        """Filled by blocks of rows, so that no second copy of it is in memory."""
        shape = self.weights.entries[name].shape
        whole = torch.empty(shape)
        for start, stop in cut(shape[0], math.prod(shape[1:]) * 4):
            whole[start:stop] = self._rows(name, start, stop)
        return whole


def open_forward(hf_dir: Path, weights: HFWeights, dtype: torch.dtype) -> HfForward:
    """Reads config.json as transformers does."""
    config = AutoConfig.from_pretrained(hf_dir, local_files_only=True)
    config._attn_implementation = "sdpa"
    return HfForward(weights=weights, config=config, dtype=dtype)
