"""The safetensors reader against the reference implementation and against damage; the writer against the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from megatron_rlsc.conversion.tensor_file import create, read_header, read_rows, read_tensor, write_tensor

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": -torch.arange(2.0), "b.weight": torch.ones(3, 2)}
BYTES = save(TENSORS, metadata={"format": "pt"})
HEADER_END = 8 + int.from_bytes(BYTES[:8], "little")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """One path for every example of a fuzz test."""
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


def read_all(path: Path, data: bytes) -> dict[str, torch.Tensor]:
    path.write_bytes(data)
    return {name: read_tensor(entry) for name, entry in read_header(path).items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_the_reference_writes_and_the_reverse(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "theirs")
    for name, entry in read_header(tmp_path / "theirs").items():
        assert entry.dtype == dtype and torch.equal(read_tensor(entry), tensors[name])

    entries = create(tmp_path / "ours", {name: tuple(tensor.shape) for name, tensor in tensors.items()}, dtype)
    for entry in reversed(entries):  # any order
        write_tensor(entry, tensors[entry.name])
    loaded = load_file(tmp_path / "ours")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "ours", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers refuses a file without it


def test_rows(file):
    file.write_bytes(BYTES)
    assert read_rows(read_header(file)["a.weight"], 1, 2).tolist() == [[3, 4, 5]]


def test_a_file_that_shrinks_after_it_was_opened(file):
    file.write_bytes(BYTES)
    entries = list(read_header(file).values())
    file.write_bytes(BYTES[:-1])
    with pytest.raises(ValueError, match=rf"{entries[-1].name} ends after"):
        read_tensor(entries[-1])


def test_a_git_lfs_pointer_says_so(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ValueError, match="git-lfs pointer"):
        read_header(file)


def with_header(header: object, data: bytes = b"\0" * 8) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(**changes: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "its 0 bytes are too few"),
        (b"\xff" * 8, "its 8 bytes are too few"),
        (with_header(b"{}")[:9], "its 9 bytes are too few for the header of 2 bytes"),
        (with_header(b"\xff\xfe"), "not JSON"),
        (with_header(b"[" * 100_000), "not JSON"),
        (with_header([]), "its header is a list"),
        (with_header({"w": 1}), "w is described by a int"),
        (with_header({}), "it has 18 bytes, its header describes 10"),
        (with_header(entry(dtype="I32")), "w is of dtype 'I32'"),
        (with_header(entry(dtype=[])), r"w is of dtype \[\]"),
        (with_header(entry(shape=[3])), r"w \(3,\) in F32 takes 12 bytes, not 8"),
        (with_header(entry(shape=[-1, -2])), r"w has shape \[-1, -2\]"),
        (with_header(entry(shape=[2.0])), r"w has shape \[2\.0\]"),
        (with_header(entry(shape=None)), "w has shape None"),
        (with_header(entry(data_offsets=[8, 16])), "w begins at byte"),
        (with_header(entry(data_offsets=[8, 0])), "w .* not -8"),
        (with_header(entry(data_offsets=[0])), r"data_offsets \[0\]"),
        (with_header(entry(), b"\0" * 7), "it has"),
        (with_header(entry(), b"\0" * 9), "it has"),
        (with_header({**entry(), "v": entry()["w"]}), "begins at byte"),
        (
            with_header(json.dumps(entry()).encode()[:-1] + b"," + json.dumps(entry()).encode()[1:]),
            "'w' stands in it twice",
        ),
    ],
)
def test_damage_is_named_with_the_file(file, data, message):
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_header(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("size", range(0, len(BYTES), 7))
def test_every_truncation_is_refused(file, size):
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_all(file, BYTES[:size])


@settings(max_examples=400, deadline=None)
@given(st.integers(0, HEADER_END - 1), st.integers(1, 255))
def test_a_damaged_header_is_refused_or_means_the_same(file, position, flip):
    """A flipped byte in a header raises ValueError, unless the reference reads the file too, and the same from it.

    It may: within `__metadata__`, or in a name, which `open_weights` holds against the model's.
    """
    data = bytearray(BYTES)
    data[position] ^= flip
    try:
        ours = read_all(file, bytes(data))
    except ValueError:
        return
    theirs = load_file(file)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=200).map(with_header))
def test_noise_is_refused(file, noise):
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        read_all(file, noise)
    with pytest.raises((SafetensorError, ValueError, RuntimeError)):
        load_file(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON)
def test_nonsense_in_a_field_is_refused(file, field, value):
    if value == entry()["w"][field]:
        return
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        read_all(file, with_header(entry(**{field: value})))
