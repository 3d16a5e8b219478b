"""One step's prompts on their way to the replicas and back: asked late, asked again elsewhere, handed over as they end.

It runs in a thread of its own, so that replicas stay busy while the trainer works on what is there already. The fleet
belongs to the main thread: what is learned of a replica goes there as an event.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import httpx
from tqdm import tqdm

from megatron_rlsc.rollout.fleet import Replica, ReplicaLostError
from megatron_rlsc.rollout.load import Load, ResponseLength, choose
from megatron_rlsc.rollout.metrics import watch
from megatron_rlsc.rollout.request import BrokenRequestError, RolloutError, Sampling, Task, ask
from megatron_rlsc.types import Sample

ATTEMPTS = 3
"""Of one prompt, at replicas that were lost or whose connection broke. An answer is never asked for again."""
CONNECT_ATTEMPTS = 3
"""Of one connection, within an attempt."""
CONNECT_TIMEOUT = 30.0
"""Seconds until a connection must stand."""


class NoReplicaLeftError(RolloutError):
    """No replica holds the version any more: push again, and ask for the whole step again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupDone:
    """All samples of one prompt, in order."""

    samples: list[Sample]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaLost:
    """To be taken out."""

    replica: Replica
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """Nothing comes after it."""

    error: Exception | None


Event = GroupDone | ReplicaLost | Ended


class Dispatch:
    """A step's prompts, and the replicas that hold its version."""

    def __init__(
        self,
        tasks: Sequence[Task],
        replicas: Sequence[Replica],
        *,
        sampling: Sampling,
        response_length: ResponseLength,
        max_num_seqs: int,
        timeout: float,
        stall_timeout: float,
        poll_seconds: float,
        transport: httpx.AsyncBaseTransport | None,
        tell: Callable[[Event], None],
    ) -> None:
        """The arguments are RolloutClient's. `tell` is called in the thread that `run` runs in."""
        self._waiting = deque(tasks)
        self._loads = [Load(replica=replica, samples_per_prompt=sampling.samples_per_prompt) for replica in replicas]
        self._asked: dict[asyncio.Task[list[Sample]], tuple[Load, Task]] = {}
        self._watches: dict[asyncio.Task[str], Load] = {}
        self._sampling = sampling
        self._response_length = response_length
        self._max_num_seqs = max_num_seqs
        self._timeout, self._stall_timeout, self._poll_seconds = timeout, stall_timeout, poll_seconds
        self._transport = transport
        self._tell = tell
        self._tokens = 0
        self._groups = len(tasks)

    async def run(self) -> None:
        """Tells of each group, of each replica that is lost, and of the end. Cancelling it abandons what is under way;
        vLLM stops generating when the connections close."""
        try:
            async with self._open() as http:
                try:
                    await self._run(http)
                finally:
                    await self._abandon()
        except Exception as error:  # noqa: BLE001 - handed to the other thread, which raises it
            self._tell(Ended(error=error))
        else:
            self._tell(Ended(error=None))

    async def _run(self, http: httpx.AsyncClient) -> None:
        seconds = {"poll_seconds": self._poll_seconds, "stall_timeout": self._stall_timeout}
        self._watches = {asyncio.create_task(watch(http, load, **seconds)): load for load in self._loads}
        with tqdm(desc="rollout", unit="tok", unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as bar:
            while self._waiting or self._asked:
                self._send(http)
                under_way = [*self._asked, *self._watches]
                await asyncio.wait(under_way, timeout=self._poll_seconds, return_when=asyncio.FIRST_COMPLETED)
                # What has been answered stays answered, though its replica be lost in this same round.
                answered = [asked for asked in self._asked if asked.done()]
                for asked in sorted(answered, key=lambda asked: asked.exception() is not None):
                    if asked in self._asked:
                        self._settle(asked)
                for watching in [watching for watching in self._watches if watching.done()]:
                    self._lose(self._watches[watching], watching.result())
                self._show(bar)

    def _send(self, http: httpx.AsyncClient) -> None:
        """Asks for as many prompts as there is room for."""
        if not self._loads:
            raise NoReplicaLeftError(
                f"no replica is left that holds the step's weights; {len(self._waiting)} prompts are"
            )
        while self._waiting:
            load = choose(self._loads, response_length=self._response_length.expected, max_num_seqs=self._max_num_seqs)
            if load is None:
                return
            task = self._waiting.popleft()
            load.send(task.group, len(task.prompt.token_ids))
            self._asked[asyncio.create_task(ask(http, load.replica, self._sampling, task))] = load, task

    def _settle(self, done: asyncio.Task[list[Sample]]) -> None:
        load, task = self._asked[done]
        try:
            samples = done.result()
        except ReplicaLostError as error:
            self._lose(load, str(error))
        except BrokenRequestError as error:
            self._take_back(done, str(error))
        else:
            del self._asked[done]
            load.finish(task.group)
            for sample in samples:
                self._response_length.add(len(sample.response_token_ids))
                self._tokens += len(sample.response_token_ids)
            self._tell(GroupDone(samples=samples))

    def _lose(self, load: Load, reason: str) -> None:
        """Goes on without a replica: its prompts go to the others, first of all."""
        self._tell(ReplicaLost(replica=load.replica, reason=reason))
        self._loads.remove(load)
        for watching in [watching for watching, watched in self._watches.items() if watched is load]:
            watching.cancel()
            del self._watches[watching]
        for asked in [asked for asked, (asked_load, _) in self._asked.items() if asked_load is load]:
            self._take_back(asked, reason)

    def _take_back(self, asked: asyncio.Task[list[Sample]], reason: str) -> None:
        """Raises RolloutError where the prompt has had its attempts."""
        load, task = self._asked.pop(asked)
        asked.cancel()
        load.finish(task.group)
        if task.attempt == ATTEMPTS:
            raise RolloutError(
                f"prompt {task.prompt.index} (group {task.group}) has had no answer in {ATTEMPTS} attempts, the last "
                f"at {load.replica}: {reason}"
            )
        self._waiting.appendleft(replace(task, attempt=task.attempt + 1))

    async def _abandon(self) -> None:
        left = [*self._asked, *self._watches]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _show(self, bar: tqdm) -> None:
        generated = max(self._tokens, sum(load.generated for load in self._loads), bar.n)
        bar.set_postfix_str(
            f"{self._groups - len(self._waiting) - len(self._asked)}/{self._groups} prompts", refresh=False
        )
        bar.update(generated - bar.n)

    def _open(self) -> httpx.AsyncClient:
        """No proxies: the replicas are here or on the cluster's network. No connection is used twice: vLLM closes idle
        ones, and one that closes under a request looks like a replica that fails."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        transport = self._transport or httpx.AsyncHTTPTransport(retries=CONNECT_ATTEMPTS - 1, limits=limits)
        timeout = httpx.Timeout(self._timeout, connect=min(CONNECT_TIMEOUT, self._timeout))
        return httpx.AsyncClient(timeout=timeout, transport=transport, trust_env=False)
