"""Megatron's distributed checkpoints (`torch_dist`) as files: which tensors they hold and where, and how one is made.

No process group and no Megatron: torch.distributed.checkpoint's `.metadata` says which boxes of a tensor lie where.
"""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_rlsc.conversion import metadata_file
from megatron_rlsc.conversion.blocks import Part
from megatron_rlsc.conversion.saved_tensor import SavedTensor, locate

LAYERS = "decoder.layers."
METADATA_JSON = "metadata.json"
COMMON = "common.pt"
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""megatron.core.dist_checkpointing's own file; it is there once a checkpoint is complete."""
COMMON_STATE = {
    "checkpoint_version": 3.0,
    "iteration": None,
    "content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"},
}
"""What policy/checkpoint.py saves beside the weights of a model without an optimizer."""
DAMAGE = (AttributeError, KeyError, TypeError)
"""What `.metadata` whose fields are not what they should be raises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A box of a tensor, and the archive that holds it: `length` bytes of a file from `start`."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint; layers are stacked along its first dimension, where it is one of theirs."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchDist:
    """An open checkpoint; nothing but `.metadata` has been read."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    """By key, an optimizer's moments among them."""

    def find(self, name: str) -> tuple[str, int | None]:
        """The key of a Megatron parameter, and its layer there where the key stacks them. ValueError where none is."""
        if name in self.tensors:
            return name, None
        if name.startswith(LAYERS):
            layer, _, rest = name.removeprefix(LAYERS).partition(".")
            if f"{LAYERS}{rest}" in self.tensors:
                return f"{LAYERS}{rest}", int(layer)
        raise ValueError(f"{self.path} has no {name}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one layer's parameter; () where that layer is not there."""
        key, layer = self.find(name)
        shape = self.tensors[key].shape
        return shape if layer is None else shape[1:] if layer < shape[0] else ()

    def parts(self, name: str, start: int, stop: int, *, row: int) -> list[Part]:
        """Where rows [start, stop) of a Megatron parameter lie; they go to `row` and on of a block.

        Raises ValueError where an archive is damaged, or the checkpoint's boxes leave gaps or overlap.
        """
        key, layer = self.find(name)
        tensor = self.tensors[key]
        found = [part for chunk in tensor.chunks for part in _overlap(name, chunk, tensor, layer, start, stop, row)]
        width = tensor.shape[-1] if len(tensor.shape) - (layer is not None) > 1 else 1
        areas = [part.rows * part.columns for part in found]
        if sum(areas) != (stop - start) * width or any(
            _meet(a, b) for i, a in enumerate(found) for b in found[i + 1 :]
        ):
            raise ValueError(
                f"{self.path}: the parts of {name} leave gaps or overlap in rows {start} to {stop}, so that the "
                f"checkpoint is no whole model. Copy it again, or take another."
            )
        return found


def open_torch_dist(path: Path) -> TorchDist:
    """Reads `.metadata` of one step's folder. Raises ValueError where it is damaged, hostile, or names other files than
    the folder's own."""
    if not (path / METADATA_JSON).is_file():
        raise ValueError(f"{path} is no finished checkpoint: it has no {METADATA_JSON}")
    try:
        backend = json.loads((path / METADATA_JSON).read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / METADATA_JSON} is damaged: {type(error).__name__} {error}") from None
    if backend != "torch_dist":
        raise ValueError(f"{path} is a checkpoint of the {backend!r} format; save it as torch_dist")
    metadata = metadata_file.read_metadata(path / metadata_file.NAME)
    try:
        tensors = {
            key: _stored(path, key, entry, metadata)
            for key, entry in metadata.state_dict_metadata.items()
            if type(entry) is TensorStorageMetadata
        }
    except DAMAGE as error:
        raise ValueError(f"{path / metadata_file.NAME} is damaged: {type(error).__name__} {error}") from None
    absent = sorted({c.path.name for t in tensors.values() for c in t.chunks if not c.path.is_file()})
    if absent:
        raise ValueError(f"{path} lacks {len(absent)} of its files: {', '.join(absent)}. Copy them, or save again.")
    return TorchDist(path=path, tensors=tensors)


def write_torch_dist(
    folder: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    chunks: Sequence[Chunk],
    objects: Mapping[str, Chunk],
) -> None:
    """The small files of a checkpoint whose archives are written. metadata.json, which says that it is whole, is last.

    Args:
        tensors: dtype and global shape, by key.
        objects: what is no tensor, by key.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        key: TensorStorageMetadata(
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(shape),
            chunks=[
                ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))
                for chunk in chunks
                if chunk.key == key
            ],
        )
        for key, (dtype, shape) in tensors.items()
    }
    entries |= {key: BytesStorageMetadata() for key in objects}
    storage = {MetadataIndex(chunk.key, torch.Size(chunk.offsets)): _info(chunk) for chunk in chunks}
    storage |= {MetadataIndex(key): _info(chunk) for key, chunk in objects.items()}
    metadata = Metadata(
        state_dict_metadata=entries,
        storage_data=storage,
        storage_meta=StorageMeta(),
        version="1.0.0",  # torch.distributed.checkpoint.filesystem.CURRENT_DCP_VERSION
    )
    (folder / metadata_file.NAME).write_bytes(pickle.dumps(metadata))
    torch.save(COMMON_STATE, folder / COMMON)
    (folder / METADATA_JSON).write_text(json.dumps(BACKENDS))


def _info(chunk: Chunk) -> _StorageInfo:
    return _StorageInfo(relative_path=chunk.path.name, offset=chunk.start, length=chunk.length)


def _stored(folder: Path, key: str, entry: TensorStorageMetadata, metadata: Metadata) -> StoredTensor:
    def chunk(box: ChunkStorageMetadata) -> Chunk:
        info = metadata.storage_data[MetadataIndex(key, box.offsets)]
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{folder / metadata_file.NAME} names a file outside its folder: {info.relative_path}")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{folder}: {key} is stored as {info.transform_descriptors}; save it without")
        return Chunk(
            key=key,
            offsets=_sizes(box.offsets),
            sizes=_sizes(box.sizes),
            path=folder / info.relative_path,
            start=_size(info.offset),
            length=_size(info.length),
        )

    shape = _sizes(entry.size)
    chunks = tuple(chunk(box) for box in entry.chunks)
    for one in chunks:
        ends = [offset + size for offset, size in zip(one.offsets, one.sizes)]
        if len(one.offsets) != len(shape) or len(one.sizes) != len(shape) or any(e > s for e, s in zip(ends, shape)):
            raise ValueError(f"{folder / metadata_file.NAME} is damaged: a part of {key} lies outside its {shape}")
    return StoredTensor(dtype=entry.properties.dtype, shape=shape, chunks=chunks)


def _sizes(sizes: object) -> tuple[int, ...]:
    if not isinstance(sizes, tuple):
        raise TypeError(f"{sizes!r} in the place of sizes")
    return tuple(_size(size) for size in sizes)


def _size(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} in the place of a size")
    return value


def _overlap(
    name: str, chunk: Chunk, tensor: StoredTensor, layer: int | None, start: int, stop: int, row: int
) -> Sequence[Part]:
    """What of rows [start, stop) a chunk holds: one part, or none."""
    offsets, sizes = chunk.offsets, chunk.sizes
    before = 0  # rows of other layers within the chunk
    if layer is not None:
        if not offsets[0] <= layer < offsets[0] + sizes[0]:
            return ()
        before = (layer - offsets[0]) * (sizes[1] if len(sizes) > 1 else 1)
        offsets, sizes = offsets[1:], sizes[1:]
    first, last = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
    column, columns = (offsets[1], sizes[1]) if len(offsets) > 1 else (0, 1)
    if first >= last or columns == 0:
        return ()
    saved = _locate(chunk)
    if saved.dtype != tensor.dtype or saved.shape != chunk.sizes:
        raise ValueError(
            f"{chunk.path} is damaged at byte {chunk.start}: {saved.shape} in {saved.dtype} in the place of "
            f"{chunk.sizes} in {tensor.dtype}, of {chunk.key}. Copy or save the checkpoint again."
        )
    offset = saved.offset + (before + first - offsets[0]) * columns * saved.dtype.itemsize
    return (
        Part(
            name=name,
            path=chunk.path,
            offset=offset,
            dtype=saved.dtype,
            row=row + first - start,
            rows=last - first,
            column=column,
            columns=columns,
        ),
    )


@functools.lru_cache(maxsize=4096)
def _locate(chunk: Chunk) -> SavedTensor:
    return locate(chunk.path, chunk.start, chunk.length)


def _meet(a: Part, b: Part) -> bool:
    rows = max(a.row, b.row) < min(a.row + a.rows, b.row + b.rows)
    return rows and max(a.column, b.column) < min(a.column + a.columns, b.column + b.columns)
