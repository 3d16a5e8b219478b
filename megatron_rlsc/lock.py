"""Locks: files that one live process holds, and that name it to the others."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without locks answer: NFS without its lock daemon, Lustre without `-o flock`."""


class Held(ValueError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Holds the lock. The kernel lets go of it with the process, however that ends; the file stays.

    Raises Held with `refusal`, its `{holder}` filled in, where another process holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, path, refusal)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):  # nobody has deleted it meanwhile
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                yield
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, path: Path, refusal: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Held(refusal.replace("{holder}", path.read_text() or "another process")) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"warning: the file system of {path.parent} has no locks ({error.strerror}): nothing keeps a second "
            f"process from writing there, so see to it that there is none",
            file=sys.stderr,
        )
