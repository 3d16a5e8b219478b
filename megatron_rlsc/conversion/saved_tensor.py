"""One tensor that torch.save wrote into a file: where its numbers lie, found without running its pickle.

torch.save's format is a zip archive, nothing in it compressed: `<name>/data.pkl` says how the tensor lies in its
storage, `<name>/data/0` is the storage. A distributed checkpoint has one such archive after another in a file.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LOCAL_HEADER_BYTES = 30
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}

# What a torn or altered archive raises.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedTensor:
    """Where a contiguous tensor lies on disk."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""


def locate(path: Path, offset: int, length: int) -> SavedTensor:
    """The tensor of the archive that takes `length` bytes of a file from `offset`.

    Raises ValueError where there is no such archive, or its tensor does not lie there as a whole and in order.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if offset < 0 or length < 0 or offset + length > size:
                raise ValueError(f"bytes {offset} to {offset + length} are asked for, of {size}")
            with zipfile.ZipFile(io.BufferedReader(_Slice(file, offset, length))) as archive:
                (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                root = pickled.removesuffix("data.pkl")
                if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                    raise ValueError("its numbers are not little-endian")
                found = _Description(io.BytesIO(archive.read(pickled))).load()
                if not isinstance(found, _Tensor):
                    raise ValueError("it is no tensor")
                record = archive.getinfo(f"{root}data/{found.storage.key}")
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed")
            # The local header has a name and padding of its own: the archive's directory does not say how long.
            header = os.pread(file.fileno(), LOCAL_HEADER_BYTES, offset + record.header_offset)
            extra = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            begin = record.header_offset + LOCAL_HEADER_BYTES + extra
    except FileNotFoundError:
        raise ValueError(f"{path.parent} lacks {path.name}: copy or save the checkpoint again") from None
    except DAMAGE as error:
        raise _damaged(path, offset, f"{error}") from None
    dtype = STORAGES[found.storage.type]
    begin += found.first * dtype.itemsize
    nbytes = math.prod(found.shape) * dtype.itemsize
    if found.first < 0 or found.first * dtype.itemsize + nbytes > record.file_size or begin + nbytes > length:
        raise _damaged(path, offset, f"{found.shape} in {dtype} are not in its {record.file_size} bytes")
    if found.stride != torch.empty(found.shape, device="meta").stride():
        raise _damaged(path, offset, f"{found.shape} lie in it with stride {found.stride}, not in order")
    return SavedTensor(path=path, dtype=dtype, shape=found.shape, offset=offset + begin)


def _damaged(path: Path, offset: int, reason: str) -> ValueError:
    return ValueError(f"{path} is truncated or damaged at byte {offset}: {reason}. Copy or save the checkpoint again.")


@dataclass(frozen=True)
class _Storage:
    type: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild(storage: Any, first: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    """In the place of torch._utils._rebuild_tensor_v2."""
    for sizes in (shape, stride):
        if not isinstance(sizes, tuple) or not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError(f"its sizes are {sizes!r}")
    if not isinstance(storage, _Storage) or type(first) is not int or first < 0 or len(shape) != len(stride):
        raise ValueError("it is no tensor")
    return _Tensor(storage, first, shape, stride)


class _Description(pickle.Unpickler):
    """Reads `data.pkl`, which may name what follows and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return name
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise ValueError(f"it would run {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, *_ = pid
        if kind != "storage" or storage not in STORAGES or not isinstance(key, str):
            raise ValueError(f"its storage is {pid!r}")
        return _Storage(storage, key)


class _Slice(io.RawIOBase):
    """`length` bytes of a file from `offset`, as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self._at = position + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise ValueError(f"seek to {self._at}")
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._at))
        data = os.pread(self._file.fileno(), wanted, self._offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
