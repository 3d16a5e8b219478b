"""The trainer's side of a push: a stream of weights, bucket by bucket, into all replicas, under a version never reused.

The phases of a push, each of them bounded in time, and each with its name in the errors:

    init      once a replica: how the bytes will travel (transport.py)
    pause     requests in flight are aborted, the KV and prefix caches dropped
    start     the replica compares all names, dtypes and shapes with its model, which has not been touched yet
    transfer  buckets, each with a checksum that is computed on either side
    finish    everything has come, and is live under the new version
    verify    checksums of live parameters of every layer, read back
    resume
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from megatron_rlsc.rollout.buckets import Bucket, TensorSpec, checksum, fill_buckets, unpack
from megatron_rlsc.rollout.fleet import Fleet, Replica, ReplicaLostError
from megatron_rlsc.rollout.link import Link, SyncError, trainer_device
from megatron_rlsc.rollout.transport import Transport

Phase = dict[int, tuple[Replica, Future[None]]]
"""Of a push, on all replicas at once, by their index."""


class NoSync:
    """For ranks other than 0, and for replays: gathers along with the others and sends nothing."""

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Walks the stream to its end, since each of its tensors may be a collective. Returns no version."""
        for _ in weights:
            pass
        return ""


class WeightSync:
    """Pushes whole models into all replicas that answer.

    Versions are "<run id>:<push>:<step>": which push of this object it was, and after which step. The run id is drawn
    afresh for each object, so that no restart, resume or rollback can bring a version back.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        specs: Sequence[TensorSpec],
        timeout: float,
        transport: Transport = "auto",
        push_dir: Path | None = None,
        http_transport: httpx.BaseTransport | None = None,
    ) -> None:
        """
        Args:
            fleet: the replicas.
            specs: every tensor of a push, in the sidecars' dtype. A tied model has no `lm_head.weight`.
            timeout: seconds that each phase of a push may take, and each bucket.
            transport: see `choose_transport`.
            push_dir: where the sidecars' push directory is mounted here, if not where they say.
            http_transport: in place of the network, in tests.
        """
        self._fleet = fleet
        self._specs = tuple(specs)
        self._timeout = timeout
        self._transport, self._push_dir = transport, push_dir
        self._http_transport = http_transport
        self._links: dict[int, Link] = {}
        self._run_id = secrets.token_hex(6)
        self._counter = 0

    def push(self, weights: Iterable[tuple[str, Tensor]], *, step: int = 0) -> str:
        """Replaces the weights of every replica that is ready. Two buckets are in memory at a time: while one travels,
        the next is gathered.

        Args:
            weights: (HF name, whole HF-shaped tensor), as `specs` says. The stream is walked to its end whatever
                happens, since other ranks gather along.
            step: after which the policy has these weights.

        Returns the version that samples carry from now on; replicas that did not answer are lost to the fleet, and have
        no version. Raises SyncError where a push was refused or did not arrive as sent, FleetError where no replica is
        left.
        """
        stream = iter(weights)
        version = f"{self._run_id}:{self._counter}:{step}"
        self._counter += 1
        try:
            replicas = self._fleet.ready()
            for replica in replicas:
                replica.version = ""
            with ThreadPoolExecutor(max(1, len(replicas))) as pool:
                live = self._each(pool, replicas, Link.begin, self._specs)
                live_sums: dict[str, str] = {}
                under_way: Phase = {}
                for count, bucket in enumerate(self._buckets(stream)):
                    live = self._through(under_way) if under_way else live
                    label = f"{version.replace(':', '-')}-{count}"
                    under_way = self._begin(pool, live, Link.transfer, bucket, label)
                    live_sums |= _norm_sums(bucket)
                live = self._each(pool, self._through(under_way), Link.finish, version, live_sums)
        finally:
            for _ in stream:
                pass
        for replica in live:
            replica.version = version
        return version

    def probe(self, token_ids: Sequence[int], version: str) -> list[tuple[float, ...]]:
        """Each replica's log-probabilities at T=1 of a fixed prompt's tokens but the first, for those with `version`.

        vLLM's prompt log-probabilities leave the temperature out.
        """
        asked = [replica for replica in self._fleet.ready() if replica.version == version]
        with ThreadPoolExecutor(max(1, len(asked))) as pool:
            found: dict[int, tuple[float, ...]] = {}

            def ask(link: Link) -> None:
                found[link.replica.index] = link.probe(token_ids)

            answered = self._each(pool, asked, ask)
        return [found[replica.index] for replica in answered]

    def close(self) -> None:
        """Closes the connections; the replicas go on with the weights that they have."""
        for link in self._links.values():
            link.close()
        self._links.clear()

    def _buckets(self, stream: Iterator[tuple[str, Tensor]]) -> Iterator[Bucket]:
        # Files are written from host memory; a group's sender has its buckets where the weights are.
        on_host = all(link.on_host for link in self._links.values())
        try:
            yield from fill_buckets(stream, device=torch.device("cpu") if on_host else trainer_device())
        except ValueError as error:
            raise SyncError(f"transfer: {error}") from None

    def _each(
        self, pool: ThreadPoolExecutor, replicas: Sequence[Replica], phase: Callable[..., None], *arguments: Any
    ) -> list[Replica]:
        """One phase on all replicas at once; those that came through."""
        return self._through(self._begin(pool, replicas, phase, *arguments))

    def _begin(
        self, pool: ThreadPoolExecutor, replicas: Sequence[Replica], phase: Callable[..., None], *arguments: Any
    ) -> Phase:
        return {replica.index: (replica, pool.submit(phase, self._link(replica), *arguments)) for replica in replicas}

    def _through(self, under_way: Phase) -> list[Replica]:
        """Those that came through. A refusal is raised when all have ended."""
        through, refused = [], None
        for replica, ended in under_way.values():
            try:
                ended.result()
                through.append(replica)
            except ReplicaLostError as error:
                self._links.pop(replica.index).close()
                self._fleet.lose(replica, str(error))
            except SyncError as error:
                refused = refused or error
        if refused is not None:
            raise refused
        return through

    def _link(self, replica: Replica) -> Link:
        link = self._links.get(replica.index)
        if link is not None and link.losses != replica.losses:  # what was agreed with it is void
            link.close()
            link = None
        if link is None:
            link = self._links[replica.index] = Link(
                replica,
                transport=self._transport,
                timeout=self._timeout,
                push_dir=self._push_dir,
                http_transport=self._http_transport,
            )
        return link


def _norm_sums(bucket: Bucket) -> dict[str, str]:
    """Checksums of the tensors that engine.Inspection reads back."""
    named = unpack(bucket.specs, bucket.data)
    return {
        name: checksum(tensor.contiguous().view(torch.uint8))
        for name, tensor in named
        if tensor.dim() == 1 and name.endswith("norm.weight")
    }
