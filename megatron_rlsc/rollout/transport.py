"""How the bytes of a bucket get from the trainer to one replica: through a file, or through a process group.

A channel is one replica's. For every bucket the trainer asks it for what the replica must be told (`offer`), tells the
replica, lets the bytes flow meanwhile (`send`), and takes back what was left (`withdraw`).
"""

from __future__ import annotations

import socket
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from megatron_rlsc.rollout.buckets import Bucket
from megatron_rlsc.rollout.group import Backend, Rendezvous, TransferGroup

Transport = Literal["auto", "file", "nccl", "gloo"]


class Channel(Protocol):
    """To one replica."""

    def offer(self, bucket: Bucket, label: str) -> dict[str, Any]:
        """What the replica is told besides the bucket's tensors and checksum. `label` is never used twice."""

    def send(self, bucket: Bucket, told: Future[Any]) -> None:
        """Moves the bytes, while the replica receives. Returns when they are there, or raises OSError or RuntimeError;
        at once where `told`, the replica's answer, is an error already."""

    def withdraw(self) -> None:
        """Leaves nothing of the bucket behind, however it went."""

    def close(self) -> None: ...


class FileChannel:
    """A file a bucket in the replica's push directory: in shared memory, or on a disk that both machines see."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: Path | None = None

    def offer(self, bucket: Bucket, label: str) -> dict[str, Any]:
        self._file = self._directory / f"{label}.bucket"
        with self._file.open("xb") as file:
            file.write(bucket.data.numpy().data)
        return {"file": self._file.name}

    def send(self, bucket: Bucket, told: Future[Any]) -> None:
        """The replica reads it for itself."""

    def withdraw(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None

    def close(self) -> None:
        self.withdraw()


class GroupChannel:
    """A broadcast a bucket from this process to all workers of the replica."""

    def __init__(self, group: TransferGroup) -> None:
        self._group = group

    def offer(self, bucket: Bucket, label: str) -> dict[str, Any]:
        return {}

    def send(self, bucket: Bucket, told: Future[Any]) -> None:
        self._group.broadcast(bucket.data, stop=told)

    def withdraw(self) -> None:
        """Nothing lies anywhere."""

    def close(self) -> None:
        self._group.close()


def choose_transport(
    wanted: Transport, described: list[dict[str, Any]], *, device: torch.device, directory: Path | None
) -> Literal["file", "nccl", "gloo"]:
    """NCCL between GPUs; else files, where the push directory is seen from here too; else gloo.

    Args:
        wanted: anything but "auto" is taken as it is.
        described: what each worker of the replica says of itself (engine.Inspection).
        device: of the trainer's weights.
        directory: where the push directory is mounted here, if not where the replica says.
    """
    if wanted != "auto":
        return wanted
    on_gpus = device.type == "cuda" and all(worker["device"] == "cuda" for worker in described)
    if on_gpus and dist.is_nccl_available():
        return "nccl"
    return "file" if visible_directory(described, directory) is not None else "gloo"


def visible_directory(described: list[dict[str, Any]], directory: Path | None) -> Path | None:
    """The push directory as it is mounted here, or None where it is on another machine alone."""
    if directory is not None:
        return directory
    told = {worker["directory"] for worker in described}
    on_this_machine = all(worker["host"] == socket.gethostname() for worker in described)
    if len(told) != 1 or "" in told:
        return None
    (path,) = map(Path, told)
    in_memory = path.is_relative_to("/dev/shm") or path.is_relative_to("/tmp")
    return path if path.is_dir() and (on_this_machine or not in_memory) else None


def open_group(
    backend: Backend, rendezvous: Rendezvous, *, world_size: int, timeout: float, device: torch.device
) -> GroupChannel:
    """Meets the replica's workers, who have been told of the rendezvous."""
    group = TransferGroup(
        backend,
        address=rendezvous.address,
        port=rendezvous.port,
        rank=0,
        world_size=world_size,
        timeout=timeout,
        device=device,
    )
    return GroupChannel(group)
