"""Policies of one rank, as the loop builds them, and what the tests read from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hf import TEMPERATURE, Model
from torch import Tensor

from megatron_rlsc.batching import build_micro_batch
from megatron_rlsc.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig
from megatron_rlsc.conversion.rules import Spec
from megatron_rlsc.policy.parallel import Parallel
from megatron_rlsc.policy.policy import Policy
from megatron_rlsc.policy.weights import iter_hf_weights, load_hf_weights
from megatron_rlsc.types import MicroBatch, Sample

OPTIMIZER = OptimizerConfig(lr=1e-3, adam_beta2=0.95, weight_decay=0.1, clip_grad=0.0)


def build_policy(
    model: Model,
    spec: Spec,
    parallel: Parallel,
    *,
    layout: Literal["packed", "padded"] = "packed",
    optimizer: OptimizerConfig = OPTIMIZER,
    distributed: bool = False,
) -> Policy:
    """In bfloat16, with the model's random weights."""
    config = Config(
        model=ModelConfig(bf16=True, transformer_impl=spec, sequence_layout=layout),
        parallel=ParallelConfig(use_distributed_optimizer=distributed),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        optimizer=optimizer,
    )
    policy = Policy(config, model.shape, parallel)
    policy.load_hf_weights(model.state(parallel.device).__getitem__)
    return policy


def one_batch(samples: list[Sample], parallel: Parallel, *, share_prompts: bool = False) -> MicroBatch:
    """All of them in one pack, in their order."""
    share, device = parallel.data_share, parallel.device
    return build_micro_batch(samples, range(len(samples)), share=share, device=device, share_prompts=share_prompts)


@torch.no_grad()
def all_logprobs(policy: Policy, batch: MicroBatch) -> Tensor:
    """[n] float32, of the responses end to end."""
    logprobs, _ = policy.chunks[0](batch)
    return logprobs


@dataclass(frozen=True)
class Attributes:
    """What each parameter has under a name, in a model's place for load_hf_weights and iter_hf_weights."""

    module: torch.nn.Module
    name: str

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, getattr(parameter, self.name)


def read_all(policy: Policy, attribute: str) -> dict[str, Tensor]:
    """main_grad, main_param or data of every parameter, by HF name, copied."""
    source: Any = [Attributes(policy.chunks[0], attribute)]
    whole = iter_hf_weights(source, shape=policy.shape, spec=policy.spec, parallel=policy.parallel)
    return {name: tensor.clone() for name, tensor in whole}


def set_gradient(policy: Policy, gradient: dict[str, Tensor]) -> None:
    """By HF name, as if a backward pass had left it."""
    target: Any = [Attributes(policy.chunks[0], "main_grad")]
    load_hf_weights(target, gradient.__getitem__, shape=policy.shape, spec=policy.spec, parallel=policy.parallel)
