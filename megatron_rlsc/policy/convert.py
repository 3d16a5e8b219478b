"""HF folder <-> Megatron distributed checkpoint, in one process that holds the model once."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_rlsc.config import ModelConfig, ParallelConfig
from megatron_rlsc.conversion.atomic import whole_folder
from megatron_rlsc.conversion.folders import hf_config_dir, is_megatron_checkpoint, latest_checkpoint
from megatron_rlsc.conversion.hf import copy_config_files, open_weights, write_hf
from megatron_rlsc.conversion.rules import EMBEDDING
from megatron_rlsc.conversion.shape import ModelShape, read_shape
from megatron_rlsc.policy.checkpoint import check_metadata, load_checkpoint, save_checkpoint
from megatron_rlsc.policy.model import LogprobGPTModel, build_model
from megatron_rlsc.policy.parallel import Parallel, init_parallel
from megatron_rlsc.policy.weights import iter_hf_weights, load_hf_weights, require_finite

DTYPES = (torch.float32, torch.bfloat16)


def hf_to_megatron(hf_dir: Path, megatron_dir: Path, *, dtype: torch.dtype | None = None, overwrite: bool) -> None:
    """Writes the weights as `megatron_dir/release`, with HF's config and tokenizer in `megatron_dir/hf`.

    Any TP x PP x DP loads it. `dtype` None keeps the one that the HF weights have. Nothing appears before it is whole.
    Raises ValueError where the source is no sound Qwen2 model of finite weights, or the target is in use.
    """
    weights = open_weights(hf_dir)
    dtype = dtype or weights.tensor(EMBEDDING.hf[0]).dtype
    with whole_folder(megatron_dir, overwrite=overwrite) as folder:
        chunks, shape, parallel = _build_whole_model(weights.shape, dtype)
        load_hf_weights(chunks, weights.tensor, shape=shape, spec="local", parallel=parallel)
        save_checkpoint(folder, None, chunks=chunks, parallel=parallel)
        copy_config_files(hf_dir, folder / "hf")


def megatron_to_hf(megatron_dir: Path, hf_dir: Path, *, reference_dir: Path | None = None, overwrite: bool) -> None:
    """Writes a checkpoint's newest weights as an HF folder, in their dtype; config and tokenizer come from
    `reference_dir`, by default those that the checkpoint carries. Raises ValueError where it is no sound checkpoint of
    finite weights, or the target is in use."""
    if not is_megatron_checkpoint(megatron_dir):
        raise ValueError(f"{megatron_dir} is no Megatron checkpoint: it names no newest step")
    path, reference_dir = latest_checkpoint(megatron_dir), reference_dir or hf_config_dir(megatron_dir)
    chunks, shape, parallel = _build_whole_model(read_shape(reference_dir), _saved_dtype(path))
    load_checkpoint(path, chunks=chunks)
    require_finite(chunks, path, shape=shape, spec="local", parallel=parallel)
    weights = iter_hf_weights(chunks, shape=shape, spec="local", parallel=parallel)
    write_hf(hf_dir, weights, reference_dir=reference_dir, overwrite=overwrite)


def _build_whole_model(shape: ModelShape, dtype: torch.dtype) -> tuple[list[LogprobGPTModel], ModelShape, Parallel]:
    if dtype not in DTYPES:
        raise ValueError(
            f"weights in {dtype} are not trained here: convert to {' or '.join(map(str, DTYPES))} (--dtype)"
        )
    settings, layout = ModelConfig(bf16=dtype == torch.bfloat16), ParallelConfig()
    parallel = init_parallel(layout, seed=0)
    shape = shape.padded_to(settings.make_vocab_size_divisible_by)
    chunks = build_model(shape, model=settings, spec="local", layout=layout, parallel=parallel, temperature=1.0)
    return chunks, shape, parallel


def _saved_dtype(path: Path) -> torch.dtype:
    check_metadata(path / ".metadata")
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    return saved[EMBEDDING.megatron].properties.dtype  # type: ignore[union-attr]
