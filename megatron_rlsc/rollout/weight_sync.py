"""The trainer's side of a push: a stream of weights, as a file, into the live sidecar, under a version never reused."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_rlsc.rollout.wire import bearer, file_sha256


class SyncError(RuntimeError):
    """A push that did not go through, with its phase. The sidecar is not resumed after it."""


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
    """Pushes whole models into one sidecar on this machine, through the push directory that the sidecar owns.

    Versions are "<run id>:<counter>". The run id is drawn afresh for each object, so that no restart, resume or
    rollback can bring a version back.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str,
        timeout: float,
        push_dir: Path | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """
        Args:
            url: the sidecar's, http://host:port.
            key: its secret.
            timeout: seconds that each phase of a push may take.
            push_dir: where the sidecar's push directory is mounted here, if not where the sidecar says.
            transport: in place of the network, in tests.
        """
        self._http = httpx.Client(
            base_url=url, headers=bearer(key), timeout=timeout, transport=transport, trust_env=False
        )
        self._directory = push_dir
        self._initialized = False
        self._run_id = secrets.token_hex(6)
        self._counter = 0
        self._failure: str | None = None

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Replaces the sidecar's weights; requests in flight are aborted, its KV and prefix caches dropped.

        Args:
            weights: (HF name, whole HF-shaped tensor), each once, in the sidecar's dtype. Tied models have no
                `lm_head.weight`. All of it is in host memory at once: safetensors wants its header first.

        Returns the version that the sidecar's samples carry from now on. Raises SyncError with the phase and the
        sidecar's words; after one inside the update, every later push raises too, since what the sidecar then holds is
        unknown: restart it.
        """
        tensors = {name: _on_host(value) for name, value in weights}  # to its end first: other ranks gather along
        _require_finite(tensors)
        if self._failure:
            raise SyncError(f"an earlier push failed, restart the sidecar: {self._failure}")
        directory = self._initialize()
        version = f"{self._run_id}:{self._counter}"
        self._counter += 1

        file = directory / f"{version.replace(':', '-')}.safetensors"
        try:
            with _phase(f"write to {directory}"):
                save_file(tensors, file)
                digest = file_sha256(file)
            self._post("pause", "/pause", params={"mode": "abort"})
            self._update(file, digest, version)
        finally:
            file.unlink(missing_ok=True)
        self._post("resume", "/resume")
        return version

    def close(self) -> None:
        """Closes the connection; the sidecar goes on with the weights that it has."""
        self._http.close()

    def _update(self, file: Path, digest: str, version: str) -> None:
        try:
            self._post("start", "/start_weight_update")
            self._post("update", "/update_weights", {"update_info": {"file": file.name, "sha256": digest}})
            self._post("finish", "/finish_weight_update", {"weight_version": version})
        except SyncError as error:
            self._failure = str(error)
            raise

    def _initialize(self) -> Path:
        """The push directory, as seen from here; opens the sidecar's end on the first call."""
        if self._directory is None:
            answers = self._post("init", "/collective_rpc", {"method": "push_directory"})["results"]
            self._directory = Path(answers[0])
        if not self._directory.is_dir():
            raise SyncError(
                f"init: the sidecar reads {self._directory}, which is not on this machine. A push by file needs a "
                "directory that both see: start the sidecar here, or give push_dir"
            )
        if not self._initialized:
            self._post("init", "/init_weight_transfer_engine", {"init_info": {}})
            self._initialized = True
        return self._directory

    def _post(self, phase: str, path: str, body: Any = None, params: dict[str, str] | None = None) -> Any:
        with _phase(phase):
            answer = self._http.post(path, json=body, params=params)
        if answer.status_code != httpx.codes.OK:
            raise SyncError(f"{phase}: the sidecar answered {answer.status_code}: {answer.text.strip()}")
        return answer.json()


@contextmanager
def _phase(name: str) -> Iterator[None]:
    """Network and disk errors, as a SyncError that says where it was."""
    try:
        yield
    except (httpx.HTTPError, OSError, SafetensorError) as error:
        raise SyncError(f"{name}: {type(error).__name__}: {error}") from error


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory: the stream may use one buffer for all that it yields."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _require_finite(tensors: dict[str, Tensor]) -> None:
    """Raises SyncError on NaN or infinity: vLLM would take it in silence and answer with token 0."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise SyncError(
            f"gather: {len(bad)} of {len(tensors)} tensors are not finite, {bad[0]} first; nothing was sent"
        )
