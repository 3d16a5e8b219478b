"""The sidecars of a run, each a replica of the sampler: which of them can be asked, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlsc.rollout.sidecar import Sidecar


class FleetError(RuntimeError):
    """No replica is left, and none can be had."""


@dataclass(eq=False, kw_only=True, slots=True)
class Replica:
    """One vLLM server as the trainer sees it."""

    index: int
    url: str
    """http://host:port"""
    key: str
    sidecar: Sidecar | None = None
    """The process, where it is ours to stop and start; None for one that others run (`--rollout-urls`)."""
    version: str = ""
    """Of the weights that it holds by its last push; empty where it has had none since it started."""

    def __str__(self) -> str:
        return f"replica {self.index} ({self.url})"


class Fleet:
    """All replicas. Those that have failed are out until they are back."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = list(replicas)
        self._lost: set[int] = set()

    def ready(self) -> list[Replica]:
        """Those that answer, to the best of our knowledge: a push goes to all of them."""
        return [replica for replica in self.replicas if replica.index not in self._lost]

    def lose(self, replica: Replica, reason: str) -> None:
        """Takes out a replica that does not answer. Raises FleetError where none is left and none can be had."""
        self._lost.add(replica.index)
        replica.version = ""
        if not self.ready():
            raise FleetError(f"no replica is left; {replica}: {reason}")
