"""A step's responses from the fleet: token ids in, token ids and log-probabilities out. No torch, no vllm."""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import httpx

from megatron_rlsc.rollout.dispatch import Dispatch, Ended, Event, GroupDone, NoReplicaLeftError, ReplicaLost
from megatron_rlsc.rollout.fleet import Fleet
from megatron_rlsc.rollout.load import ResponseLength
from megatron_rlsc.rollout.request import Sampling, Task
from megatron_rlsc.types import Prompt, Sample

POLL_SECONDS = 2.0
"""Between two looks at a busy replica's figures."""
_REVIVE_SECONDS = 1.0


class RolloutClient:
    """Asks a fleet for samples of p_old at the sampling temperature, uncut by top-k, top-p or penalties.

    The seed of a request comes from the run's seed, the step and the prompt's place in it, and vLLM adds the sample's
    index. Equal seeds give equal samples for one composition of vLLM's batches, on one machine: how prompts fall on
    replicas and into batches depends on timing, and so does the last bit of a logit. What a resumed run learns from is
    therefore the journal, not the seed.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        samples_per_prompt: int,
        temperature: float,
        max_response_length: int,
        stop_token_ids: Sequence[int],
        seed: int,
        max_num_seqs: int = 64,
        timeout: float = 7200.0,
        stall_timeout: float = 300.0,
        poll_seconds: float = POLL_SECONDS,
        abandoned: Callable[[], bool] = lambda: False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            fleet: whom to ask; told of replicas that fail.
            samples_per_prompt: responses a prompt; at most the sidecars' --max-num-seqs.
            temperature: of sampling and of the log-probabilities; 0 is greedy, one sample a prompt.
            max_response_length: tokens, the stop token included.
            stop_token_ids: the run's one stop set. The sidecar's own idea of an end is switched off.
            seed: the run's.
            max_num_seqs: responses that a replica decodes at one time; no more than that are there, and one prompt's.
            timeout: seconds from a prompt's request to its answer, vLLM's queue included; the replica is lost then.
            stall_timeout: seconds after which a busy replica that generates nothing is lost.
            poll_seconds: between two looks at a busy replica.
            abandoned: whether the caller has lost interest: looked at once a second, it ends a stream early.
            transport: in place of the network, in tests.
        """
        self._fleet = fleet
        self._abandoned = abandoned
        self._sampling = Sampling(
            samples_per_prompt=samples_per_prompt,
            temperature=temperature,
            max_response_length=max_response_length,
            stop_token_ids=frozenset(stop_token_ids),
            seed=seed,
        )
        self._response_length = ResponseLength(max_response_length)
        self._max_num_seqs = max_num_seqs
        self._timeout, self._stall_timeout, self._poll_seconds = timeout, stall_timeout, poll_seconds
        self._transport = transport

    def generate(self, prompts: Sequence[Prompt], *, step: int, version: str) -> list[Sample]:
        """`samples_per_prompt` responses to each prompt, ordered by (group, sample). The rest is `stream`'s."""
        groups = list(self.stream(prompts, step=step, version=version))
        return [sample for group in sorted(groups, key=lambda group: group[0].group) for sample in group]

    def stream(
        self, prompts: Sequence[Prompt], *, step: int, version: str, without: Collection[int] = ()
    ) -> Iterator[list[Sample]]:
        """The groups of `begin`, one after the other. Closing the iterator abandons what is under way."""
        with self.begin(prompts, step=step, version=version, without=without) as begun:
            yield from begun.groups()

    def begin(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        version: str,
        without: Collection[int] = (),
        keep: Callable[[list[Sample]], None] | None = None,
    ) -> BegunRollout:
        """Asks at once; replicas go on while the caller does something else. Main thread.

        Args:
            prompts: the step's.
            step: goes into the seeds with the run's seed and the group.
            version: of the last push; a sample with a token of any other is refused.
            without: groups that nobody asks for.
            keep: is given each group as it ends, whether or not anybody waits for it, in another thread.

        Raises NoReplicaLeftError where no replica holds the version.
        """
        holders = [replica for replica in self._fleet.ready() if replica.version == version]
        if not holders:
            raise NoReplicaLeftError(f"no replica holds the weights of version {version!r}")
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def tell(event: Event) -> None:
            if keep is not None and isinstance(event, GroupDone):
                keep(event.samples)
            events.put(event)

        dispatch = Dispatch(
            [
                Task(prompt=prompt, group=i, step=step, version=version)
                for i, prompt in enumerate(prompts)
                if i not in without
            ],
            holders,
            sampling=self._sampling,
            response_length=self._response_length,
            max_num_seqs=self._max_num_seqs,
            timeout=self._timeout,
            stall_timeout=self._stall_timeout,
            poll_seconds=self._poll_seconds,
            transport=self._transport,
            tell=tell,
        )
        return BegunRollout(self._fleet, dispatch, events, self._abandoned)


class BegunRollout:
    """Prompts that replicas are answering. A context manager: leaving it abandons what is under way."""

    def __init__(
        self, fleet: Fleet, dispatch: Dispatch, events: queue.SimpleQueue[Event], abandoned: Callable[[], bool]
    ) -> None:
        self._fleet, self._events, self._abandoned = fleet, events, abandoned
        self._running = _Running(dispatch)

    def __enter__(self) -> BegunRollout:
        return self

    def __exit__(self, *error: object) -> None:
        self._running.stop()
        while not self._events.empty():  # a replica that was lost is lost, whether or not anybody waits for its samples
            event = self._events.get()
            if isinstance(event, ReplicaLost):
                self._fleet.lose(event.replica, event.reason)

    def groups(self, *, seconds: float = math.inf) -> Iterator[list[Sample]]:
        """The samples of one prompt after the other, each as soon as its last sibling has ended; group is the prompt's
        position. Ends early where the caller has lost interest, and after so many seconds. Main thread.

        The first failure cancels the rest. Raises NoReplicaLeftError where no replica holds the version any more and
        some may be had again, FleetError where none may; RolloutError, StaleSampleError, MalformedAnswerError.
        """
        end = time.monotonic() + seconds
        while not self._abandoned():
            try:
                event = self._events.get(timeout=min(max(end - time.monotonic(), 0.0), _REVIVE_SECONDS))
            except queue.Empty:
                if time.monotonic() >= end:
                    return
                self._fleet.revive()
                continue
            match event:
                case GroupDone():
                    yield event.samples
                case ReplicaLost():
                    self._fleet.lose(event.replica, event.reason)
                case Ended(error=None):
                    return
                case Ended(error=error):
                    assert error is not None
                    raise error


class _Running:
    """A dispatch in a thread."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(dispatch.run())
        self._thread = threading.Thread(target=self._run, name="rollout", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(asyncio.wait([self._task]))
        finally:
            self._loop.close()

    def stop(self) -> None:
        """Abandons what is under way and returns when nothing is; does nothing where it has ended."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
