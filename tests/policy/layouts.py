"""A policy on one layout, put through its paces on every rank: what test_layouts.py holds against reference.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import reference
import torch
from torch import Tensor

from megatron_rlsc.batching import pack
from megatron_rlsc.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.objective import on_policy_losses, weight_shift
from megatron_rlsc.policy.parallel import init_parallel
from megatron_rlsc.policy.policy import Objective, Policy
from megatron_rlsc.policy.weights import iter_hf_weights
from megatron_rlsc.types import MicroBatch, ResponseScores, Sample

MAX_TOKENS = 50
"""Of a micro-batch: the longest sample fits, two of them do not."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    tp: int = 1
    pp: int = 1
    dp: int = 1
    distributed_optimizer: bool = False

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"tp{self.tp}-pp{self.pp}-dp{self.dp}" + ("-distopt" if self.distributed_optimizer else "")


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """After one backward pass over a batch."""

    scores: ResponseScores
    norm: float
    by_name: dict[str, Tensor]
    """Whole, by HF name; empty under a distributed optimizer, where no rank has more than its slice."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank saw. Batches go by their name."""

    micro_batches: dict[str, int]
    scores: dict[str, ResponseScores]
    """Of each batch, forward only."""
    l2: dict[str, Gradient]
    """Of each batch, p_old being the value of the same pass."""
    batch_max: Gradient
    """Of L1 on `seven`, the shift from a pass before it."""
    weights: dict[str, Tensor]
    """After an update on `seven` and one on `three`; on rank 0."""
    replica: dict[str, Tensor]
    """This rank's own parameters then, by Megatron name."""
    place: tuple[int, int, int]
    """tp, pp and dp rank."""


def build_policy(
    layout: Layout, shape: ModelShape, state: dict[str, Tensor] | None, *, temperature: float = 0.5
) -> Policy:
    """With `state`'s weights, and rows beyond the vocabulary that would win every softmax."""
    config = Config(
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            use_distributed_optimizer=layout.distributed_optimizer,
        ),
        model=ModelConfig(logprob_chunk_tokens=7),
        rollout=RolloutConfig(temperature=temperature),
        optimizer=OptimizerConfig(
            lr=reference.LR,
            adam_beta1=reference.BETAS[0],
            adam_beta2=reference.BETAS[1],
            adam_eps=reference.EPS,
            weight_decay=reference.WEIGHT_DECAY,
            clip_grad=reference.CLIP,
        ),
    )
    policy = Policy(config, shape, init_parallel(config.parallel, seed=layout.ranks))
    if state is not None:
        policy.load_hf_weights(state.__getitem__)
        fill_padding_rows(policy, 50.0)
    return policy


@torch.no_grad()
def fill_padding_rows(policy: Policy, value: float) -> None:
    for name, parameter in policy.model.named_parameters():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            present = policy.shape.vocab_size - policy.parallel.tp_rank * len(parameter)
            parameter[max(present, 0) :] = value


def pack_for(policy: Policy, samples: list[Sample]) -> list[MicroBatch]:
    parallel = policy.parallel
    return pack(
        samples, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size, max_tokens=MAX_TOKENS, device=parallel.device
    )


@dataclass(frozen=True)
class MainGradients:
    """Stands where a model stands in iter_hf_weights, whose table and collectives then gather the gradient."""

    model: torch.nn.Module

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.main_grad


def backward(policy: Policy, samples: list[Sample], loss: Objective, *, gather: bool) -> Gradient:
    scores = policy.forward_backward(pack_for(policy, samples), len(samples), loss)
    shards = MainGradients(policy.model)
    whole = iter_hf_weights(shards, shape=policy.shape, spec=policy.spec, parallel=policy.parallel)
    by_name = {name: tensor.clone() for name, tensor in whole} if gather else {}
    return Gradient(scores=scores, norm=policy.gradient_norm(), by_name=by_name)


def update(policy: Policy, samples: list[Sample]) -> None:
    """One step of RLSC with alpha 0.1."""
    policy.forward_backward(pack_for(policy, samples), len(samples), partial(on_policy_losses, alpha=0.1))
    policy.gradient_norm()
    policy.step()


def hf_weights(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.iter_hf_weights()}


def play(layout: Layout, shape: ModelShape, state: dict[str, Tensor], batches: dict[str, list[Sample]]) -> Outcome:
    """Every rank's part; the weights change at the very end alone."""
    policy = build_policy(layout, shape, state)
    gather = not layout.distributed_optimizer
    scores = {name: policy.score(pack_for(policy, samples), len(samples)) for name, samples in batches.items()}
    l2 = {
        name: backward(policy, samples, partial(on_policy_losses, alpha=0.1), gather=gather)
        for name, samples in batches.items()
    }
    shift = weight_shift(scores["seven"].logprobs, 0.0, "batch-max")
    batch_max = backward(policy, batches["seven"], partial(on_policy_losses, alpha=0.0, shift=shift), gather=gather)
    update(policy, batches["seven"])
    update(policy, batches["three"])
    return Outcome(
        micro_batches={name: len(pack_for(policy, samples)) for name, samples in batches.items()},
        scores=scores,
        l2=l2,
        batch_max=batch_max,
        weights=hf_weights(policy),
        replica={name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()},
        place=(policy.parallel.tp_rank, policy.parallel.pp_rank, policy.parallel.dp_rank),
    )
