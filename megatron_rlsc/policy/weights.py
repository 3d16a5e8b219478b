"""The policy's weights as HF tensors, in and out, by the one table of conversion/rules.py."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlsc.conversion.layout import gather, shard
from megatron_rlsc.conversion.rules import EMBEDDING, OUTPUT, Rule, Spec, rules_for
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.policy.parallel import Parallel
from megatron_rlsc.ranges import span

LAYERS = "decoder.layers."
SHOWN = 5
"""Of many bad tensors, those that an error names."""


def load_hf_weights(
    chunks: Sequence[torch.nn.Module],
    read: Callable[[str], Tensor],
    *,
    shape: ModelShape,
    spec: Spec,
    parallel: Parallel,
    source: str = "the HF model",
) -> None:
    """Fills this rank's stage and shards. `read` returns a whole HF tensor of `source` by name.

    A collective: where any rank has read NaN or infinity, all raise ValueError with the names.
    """
    params = [dict(chunk.named_parameters()) for chunk in chunks]
    rules = rules_for(num_layers=shape.num_hidden_layers, tied=shape.tie_word_embeddings, spec=spec)
    if shape.tie_word_embeddings and parallel.pp_size > 1:
        # The last stage of a tied model holds a copy of the embedding, far from the first stage's own.
        rules.append(replace(EMBEDDING, megatron=OUTPUT.megatron))
    bad: set[str] = set()
    for rule in rules:
        stage, chunk, name = _locate(rule.megatron, shape, parallel)
        if stage == parallel.pp_rank:
            tensors = [read(hf_name) for hf_name in rule.hf]
            bad |= {hf_name for hf_name, tensor in zip(rule.hf, tensors) if not _is_finite(tensor)}
            part = shard(rule.layout, tensors, shape, tp_rank=parallel.tp_rank, tp_size=parallel.tp_size)
            with torch.no_grad():
                params[chunk].pop(name).copy_(part)
    assert not any(params), f"the table has no row for {[name for chunk in params for name in chunk]}"
    _agree_on_finite(bad, list(shape.hf_tensors()), source, parallel)


def require_finite(
    chunks: Sequence[torch.nn.Module], source: Path, *, shape: ModelShape, spec: Spec, parallel: Parallel
) -> None:
    """Where any rank's parameters, as loaded from the checkpoint `source`, hold NaN or infinity, all raise ValueError
    with their names. A collective."""
    params = [dict(chunk.named_parameters()) for chunk in chunks]
    rules = rules_for(num_layers=shape.num_hidden_layers, tied=shape.tie_word_embeddings, spec=spec)
    bad: set[str] = set()
    for rule in rules:
        stage, chunk, name = _locate(rule.megatron, shape, parallel)
        if stage == parallel.pp_rank and not _is_finite(params[chunk][name].detach()):
            bad.add(rule.megatron)
    _agree_on_finite(bad, [rule.megatron for rule in rules], str(source), parallel)


def _agree_on_finite(bad: Collection[str], names: Sequence[str], source: str, parallel: Parallel) -> None:
    """Raises ValueError on every rank alike where any of them found a bad tensor."""
    flags = torch.tensor([name in bad for name in names], dtype=torch.int64, device=parallel.device)
    found = [name for name, count in zip(names, parallel.sum(flags).tolist()) if count]
    if found:
        shown = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
        raise ValueError(
            f"{len(found)} of the {len(names)} tensors of {source} hold NaN or infinity, and no training would mend "
            f"them: {shown}. Copy or download the model again, or take an earlier checkpoint"
        )


def _is_finite(tensor: Tensor) -> bool:
    """By its extremes, which are NaN where a number is: one pass, and no second tensor of this size."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


@torch.no_grad()
def iter_hf_weights(
    chunks: Sequence[torch.nn.Module], *, shape: ModelShape, spec: Spec, parallel: Parallel
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, whole tensor) on rank 0, in HF's order; other ranks yield nothing but must exhaust it too.

    One row of the table at a time: its TP shards meet on the first rank of their stage, which sends the HF tensors to
    rank 0. A tensor may share memory with the model: use it before the next update.
    """
    params = [dict(chunk.named_parameters()) for chunk in chunks]
    for rule in rules_for(num_layers=shape.num_hidden_layers, tied=shape.tie_word_embeddings, spec=spec):
        tensors = _gather_tensors(rule, params, shape, parallel)
        if parallel.rank == 0:
            yield from zip(rule.hf, tensors, strict=True)


@span("gather-weights")
def _gather_tensors(
    rule: Rule, params: Sequence[Mapping[str, Tensor]], shape: ModelShape, parallel: Parallel
) -> Sequence[Tensor]:
    """A row's HF tensors, on rank 0."""
    stage, chunk, name = _locate(rule.megatron, shape, parallel)
    source = parallel.stage_source(stage)
    tensors: Sequence[Tensor] = ()
    if parallel.holds_first_copy and parallel.pp_rank == stage:
        shards = _gather_shards(params[chunk][name], source, parallel)
        if shards:
            tensors = gather(rule.layout, shards, shape)
    if source != 0 and parallel.rank == source:
        for tensor in tensors:
            dist.send(tensor.contiguous(), dst=0)
    if source != 0 and parallel.rank == 0:
        tensors = _receive(rule, shape, source, like=next(iter(params[0].values())))
    return tensors


def _locate(megatron_name: str, shape: ModelShape, parallel: Parallel) -> tuple[int, int, str]:
    """(stage, chunk, name there) of a parameter's global name.

    Layers are cut into PP x VPP runs, dealt over the stages in turn, and counted from 0 in each.
    """
    if megatron_name.startswith(LAYERS):
        layer, _, rest = megatron_name.removeprefix(LAYERS).partition(".")
        per_run = shape.num_hidden_layers // (parallel.pp_size * parallel.vpp_size)
        run, local = divmod(int(layer), per_run)
        chunk, stage = divmod(run, parallel.pp_size)
        return stage, chunk, f"{LAYERS}{local}.{rest}"
    if megatron_name == EMBEDDING.megatron:
        return 0, 0, megatron_name
    return parallel.pp_size - 1, parallel.vpp_size - 1, megatron_name


def _gather_shards(param: Tensor, destination: int, parallel: Parallel) -> list[Tensor]:
    """Every TP rank's part on `destination`; an empty list on the others."""
    param = param.detach()
    if parallel.tp_size == 1:
        return [param]
    shards = [torch.empty_like(param) for _ in range(parallel.tp_size)] if parallel.rank == destination else None
    dist.gather(param.contiguous(), shards, dst=destination, group=parallel.tp_group)
    return shards or []


def _receive(rule: Rule, shape: ModelShape, source: int, *, like: Tensor) -> list[Tensor]:
    tensors = [like.new_empty(size) for size in shape.hf_shapes(rule)]
    for tensor in tensors:
        dist.recv(tensor, src=source)
    return tensors
