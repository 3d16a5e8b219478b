"""A checkpoint on its way to the disk: planned by all ranks, written now or behind, sealed with checksums, renamed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial as partial_call
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX

from megatron_rlsc.conversion.folders import set_latest, step_dir
from megatron_rlsc.conversion.manifest import read_sums, sum_file, write_manifest, write_sums
from megatron_rlsc.conversion.metadata_file import NAME as METADATA
from megatron_rlsc.conversion.metadata_file import read_metadata
from megatron_rlsc.disk import REMEDY, DiskError, flush, free_bytes, readable, used_bytes, write_whole
from megatron_rlsc.policy.checkpoint import RESHARDABLE, RNG, checkpoint_state
from megatron_rlsc.policy.model import LogprobGPTModel
from megatron_rlsc.policy.parallel import Parallel
from megatron_rlsc.policy.rng import sharded_rng_state
from megatron_rlsc.run_folder.checkpoints import deleted
from megatron_rlsc.types import Progress

SETTINGS, SUMS = "config.toml", ".sums-"
"""What it holds beside Megatron's files: the run's settings and, while it is written, each rank's checksums."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Save:
    """A checkpoint on its way to the disk: beside its place, until `seal` moves it there."""

    final: Path
    """`iter_NNNNNNN`, or `release`."""
    partial: Path
    """A name that no other run's save has: what a killed one has left may still be written to."""
    step: int | None
    settings: str
    """The run's, as TOML."""
    request: AsyncRequest
    """Megatron's: what each rank writes, and what all of them do when it is written."""


def begin_save(
    folder: Path,
    step: int | None,
    *,
    chunks: Sequence[LogprobGPTModel],
    parallel: Parallel,
    optimizer: MegatronOptimizer | None = None,
    schedule: OptimizerParamScheduler | None = None,
    progress: Progress | None = None,
    settings: str = "",
) -> Save:
    """Plans what each rank writes to `folder/iter_NNNNNNN` (or `release`, for step None); nothing large is written yet.

    A collective; the folder must be shared by all ranks. Without an optimizer only the weights are saved. `settings`
    become a config.toml in it.
    """
    final = step_dir(folder, step)
    partial = final.with_name(f".{final.name}.partial-{parallel.nonce}")
    if parallel.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    parallel.barrier()
    state = checkpoint_state(chunks, optimizer, schedule, is_loading=False) | {"iteration": step}
    if progress is not None:
        state |= {"progress": asdict(progress), RNG: sharded_rng_state(parallel)}
    with _explained(partial, final, parallel):
        request = dist_checkpointing.save(
            state, str(partial), async_sharded_save=True, content_metadata=dict(RESHARDABLE)
        )
    assert request is not None
    if request.async_fn is not None:
        request = request._replace(async_fn=partial_call(_write_and_sum, request.async_fn, partial, parallel.rank))
    return Save(final=final, partial=partial, step=step, settings=settings, request=request)


def write_now(save: Save, parallel: Parallel) -> None:
    """Writes and seals it. A collective. Raises DiskError where the disk did not take it all: nothing of it is left."""
    with _explained(save.partial, save.final, parallel):
        save.request.execute_sync()
        seal(save, parallel)


def write_behind(save: Save, queue: AsyncCallsQueue, parallel: Parallel) -> None:
    """Copies what is on GPUs to the host and has a fork of each rank write it; `finish` seals it. A collective."""
    with _explained(save.partial, save.final, parallel):
        save.request.add_finalize_fn(partial_call(seal, save, parallel))
        queue.schedule_async_request(save.request)


def finish(save: Save, queue: AsyncCallsQueue, parallel: Parallel, *, wait: bool) -> bool:
    """Seals what `write_behind` began, if all ranks have written theirs, or waits until they have. A collective.

    Returns whether it is sealed; raises as `write_now`.
    """
    with _explained(save.partial, save.final, parallel):
        return bool(queue.maybe_finalize_async_calls(blocking=wait))


def seal(save: Save, parallel: Parallel) -> None:
    """Sums what rank 0 has written beside the ranks' shards, moves the folder to its place, and names it the latest."""
    parallel.barrier()
    if parallel.rank == 0:
        storage = read_metadata(save.partial / METADATA).storage_data.values()
        shards = {info.relative_path for info in storage}
        sums = {file.name: file for path in save.partial.glob(f"{SUMS}*") for file in read_sums(path)}
        if absent := shards - sums.keys():
            raise OSError(errno.EIO, f"no checksum of {', '.join(sorted(absent))}: the rank that wrote it has died")
        for path in save.partial.glob(f"{SUMS}*"):
            path.unlink()
        if save.settings:
            write_whole(save.partial / SETTINGS, save.settings.encode())
        others = [path for path in save.partial.iterdir() if path.name not in sums]
        write_manifest(save.partial, [*sums.values(), *map(sum_file, others)])
        flush(save.partial)
        if save.final.exists():  # a run that went back a step comes here a second time
            save.final.rename(deleted(save.final))
        save.partial.rename(save.final)
        flush(save.final.parent)
        shutil.rmtree(deleted(save.final), ignore_errors=True)
        set_latest(save.final.parent, save.step)
    parallel.barrier()


def save_checkpoint(
    folder: Path,
    step: int | None,
    *,
    chunks: Sequence[LogprobGPTModel],
    parallel: Parallel,
    optimizer: MegatronOptimizer | None = None,
    schedule: OptimizerParamScheduler | None = None,
    progress: Progress | None = None,
) -> Path:
    """`begin_save` and `write_now`. Returns the folder."""
    save = begin_save(
        folder, step, chunks=chunks, parallel=parallel, optimizer=optimizer, schedule=schedule, progress=progress
    )
    write_now(save, parallel)
    return save.final


def _write_and_sum(write: Callable[..., None], folder: Path, rank: int, *arguments: Any) -> None:
    """Megatron's writer, and then the checksums of this rank's files; in a fork of the rank where saves are behind."""
    write(*arguments)
    sums = [sum_file(path) for path in sorted(folder.glob(f"__{rank}_*{DEFAULT_SUFFIX}"))]
    write_sums(folder / f"{SUMS}{rank}", sums)


@contextmanager
def _explained(partial: Path, final: Path, parallel: Parallel) -> Iterator[None]:
    """Turns what a failed save raises into a DiskError, but for a rank that died meanwhile: no fault of the disk."""
    try:
        yield
    except (CheckpointException, RuntimeError, OSError) as error:  # torch's writer has words of its own for a full disk
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise
        raise _not_written(partial, final, error, parallel) from error


def _not_written(partial: Path, final: Path, error: BaseException, parallel: Parallel) -> DiskError:
    """What became of a save, with what was free when it ended; rank 0 removes what there is of it."""
    cause: BaseException | str = error
    if isinstance(error, CheckpointException):  # with every rank's failure, and that on rank 0 alone
        cause = next((cause for cause, _ in error.failures.values()), "rank 0 knows the cause")
    written, free = readable(used_bytes(partial)), readable(free_bytes(partial))
    if parallel.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    return DiskError(
        f"{final} could not be written ({cause}): after {written} of it, {free} was free. What was there before is "
        f"whole. {REMEDY}"
    )
