"""Every setting: frozen dataclasses of the standard library alone, checked when they are made; recipe.py reads them.

Names are Megatron's and vLLM's where they have one. The docstring under a field is its `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rlsc.config.check import require
from megatron_rlsc.config.guard import GuardConfig
from megatron_rlsc.config.learning import ObjectiveConfig, OptimizerConfig
from megatron_rlsc.config.model import ModelConfig, ParallelConfig
from megatron_rlsc.config.rollout import DataConfig, RolloutConfig
from megatron_rlsc.config.train import KEPT_BY_RESUME, TrainConfig

__all__ = [
    "KEPT_BY_RESUME",
    "Config",
    "DataConfig",
    "GuardConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RolloutConfig",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Train Qwen2.5 on its own confidence: RLSC on megatron-core, with vLLM for the responses."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What is trained."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Where it lies; data parallelism is what is left of the world."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it is asked."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How it answers."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What it learns."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How fast."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What a collapse is, and what is done about it."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, and where it is written."""

    def __post_init__(self) -> None:
        cp = self.parallel.context_parallel_size
        require(
            self.model.sequence_layout == "packed" or cp == 1,
            f"sequence_layout padded does not go with context parallelism (context_parallel_size {cp}): give up either",
        )
        require(
            self.model.share_prompts != "on" or cp == 1,
            f"share_prompts on does not go with context parallelism, which cuts every document by itself "
            f"(context_parallel_size {cp}): give up either",
        )
        require(
            not self.optimizer.use_precision_aware_optimizer
            or (self.model.bf16 and self.parallel.use_distributed_optimizer),
            "use_precision_aware_optimizer needs bf16 and use_distributed_optimizer: its shards are what changes dtype",
        )
        alone = self.objective.objective in ("rlsc", "rlsc-length", "rlsc-power", "self-sft")
        require(
            alone or self.rollout.samples_per_prompt > 1,
            f"{self.objective.objective} weighs a response against its siblings, and samples_per_prompt is 1",
        )
