"""Layouts of a model on so many GPUs: those that fit, with a step's time by `timing`, the quickest first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from megatron_rlsc.config import Config, ParallelConfig, RolloutConfig
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.memory import choose_planned_spec, plan_memory
from megatron_rlsc.planning import check_layout, plan_sidecar
from megatron_rlsc.timing import NODE, Gpu, TrainTime, Work, generate_time, push_time, train_time

SIZES, STAGES, RUNS, CONTEXTS = (1, 2, 4, 8), (1, 2, 4, 5, 7, 8, 10, 16, 20), (1, 2, 4), (1, 2)
"""TP, PP, VPP and CP that are tried."""
BUDGETS = (1, 2, 4)
"""Times --max-tokens-per-micro-batch."""
LANES = 256
"""Responses that a server is given at one time, at most: vLLM's own limit."""
RECOMPUTED: tuple[dict[str, Any], ...] = (
    {},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A layout that fits, and what it would take."""

    config: Config
    """With the layout, the sidecars and the micro-batches that are proposed."""
    trainer_gpus: int
    dp_size: int
    memory: int
    """Bytes of a trainer's GPU, in the worst stage."""
    train: TrainTime
    generate: float
    """Seconds."""
    push: float
    """Seconds."""

    @property
    def sidecar_gpus(self) -> int:
        return self.config.rollout.sidecar_replicas * self.config.rollout.sidecar_tensor_parallel_size

    @property
    def seconds(self) -> float:
        """Of a step; with --rollout-lead it trains and generates at one time."""
        both = (self.train.total, self.generate)
        return (max(both) if self.config.rollout.rollout_lead else sum(both)) + self.push


def propose(shape: ModelShape, config: Config, gpu: Gpu, *, gpus: int, work: Work) -> list[Proposal]:
    """All that fit, by a step's seconds; of one split of the GPUs and one TP x PP x CP the quickest alone.

    Args:
        config: what is no layout, and the smallest micro-batch.
        gpus: trainer's and sidecars' together; beyond a node whole nodes, which are one or the other.

    Raises ValueError where nothing fits.
    """
    if gpus < 2 or (gpus > NODE and gpus % NODE):
        raise ValueError(f"{gpus} GPUs are neither 2 to {NODE} of one node nor whole nodes of {NODE}")
    best: dict[tuple[int, ...], Proposal] = {}
    for trainer_gpus in range(1, gpus) if gpus <= NODE else range(NODE, gpus, NODE):
        sidecars = _sidecars(shape, config, gpu, gpus=gpus - trainer_gpus, work=work)
        if not sidecars:
            continue
        generate, settings = min(sidecars, key=lambda each: each[0])
        push = push_time(
            shape, gpu, trainer_gpus=trainer_gpus, sidecar_gpus=gpus - trainer_gpus, bf16=config.model.bf16
        )
        for layout, dp_size in _layouts(shape, trainer_gpus):
            found = _quickest(shape, replace(config, rollout=settings), gpu, work, layout, dp_size)
            if found is None:
                continue
            chosen, memory, train = found
            key = (
                trainer_gpus,
                layout.tensor_model_parallel_size,
                layout.pipeline_model_parallel_size,
                layout.context_parallel_size,
            )
            proposal = Proposal(
                config=chosen,
                trainer_gpus=trainer_gpus,
                dp_size=dp_size,
                memory=memory,
                train=train,
                generate=generate,
                push=push,
            )
            if key not in best or proposal.seconds < best[key].seconds:
                best[key] = proposal
    if not best:
        raise ValueError(
            f"{shape.num_parameters / 1e9:.1f} G parameters and a vLLM beside them fit no layout on {gpus} GPUs of "
            f"{gpu.memory / 2**30:.0f} GiB: take more"
        )
    return sorted(best.values(), key=lambda proposal: proposal.seconds)


def changed_settings(before: Config, after: Config) -> str:
    """The lines of a recipe in which two configs differ."""
    lines = []
    for section in dataclasses.fields(Config):
        old, new = (dataclasses.asdict(getattr(config, section.name)) for config in (before, after))
        changes = [f"{name} = {_toml(value)}" for name, value in new.items() if value != old[name]]
        lines += [f"[{section.name}]", *changes, ""] if changes else []
    return "\n".join(lines)


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, (str, Path)) else str(value).lower()


def _sidecars(
    shape: ModelShape, config: Config, gpu: Gpu, *, gpus: int, work: Work
) -> list[tuple[float, RolloutConfig]]:
    """(seconds of generation, settings) of the servers that so many GPUs make, for each TP that holds the model."""
    found = []
    for tp in SIZES:
        if gpus % tp or shape.num_attention_heads % tp:
            continue
        replicas, bf16 = gpus // tp, config.model.bf16
        settings = replace(
            config.rollout,
            sidecar_tensor_parallel_size=tp,
            sidecar_replicas=replicas,
            sidecar_max_num_seqs=min(LANES, -(-work.responses // replicas)),
        )
        longest = work.prompt + work.longest
        try:
            memory = plan_sidecar(shape, settings, bf16=bf16, longest=longest, gpu_bytes=gpu.memory)
        except ValueError:
            continue
        seconds = generate_time(shape, settings, gpu, work, replicas=replicas, bf16=bf16, kv_cache=memory.kv_cache)
        found.append((seconds, settings))
    return found


def _layouts(shape: ModelShape, world_size: int) -> Iterator[tuple[ParallelConfig, int]]:
    """(layout, data-parallel size) of all that fit the model and the world."""
    for tp, pp, vpp, cp, recomputed in product(SIZES, STAGES, RUNS, CONTEXTS, RECOMPUTED):
        if vpp > 1 and pp == 1:
            continue
        layout = ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            context_parallel_size=cp,
            sequence_parallel=tp > 1,
            **recomputed,
        )
        try:
            dp_size = check_layout(shape, layout, world_size=world_size)
        except ValueError:
            continue
        shared = dp_size * cp > 1
        yield replace(layout, use_distributed_optimizer=shared, overlap_grad_reduce=shared), dp_size


def _quickest(
    shape: ModelShape, config: Config, gpu: Gpu, work: Work, layout: ParallelConfig, dp_size: int
) -> tuple[Config, int, TrainTime] | None:
    """The size of the micro-batches that fits and takes least time, with its memory; None where none fits."""
    found: list[tuple[Config, int, TrainTime]] = []
    for times in BUDGETS:
        train = replace(config.train, max_tokens_per_micro_batch=times * config.train.max_tokens_per_micro_batch)
        chosen = replace(config, parallel=layout, train=train)
        stages = plan_memory(shape, chosen, dp_size=dp_size, spec=choose_planned_spec(chosen))
        memory = max(stage.total for stage in stages)
        if memory > gpu.memory:
            break
        found.append((chosen, memory, train_time(shape, chosen, gpu, work, dp_size=dp_size)))
    return min(found, key=lambda each: each[2].total, default=None)
