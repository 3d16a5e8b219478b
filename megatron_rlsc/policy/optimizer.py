"""Megatron's AdamW over a wrapped model, and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rlsc.config import OptimizerConfig, ParallelConfig
from megatron_rlsc.policy.model import LogprobGPTModel

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.uint8}
"""By Megatron-LM's words for them."""


def wrap_model(
    chunks: Sequence[LogprobGPTModel], layout: ParallelConfig, *, main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
) -> list[DistributedDataParallel]:
    """Megatron's DDP: gradients accumulate in buffers of that dtype, and are summed over replicas by a step's end."""
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=main_grads_dtype == "fp32",
        use_distributed_optimizer=layout.use_distributed_optimizer,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
    )
    wrapped = [
        # Later chunks of an interleaved stage need no buckets to overlap with (megatron/training/training.py).
        DistributedDataParallel(config=config, ddp_config=ddp, module=chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    no_sync = [chunk.no_sync for chunk in wrapped]
    config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], config: OptimizerConfig, *, updates: int, use_distributed_optimizer: bool
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW with decoupled weight decay on matrices, clipping by the global norm, and the schedule of its rate."""
    model = chunks[0].module
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=use_distributed_optimizer,
            use_precision_aware_optimizer=config.use_precision_aware_optimizer,
            main_grads_dtype=DTYPES[config.main_grads_dtype],
            main_params_dtype=DTYPES[config.main_params_dtype],
            exp_avg_dtype=DTYPES[config.exp_avg_dtype],
            exp_avg_sq_dtype=DTYPES[config.exp_avg_sq_dtype],
            # Megatron's default keeps 16 bits of each float32 weight beside the bfloat16 one. Its resharded checkpoints
            # save those bits for the weight, and cannot load them (distrib_optimizer.py).
            store_param_remainders=False,
        ),
        chunks,
    )
    # Weight decay reaches the parameter groups (and spares biases and norms) through the schedule alone.
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=max(updates, config.lr_warmup_iters + 1),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resumed run may have another rate, or go on for longer: its own flags count, not those of the checkpoint.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, schedule


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The norm of the reduced gradient over the whole model, before clipping. Call once, after the backward pass."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def scale_rate(optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler, factor: float) -> None:
    """Multiplies the rate of this and all later updates, peak and end of its schedule alike. A checkpoint that is
    loaded later leaves it so (checkpoint.OWN_SETTINGS)."""
    for group in optimizer.param_groups:
        group |= {name: factor * group[name] for name in ("lr", "max_lr", "min_lr")}
    schedule.max_lr, schedule.min_lr = factor * schedule.max_lr, factor * schedule.min_lr


def forget_updates(optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler) -> None:
    """As if no update had been made: no moments, and the first rate of the schedule."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.optimizer.state.clear()  # which the next update makes anew
        for group in part.optimizer.param_groups:
            group.pop("step", None)  # where Transformer Engine's FusedAdam counts
    schedule.num_steps = 0
    schedule.step(increment=0)
