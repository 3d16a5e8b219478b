"""Buckets and their checksum, without a sidecar."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlsc.rollout import buckets
from megatron_rlsc.rollout.buckets import ALIGNED, TensorSpec, checksum, fill_buckets, unpack

CPU = torch.device("cpu")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(st.lists(st.tuples(DTYPES, st.lists(st.integers(0, 7), max_size=3)), max_size=12), st.integers(1, 500))
def test_what_is_packed_comes_back(tensors: list[tuple[torch.dtype, list[int]]], bucket_bytes: int) -> None:
    weights = {f"w{i}": torch.randn(shape).to(dtype) for i, (dtype, shape) in enumerate(tensors)}
    filled = list(fill_buckets(weights.items(), device=CPU, bucket_bytes=bucket_bytes))
    found = {name: tensor for bucket in filled for name, tensor in unpack(bucket.specs, bucket.data)}
    assert list(found) == list(weights)
    for bucket in filled:
        assert bucket.data.numel() == buckets.bucket_nbytes(bucket.specs)
        assert bucket.data.numel() <= bucket_bytes or len(bucket.specs) == 1
        assert bucket.checksum == checksum(bucket.data)
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert found[name].data_ptr() % ALIGNED == 0 or not tensor.numel()


def test_a_bucket_is_filled_when_it_is_asked_for_and_keeps_its_own_memory() -> None:
    """The stream may use one buffer for all that it yields, and no tensor is read before its bucket's turn."""
    shared, read = torch.empty(100), []

    def stream():
        for i in range(10):
            read.append(i)
            yield f"w{i}", shared.fill_(i)

    filled = fill_buckets(stream(), device=CPU, bucket_bytes=900)
    first = next(filled)
    assert read == [0, 1, 2]
    second = next(filled)
    values = [int(tensor[0]) for bucket in (first, second) for _, tensor in unpack(bucket.specs, bucket.data)]
    assert values == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=r"^w2 holds NaN or infinity"):
        list(fill_buckets([("w1", torch.ones(2)), ("w2", torch.tensor([1.0, value]))], device=CPU))


def test_the_checksum_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words 1, 2 and 3: 6, and 1 + 4 + 9; in whatever chunks; of negative words modulo 2^64."""
    words = torch.tensor([1, 2, 3])
    for chunk in (1, 2, 100):
        monkeypatch.setattr(buckets, "CACHED_WORDS", chunk)
        assert checksum(words.view(torch.uint8)) == f"{6:016x}{14:016x}"
    assert checksum(torch.tensor([-1]).view(torch.uint8)) == "f" * 32
    assert checksum(torch.tensor([7], dtype=torch.uint8)) == f"{7:016x}{7:016x}"
    assert checksum(torch.empty(0, dtype=torch.uint8)) == "0" * 32


@given(st.binary(min_size=1, max_size=400), st.data())
def test_every_flipped_bit_and_every_exchanged_pair_of_words_is_found(content: bytes, data: st.DataObject) -> None:
    before = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = before.clone()
    flipped[bit // 8] ^= 1 << bit % 8
    assert checksum(flipped) != checksum(before)
    words = [content[i : i + 8].ljust(8, b"\0") for i in range(0, len(content), 8)]
    random.Random(bit).shuffle(words)
    exchanged = b"".join(words)
    if exchanged[: len(content)] != content and len(words) == 2:
        assert checksum(torch.frombuffer(bytearray(exchanged), dtype=torch.uint8)) != checksum(before)


@given(st.binary(max_size=400), st.integers(1, 60))
def test_the_sums_of_a_gpu_are_those_of_a_cpu(content: bytes, step: int) -> None:
    """On the CPU, by the GPU's lines; over whole words of any sign."""
    words = torch.frombuffer(bytearray(content + bytes(-len(content) % 8 + 8)), dtype=torch.int64)
    before, buckets.DEVICE_WORDS = buckets.DEVICE_WORDS, step
    try:
        found = buckets._sums_on_device(words)
    finally:
        buckets.DEVICE_WORDS = before
    assert f"{found[0] & buckets.MASK:016x}{found[1] & buckets.MASK:016x}" == checksum(words.view(torch.uint8))


def test_a_spec_goes_over_the_wire() -> None:
    spec = TensorSpec(name="a.b", dtype=torch.bfloat16, shape=(2, 3))
    assert TensorSpec.from_json(spec.to_json()) == spec
    assert (str(spec), spec.nbytes) == ("bfloat16 [2, 3]", 12)
    for dtype in ("nn", "Tensor", "load"):
        with pytest.raises(ValueError, match="is no dtype"):
            TensorSpec.from_json(["a", dtype, [1]])
