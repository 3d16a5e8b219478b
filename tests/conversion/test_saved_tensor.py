"""Tensors that torch.save wrote, found without running its pickle; hostile and damaged archives refused."""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlsc.conversion.saved_tensor import SavedTensor, locate

BEFORE = b"what stands before it"


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


WHOLE = saved(torch.arange(6.0).bfloat16().view(1, 2, 3))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """One path for every example of a fuzz test."""
    return tmp_path_factory.mktemp("fuzz") / "__0_0.distcp"


def put(path: Path, data: bytes) -> SavedTensor:
    path.write_bytes(BEFORE + data + b"behind")
    return locate(path, len(BEFORE), len(data))


def read(found: SavedTensor) -> torch.Tensor:
    nbytes = math.prod(found.shape) * found.dtype.itemsize
    data = bytearray(found.path.read_bytes()[found.offset : found.offset + nbytes])
    return torch.frombuffer(data, dtype=found.dtype).view(found.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_torch_saves_is_found(file, dtype):
    tensor = torch.randn(4, 5).to(dtype)
    for each in (tensor, tensor[1:], tensor[2:3], tensor[:, :1].contiguous()):  # views keep all of their storage
        found = put(file, saved(each))
        assert torch.equal(read(found), each) and found.dtype == dtype


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.ones(3, 4).t(), "not in order"),
        (torch.ones(3).int(), r"would run torch\.IntStorage"),
        ([None], "it is no tensor"),
        ({"a": torch.ones(2)}, "it is no tensor"),
        (torch.ones(3).to_sparse(), "would run"),
        (torch.nn.Parameter(torch.ones(3)), "would run"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(file, value, reason):
    with pytest.raises(ValueError, match=f"truncated or damaged at byte {len(BEFORE)}: .*{reason}"):
        put(file, saved(value))


class Run:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_code_is_refused_unrun(file, tmp_path):
    with pytest.raises(ValueError, match=r"would run (os|posix)\.system"):
        put(file, saved(Run(tmp_path / "it-ran")))
    assert not (tmp_path / "it-ran").exists()


def rewritten(change, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as source, zipfile.ZipFile(stream, "w", compression) as target:
        for name in source.namelist():
            data = change(name, source.read(name))
            if data is not None:
                target.writestr(name, data)
    return stream.getvalue()


def test_archives_that_are_not_torch_s(file):
    assert torch.equal(read(put(file, rewritten(lambda name, data: data))).view(-1), torch.arange(6.0).bfloat16())
    with pytest.raises(ValueError, match="not little-endian"):
        put(file, rewritten(lambda name, data: b"big" if name.endswith("byteorder") else data))
    with pytest.raises(ValueError, match="compressed"):
        put(file, rewritten(lambda name, data: data, zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="not in its 4 bytes"):
        put(file, rewritten(lambda name, data: data[:4] if name.endswith("data/0") else data))
    with pytest.raises(ValueError, match="damaged"):
        put(file, rewritten(lambda name, data: None if name.endswith("data/0") else data))
    with pytest.raises(ValueError, match=r"lacks absent\.distcp"):
        locate(file.with_name("absent.distcp"), 0, 10)
    with pytest.raises(ValueError, match="are asked for, of"):
        locate(file, 0, 10**9)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damage_is_refused_or_lies_within_the_file(file, data):
    """A byte changed, or the end cut off. What remains a tensor, `.metadata` says the size of, and manifest.json the
    SHA-256."""
    damaged = bytearray(WHOLE)
    if data.draw(st.booleans(), "cut"):
        del damaged[data.draw(st.integers(0, len(WHOLE) - 1), "at") :]
    else:
        damaged[data.draw(st.integers(0, len(WHOLE) - 1), "position")] ^= data.draw(st.integers(1, 255), "flip")
    try:
        found = put(file, bytes(damaged))
    except ValueError as error:
        assert str(file) in str(error)
        return
    end = found.offset + math.prod(found.shape) * found.dtype.itemsize
    assert len(BEFORE) <= found.offset <= end <= len(BEFORE) + len(damaged)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_refused(file, noise):
    with pytest.raises(ValueError, match="truncated or damaged"):
        put(file, noise)
