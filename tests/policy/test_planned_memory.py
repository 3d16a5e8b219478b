"""The memory that planning counts against a real policy's: parameters to the last, bytes within a tenth.

On CPUs, under the local layer spec. Not covered: what Transformer Engine keeps on a GPU, the update and the save (on a
CPU other code makes them), and the allowance, which is an assumption.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import Layout, rlsc
from live_bytes import counted, peak
from test_published_models import CONFIGS
from torch import Tensor
from world import World

from megatron_rlsc.batching import pack
from megatron_rlsc.config import Config, ModelConfig, ParallelConfig, TrainConfig
from megatron_rlsc.conversion.shape import ModelShape, read_shape
from megatron_rlsc.memory import StageMemory, count_parameters, plan_memory
from megatron_rlsc.policy.parallel import Parallel
from megatron_rlsc.types import Sample

TOLERANCE = 0.1
DOCUMENTS = 4
"""In each micro-batch, of one length, so that no token is padding."""
TERMS = ("activations", "backward", "logprobs")
"""Of what comes and goes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a layout and settings, in which some term is large."""

    name: str
    layout: Layout = field(default_factory=Layout)
    bf16: bool = False
    hidden: int = 128
    intermediate: int = 256
    layers: int = 2
    vocabulary: int = 512
    tied: bool = False
    tokens: int = 512
    chunk: int = 64
    parallel: dict[str, Any] = field(default_factory=dict)
    """Settings of the layout besides."""

    def __str__(self) -> str:
        return self.name

    @property
    def shape(self) -> ModelShape:
        """Eight heads on two KV heads."""
        return ModelShape(
            vocab_size=self.vocabulary,
            padded_vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=self.hidden // 8,
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            tie_word_embeddings=self.tied,
        )

    @property
    def config(self) -> Config:
        layout = "padded" if self.layout.padded else "packed"
        return Config(
            model=ModelConfig(bf16=self.bf16, logprob_chunk_tokens=self.chunk, sequence_layout=layout),  # type: ignore[arg-type]
            parallel=replace(self.layout.config(), **self.parallel),
            train=TrainConfig(max_tokens_per_micro_batch=self.tokens),
        )

    @property
    def micro_batches(self) -> int:
        """Of a replica: enough for a pipeline to be full, and a multiple of its stages."""
        return 1 if self.layout.pp == 1 else 2 * self.layout.pp

    def samples(self) -> list[Sample]:
        """All of a response but one token, as the plan takes them to be."""
        response = self.tokens // DOCUMENTS - 1
        return [
            Sample(
                group=0,
                sample=i,
                prompt_index=0,
                prompt_token_ids=(1,),
                response_token_ids=tuple((7 * j + i) % self.vocabulary for j in range(response)),
                rollout_logprobs=(-1.0,) * response,
                finish_reason="length",
                seed=0,
                version="0",
            )
            for i in range(DOCUMENTS * self.micro_batches * self.layout.dp)
        ]

    def planned(self) -> tuple[StageMemory, ...]:
        return plan_memory(
            self.shape, self.config, dp_size=self.layout.dp, spec="local", micro_batches=self.micro_batches
        )


CASES = (
    Case(name="single"),
    Case(name="bf16", bf16=True),
    Case(name="wide MLP", intermediate=1024),
    Case(name="large vocabulary", vocabulary=8192),
    Case(name="large vocabulary bf16", vocabulary=8192, bf16=True),
    Case(name="large vocabulary tied", vocabulary=8192, tied=True),
    Case(name="large chunks bf16", hidden=64, intermediate=128, vocabulary=4096, chunk=128, bf16=True),
    Case(name="few tokens", hidden=512, intermediate=1024, tokens=128, vocabulary=256, bf16=True),
    Case(name="padded", layout=Layout(padded=True)),
    Case(name="selective", layout=Layout(recompute="selective"), layers=4),
    Case(name="uniform, 2 layers", layout=Layout(recompute="uniform"), layers=4, parallel={"recompute_num_layers": 2}),
    Case(name="block bf16", layout=Layout(recompute="block"), layers=4, bf16=True),
    Case(name="tp2", layout=Layout(tp=2)),
    Case(name="tp2 sp bf16", layout=Layout(tp=2, sequence_parallel=True), bf16=True),
    Case(name="tp4 sp, shared KV heads", layout=Layout(tp=4, sequence_parallel=True)),
    Case(name="cp2", layout=Layout(cp=2)),
    Case(name="dp2 distributed optimizer", layout=Layout(dp=2, distributed_optimizer=True)),
    Case(name="dp2 distributed optimizer bf16", layout=Layout(dp=2, distributed_optimizer=True), bf16=True),
    Case(name="pp2 bf16 tied", layout=Layout(pp=2), layers=4, bf16=True, tied=True, vocabulary=4096),
    Case(name="pp4", layout=Layout(pp=4), layers=4),
    Case(name="pp2 vpp2 bf16", layout=Layout(pp=2, vpp=2), layers=4, bf16=True),
    Case(name="pp2 uniform", layout=Layout(pp=2, recompute="uniform"), layers=4),
    Case(
        name="tp2 pp2 sp bf16",
        layout=Layout(tp=2, pp=2, sequence_parallel=True, distributed_optimizer=True),
        layers=4,
        bf16=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A rank's second step, in bytes."""

    stage: int
    parameters: int
    state: int
    """Of weights, gradients and the optimizer's tensors."""
    peak: int
    """Of everything, while it went forwards and backwards."""


def measure(case: Case) -> Measured:
    from megatron_rlsc.policy.parallel import init_parallel
    from megatron_rlsc.policy.policy import Policy

    gc.collect()
    gc.disable()  # what is freed when must not depend on it
    try:
        with counted():
            before = peak(lambda: None)
            parallel = init_parallel(case.config.parallel, seed=1)
            policy = Policy(case.config, case.shape, parallel)
            samples = case.samples()
            batch = pack(
                samples,
                parallel.data_share,
                max_tokens=case.tokens,
                device=parallel.device,
                layout=case.config.model.sequence_layout,
            ).micro_batches
            assert len(batch) == case.micro_batches
            learn = partial(policy.forward_backward, batch, len(samples), rlsc(0.1))
            learn()
            policy.gradient_norm()
            policy.step()  # makes the moments
            most = peak(learn)
    finally:
        gc.enable()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state(policy)}
    return Measured(
        stage=parallel.pp_rank,
        parameters=sum(parameter.numel() for chunk in policy.chunks for parameter in chunk.parameters()),
        state=sum(storages.values()),
        peak=most - before,
    )


def state(policy: Any) -> Iterator[Tensor]:
    """Every tensor that a step leaves: several may share a storage."""
    for chunk in policy.ddp:
        yield from (parameter.data for parameter in chunk.parameters())
        yield from (buffer.grad_data for buffer in chunk.buffers)
    for optimizer in policy.optimizer.chained_optimizers:
        for parameter in (parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]):
            yield parameter.data
            yield from (item for item in optimizer.optimizer.state[parameter].values() if isinstance(item, Tensor))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_measured(case: Case, world: World) -> None:
    """What stays is counted exactly; what comes and goes, by itself, within a tenth."""
    plan = case.planned()
    for found in world.run(case.layout.ranks, measure, case):
        stage = plan[found.stage]
        assert stage.parameters == found.parameters
        assert stage.state == found.state
        comes_and_goes = stage.activations + max(stage.backward, stage.logprobs)
        assert comes_and_goes == pytest.approx(found.peak - found.state, rel=TOLERANCE)


@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_measured_somewhere(term: str) -> None:
    """In some case the sum without it would be off by more than is allowed."""

    def total(stage: StageMemory) -> int:
        return stage.activations + max(stage.backward, stage.logprobs)

    stages = [stage for case in CASES for stage in case.planned()]
    assert any(total(replace(stage, **{term: 0})) < (1 - TOLERANCE) * total(stage) for stage in stages)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model as published, on a layout of many GPUs."""

    size: str
    layout: ParallelConfig

    def __str__(self) -> str:
        layout = self.layout
        sizes = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size)
        return f"{self.size}-tp{sizes[0]}-pp{sizes[1]}-vpp{layout.virtual_pipeline_model_parallel_size}"


def layout(tp: int, pp: int, vpp: int = 1) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=tp > 1,
    )


PUBLISHED = (
    Published(size="0.5B", layout=layout(1, 1)),  # tied: one embedding, or one at either end
    Published(size="0.5B", layout=layout(2, 2)),
    Published(size="1.5B", layout=layout(4, 2, 7)),  # 2 KV heads
    Published(size="7B", layout=layout(4, 1)),
    Published(size="32B", layout=layout(8, 2)),
    Published(size="32B", layout=layout(4, 4, 2)),
    Published(size="72B", layout=layout(8, 4)),
    Published(size="72B", layout=layout(16, 2)),
)


def built_sizes(shape: ModelShape, layout: ParallelConfig) -> list[list[list[int]]]:
    """[stage][run]: the sizes of the first TP rank's parameters, of Megatron's model built without memory. One process
    plays each stage in turn, in groups that carry nothing."""
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_rlsc.policy.model import build_model
    from megatron_rlsc.policy.parallel import destroy_parallel, init_parallel

    alone = init_parallel(ParallelConfig(), seed=1)  # and megatron-core made to run on a CPU
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    vpp, meta = layout.virtual_pipeline_model_parallel_size, torch.device("meta")
    stages = []
    for stage in range(pp):
        destroy_parallel()
        dist.init_process_group("fake", rank=tp * stage, world_size=tp * pp, store=FakeStore())
        parallel_state.initialize_model_parallel(tp, pp, vpp if vpp > 1 else None, create_gloo_process_groups=False)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        place: Parallel = replace(
            alone, tp_size=tp, pp_rank=stage, pp_size=pp, vpp_size=vpp, sequence_parallel=tp > 1, device=meta
        )
        with meta:
            runs = build_model(shape, model=ModelConfig(), spec="local", layout=layout, parallel=place, temperature=1.0)
        stages.append([[parameter.numel() for parameter in run.parameters()] for run in runs])
    return stages


@pytest.mark.parametrize("model", PUBLISHED, ids=str)
def test_parameters_of_every_stage(model: Published, world: World, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[model.size]))
    shape = read_shape(tmp_path).padded_to(128 * model.layout.tensor_model_parallel_size)
    (stages,) = world.run(1, built_sizes, shape, model.layout)
    assert len(stages) == model.layout.pipeline_model_parallel_size
    for stage, runs in enumerate(stages):
        counted_runs = count_parameters(shape, model.layout, stage=stage)
        assert [sorted(run) for run in counted_runs] == [sorted(run) for run in runs]
