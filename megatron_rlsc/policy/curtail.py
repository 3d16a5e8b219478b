"""A pass over micro-batches that may be cut short: every rank of a pipeline stops at the same one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_rlsc.batching import build_filler
from megatron_rlsc.policy.parallel import Parallel
from megatron_rlsc.ranges import span
from megatron_rlsc.types import MicroBatch


class Curtailed:
    """The micro-batches of one replica; from the first one on before which its leader is told to stop, fillers.

    A schedule of pipeline stages cannot be left half-way: each rank would wait for a message that never comes. So all
    of it runs, and what is left of it costs nothing. The leader, the first stage's first rank, says at the store
    whether a micro-batch is to be computed; every other rank reads it there before it begins with it. What came of the
    pass is worth nothing then, and its gradient is to be dropped.
    """

    def __init__(self, micro_batches: Sequence[MicroBatch], abandoned: Callable[[], bool], parallel: Parallel) -> None:
        """
        Args:
            micro_batches: this rank's.
            abandoned: whether to stop; asked on the leader alone.
            parallel: this rank's place.
        """
        self._micro_batches, self._abandoned, self._parallel = micro_batches, abandoned, parallel
        self._filler = build_filler(parallel.data_share, device=parallel.device)
        self._turn = parallel.next_turn()
        self._stopped: list[bool] = []

    def __iter__(self) -> Iterator[MicroBatch]:
        """Once for each run of layers of this rank."""
        for number, batch in enumerate(self._micro_batches):
            yield self._filler if self._stops_before(number) else batch

    def _stops_before(self, number: int) -> bool:
        while len(self._stopped) <= number:
            self._stopped.append(any(self._stopped[-1:]) or self._decide(len(self._stopped)))
        return self._stopped[number]

    @span("go-ahead")
    def _decide(self, number: int) -> bool:
        replica = self._parallel
        key = f"{self._turn}/{replica.dp_rank}/{number}"
        if replica.tp_rank == 0 and replica.cp_rank == 0 and replica.is_first_stage:
            stop = self._abandoned()
            replica.tell(key, "stop" if stop else "go")
            return stop
        return replica.hear(key) == "stop"
