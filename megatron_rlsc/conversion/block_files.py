"""Files of blocks, written side by side: the archives of a checkpoint, and safetensors."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlsc.conversion.blocks import Block, BlockReader, NotFinite, as_bytes
from megatron_rlsc.conversion.hashed_file import HashedFile, ahead, hashed_file, run_all
from megatron_rlsc.conversion.manifest import FileSum
from megatron_rlsc.conversion.plan import MegatronBlock
from megatron_rlsc.conversion.tensor_file import build_header
from megatron_rlsc.conversion.torch_dist import Chunk

SHOWN = 5
"""Of many bad tensors, those that an error names."""

Progress = Callable[[int], None]
"""Hears of the bytes as they are written."""
Check = Callable[[], None]
"""Raises where another thread has failed."""


class BlockFiles:
    """What becomes known while the files are written: their checksums, what lies where, and what was not finite."""

    def __init__(self, dtype: torch.dtype, progress: Progress) -> None:
        self.dtype = dtype
        self.sums: list[FileSum] = []
        self.chunks: list[Chunk] = []
        """Of the archives, in no order."""
        self._progress = progress
        self._bad: set[str] = set()

    def write_archives(self, folder: Path, blocks: Iterable[MegatronBlock], file_bytes: int, *, workers: int) -> None:
        """Blocks as torch.save writes tensors, in files of near `file_bytes`."""
        files = enumerate(_fill_files(blocks, self.dtype, file_bytes))
        jobs = [partial(self._write_archives, folder / f"__0_{i}.distcp", file) for i, file in files]
        # The checksum within each archive would be a second one, computed while no other thread may run.
        with _without_archive_checksums():
            run_all(jobs, workers=workers)

    def write_safetensors(
        self,
        folder: Path,
        shards: Mapping[str, Mapping[str, tuple[int, ...]]],
        blocks: Mapping[str, Iterable[Block]],
        *,
        workers: int,
    ) -> None:
        """Each tensor's blocks, in the file that holds its name."""
        jobs = [
            partial(
                self._write_safetensors,
                folder / name,
                build_header(tensors, self.dtype),
                [blocks[tensor] for tensor in tensors],
            )
            for name, tensors in shards.items()
        ]
        run_all(jobs, workers=workers)

    def write_empty_states(self, path: Path, keys: Sequence[str]) -> dict[str, Chunk]:
        """As megatron-core saves each `_extra_state` that holds nothing, by key."""
        state = io.BytesIO()
        torch.save([None], state)
        chunks = {}
        with hashed_file(path, self.sums) as file:
            for key in keys:
                start = file.tell()
                file.write(state.getbuffer())
                chunks[key] = _chunk(file, start, key, (), ())
        return chunks

    def refuse_bad(self, source: str, count: int) -> None:
        """Raises ValueError where any of the source's `count` tensors was not finite."""
        if self._bad:
            names = sorted(self._bad)
            shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            raise ValueError(
                f"{len(names)} of the {count} tensors of {source} hold NaN or infinity, in {self.dtype}, and no "
                f"training would mend them: {shown}. Copy or download the model again, or take an earlier checkpoint"
            )

    def _write_archives(self, path: Path, blocks: Sequence[MegatronBlock], check: Check) -> None:
        with hashed_file(path, self.sums) as file:
            for one, tensor in zip(blocks, self._read((one.block for one in blocks), check)):
                start = file.tell()
                # A tensor of its own storage: torch.save writes the whole one, here all of the reader's memory.
                own = torch.from_numpy(as_bytes(tensor)).view(self.dtype).view(one.sizes)
                torch.save(own, file)  # type: ignore[arg-type]
                self.chunks.append(_chunk(file, start, one.key, one.offsets, one.sizes))

    def _write_safetensors(self, path: Path, header: bytes, tensors: Sequence[Iterable[Block]], check: Check) -> None:
        with hashed_file(path, self.sums) as file:
            file.write(header)
            for tensor in self._read((block for blocks in tensors for block in blocks), check):
                file.write(as_bytes(tensor))

    def _read(self, blocks: Iterable[Block], check: Check) -> Iterator[Tensor]:
        """Each block as a tensor, the next one read ahead. After a bad one nothing more is worth writing, but all bad
        ones are found."""
        readers = [BlockReader(self.dtype) for _ in range(2)]
        for tensor in ahead(partial(self._read_one, readers[i % 2], block) for i, block in enumerate(blocks)):
            check()
            if tensor is not None and not self._bad:
                yield tensor
                self._progress(tensor.nbytes)

    def _read_one(self, reader: BlockReader, block: Block) -> Tensor | None:
        try:
            return reader.read(block)
        except NotFinite as error:
            self._bad |= error.names
            return None


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


def _chunk(file: HashedFile, start: int, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Chunk:
    """What has been written since `start`."""
    return Chunk(key=key, offsets=offsets, sizes=sizes, path=file.path, start=start, length=file.tell() - start)


class _without_archive_checksums:
    def __enter__(self) -> None:
        self._before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)

    def __exit__(self, *_: object) -> None:
        torch.serialization.set_crc32_options(self._before)
