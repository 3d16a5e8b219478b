"""Does a layout fit a model: the checks that need neither a GPU nor a model in memory."""

from __future__ import annotations

from megatron_rlsc.config import ParallelConfig
from megatron_rlsc.conversion.shape import ModelShape


def check_layout(shape: ModelShape, layout: ParallelConfig, *, world_size: int) -> int:
    """The data-parallel size of a layout, or ValueError with every number where it fits not the model or the world."""
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    misfits = []
    if not _tp_fits(shape, tp):
        fitting = [str(n) for n in range(1, heads + 1) if _tp_fits(shape, n)]
        misfits.append(
            f"--tensor-model-parallel-size {tp} does not fit {heads} attention heads, {kv_heads} KV heads and an MLP "
            f"of {shape.intermediate_size}: {', '.join(fitting)} do"
        )
    if shape.num_hidden_layers % pp:
        layers = shape.num_hidden_layers
        fitting = [str(n) for n in range(1, layers + 1) if layers % n == 0]
        misfits.append(f"--pipeline-model-parallel-size {pp} does not divide {layers} layers: {', '.join(fitting)} do")
    if world_size % (tp * pp):
        misfits.append(
            f"TP {tp} x PP {pp} = {tp * pp} ranks do not divide the world of {world_size}: start a multiple of "
            f"{tp * pp} processes (torchrun --nproc-per-node), or change the layout"
        )
    if misfits:
        raise ValueError("this layout does not fit: " + "; ".join(misfits))
    return world_size // (tp * pp)


def _tp_fits(shape: ModelShape, tp: int) -> bool:
    """TP shares out whole query heads and MLP rows; KV heads are shared out, or each is held by several ranks."""
    kv_heads = shape.num_key_value_heads
    return (
        shape.num_attention_heads % tp == 0
        and shape.intermediate_size % tp == 0
        and (kv_heads % tp == 0 or tp % kv_heads == 0)
    )
