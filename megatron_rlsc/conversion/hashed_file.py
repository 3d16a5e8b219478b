"""Large files, written once from the first byte to the last: hashed on the way, and by several threads at a time."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_rlsc.conversion.manifest import FileSum

BUFFER_BYTES = 2**24
ALIGNED = 2**12
"""Bytes of which a direct write is a multiple."""

T = TypeVar("T")


class HashedFile:
    """A new file, hashed and written by threads beside the caller's, 16 MiB at a time.

    Past the page cache, where the file system knows how: what has been written is on the disk, and the kernel's copies,
    which take a processor as long as the checksum does, are saved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._set_direct(True)
        self._digest = hashlib.sha256()
        self._size = self._filled = 0
        self._buffer, self._other = (np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8) for _ in range(2))
        self._pools = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]
        self._under_way: list[Future[None]] = []
        self.error: OSError | None = None
        """What the disk said first; torch.save has other words for it."""

    def write(self, data: Any) -> int:
        """All of the bytes; they may be changed when this returns."""
        left = np.frombuffer(data, np.uint8)
        size = left.size
        while left.size:
            count = min(BUFFER_BYTES - self._filled, left.size)
            self._buffer[self._filled : self._filled + count] = left[:count]
            left, self._filled = left[count:], self._filled + count
            if self._filled == BUFFER_BYTES:
                self._send()
        self._size += size
        return size

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """torch.save calls it; `close` does it."""

    def close(self) -> FileSum:
        """What the manifest says of it; all is on the disk."""
        try:
            self._send()
            self._wait()
            os.fsync(self._descriptor)
        finally:
            self.abandon()
        return FileSum(name=self.path.name, size=self._size, sha256=self._digest.hexdigest())

    def abandon(self) -> None:
        for pool in self._pools:
            pool.shutdown()
        os.close(self._descriptor)

    def _send(self) -> None:
        """What the buffer holds to the threads; the other buffer, when they have done with it, is the next."""
        self._wait()
        data = self._buffer[: self._filled].data
        jobs = (self._digest.update, self._write)
        self._under_way = [pool.submit(job, data) for pool, job in zip(self._pools, jobs)]
        self._buffer, self._other, self._filled = self._other, self._buffer, 0

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, []
        for future in under_way:
            future.result()

    def _write(self, data: memoryview) -> None:
        try:
            while data:
                if data.nbytes % ALIGNED:  # the file's end, or a disk that took a part
                    self._set_direct(False)
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            self.error = self.error or error
            raise

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        flags = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
        with suppress(OSError):  # a file system that only knows the page cache
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)


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
