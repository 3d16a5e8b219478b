"""Megatron's AdamW over a wrapped model, and its learning-rate schedule."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rlsc.config import OptimizerConfig
from megatron_rlsc.policy.model import LogprobGPTModel


def wrap_model(model: LogprobGPTModel, *, use_distributed_optimizer: bool) -> DistributedDataParallel:
    """Megatron's DDP: gradients accumulate in float32 buffers and are summed over replicas at a step's end."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=use_distributed_optimizer,
    )
    wrapped = DistributedDataParallel(config=model.config, ddp_config=ddp, module=model)
    model.config.no_sync_func = wrapped.no_sync
    model.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(
    model: DistributedDataParallel, config: OptimizerConfig, *, train_iters: int, use_distributed_optimizer: bool
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW with decoupled weight decay on matrices, clipping by the global norm, and the schedule of its rate."""
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
            bf16=model.module.config.bf16,
            params_dtype=model.module.config.params_dtype,
            use_distributed_optimizer=use_distributed_optimizer,
        ),
        [model],
    )
    # Weight decay reaches the parameter groups (and spares biases and norms) through the schedule alone.
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=max(train_iters, config.lr_warmup_iters + 1),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, schedule


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The norm of the reduced gradient over the whole model, before clipping. Call once, after the backward pass."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())
