"""Settings of what is learned from the responses, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_rlsc.config.check import require


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    objective: Literal[
        "rlsc",
        "rlsc-length",
        "rlsc-group",
        "rlsc-power",
        "negative-entropy",
        "ttrl",
        "self-sft",
        "random",
        "verified",
    ] = "rlsc"
    """What a response weighs in the loss: see docs/objectives.md. `verified` alone reads labels, the `answer` of each
    line of data_path."""
    alpha: float = 0.1
    """The constant of L2; 0 gives L1. Of the rlsc methods alone."""
    power: float = 0.5
    """Of rlsc-power: the exponent of p_old."""
    weight_scale: Literal["none", "batch-max"] = "none"
    """`none`: the paper's weights. `batch-max`: all divided by the largest of the global batch, so that L1 keeps its
    direction where exp(log p) of a long response underflows; costs one more forward pass."""

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"alpha must not be negative, it is {self.alpha}")
        require(self.power > 0, f"power must be positive, it is {self.power}")
        require(
            self.weight_scale == "none" or self.objective in ("rlsc", "rlsc-power"),
            f"weight_scale {self.weight_scale} is for weights that underflow, and those of {self.objective} do not: "
            f"give up either",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    min_lr: float = 0.0
    """Learning rate at the end of a decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Of the rate over train_iters."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Of matrices; biases and norms have none."""
    adam_beta1: float = 0.9
    """First moment's decay."""
    adam_beta2: float = 0.999
    """Second moment's decay."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    use_precision_aware_optimizer: bool = False
    """Hold the optimizer's tensors in the dtypes below, to save memory: Transformer Engine's FusedAdam does. Needs bf16
    and use_distributed_optimizer."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the gradients that add up over micro-batches and replicas."""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """Of the master weights."""
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Of the first moment."""
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Of the second moment."""

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "weight_decay", "clip_grad", "adam_eps", "lr_warmup_iters"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, it is {getattr(self, name)}")
        require(self.min_lr <= self.lr, f"min_lr {self.min_lr} is more than lr {self.lr}")
        for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            require(
                self.use_precision_aware_optimizer or getattr(self, name) == "fp32",
                f"{name}={getattr(self, name)} needs use_precision_aware_optimizer; without it all of them are fp32",
            )
