"""Does a layout fit a model: the checks that need neither a GPU nor a model in memory."""

from __future__ import annotations

from megatron_rlsc.config import ParallelConfig
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.types import DataShare


def check_layout(shape: ModelShape, layout: ParallelConfig, *, world_size: int) -> int:
    """The data-parallel size of a layout, or ValueError with every number where it fits not the model or the world."""
    tp, pp, cp = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
    )
    vpp = layout.virtual_pipeline_model_parallel_size
    heads, kv_heads, layers = shape.num_attention_heads, shape.num_key_value_heads, shape.num_hidden_layers
    misfits = []
    if not _tp_fits(shape, tp):
        fitting = [str(n) for n in range(1, heads + 1) if _tp_fits(shape, n)]
        misfits.append(
            f"--tensor-model-parallel-size {tp} does not fit {heads} attention heads, {kv_heads} KV heads and an MLP "
            f"of {shape.intermediate_size}: {', '.join(fitting)} do"
        )
    if layers % (pp * vpp):
        fitting = [str(n) for n in range(1, layers + 1) if layers % n == 0]
        what = f"--pipeline-model-parallel-size {pp}"
        what += f" x --virtual-pipeline-model-parallel-size {vpp} = {pp * vpp}" if vpp > 1 else ""
        misfits.append(f"{what} does not divide {layers} layers: {', '.join(fitting)} do")
    elif layout.recompute_num_layers is not None and layout.recompute_num_layers > layers // (pp * vpp):
        misfits.append(
            f"--recompute-num-layers {layout.recompute_num_layers} is more than the {layers // (pp * vpp)} layers of a "
            f"stage ({layers} layers over {pp * vpp})"
        )
    if world_size % (tp * pp * cp):
        what = f"TP {tp} x PP {pp}" + (f" x CP {cp}" if cp > 1 else "")
        misfits.append(
            f"{what} = {tp * pp * cp} ranks do not divide the world of {world_size}: start a multiple of "
            f"{tp * pp * cp} processes (torchrun --nproc-per-node), or change the layout"
        )
    if misfits:
        raise ValueError("this layout does not fit: " + "; ".join(misfits))
    return world_size // (tp * pp * cp)


def fitting_layouts(shape: ModelShape, *, most: int = 16) -> list[str]:
    """The sizes up to `most` that fit a model, in words: `TP 1, 2, 4`; each PP with the VPPs that go with it."""
    layers = shape.num_hidden_layers
    sizes = range(1, most + 1)
    stages = [pp for pp in sizes if layers % pp == 0]
    vpps = {pp: [vpp for vpp in range(2, layers // pp + 1) if pp > 1 and layers % (pp * vpp) == 0] for pp in stages}
    return [
        "TP " + ", ".join(str(tp) for tp in sizes if _tp_fits(shape, tp)),
        "PP " + ", ".join(f"{pp}" + (f" (VPP {', '.join(map(str, v))})" if (v := vpps[pp]) else "") for pp in stages),
        "any DP",
    ]


def check_token_budget(longest: int, layout: ParallelConfig, *, max_tokens: int) -> None:
    """Raises ValueError where a sample of `longest` tokens, prompt and response, would not fit a micro-batch."""
    sp_size = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    share = DataShare(cp_size=layout.context_parallel_size, sp_size=sp_size)
    if share.padded(longest) > share.capacity(max_tokens):
        needed = -(-share.padded(longest) // share.pack_multiple) * share.pack_multiple
        raise ValueError(
            f"the longest prompt and a response of --max-response-length are {longest} tokens together, more than the "
            f"{max_tokens} of --max-tokens-per-micro-batch; {needed} are enough (this layout pads packs to a multiple "
            f"of {share.pack_multiple})"
        )


def _tp_fits(shape: ModelShape, tp: int) -> bool:
    """TP shares out whole query heads and MLP rows; KV heads are shared out, or each is held by several ranks."""
    kv_heads = shape.num_key_value_heads
    return (
        shape.num_attention_heads % tp == 0
        and shape.intermediate_size % tp == 0
        and (kv_heads % tp == 0 or tp % kv_heads == 0)
    )
