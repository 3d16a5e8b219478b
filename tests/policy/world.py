"""Four processes that play every layout: a test names a function, and the first n of them run it as n gloo ranks.

Starting a process (torch, megatron) costs seconds, joining a process group a fraction of one: so the processes stay,
and each run makes its own process group and leaves it. A rank that fails or hangs takes all of them down; the next run
starts fresh ones.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any


class RankError(Exception):
    """A rank raised, died or hung; the message has its traceback."""


class World:
    """Answers `run`; owns the processes."""

    def __init__(self, max_ranks: int) -> None:
        self.max_ranks = max_ranks
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """`function(*args)` on ranks 0 .. size - 1 of a process group of its own; their answers, in order.

        The function must be importable by name, and may leave Megatron's groups behind. Raises RankError.
        """
        assert 1 <= size <= self.max_ranks
        if not self._ranks:
            self._ranks = [_start(rank) for rank in range(self.max_ranks)]
        with tempfile.TemporaryDirectory() as folder:
            order = pickle.dumps((size, f"file://{folder}/store", function, args, timeout))
            for _, pipe in self._ranks[:size]:
                pipe.send_bytes(order)
            try:
                return self._collect(size, timeout)
            except BaseException:  # the others wait for the failed rank, in a collective
                self.close()
                raise

    def _collect(self, size: int, timeout: float) -> list[Any]:
        pending = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks[:size])}
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(f"ranks {sorted(pending.values())} gave no answer in {timeout} s (stacks: stderr)")
            for pipe in ready:
                rank = pending.pop(pipe)
                try:
                    ok, answer = pickle.loads(pipe.recv_bytes())  # noqa: S301 our own process
                except EOFError:
                    raise RankError(f"rank {rank} died") from None
                if not ok:
                    raise RankError(f"rank {rank}:\n{answer}")
                answers[rank] = answer
        return [answers[rank] for rank in range(size)]

    def close(self) -> None:
        """Ends the processes, and what they have started."""
        for process, pipe in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            pipe.close()
        self._ranks = []


def _start(rank: int) -> tuple[Any, Connection]:
    """Not a daemon: Megatron's checkpoint writer has children of its own."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(rank, theirs))
    process.start()
    theirs.close()
    ready = ours.poll(120) and ours.recv_bytes()
    assert ready == b"ready", f"rank {rank} did not start"
    return process, ours


def _serve(rank: int, pipe: Connection) -> None:
    """Runs orders until the other end closes."""
    os.setsid()  # so that killing the group ends the checkpoint writer too
    pipe.send_bytes(b"ready")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            size, store, function, args, timeout = pickle.loads(pipe.recv_bytes())  # noqa: S301 our own process
        except EOFError:
            return
        faulthandler.dump_traceback_later(0.9 * timeout)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
        try:
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
            )
            answer = True, function(*args)
            dist.barrier()  # nobody leaves while another still reads from it
            if "megatron" in sys.modules:
                _leave_megatron()
            else:
                dist.destroy_process_group()
        except BaseException:  # noqa: BLE001 the other end raises it
            answer = False, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(pickle.dumps(answer))


def _leave_megatron() -> None:
    """Leaves no reference to a process group: until its last one is gone, a gloo group has threads that poll."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megatron_rlsc.policy.parallel import destroy_parallel

    destroy_parallel()
    for thing in gc.get_objects():
        if type(thing) is DistributedDataParallel:
            thing.grad_accs.clear()  # autograd's nodes, whose hooks hold the model where gc does not look
            thing.config.grad_scale_func = None  # the optimizer's, whose shards hold those nodes too
    del thing
    RotaryEmbedding.forward.cache_clear()
    gc.collect()
