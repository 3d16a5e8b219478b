"""A run's checkpoints while it runs: written now or behind the next step, one at a time; the old ones go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_rlsc.policy import children
from megatron_rlsc.policy.policy import Policy
from megatron_rlsc.policy.save import Save, finish, write_behind, write_now
from megatron_rlsc.run_folder.checkpoints import prune, sweep
from megatron_rlsc.types import Progress


class Saver:
    """Every method is a collective of all ranks, and raises DiskError where a checkpoint could not be written."""

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        *,
        behind: bool,
        keep_last: int,
        keep_best: str,
        metrics: Path,
        settings: str,
        saved: int,
        spared: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        """
        Args:
            folder: of the checkpoints; what a killed save has left there is deleted.
            policy: what is saved.
            behind: write while training goes on (megatron.core.dist_checkpointing's asynchronous save).
            keep_last, keep_best, metrics: see `checkpoints.prune`.
            settings: the run's, as TOML; kept in each checkpoint.
            saved: the step of the newest one; 0 where there is none.
            spared: steps that the run could go back to; see `checkpoints.prune`. Asked on rank 0.
        """
        self.saved = saved
        """The last step that is on its way to the disk, or there."""
        self._folder, self._policy, self._parallel = folder, policy, policy.parallel
        self._keep_last, self._keep_best, self._metrics = keep_last, keep_best, metrics
        self._settings, self._spared = settings, spared
        self._queue = AsyncCallsQueue() if behind else None
        self._under_way: Save | None = None
        children.keep()
        if self._parallel.rank == 0:
            sweep(folder)

    def save(self, progress: Progress) -> None:
        """Saves what the policy is now, when the save before it has reached the disk."""
        self.wait()
        save = self._policy.begin_save(self._folder, progress, settings=self._settings)
        self.saved = progress.step
        if self._queue is None:
            write_now(save, self._parallel)
            self._prune()
        else:
            write_behind(save, self._queue, self._parallel)
            self._under_way = save

    def look(self) -> None:
        """Finishes the save that is under way if it has been written; never waits for the disk."""
        self._finish(wait=False)

    def wait(self) -> None:
        """Returns when nothing is under way."""
        self._finish(wait=True)

    def _finish(self, *, wait: bool) -> None:
        if self._under_way is None or self._queue is None:
            return
        if finish(self._under_way, self._queue, self._parallel, wait=wait):
            self._under_way = None
            self._prune()

    def _prune(self) -> None:
        if self._parallel.rank == 0:
            prune(
                self._folder,
                keep_last=self._keep_last,
                keep_best=self._keep_best,
                metrics=self._metrics,
                spared=self._spared(),
            )
