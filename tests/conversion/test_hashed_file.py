"""Files that are hashed and written by threads: what is on the disk, what the manifest says of it, and what goes wrong.

A full disk is in tests/test_disk.py. Not covered: file systems that take direct writes of another size than 4 KiB.
"""

from __future__ import annotations

import fcntl
import hashlib

import pytest

from megatron_rlsc.conversion import hashed_file as module
from megatron_rlsc.conversion.hashed_file import HashedFile, Stopped, ahead, hashed_file, run_all


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def file_system(request, monkeypatch):
    """One that knows direct writes, where the test runs on one, and one that refuses them."""

    def refuse(descriptor, operation, *flags):
        if operation == fcntl.F_SETFL:
            raise OSError(22, "Invalid argument")
        return fcntl.fcntl(descriptor, operation, *flags)

    if not request.param:
        monkeypatch.setattr(module, "fcntl", type("", (), {**vars(fcntl), "fcntl": staticmethod(refuse)}))


@pytest.mark.parametrize("sizes", [[], [0], [1], [4096], [8192, 8192], [4097, 1, 0, 30_000, 12_287], [100_000]])
def test_what_is_written_is_there_and_hashed(tmp_path, monkeypatch, file_system, sizes):
    monkeypatch.setattr(module, "BUFFER_BYTES", 8192)
    content = bytes(i * 37 % 251 for i in range(sum(sizes)))
    sums: list = []
    with hashed_file(tmp_path / "f", sums) as file:
        start = 0
        for size in sizes:
            data = bytearray(content[start : start + size])
            assert file.write(memoryview(data)) == size
            data[:] = b"\0" * size  # the caller's memory is its own again
            start += size
            assert file.tell() == start
    assert (tmp_path / "f").read_bytes() == content
    (found,) = sums
    assert (found.name, found.size, found.sha256) == ("f", len(content), hashlib.sha256(content).hexdigest())


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(FileExistsError):
        HashedFile(tmp_path / "f")
    assert (tmp_path / "f").read_text() == "old"


def test_an_error_in_the_block_is_the_one_that_is_raised(tmp_path):
    sums: list = []
    with pytest.raises(KeyError):
        with hashed_file(tmp_path / "f", sums) as file:
            file.write(b"abc")
            raise KeyError
    assert sums == []


def test_results_come_in_order_and_errors_where_they_belong():
    def fail():
        raise KeyError

    results = ahead([lambda: 1, lambda: 2, fail, lambda: 4])
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(KeyError):
        next(results)


@pytest.mark.parametrize("workers", [1, 3])
def test_one_that_fails_ends_the_others(workers):
    begun = []

    def job(check, name):
        begun.append(name)
        if name == "bad":
            raise KeyError(name)
        while True:
            check()

    with pytest.raises((KeyError, Stopped)) as raised:
        run_all([lambda check, name=name: job(check, name) for name in ("bad", "a", "b", "c")], workers=workers)
    assert raised.type is KeyError and "bad" in begun
