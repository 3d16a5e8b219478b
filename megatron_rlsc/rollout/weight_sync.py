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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from megatron_rlsc.rollout.buckets import Bucket, TensorSpec, checksum, fill_buckets, unpack
from megatron_rlsc.rollout.fleet import Fleet, Replica
from megatron_rlsc.rollout.group import Rendezvous, own_address
from megatron_rlsc.rollout.transport import (
    Channel,
    FileChannel,
    Transport,
    choose_transport,
    open_group,
    visible_directory,
)
from megatron_rlsc.rollout.wire import bearer

HEALTH_ATTEMPTS = 3
HEALTH_SECONDS = 10.0
"""What a replica that has refused a phase is given to say that its engine lives."""


class SyncError(RuntimeError):
    """A push that a living replica refused, or that did not arrive as it was sent: its phase, its replica, both sides'
    figures. The run must not go on."""


class LostReplica(RuntimeError):
    """A replica that did not answer in a phase, or answered that its engine is dead."""


class WeightPusher(Protocol):
    """What the training loop holds: rank 0 a `WeightSync`, the others `NoSync`."""

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> str: ...


class NoSync:
    """For ranks other than 0, and for replays: gathers along with the others and sends nothing."""

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Walks the stream to its end, since each of its tensors may be a collective. Returns no version."""
        for _ in weights:
            pass
        return ""


class WeightSync:
    """Pushes whole models into all replicas that answer.

    Versions are "<run id>:<counter>". The run id is drawn afresh for each object, so that no restart, resume or
    rollback can bring a version back.
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
        self._links: dict[int, _Link] = {}
        self._run_id = secrets.token_hex(6)
        self._counter = 0

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Replaces the weights of every replica that is ready. One bucket is in memory at a time.

        Args:
            weights: (HF name, whole HF-shaped tensor), as `specs` says. The stream is walked to its end whatever
                happens, since other ranks gather along.

        Returns the version that samples carry from now on; replicas that did not answer are lost to the fleet, and have
        no version. Raises SyncError where a push was refused or did not arrive as sent, FleetError where no replica is
        left.
        """
        stream = iter(weights)
        version = f"{self._run_id}:{self._counter}"
        self._counter += 1
        try:
            replicas = self._fleet.ready()
            for replica in replicas:
                replica.version = ""
            with ThreadPoolExecutor(max(1, len(replicas))) as pool:
                live = self._each(pool, replicas, _Link.begin, self._specs)
                live_sums: dict[str, str] = {}
                for count, bucket in enumerate(self._buckets(stream)):
                    live = self._each(pool, live, _Link.transfer, bucket, f"{version.replace(':', '-')}-{count}")
                    live_sums |= _norm_sums(bucket)
                live = self._each(pool, live, _Link.finish, version, live_sums)
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

            def ask(link: _Link) -> None:
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
            yield from fill_buckets(stream, device=torch.device("cpu") if on_host else _device())
        except ValueError as error:
            raise SyncError(f"transfer: {error}") from None

    def _each(
        self, pool: ThreadPoolExecutor, replicas: Sequence[Replica], phase: Callable[..., None], *arguments: Any
    ) -> list[Replica]:
        """One phase on all replicas at once; those that came through. A refusal is raised when all have ended."""
        futures = {replica.index: pool.submit(phase, self._link(replica), *arguments) for replica in replicas}
        through, refused = [], None
        for replica in replicas:
            try:
                futures[replica.index].result()
                through.append(replica)
            except LostReplica as error:
                self._links.pop(replica.index).close()
                self._fleet.lose(replica, str(error))
            except SyncError as error:
                refused = refused or error
        if refused is not None:
            raise refused
        return through

    def _link(self, replica: Replica) -> _Link:
        link = self._links.get(replica.index)
        if link is not None and link.losses != replica.losses:  # what was agreed with it is void
            link.close()
            link = None
        if link is None:
            link = self._links[replica.index] = _Link(
                replica,
                transport=self._transport,
                timeout=self._timeout,
                push_dir=self._push_dir,
                http_transport=self._http_transport,
            )
        return link


class _Link:
    """The control connection to one replica, and the channel for its bytes."""

    def __init__(
        self,
        replica: Replica,
        *,
        transport: Transport,
        timeout: float,
        push_dir: Path | None,
        http_transport: httpx.BaseTransport | None,
    ) -> None:
        self.replica, self.losses = replica, replica.losses
        self.on_host = True
        self._wanted, self._timeout, self._push_dir = transport, timeout, push_dir
        self._channel: Channel | None = None
        self._pool = ThreadPoolExecutor(1)
        self._http = httpx.Client(
            base_url=replica.url,
            headers=bearer(replica.key),
            timeout=timeout,
            transport=http_transport,
            trust_env=False,
        )

    def begin(self, specs: Sequence[TensorSpec]) -> None:
        """init, where it is new; pause; start."""
        if self._channel is None:
            self._channel = self._open()
        self._post("pause", "/pause", params={"mode": "abort"})
        self._ask_workers("start", "abandon_update")  # where an earlier push broke off
        self._post("start", "/start_weight_update")
        self._update("start", {"announced": [spec.to_json() for spec in specs]})

    def transfer(self, bucket: Bucket, label: str) -> None:
        assert self._channel is not None
        try:
            with self._trainer_side("transfer"):
                offer = self._channel.offer(bucket, label)
            update = {"tensors": [spec.to_json() for spec in bucket.specs], "checksum": bucket.checksum, **offer}
            told = self._pool.submit(self._update, "transfer", update)
            try:
                self._channel.send(bucket, told)
            except (OSError, RuntimeError) as error:
                if told.done() and told.exception() is not None:
                    told.result()  # the replica's own word is the better one
                raise LostReplica(f"transfer: {self.replica} did not receive it, as seen from here: {error}") from error
            told.result()
        finally:
            self._channel.withdraw()

    def finish(self, version: str, live_sums: Mapping[str, str]) -> None:
        """finish; verify; resume."""
        self._post("finish", "/finish_weight_update", {"weight_version": version})
        for rank, found in enumerate(self._ask_workers("verify", "live_checksums")):
            if wrong := sorted(name for name, value in live_sums.items() if found.get(name) != value):
                raise SyncError(
                    f"verify: {self.replica}, worker {rank}: {len(wrong)} of {len(live_sums)} live parameters are not "
                    f"what was sent, {wrong[0]} first: its checksum is {found.get(wrong[0])} there and "
                    f"{live_sums[wrong[0]]} here"
                )
        self._post("resume", "/resume")

    def probe(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        body = {"token_ids": list(token_ids), "sampling_params": sampling}
        answer = self._post("probe", "/inference/v1/generate", body)
        rows = answer["prompt_logprobs"][1:]
        return tuple(float(row[str(token)]["logprob"]) for row, token in zip(rows, token_ids[1:], strict=True))

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._http.close()
        self._pool.shutdown(wait=False)

    def _open(self) -> Channel:
        described = self._ask_workers("init", "describe_transfer")
        transport = choose_transport(self._wanted, described, device=_device(), directory=self._push_dir)
        if transport == "file":
            directory = visible_directory(described, self._push_dir)
            if directory is None or not directory.is_dir():
                raise SyncError(
                    f"init: {self.replica} reads {described[0]['directory'] or 'no directory'}, which is not on this "
                    f"machine. Name where it is mounted here (--push-dir), or take another --weight-transport"
                )
            self._post("init", "/init_weight_transfer_engine", {"init_info": {"transport": "file"}})
            return FileChannel(directory)
        self.on_host = transport == "gloo"
        host = urlsplit(self.replica.url).hostname
        assert host is not None
        with self._trainer_side("init"), Rendezvous(own_address(host), timeout=self._timeout) as rendezvous:
            world_size = 1 + len(described)
            info = {"transport": transport, "address": rendezvous.address, "port": rendezvous.port}
            info |= {"world_size": world_size, "timeout": self._timeout}
            told = self._pool.submit(self._post, "init", "/init_weight_transfer_engine", {"init_info": info})
            device = torch.device("cpu") if self.on_host else _device()
            channel = open_group(transport, rendezvous, world_size=world_size, timeout=self._timeout, device=device)
            told.result()
        return channel

    def _update(self, phase: str, update: Mapping[str, Any]) -> None:
        self._post(phase, "/update_weights", {"update_info": update})

    def _ask_workers(self, phase: str, method: str) -> list[Any]:
        answers = self._post(phase, "/collective_rpc", {"method": method})["results"]
        return list(answers)

    def _post(self, phase: str, path: str, body: Any = None, params: dict[str, str] | None = None) -> Any:
        try:
            answer = self._http.post(path, json=body, params=params)
        except httpx.HTTPError as error:
            raise LostReplica(f"{phase}: {self.replica} did not answer ({type(error).__name__}: {error})") from error
        if answer.status_code == httpx.codes.OK:
            return answer.json()
        what = f"{phase}: {self.replica} answered {answer.status_code}: {answer.text.strip()}"
        raise LostReplica(what) if self._is_dead() else SyncError(what)

    def _is_dead(self) -> bool:
        """Whether the engine behind a refusal has died; the server outlives it for a moment.

        Asked more than once: behind an error of its own, the server closes the connection.
        """
        for _ in range(HEALTH_ATTEMPTS):
            with suppress(httpx.HTTPError):
                return self._http.get("/health", timeout=HEALTH_SECONDS).status_code != httpx.codes.OK
        return True

    @contextmanager
    def _trainer_side(self, phase: str) -> Iterator[None]:
        """The trainer's own errors: a full disk is the run's, a peer that does not come the replica's."""
        try:
            yield
        except (SyncError, LostReplica):
            raise
        except OSError as error:
            raise SyncError(f"{phase} to {self.replica}: {type(error).__name__}: {error}") from error
        except RuntimeError as error:  # torch.distributed's
            raise LostReplica(f"{phase}: {self.replica} did not come: {error}") from error


def _device() -> torch.device:
    """Of the trainer's weights."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _norm_sums(bucket: Bucket) -> dict[str, str]:
    """Checksums of the tensors that engine.Inspection reads back."""
    named = unpack(bucket.specs, bucket.data)
    return {
        name: checksum(tensor.contiguous().view(torch.uint8))
        for name, tensor in named
        if tensor.dim() == 1 and name.endswith("norm.weight")
    }
