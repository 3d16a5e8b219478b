"""The next step's responses, generated while a step trains (--rollout-lead 1).

A step then takes as long as the slower of the two, and learns from responses of the weights before its policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from megatron_rlsc.config import Config
from megatron_rlsc.policy.parallel import Parallel
from megatron_rlsc.rollout.client import BegunRollout
from megatron_rlsc.rollout.dispatch import NoReplicaLeftError
from megatron_rlsc.rollout.fleet import FleetError
from megatron_rlsc.rollout.request import RolloutError
from megatron_rlsc.sampler import Sampler
from megatron_rlsc.tracking import Timer, Tracker
from megatron_rlsc.types import Progress


class NoAhead:
    """Of a run that samples and trains in turn."""

    def meanwhile(self, progress: Progress, timer: Timer) -> AbstractContextManager[None]:
        return nullcontext()


class Ahead(NoAhead):
    """On every rank; rank 0 has the sampler that is asked."""

    def __init__(
        self,
        sampler: Sampler,
        parallel: Parallel,
        tracker: Tracker,
        *,
        prompts_per_step: int,
        total: int,
        abandoned: Callable[[], bool],
    ) -> None:
        """
        Args:
            total: the last step to do: nothing is begun beyond it.
            abandoned: whether the run is to end at once.
        """
        self._sampler, self._parallel, self._tracker = sampler, parallel, tracker
        self._prompts_per_step, self._total, self._abandoned = prompts_per_step, total, abandoned

    @contextmanager
    def meanwhile(self, progress: Progress, timer: Timer) -> Iterator[None]:
        """Has the sampler answer the prompts of the step after the one that is trained in the block, into the journal,
        and waits for what is left then, as part of the phase `rollout`. The weights that it has must be those of
        `progress`, and none may be pushed inside: a response would be of both. What comes of a block that fails is
        dropped, but for what is in the journal.

        Replicas that are lost cost no more than time: the step asks again for what is missing when it comes.
        """
        step, begun = progress.step + 2, None
        if step <= self._total:
            try:
                begun = self._sampler.begin(step, progress.prompts + self._prompts_per_step, progress.version)
            except NoReplicaLeftError:  # they were lost with the last of the samples that are trained on
                self._tracker.say(f"step {step} is not sampled ahead: no replica has the weights")
        with begun or nullcontext():
            yield
            with timer.phase("rollout"):
                if begun is not None:
                    self._wait(begun, step)
                # A step's responses may take longer than a collective may: other ranks wait for them here.
                self._parallel.broadcast_bytes(b"")

    def _wait(self, begun: BegunRollout, step: int) -> None:
        try:
            for _ in begun.groups():
                pass
        except NoReplicaLeftError:
            self._tracker.say(f"step {step} is not all sampled ahead: its replicas were lost")
        except (FleetError, RolloutError):  # a SIGTERM may have reached the sidecars as well
            if not self._abandoned():
                raise


def open_ahead(
    config: Config, sampler: Sampler, parallel: Parallel, tracker: Tracker, *, abandoned: Callable[[], bool]
) -> NoAhead:
    """What the loop has generated while a step trains, on this rank."""
    if not config.rollout.rollout_lead:
        return NoAhead()
    prompts, total = config.data.prompts_per_step, config.train.train_iters
    return Ahead(sampler, parallel, tracker, prompts_per_step=prompts, total=total, abandoned=abandoned)
