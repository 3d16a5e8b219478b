"""A policy on one layout, put through its paces on every rank: what test_layouts.py holds against reference.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import reference
import torch
from torch import Tensor

from megatron_rlsc.config import (
    Config,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.objective import log_weights, weight_shift
from megatron_rlsc.policy.parallel import init_parallel
from megatron_rlsc.policy.policy import Policy, Weigh
from megatron_rlsc.policy.weights import iter_hf_weights
from megatron_rlsc.types import Load, MicroBatch, ResponseScores, Sample

MAX_TOKENS = 50
"""Of a micro-batch: the longest sample fits, two of them do not."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    """Of gradients, and under a distributed optimizer of parameters."""
    padded: bool = False
    """Documents of a micro-batch padded to one length."""
    recompute: Literal["selective", "uniform", "block"] | None = None
    """`uniform` and `block` are methods of full."""

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def config(self) -> ParallelConfig:
        full = self.recompute in ("uniform", "block")
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            context_parallel_size=self.cp,
            sequence_parallel=self.sequence_parallel,
            use_distributed_optimizer=self.distributed_optimizer,
            overlap_grad_reduce=self.overlap,
            overlap_param_gather=self.overlap and self.distributed_optimizer,
            recompute_granularity="full" if full else self.recompute,  # type: ignore[arg-type]
            recompute_method=self.recompute if full else None,  # type: ignore[arg-type]
            recompute_num_layers=1 if full else None,
        )

    def __str__(self) -> str:
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp, "dp": self.dp}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["single"]
        flags = {
            "sp": self.sequence_parallel,
            "distopt": self.distributed_optimizer,
            "overlap": self.overlap,
            "padded": self.padded,
        }
        words += [name for name, flag in flags.items() if flag]
        return "-".join(words + ([self.recompute] if self.recompute else []))


class Place(NamedTuple):
    """A rank's, in the grid."""

    tp: int
    pp: int
    cp: int
    dp: int


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
    loads: dict[str, Load]
    scores: dict[str, ResponseScores]
    """Of each batch, forward only."""
    l2: dict[str, Gradient]
    """Of each batch, p_old being the value of the same pass."""
    batch_max: Gradient
    """Of L1 on `seven`, the shift from a pass before it."""
    weights: dict[str, Tensor]
    """After an update on `seven` and one on `three`; on rank 0."""
    replica: dict[str, Tensor]
    """This rank's own parameters then, by Megatron name, behind its chunk's number."""
    later_weights: dict[str, Tensor]
    """After two more updates, both on `seven`; on rank 0."""
    place: Place


def build_policy(
    layout: Layout,
    shape: ModelShape,
    state: dict[str, Tensor] | None,
    *,
    temperature: float = 0.5,
    bf16: bool = False,
    lr: float = reference.LR,
) -> Policy:
    """With `state`'s weights, and rows beyond the vocabulary that would win every softmax."""
    config = Config(
        parallel=layout.config(),
        model=ModelConfig(logprob_chunk_tokens=7, bf16=bf16, sequence_layout="padded" if layout.padded else "packed"),
        rollout=RolloutConfig(temperature=temperature),
        train=TrainConfig(max_tokens_per_micro_batch=MAX_TOKENS),
        optimizer=OptimizerConfig(
            lr=lr,
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
    for name, parameter in (named for chunk in policy.chunks for named in chunk.named_parameters()):
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            present = policy.shape.vocab_size - policy.parallel.tp_rank * len(parameter)
            parameter[max(present, 0) :] = value


def pack_for(policy: Policy, samples: list[Sample]) -> list[MicroBatch]:
    return policy.pack(samples).micro_batches


@dataclass(frozen=True)
class MainGradients:
    """Stands where a model stands in iter_hf_weights, whose table and collectives then gather the gradient."""

    model: torch.nn.Module

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.main_grad


def rlsc(alpha: float, shift: float = 0.0) -> Weigh:
    """RLSC's weights of a policy that is still p_old."""

    def weigh(logprobs: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        return (log_weights(logprobs, alpha) - shift).exp()

    return weigh


def looked_up(table: Tensor) -> Weigh:
    """Weights that are known before the pass."""

    def weigh(logprobs: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        return table[rows]

    return weigh


def backward(policy: Policy, samples: list[Sample], weigh: Weigh, *, gather: bool) -> Gradient:
    scores = policy.forward_backward(pack_for(policy, samples), len(samples), weigh)
    shards = [MainGradients(chunk) for chunk in policy.chunks]
    whole = iter_hf_weights(shards, shape=policy.shape, spec=policy.spec, parallel=policy.parallel)
    by_name = {name: tensor.clone() for name, tensor in whole} if gather else {}
    return Gradient(scores=scores, norm=policy.gradient_norm(), by_name=by_name)


def update(policy: Policy, samples: list[Sample]) -> None:
    """One step of RLSC with alpha 0.1."""
    policy.forward_backward(pack_for(policy, samples), len(samples), rlsc(0.1))
    policy.gradient_norm()
    policy.step()


def two_updates_on_one_rollout(policy: Policy, samples: list[Sample]) -> None:
    """p_old is what it was before the first."""
    batch = pack_for(policy, samples)
    weights = log_weights(policy.score(batch, len(samples)).logprobs, 0.1).exp()
    for _ in range(2):
        policy.forward_backward(batch, len(samples), looked_up(weights))
        policy.gradient_norm()
        policy.step()


def hf_weights(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.iter_hf_weights()}


def play(layout: Layout, shape: ModelShape, state: dict[str, Tensor], batches: dict[str, list[Sample]]) -> Outcome:
    """Every rank's part; the weights change at the very end alone."""
    policy = build_policy(layout, shape, state)
    gather = not layout.distributed_optimizer
    scores = {name: policy.score(pack_for(policy, samples), len(samples)) for name, samples in batches.items()}
    l2 = {name: backward(policy, samples, rlsc(0.1), gather=gather) for name, samples in batches.items()}
    shift = weight_shift(scores["seven"].logprobs, ObjectiveConfig(alpha=0, weight_scale="batch-max"))
    batch_max = backward(policy, batches["seven"], rlsc(0.0, shift), gather=gather)
    update(policy, batches["seven"])
    update(policy, batches["three"])
    weights = hf_weights(policy)
    replica = {
        f"{i}.{name}": parameter.detach().clone()
        for i, chunk in enumerate(policy.chunks)
        for name, parameter in chunk.named_parameters()
    }
    two_updates_on_one_rollout(policy, batches["seven"])
    parallel = policy.parallel
    return Outcome(
        micro_batches={name: len(pack_for(policy, samples)) for name, samples in batches.items()},
        loads={name: policy.pack(samples).load for name, samples in batches.items()},
        scores=scores,
        l2=l2,
        batch_max=batch_max,
        weights=weights,
        replica=replica,
        later_weights=hf_weights(policy),
        place=Place(parallel.tp_rank, parallel.pp_rank, parallel.cp_rank, parallel.dp_rank),
    )
