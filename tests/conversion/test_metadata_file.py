"""`.metadata` of a checkpoint: a pickle that may be hostile or torn, read without running anything of it."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_rlsc.conversion.metadata_file import read_metadata


def call(function_as_pickled: bytes, argument: str) -> bytes:
    """A pickle that calls a function with a string when it is loaded."""
    text = argument.encode()
    return b"\x80\x04" + function_as_pickled + b"X" + struct.pack("<I", len(text)) + text + b"\x85R."


def dotted(module: str, name: str) -> bytes:
    """STACK_GLOBAL, which follows dots in a name."""
    parts = (part.encode() for part in (module, name))
    return b"".join(b"X" + struct.pack("<I", len(part)) + part for part in parts) + b"\x93"


HOSTILE = {
    "global": b"cos\nsystem\n",
    "posix": b"cposix\nsystem\n",
    "builtin": b"cbuiltins\nexec\n",
    "dotted through torch's own module": dotted("torch.distributed.checkpoint.filesystem", "os.system"),
    "dotted through an allowed class": dotted("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
    "dotted from the root": dotted("torch", "serialization.os.system"),
    "a module's whole namespace": dotted("torch.distributed.checkpoint.metadata", "os.system"),
    "torch.load": dotted("torch", "load"),
}


@pytest.mark.parametrize("function", HOSTILE.values(), ids=HOSTILE)
def test_metadata_that_would_run_code_is_refused_unrun(function: bytes, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    path = tmp_path / ".metadata"
    path.write_bytes(call(function, f"touch {marker}"))
    with pytest.raises(ValueError, match=r"would run .*: it is no checkpoint that Megatron wrote"):
        read_metadata(path)
    assert not marker.exists()


class Run:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_the_attacks_work_where_nothing_refuses_them(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    for i, name in enumerate(("global", "posix", "dotted through torch's own module", "dotted from the root")):
        pickle.loads(call(HOSTILE[name], f"touch {tmp_path / str(i)}"))  # noqa: S301
        assert (tmp_path / str(i)).exists()


def test_metadata_that_hides_code_in_an_allowed_class_is_refused_unrun(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(Metadata(state_dict_metadata={"weight": Run(marker)})))
    with pytest.raises(ValueError, match=r"would run (os|posix)\.system"):
        read_metadata(path)
    assert not marker.exists()


def tensor_entry() -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([4]))
    return TensorStorageMetadata(properties=TensorProperties(), size=torch.Size([4]), chunks=[chunk])


def test_a_tensor_that_is_stored_as_a_pickle_is_refused(tmp_path: Path) -> None:
    """torch would unpickle it from a .distcp file, without restriction; a size is no proof of a tensor."""
    pickled = BytesStorageMetadata()
    pickled.size = torch.Size([4])
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(Metadata(state_dict_metadata={"good": tensor_entry(), "evil.weight": pickled})))
    with pytest.raises(ValueError, match=r"pickles in the place of tensors \(evil.weight\)"):
        read_metadata(path)
    path.write_bytes(pickle.dumps(Metadata(state_dict_metadata={"good": tensor_entry()})))
    read_metadata(path)


def test_damaged_metadata_is_refused(tmp_path: Path) -> None:
    """Cut anywhere, or with any byte inverted: a ValueError, or (a byte of a number or a name) still metadata."""
    path = tmp_path / ".metadata"
    with pytest.raises(ValueError, match=r"is no torch_dist checkpoint: it has no \.metadata"):
        read_metadata(path)
    whole = pickle.dumps(Metadata(state_dict_metadata={"weight": tensor_entry()}))
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError):
            read_metadata(path)
    refused = 0
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :])
        try:
            read_metadata(path)
        except ValueError:
            refused += 1
    assert refused > len(whole) / 2
