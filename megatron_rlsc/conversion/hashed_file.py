"""Large files, written once from the first byte to the last: hashed on the way, and by several threads at a time."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from megatron_rlsc.conversion.manifest import FileSum

FLUSH_BYTES = 2**28
SMALL = 2**16
"""Bytes that are hashed sooner than another thread is woken."""

T = TypeVar("T")


class HashedFile:
    """A new file. Large writes are hashed by a thread beside, and sent to the disk by another: so that neither waits
    for the other, and what is left to flush at the end is little."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb", buffering=0)
        self._digest = hashlib.sha256()
        self._size = self._flushed = 0
        self._hasher, self._flusher = (ThreadPoolExecutor(1) for _ in range(2))
        self._flush: Future[None] | None = None
        self.error: OSError | None = None
        """What the disk said first; torch.save has other words for it."""

    def write(self, data: Any) -> int:
        """All of the bytes; they may be changed when this returns."""
        view = memoryview(data).cast("B")
        hashing = self._hasher.submit(self._digest.update, view) if view.nbytes > SMALL else None
        if hashing is None:
            self._digest.update(view)
        try:
            left = view
            while left.nbytes:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.error = self.error or error
            raise
        finally:
            if hashing is not None:
                hashing.result()
        self._size += view.nbytes
        if self._size - self._flushed > FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._wait_for_flush()
            self._flushed = self._size
            self._flush = self._flusher.submit(os.fdatasync, self._file.fileno())
        return view.nbytes

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """torch.save calls it; nothing is held back."""

    def close(self) -> FileSum:
        """What the manifest says of it; all is on the disk."""
        try:
            self._wait_for_flush()
            os.fsync(self._file.fileno())
        finally:
            self.abandon()
        return FileSum(name=self.path.name, size=self._size, sha256=self._digest.hexdigest())

    def abandon(self) -> None:
        for pool in (self._hasher, self._flusher):
            pool.shutdown()
        self._file.close()

    def _wait_for_flush(self) -> None:
        if self._flush is not None:
            self._flush.result()
            self._flush = None


@contextmanager
def hashed_file(path: Path, sums: list[FileSum]) -> Iterator[HashedFile]:
    """The file, and what the manifest says of it in `sums`, where no error ends the block."""
    file = HashedFile(path)
    try:
        yield file
    except BaseException:
        file.abandon()
        if file.error is not None:
            raise file.error from None
        raise
    sums.append(file.close())


def ahead(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Results of calls, in order; the next call runs while the last result is in use."""
    with ThreadPoolExecutor(1) as pool:
        pending: Future[T] | None = None
        for call in calls:
            following = pool.submit(call)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


class Stopped(Exception):
    """Another thread has failed."""


def run_all(jobs: Sequence[Callable[[Callable[[], None]], None]], *, workers: int) -> None:
    """Runs jobs on so many threads. Each is given a function to call often, which raises where another has failed."""
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(job, check) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
