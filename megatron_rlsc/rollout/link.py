"""The control connection to one replica, phase by phase of a push, and the channel for its bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch

from megatron_rlsc.rollout.buckets import Bucket, TensorSpec
from megatron_rlsc.rollout.fleet import Replica, ReplicaLostError
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


class Link:
    """What a push asks of one replica. Each method raises SyncError for what the replica refuses, and ReplicaLostError
    where it does not answer in time or has died."""

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
                raise ReplicaLostError(
                    f"transfer: {self.replica} did not receive it, as seen from here: {error}"
                ) from error
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
        transport = choose_transport(self._wanted, described, device=trainer_device(), directory=self._push_dir)
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
            device = torch.device("cpu") if self.on_host else trainer_device()
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
            raise ReplicaLostError(
                f"{phase}: {self.replica} did not answer ({type(error).__name__}: {error})"
            ) from error
        if answer.status_code == httpx.codes.OK:
            return answer.json()
        what = f"{phase}: {self.replica} answered {answer.status_code}: {answer.text.strip()}"
        raise ReplicaLostError(what) if self._is_dead() else SyncError(what)

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
        except (SyncError, ReplicaLostError):
            raise
        except OSError as error:
            raise SyncError(f"{phase} to {self.replica}: {type(error).__name__}: {error}") from error
        except RuntimeError as error:  # torch.distributed's
            raise ReplicaLostError(f"{phase}: {self.replica} did not come: {error}") from error


def trainer_device() -> torch.device:
    """Of the trainer's weights."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
