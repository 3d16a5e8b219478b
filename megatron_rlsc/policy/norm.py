"""RMSNorm for the local layer spec, in the model's dtype: megatron's own keeps float32, and refuses SP."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Stands where megatron.core.transformer.torch_norm.WrappedTorchNorm stands in the local spec."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Each TP rank norms its own tokens: finalize_model_grads.py sums the gradient of what is marked so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
