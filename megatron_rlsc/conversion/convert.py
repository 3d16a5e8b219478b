"""HF folder <-> Megatron distributed checkpoint in bounded memory: planned first, then a block at a time.

What is written appears when it is whole, with its checksums in manifest.json. Sources are only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rlsc.conversion.atomic import access_explained, unfinished, whole_folder
from megatron_rlsc.conversion.block_files import BlockFiles, Progress
from megatron_rlsc.conversion.folders import (
    hf_config_dir,
    is_megatron_checkpoint,
    latest_checkpoint,
    set_latest,
    step_dir,
)
from megatron_rlsc.conversion.hf import (
    CONFIG,
    INDEX,
    HFWeights,
    copy_config_files,
    open_weights,
    plan_shards,
    set_dtype,
    write_index,
)
from megatron_rlsc.conversion.manifest import check_sizes, sum_file, write_manifest
from megatron_rlsc.conversion.metadata_file import NAME as METADATA
from megatron_rlsc.conversion.plan import (
    FILE_BYTES,
    check_checkpoint,
    checkpoint_dtypes,
    hf_blocks,
    megatron_blocks,
    megatron_objects,
    megatron_tensors,
)
from megatron_rlsc.conversion.rules import EMBEDDING
from megatron_rlsc.conversion.shape import ModelShape, read_shape
from megatron_rlsc.conversion.torch_dist import (
    COMMON,
    METADATA_JSON,
    TorchDist,
    open_torch_dist,
    write_torch_dist,
)
from megatron_rlsc.disk import DiskError, free_bytes, full_disk_explained, readable

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REMEDY = "Make room, or name a folder on another disk, and start again"
OVERHEAD = 1.01
"""Of the disk: headers, `.metadata`, tokenizer."""
EMPTY_STATES = "__0_states.distcp"


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What is to be done. Nothing but headers has been read, and nothing written."""

    source: HFWeights | TorchDist
    source_dir: Path
    """Where the config and the tokenizer's files come from."""
    target: Path
    shape: ModelShape
    dtype: torch.dtype
    cast: int
    """Tensors of another dtype, which are cast."""
    nbytes: int
    """Of the tensors that are written."""
    max_shard_size: int
    overwrite: bool

    def describe(self) -> list[str]:
        """The plan in lines for people."""
        name = str(self.dtype).removeprefix("torch.")
        tied = "tied" if self.shape.tie_word_embeddings else "untied"
        lines = [
            f"{len(self.shape.hf_tensors())} tensors of {self.shape.num_hidden_layers} layers, {tied} embeddings, "
            f"{readable(self.nbytes)} in {name}",
            f"written to {self.target} ({readable(free_bytes(self.target))} free)",
        ]
        if self.cast:
            lines.append(f"{self.cast} tensors are of another dtype and cast to {name}")
        if left := unfinished(self.target):
            lines.append(f"{left} is what an interrupted run left: it is removed, and this one begins anew")
        if self.overwrite and self.target.exists():
            lines.append(f"{self.target} is replaced when the new one is whole; until then both take disk space")
        return lines


def plan_megatron(hf_dir: Path, megatron_dir: Path, *, dtype: torch.dtype | None, overwrite: bool) -> Conversion:
    """HF folder -> `megatron_dir/release`. `dtype` None keeps that of the embedding.

    Raises ValueError where the source is no sound Qwen2 model, or the target is in use or too small a disk.
    """
    with access_explained(hf_dir):
        weights = open_weights(hf_dir)
        check_sizes(hf_dir)
    dtype = dtype or weights.entries[EMBEDDING.hf[0]].dtype
    if overwrite and megatron_dir.is_dir() and any(megatron_dir.iterdir()) and not is_megatron_checkpoint(megatron_dir):
        raise ValueError(f"{megatron_dir} is not overwritten: it is something other than a Megatron checkpoint")
    return _plan(weights, hf_dir, megatron_dir, weights.shape, dtype, overwrite=overwrite, max_shard_size=FILE_BYTES)


def plan_hf(
    megatron_dir: Path, hf_dir: Path, *, reference_dir: Path | None, max_shard_size: int, overwrite: bool
) -> Conversion:
    """A checkpoint's newest step, converted or saved by training -> an HF folder in the dtype of its embedding.

    Config and tokenizer come from `reference_dir`, by default those that the checkpoint carries. Raises ValueError
    where it is no sound checkpoint of that model, or the target is in use or too small a disk.
    """
    if not is_megatron_checkpoint(megatron_dir):
        raise ValueError(f"{megatron_dir} is no Megatron checkpoint: it names no newest step")
    with access_explained(megatron_dir):
        path, reference_dir = latest_checkpoint(megatron_dir), reference_dir or hf_config_dir(megatron_dir)
        shape, checkpoint = read_shape(reference_dir), open_torch_dist(path)
        check_sizes(path)
    check_checkpoint(checkpoint, shape)
    dtype = checkpoint.tensors[EMBEDDING.megatron].dtype
    if overwrite and hf_dir.is_dir() and any(hf_dir.iterdir()) and not (hf_dir / CONFIG).exists():
        raise ValueError(f"{hf_dir} is not overwritten: it holds no {CONFIG}, so it is something other than a model")
    inputs = [megatron_dir, reference_dir]
    return _plan(
        checkpoint, reference_dir, hf_dir, shape, dtype, overwrite=overwrite, max_shard_size=max_shard_size, also=inputs
    )


def _plan(
    source: HFWeights | TorchDist,
    source_dir: Path,
    target: Path,
    shape: ModelShape,
    dtype: torch.dtype,
    *,
    overwrite: bool,
    max_shard_size: int,
    also: Sequence[Path] = (),
) -> Conversion:
    if dtype not in DTYPES:
        raise ValueError(f"weights in {dtype} are not converted: name another with --dtype (bf16, fp16 or fp32)")
    for folder in (source_dir, *also):
        if target.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise ValueError(f"{target} holds the source {folder}, which is never touched: name another target")
    if isinstance(source, HFWeights):
        dtypes = [entry.dtype for entry in source.entries.values()]
    else:
        dtypes = list(checkpoint_dtypes(source).values())
    nbytes = sum(torch.Size(size).numel() for size in shape.hf_tensors().values()) * dtype.itemsize
    if nbytes * OVERHEAD > free_bytes(target):
        raise DiskError(
            f"{target} has {readable(free_bytes(target))} free, the weights take {readable(nbytes)}. {REMEDY}"
        )
    return Conversion(
        source=source,
        source_dir=source_dir,
        target=target,
        shape=shape,
        dtype=dtype,
        cast=sum(found != dtype for found in dtypes),
        nbytes=nbytes,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )


def convert(plan: Conversion, *, workers: int = 2, progress: Progress = lambda count: None) -> None:
    """Does what was planned. Raises ValueError where a tensor holds NaN or infinity, a source file changes meanwhile,
    or the disk refuses; the target is then as it was."""
    write = _write_megatron if isinstance(plan.source, HFWeights) else _write_hf
    with access_explained(plan.target), full_disk_explained(plan.target.parent, REMEDY):
        with whole_folder(plan.target, overwrite=plan.overwrite) as folder:
            write(plan, folder, workers, progress)


def _write_megatron(plan: Conversion, folder: Path, workers: int, progress: Progress) -> None:
    assert isinstance(plan.source, HFWeights)
    release = step_dir(folder, None)
    release.mkdir()
    files = BlockFiles(plan.dtype, progress)
    files.write_archives(release, megatron_blocks(plan.source, plan.dtype), plan.max_shard_size, workers=workers)
    files.refuse_bad(str(plan.source_dir), len(plan.shape.hf_tensors()))
    objects = files.write_empty_states(release / EMPTY_STATES, megatron_objects(plan.shape))
    tensors = {key: (plan.dtype, size) for key, size in megatron_tensors(plan.shape).items()}
    write_torch_dist(release, tensors, sorted(files.chunks, key=lambda chunk: (chunk.path, chunk.start)), objects)
    write_manifest(release, [*files.sums, *(sum_file(release / name) for name in (METADATA, COMMON, METADATA_JSON))])
    copy_config_files(plan.source_dir, folder / "hf")
    set_latest(folder, None)


def _write_hf(plan: Conversion, folder: Path, workers: int, progress: Progress) -> None:
    assert isinstance(plan.source, TorchDist)
    shards = plan_shards(plan.shape.hf_tensors(), plan.dtype, plan.max_shard_size)
    blocks = dict(hf_blocks(plan.source, plan.shape, plan.dtype))
    files = BlockFiles(plan.dtype, progress)
    files.write_safetensors(folder, shards, blocks, workers=workers)
    files.refuse_bad(str(plan.source.path), len(plan.shape.hf_tensors()))
    write_index(folder, shards, plan.nbytes)
    copy_config_files(plan.source_dir, folder)
    set_dtype(folder / CONFIG, plan.dtype)
    write_manifest(folder, [*files.sums, *([sum_file(folder / INDEX)] if len(shards) > 1 else [])])
