"""HF folder <-> Megatron distributed checkpoint in bounded memory: planned first, then a block at a time.

What is written appears when it is whole, with its checksums in manifest.json. Sources are only read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlsc.conversion import tensor_file
from megatron_rlsc.conversion.atomic import access_explained, unfinished, whole_folder
from megatron_rlsc.conversion.blocks import Block, BlockReader, NotFinite, as_bytes
from megatron_rlsc.conversion.folders import (
    hf_config_dir,
    is_megatron_checkpoint,
    latest_checkpoint,
    set_latest,
    step_dir,
)
from megatron_rlsc.conversion.hashed_file import HashedFile, ahead, hashed_file, run_all
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
from megatron_rlsc.conversion.manifest import FileSum, check_sizes, sum_file, write_manifest
from megatron_rlsc.conversion.metadata_file import NAME as METADATA
from megatron_rlsc.conversion.plan import (
    FILE_BYTES,
    MegatronBlock,
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
    Chunk,
    TorchDist,
    open_torch_dist,
    write_torch_dist,
)
from megatron_rlsc.disk import DiskError, free_bytes, full_disk_explained, readable

SHOWN = 5
"""Of many bad tensors, those that an error names."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REMEDY = "Make room, or name a folder on another disk, and start again"
OVERHEAD = 1.01
"""Of the disk: headers, `.metadata`, tokenizer."""

Progress = Callable[[int], None]
"""Hears of the bytes as they are written."""


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
    sums: list[FileSum] = []
    chunks: list[Chunk] = []
    jobs = _Jobs(plan.dtype, progress)
    files = list(_fill_files(megatron_blocks(plan.source, plan.dtype), plan.dtype, plan.max_shard_size))
    calls = [
        partial(_write_archives, jobs, release / f"__0_{i}.distcp", blocks, chunks, sums)
        for i, blocks in enumerate(files)
    ]
    # The checksum within each archive would be a second one, computed while no other thread may run.
    with _without_archive_checksums():
        run_all(calls, workers=workers)
    jobs.refuse_bad(str(plan.source_dir), len(plan.shape.hf_tensors()))
    path = release / f"__0_{len(files)}.distcp"
    with hashed_file(path, sums) as file:
        objects = {key: _write_empty_state(file, key) for key in megatron_objects(plan.shape)}
    tensors = {key: (plan.dtype, size) for key, size in megatron_tensors(plan.shape).items()}
    write_torch_dist(release, tensors, sorted(chunks, key=lambda chunk: (chunk.path, chunk.start)), objects)
    sums += [sum_file(release / name) for name in (METADATA, COMMON, METADATA_JSON)]
    write_manifest(release, sums)
    copy_config_files(plan.source_dir, folder / "hf")
    set_latest(folder, None)


def _write_hf(plan: Conversion, folder: Path, workers: int, progress: Progress) -> None:
    assert isinstance(plan.source, TorchDist)
    shards = plan_shards(plan.shape.hf_tensors(), plan.dtype, plan.max_shard_size)
    blocks = dict(hf_blocks(plan.source, plan.shape, plan.dtype))
    sums: list[FileSum] = []
    jobs = _Jobs(plan.dtype, progress)
    calls = [
        partial(
            _write_safetensors,
            jobs,
            folder / name,
            tensor_file.build_header(tensors, plan.dtype),
            [blocks[tensor] for tensor in tensors],
            sums,
        )
        for name, tensors in shards.items()
    ]
    run_all(calls, workers=workers)
    jobs.refuse_bad(str(plan.source.path), len(plan.shape.hf_tensors()))
    write_index(folder, shards, plan.nbytes)
    copy_config_files(plan.source_dir, folder)
    set_dtype(folder / CONFIG, plan.dtype)
    write_manifest(folder, [*sums, *([sum_file(folder / INDEX)] if len(shards) > 1 else [])])


class _Jobs:
    """What threads share: the names of tensors that are not finite, and the progress."""

    def __init__(self, dtype: torch.dtype, progress: Progress) -> None:
        self.dtype = dtype
        self.progress = progress
        self.bad: set[str] = set()

    def read(self, blocks: Iterable[Block], check: Callable[[], None]) -> Iterator[Tensor]:
        """Each block as a tensor, the next one read ahead. After a bad one nothing more is worth writing, but all bad
        ones are found."""
        readers = [BlockReader(self.dtype) for _ in range(2)]
        for tensor in ahead(partial(self._read, readers[i % 2], block) for i, block in enumerate(blocks)):
            check()
            if tensor is not None and not self.bad:
                yield tensor
                self.progress(tensor.nbytes)

    def _read(self, reader: BlockReader, block: Block) -> Tensor | None:
        try:
            return reader.read(block)
        except NotFinite as error:
            self.bad |= error.names
            return None

    def refuse_bad(self, source: str, count: int) -> None:
        if self.bad:
            names = sorted(self.bad)
            shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            raise ValueError(
                f"{len(names)} of the {count} tensors of {source} hold NaN or infinity, in {self.dtype}, and no "
                f"training would mend them: {shown}. Copy or download the model again, or take an earlier checkpoint"
            )


def _fill_files(blocks: Iterable[MegatronBlock], dtype: torch.dtype, file_bytes: int) -> Iterator[list[MegatronBlock]]:
    """Blocks in order, in files of near `file_bytes`."""
    file: list[MegatronBlock] = []
    room = file_bytes
    for one in blocks:
        nbytes = one.block.nbytes(dtype)
        if file and nbytes > room:
            yield file
            file, room = [], file_bytes
        file.append(one)
        room -= nbytes
    if file:
        yield file


def _write_archives(
    jobs: _Jobs,
    path: Path,
    blocks: Sequence[MegatronBlock],
    chunks: list[Chunk],
    sums: list[FileSum],
    check: Callable[[], None],
) -> None:
    with hashed_file(path, sums) as file:
        for one, tensor in zip(blocks, jobs.read((one.block for one in blocks), check)):
            start = file.tell()
            # A tensor of its own storage: torch.save writes the whole one, here all of the reader's memory.
            own = torch.from_numpy(as_bytes(tensor)).view(jobs.dtype).view(one.sizes)
            torch.save(own, file)  # type: ignore[arg-type]
            chunks.append(
                Chunk(
                    key=one.key,
                    offsets=one.offsets,
                    sizes=one.sizes,
                    path=path,
                    start=start,
                    length=file.tell() - start,
                )
            )


def _write_empty_state(file: HashedFile, key: str) -> Chunk:
    """As megatron-core saves an `_extra_state` that holds nothing."""
    start, state = file.tell(), io.BytesIO()
    torch.save([None], state)
    file.write(state.getbuffer())
    return Chunk(key=key, offsets=(), sizes=(), path=file.path, start=start, length=file.tell() - start)


def _write_safetensors(
    jobs: _Jobs,
    path: Path,
    header: bytes,
    tensors: Sequence[Iterable[Block]],
    sums: list[FileSum],
    check: Callable[[], None],
) -> None:
    with hashed_file(path, sums) as file:
        file.write(header)
        for tensor in jobs.read((block for blocks in tensors for block in blocks), check):
            file.write(as_bytes(tensor).data)


class _without_archive_checksums:
    def __enter__(self) -> None:
        self._before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)

    def __exit__(self, *_: object) -> None:
        torch.serialization.set_crc32_options(self._before)
