"""What a rank does with a model under either layer spec: run by faked_te.call, Transformer Engine being there.

Answers are plain types: a process without Transformer Engine reads them, and cannot import this file.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import faked_te
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.optimizer import clip_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_l2_norm
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention
from transformer_engine.pytorch.optimizers import fused_adam

from megatron_rlsc.batching import build_micro_batch
from megatron_rlsc.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rlsc.conversion.convert import convert as convert_weights
from megatron_rlsc.conversion.convert import plan_megatron
from megatron_rlsc.conversion.rules import Spec
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.policy import cpu
from megatron_rlsc.policy.attention import PackedAttention, packed_params
from megatron_rlsc.policy.checkpoint import load_checkpoint
from megatron_rlsc.policy.model import LogprobGPTModel, build_model
from megatron_rlsc.policy.optimizer import build_optimizer, wrap_model
from megatron_rlsc.policy.parallel import Parallel, init_parallel
from megatron_rlsc.policy.save import save_checkpoint
from megatron_rlsc.policy.weights import iter_hf_weights, load_hf_weights
from megatron_rlsc.types import DataShare, Sample

State = dict[str, Tensor]

# Kernels of Transformer Engine's; these are what megatron-core takes without it.
clip_grads.multi_tensor_applier, clip_grads.l2_norm_impl = local_multi_tensor_applier, local_multi_tensor_l2_norm


@dataclass(frozen=True, kw_only=True)
class Model:
    """A rank's stage and shards, in bfloat16."""

    chunks: list[LogprobGPTModel]
    shape: ModelShape
    spec: Spec
    layout: ParallelConfig
    parallel: Parallel

    def fill(self, state: State, attribute: str = "data") -> None:
        """By HF name: the weights, or what each parameter has under that attribute, in the weight's shape."""
        target = [Attributes(chunk, attribute) for chunk in self.chunks]
        load_hf_weights(target, state.__getitem__, shape=self.shape, spec=self.spec, parallel=self.parallel)

    def hf(self, attribute: str = "data") -> State:
        """The same, on rank 0."""
        source = [Attributes(chunk, attribute) for chunk in self.chunks]
        whole = iter_hf_weights(source, shape=self.shape, spec=self.spec, parallel=self.parallel)
        return {name: tensor.clone() for name, tensor in whole}


@dataclass(frozen=True)
class Attributes:
    """Stands where a model stands for load_hf_weights and iter_hf_weights."""

    module: torch.nn.Module
    name: str

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, getattr(parameter, self.name)


def build(spec: Spec, shape: ModelShape, layout: ParallelConfig) -> Model:
    parallel = init_parallel(layout, seed=1)
    settings = ModelConfig(bf16=True)
    shape = shape.padded_to(settings.make_vocab_size_divisible_by * parallel.tp_size)
    with faked_te.pretended_gpu() if spec == "transformer_engine" else contextlib.nullcontext():
        chunks = build_model(
            shape,
            model=settings,
            spec=spec,
            attention="local" if spec == "local" else "fused",
            layout=layout,
            parallel=parallel,
            temperature=1.0,
        )
    return Model(chunks=chunks, shape=shape, spec=spec, layout=layout, parallel=parallel)


def kernels(spec: Spec, shape: ModelShape) -> tuple[list[str | None], bool]:
    """The variables that tell Transformer Engine which attention it may take; whether its rotary kernel is taken."""
    config = build(spec, shape, ParallelConfig()).chunks[0].config
    return [os.environ.get(f"NVTE_{kind}_ATTN") for kind in ("FLASH", "FUSED", "UNFUSED")], config.apply_rope_fusion


def attend_with_shared_prompts(shape: ModelShape) -> tuple[Tensor, Tensor]:
    """Three siblings and a stranger, [t, heads * head_dim]: by a Transformer Engine model's attention over what their
    documentation says the kernels do, and by PackedAttention."""
    sizes = [((5, 6, 7), 4), ((1, 2), 3), ((5, 6, 7), 1), ((5, 6, 7), 6)]
    samples = [
        Sample(
            group=0,
            sample=0,
            prompt_index=0,
            prompt_token_ids=prompt,
            response_token_ids=(9,) * response,
            rollout_logprobs=(0.0,) * response,
            finish_reason="length",
            seed=0,
            version="",
        )
        for prompt, response in sizes
    ]
    batch = build_micro_batch(samples, range(4), share=DataShare(), device=torch.device("cpu"), share_prompts=True)
    model = build("transformer_engine", shape, ParallelConfig())
    core = model.chunks[0].decoder.layers[0].self_attention.core_attention
    local = PackedAttention(model.chunks[0].config, 1, AttnMaskType.causal, "self", pg_collection=core_groups())
    query = torch.randn(len(batch.tokens), shape.num_attention_heads, shape.head_dim)
    key, value = (torch.randn(len(batch.tokens), shape.num_key_value_heads, shape.head_dim) for _ in range(2))
    params = packed_params(batch)
    with mock.patch.object(DotProductAttention, "forward", documented_attention):
        theirs = core(query, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=params)
    return theirs, local(query, key, value, None, packed_seq_params=params)


def core_groups() -> Any:
    return ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])


def documented_attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    qkv_format: str,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_mask_type: str,
) -> Tensor:
    """DotProductAttention.forward of dot_product_attention.py, as its docstring has it for these arguments."""
    assert (qkv_format, attn_mask_type) == ("thd", "padding_causal_bottom_right")
    assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
    assert (max_seqlen_q, max_seqlen_kv) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_kv.diff().max()))
    assert max_seqlen_q <= max_seqlen_kv
    each = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
    found = []
    for document in range(len(cu_seqlens_q) - 1):
        queries, keys = (slice(*bounds[document : document + 2].tolist()) for bounds in (cu_seqlens_q, cu_seqlens_kv))
        scores = torch.einsum("qhd,khd->hqk", query[queries], key[keys]) / query.shape[2] ** 0.5
        # the last query sees every key
        behind = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
        weights = scores.masked_fill(behind, -torch.inf).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, value[keys]).flatten(1))
    return torch.cat(found)


def versions() -> tuple[str, list[str], list[str]]:
    """Transformer Engine's, and what its FusedAdam and ours keep in a parameter group."""
    import transformer_engine

    fused_adam.torch = cpu._CpuTorch("torch")  # it makes a buffer on CUDA
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs, ours = (sorted(kind([weight]).param_groups[0]) for kind in (fused_adam.FusedAdam, cpu.FusedAdam))
    return transformer_engine.__version__, theirs, ours


def parameters(
    spec: Spec, shape: ModelShape, layout: ParallelConfig
) -> tuple[tuple[int, int], dict[str, tuple[tuple[int, ...], int | None]], set[torch.dtype]]:
    """This rank's place, (tp, pp); of each parameter, behind its chunk's number, its shape and the dimension that TP
    ranks share out; all dtypes."""
    model = build(spec, shape, layout)
    named = {f"{i}.{name}": tensor for i, chunk in enumerate(model.chunks) for name, tensor in chunk.named_parameters()}
    shapes = {
        name: (
            tuple(parameter.shape),
            parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None,
        )
        for name, parameter in named.items()
    }
    return (model.parallel.tp_rank, model.parallel.pp_rank), shapes, {parameter.dtype for parameter in named.values()}


def there_and_back(shape: ModelShape, layout: ParallelConfig, state: State) -> State:
    """HF weights through a Transformer Engine model."""
    model = build("transformer_engine", shape, layout)
    model.fill(state)
    return model.hf()


def entries(spec: Spec, shape: ModelShape, layout: ParallelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What this rank would have in a checkpoint: global shapes of tensors, and of objects, by key."""
    tensors, objects = {}, {}
    chunks = build(spec, shape, layout).chunks
    for item in (item for chunk in chunks for item in chunk.sharded_state_dict(metadata={}).values()):
        for part in item.build() if isinstance(item, ShardedTensorFactory) else [item]:
            (objects if isinstance(part, ShardedObject) else tensors)[part.key] = tuple(part.global_shape)
    return tensors, objects


def save(spec: Spec, shape: ModelShape, layout: ParallelConfig, state: State, folder: Path) -> None:
    model = build(spec, shape, layout)
    model.fill(state)
    save_checkpoint(folder, None, chunks=model.chunks, parallel=model.parallel)


def convert(hf_dir: Path, folder: Path) -> None:
    convert_weights(plan_megatron(hf_dir, folder, dtype=torch.bfloat16, overwrite=False))


def load(spec: Spec, shape: ModelShape, layout: ParallelConfig, path: Path) -> State:
    """By our loader."""
    model = build(spec, shape, layout)
    load_checkpoint(path, chunks=model.chunks)
    return model.hf()


def load_as_megatron_does(spec: Spec, shape: ModelShape, layout: ParallelConfig, path: Path) -> State:
    """By megatron-core alone, nothing said of strictness."""
    model = build(spec, shape, layout)
    names = ["model"] if len(model.chunks) == 1 else [f"model{i}" for i in range(len(model.chunks))]
    sharded = {name: chunk.sharded_state_dict(metadata={}) for name, chunk in zip(names, model.chunks, strict=True)}
    loaded = dist_checkpointing.load(sharded, str(path))
    for name, chunk in zip(names, model.chunks, strict=True):
        chunk.load_state_dict(loaded[name])
    return model.hf()


def train(
    spec: Spec, shape: ModelShape, layout: ParallelConfig, folder: Path, state: State | None, gradient: State
) -> tuple[State, State, State]:
    """One update with a gradient given by HF name, from `state` or from the newest checkpoint; then a checkpoint.

    Returns the model's weights, its float32 ones, and what the update was made from.
    """
    model = build(spec, shape, layout)
    if state is not None:
        model.fill(state)
    sharded = layout.use_distributed_optimizer
    ddp = wrap_model(model.chunks, layout)
    settings = OptimizerConfig(lr=1e-2, adam_eps=1e-5, clip_grad=0.0)
    optimizer, schedule = build_optimizer(ddp, settings, updates=4, use_distributed_optimizer=sharded)
    checkpoint = {"chunks": model.chunks, "optimizer": optimizer, "schedule": schedule}
    step = 0
    if state is None:
        progress = load_checkpoint(folder / "iter_0000001", **checkpoint)
        step = progress.step if progress else 0
    before = model.hf()
    model.fill(gradient, "main_grad")
    optimizer.step()
    schedule.step(increment=1)
    save_checkpoint(folder, step + 1, parallel=model.parallel, **checkpoint)
    return model.hf(), {} if sharded else model.hf("main_param"), before


def precision_aware(
    shape: ModelShape, layout: ParallelConfig, folder: Path, state: State | None
) -> list[tuple[Tensor, Tensor, torch.dtype]]:
    """Transformer Engine's own FusedAdam behind Megatron's distributed optimizer, its state set and saved, or loaded.

    Returns this rank's shard of every master weight and first moment, and the dtype that the moment is held in.
    """
    optimizers = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    model = build("transformer_engine", shape, layout)
    if state is not None:
        model.fill(state)
    ddp = wrap_model(model.chunks, layout, main_grads_dtype="bf16")
    asked = OptimizerConfig(use_precision_aware_optimizer=True, main_grads_dtype="bf16", exp_avg_dtype="bf16")
    fused_adam.torch = cpu._CpuTorch("torch")  # it makes a buffer on CUDA
    ours = optimizers.Adam
    optimizers.Adam = distributed.Adam = fused_adam.FusedAdam
    try:
        optimizer, schedule = build_optimizer(ddp, asked, updates=4, use_distributed_optimizer=True)
        inner = optimizer.chained_optimizers[0].optimizer
        checkpoint = {"chunks": model.chunks, "optimizer": optimizer, "schedule": schedule}
        if state is not None:
            set_state(inner)
            save_checkpoint(folder, 1, parallel=model.parallel, **checkpoint)
        else:
            load_checkpoint(folder / "iter_0000001", **checkpoint)
    finally:
        optimizers.Adam = distributed.Adam = ours
    return [
        (
            inner.get_unscaled_state(shard, "master_param").clone(),
            inner.get_unscaled_state(shard, "exp_avg").clone(),
            inner.state[shard]["exp_avg"].dtype,
        )
        for group in inner.param_groups
        for shard in group["params"]
    ]


def set_state(inner: torch.optim.Optimizer) -> None:
    """As if after a step: master weights that bfloat16 does not hold, and moments that it does."""
    for group in inner.param_groups:
        group["step"] = 1
        for shard in group["params"]:
            inner.initialize_state(shard, store_param_remainders=False)
            inner.set_scaled_state(shard, "master_param", shard.detach().float() * 1.001)
            inner.set_scaled_state(shard, "exp_avg", (shard.detach().float() * 0.1).bfloat16().float())


def plain(shape: ModelShape, layout: ParallelConfig, folder: Path) -> list[tuple[Tensor, Tensor, torch.dtype]]:
    """The same checkpoint under an optimizer in float32."""
    model = build("transformer_engine", shape, layout)
    ddp = wrap_model(model.chunks, layout)
    optimizer, schedule = build_optimizer(ddp, OptimizerConfig(), updates=4, use_distributed_optimizer=True)
    load_checkpoint(folder / "iter_0000001", chunks=model.chunks, optimizer=optimizer, schedule=schedule)
    inner = optimizer.chained_optimizers[0].optimizer
    return [
        (shard.detach().clone(), inner.state[shard]["exp_avg"].clone(), inner.state[shard]["exp_avg"].dtype)
        for group in inner.param_groups
        for shard in group["params"]
    ]
