"""The client against servers that we write here: what it sends, every malformed answer, how prompts are spread over
replicas, and what becomes of those of a replica that fails. No vLLM; test_faults.py has the real one."""

from __future__ import annotations

import asyncio
import copy
import errno
import json
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from megatron_rlsc.rollout.client import RolloutClient
from megatron_rlsc.rollout.dispatch import NoReplicaLeftError
from megatron_rlsc.rollout.fleet import Fleet, Replica
from megatron_rlsc.rollout.request import RolloutError, again_seed, request_seed
from megatron_rlsc.rollout.responses import MalformedAnswerError, StaleSampleError
from megatron_rlsc.types import Prompt, Sample

Handler = Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response]]
STOP, OTHER_STOP, VERSION, LIMIT = 3, 5, "run:7", 4
PROMPTS = [Prompt(index=8, text="", token_ids=(1, 2)), Prompt(index=6, text="", token_ids=(1,))]


def choice(index: int, token_ids: list[int], finish_reason: str, version: str = VERSION) -> dict[str, Any]:
    return {
        "index": index,
        "token_ids": token_ids,
        "logprobs": {"content": [{"token_id": token, "logprob": -0.5} for token in token_ids]},
        "finish_reason": finish_reason,
        "weight_versions": [{"version": version, "start": 0, "end": len(token_ids)}],
    }


GOOD = {"choices": [choice(1, [STOP], "stop"), choice(0, [9, 9, 9, 9], "length")]}
"""Out of order, as vLLM may answer; the stop token alone, and a response cut at the limit."""


def build_fleet(replicas: int = 1) -> Fleet:
    """Of servers of others, all of which hold VERSION."""
    return Fleet([Replica(index=i, url=f"http://{i}", key="secret", version=VERSION) for i in range(replicas)])


def build_client(handler: Handler, fleet: Fleet | None = None, **changes: Any) -> RolloutClient:
    arguments: dict[str, Any] = {
        "samples_per_prompt": 2,
        "temperature": 0.5,
        "max_response_length": LIMIT,
        "stop_token_ids": (OTHER_STOP, STOP),
        "seed": 1,
        "timeout": 5,
        "poll_seconds": 0.01,
        "transport": httpx.MockTransport(handler),
    }
    return RolloutClient(fleet or build_fleet(), **{**arguments, **changes})


def test_a_good_answer_becomes_samples() -> None:
    samples = build_client(lambda request: httpx.Response(200, json=GOOD)).generate(PROMPTS, step=0, version=VERSION)
    assert [(s.group, s.sample, s.prompt_index, s.response_token_ids, s.finish_reason) for s in samples] == [
        (0, 0, 8, (9, 9, 9, 9), "length"),
        (0, 1, 8, (3,), "stop"),
        (1, 0, 6, (9, 9, 9, 9), "length"),
        (1, 1, 6, (3,), "stop"),
    ]
    assert samples[0].rollout_logprobs == (-0.5,) * 4
    assert samples[0].version == VERSION


def test_the_request_asks_for_the_uncut_distribution_and_one_stop_set() -> None:
    requests: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/metrics":
            requests.append(request)
        return httpx.Response(200, json=GOOD)

    build_client(handler).generate(PROMPTS[:1], step=5, version=VERSION)
    (request,) = requests
    assert request.headers["Authorization"] == "Bearer secret"
    assert json.loads(request.content) == {
        "request_id": "step-5-group-0",
        "token_ids": [1, 2],
        "sampling_params": {
            "n": 2,
            "temperature": 0.5,
            "max_tokens": LIMIT,
            "stop_token_ids": [STOP, OTHER_STOP],
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
            "seed": request_seed(1, 5, 0),
        },
    }


def test_seeds_differ_in_run_step_and_group() -> None:
    seeds = {request_seed(run, step, group) for run in range(4) for step in range(12) for group in range(12)}
    assert len(seeds) == 4 * 12 * 12
    assert max(seeds) < 2**48
    # int.from_bytes(sha256(b"1234:0:0").digest()[:6], "big"): a journal's seeds must not change under us.
    assert request_seed(1234, 0, 0) == 268149602545406


def test_a_run_that_has_gone_back_asks_with_other_seeds() -> None:
    """The same again for each number of times: a run that is resumed after it has gone back goes on with those."""
    assert again_seed(7, 0) == 7
    seeds = {again_seed(run, times) for run in range(4) for times in range(8)}
    assert len(seeds) == 4 * 8
    assert again_seed(7, 2) == again_seed(7, 2) < 2**48


def edit(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(answer: dict[str, Any]) -> None:
        target: Any = answer
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return apply


FIRST = ["choices", 0]
"""Sample 1, the stop token alone."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit([*FIRST, "logprobs", "content"], []), "1 tokens with 0 log-probabilities"),
        (edit([*FIRST, "logprobs", "content", 0, "logprob"], -9999.0), "log-probability -9999.0 at token 0"),
        (edit([*FIRST, "logprobs", "content", 0, "logprob"], "nan"), "log-probability nan"),
        (edit([*FIRST, "logprobs", "content", 0, "logprob"], None), "TypeError"),
        (edit([*FIRST, "logprobs"], None), "TypeError"),
        (edit([*FIRST, "token_ids"], [9]), "finished by 'stop' after 1 tokens .* stop tokens at \\[\\]"),
        (edit(FIRST, choice(1, [STOP, 9, STOP], "stop")), "stop tokens at \\[0, 2\\]"),
        (edit(FIRST, choice(1, [9, 9, 9, 9, STOP], "stop")), "'stop' after 5 tokens \\(the limit is 4\\)"),
        (edit(FIRST, choice(1, [9, 9], "length")), "'length' after 2 tokens \\(the limit is 4\\)"),
        (edit(FIRST, choice(1, [9, 9, 9, STOP], "length")), "'length' after 4 tokens .* stop tokens at \\[3\\]"),
        (edit(FIRST, choice(1, [], "error")), "finished by 'error'"),
        (edit([*FIRST, "index"], 0), "2 choices \\[0\\], 2 were asked for"),
        (edit(["choices"], GOOD["choices"][:1]), "1 choices \\[1\\], 2 were asked for"),
        (edit(["choices"], None), "TypeError"),
        (edit(["choices"], [{}, {}]), "KeyError"),
    ],
)
def test_malformed_answers_are_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    answer = copy.deepcopy(GOOD)
    change(answer)
    client = build_client(lambda request: httpx.Response(200, json=answer))
    with pytest.raises(MalformedAnswerError, match=f"prompt 8 \\(group 0\\).*{message}"):
        client.generate(PROMPTS[:1], step=0, version=VERSION)


@pytest.mark.parametrize(
    "spans",
    [
        None,
        [],
        [{"version": "run:6", "start": 0, "end": 1}],
        [{"version": VERSION, "start": 0, "end": 0}],
        [{"version": "run:6", "start": 0, "end": 1}, {"version": VERSION, "start": 1, "end": 1}],
    ],
)
def test_a_sample_that_is_not_of_the_version_throughout_is_refused(spans: Any) -> None:
    answer = copy.deepcopy(GOOD)
    edit([*FIRST, "weight_versions"], spans)(answer)
    client = build_client(lambda request: httpx.Response(200, json=answer))
    with pytest.raises(StaleSampleError, match=r"prompt 8 .*sample 1.* not all of 'run:7'"):
        client.generate(PROMPTS[:1], step=0, version=VERSION)


def test_an_answer_is_not_asked_for_twice() -> None:
    """Retries are for connections that were never made; an error that the server took the time to write is final."""
    paths: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        return httpx.Response(400, json={"error": "n must be at most 1"})

    with pytest.raises(RolloutError, match=r"answered 400: .*n must be at most 1"):
        build_client(handler).generate(PROMPTS[:1], step=0, version=VERSION)
    assert [path for path in paths if path != "/metrics"] == ["/inference/v1/generate"]


def test_an_empty_stop_set_is_refused() -> None:
    with pytest.raises(ValueError, match="stop_token_ids is empty"):
        build_client(lambda request: httpx.Response(200), stop_token_ids=())


# Several replicas


MANY = [Prompt(index=i, text="", token_ids=(1,) * 10) for i in range(12)]


class Servers:
    """What several replicas answer, each as its own function of (group) -> response says; and what they were asked."""

    def __init__(self, *behaviours: Callable[[int], Awaitable[httpx.Response]]) -> None:
        self.behaviours = behaviours
        self.asked: list[tuple[int, int]] = []
        """(replica, group)"""
        self.seeds: dict[int, set[int]] = {}
        """{group: seeds}"""
        self.well = [True] * len(behaviours)
        self.metrics = [""] * len(behaviours)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        replica = int(request.url.host)
        if request.url.path == "/metrics":
            return httpx.Response(200, text=self.metrics[replica])
        if request.url.path == "/health":
            return httpx.Response(200 if self.well[replica] else 503)
        body = json.loads(request.content)
        group = int(body["request_id"].split("-")[3])
        self.asked.append((replica, group))
        self.seeds.setdefault(group, set()).add(body["sampling_params"]["seed"])
        return await self.behaviours[replica](group)


def after(seconds: float) -> Callable[[int], Awaitable[httpx.Response]]:
    async def answer(group: int) -> httpx.Response:
        await asyncio.sleep(seconds)
        return httpx.Response(200, json=GOOD)

    return answer


async def break_off(group: int) -> httpx.Response:
    raise httpx.ReadError("connection reset")


async def fail(group: int) -> httpx.Response:
    return httpx.Response(500, text="the engine is dead")


def test_a_slow_replica_is_given_less() -> None:
    """Room for one prompt's two sequences, and one more waits: a replica ten times as fast does most of the work, and
    the slow one is never given more than it can hold."""
    servers = Servers(after(0.3), after(0.01))
    samples = build_client(servers, build_fleet(2), max_num_seqs=2).generate(MANY, step=0, version=VERSION)
    assert [(sample.group, sample.sample) for sample in samples] == [(g, s) for g in range(12) for s in range(2)]
    assert sum(replica == 0 for replica, _ in servers.asked) == 2


def test_groups_are_handed_over_as_they_end() -> None:
    release = threading.Event()

    async def answer(group: int) -> httpx.Response:
        while group == 0 and not release.is_set():
            await asyncio.sleep(0.01)
        return httpx.Response(200, json=GOOD)

    stream = build_client(Servers(answer)).stream(MANY[:4], step=0, version=VERSION)
    before = [next(stream)[0].group for _ in range(3)]
    release.set()
    assert sorted(before) == [1, 2, 3]
    assert [group[0].group for group in stream] == [0]


def test_a_consumer_that_stops_stops_the_requests() -> None:
    cancelled = threading.Event()

    async def answer(group: int) -> httpx.Response:
        try:
            await asyncio.sleep(60 if group else 0)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return httpx.Response(200, json=GOOD)

    stream = build_client(Servers(answer)).stream(MANY[:2], step=0, version=VERSION)
    assert next(stream)[0].group == 0
    began = time.monotonic()
    stream.close()
    assert cancelled.is_set()
    assert time.monotonic() - began < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "rollout"]


@pytest.mark.parametrize("failure", [break_off, fail])
def test_the_prompts_of_a_lost_replica_go_to_the_others(failure: Callable[[int], Awaitable[httpx.Response]]) -> None:
    servers, fleet = Servers(failure, after(0.01)), build_fleet(2)
    servers.well[0] = False
    samples = build_client(servers, fleet).generate(MANY, step=0, version=VERSION)
    assert len(samples) == 24
    assert all(len(seeds) == 1 for seeds in servers.seeds.values()), "another attempt has another seed"
    assert [replica.state for replica in fleet.replicas] == ["away", "ready"]
    assert [replica.version for replica in fleet.replicas] == ["", VERSION]
    assert fleet.replicas[0].reason.startswith("POST http://0/inference/v1/generate")


def test_a_replica_that_is_shut_down_in_order_is_lost_too() -> None:
    """It answers 200, and every response has ended in the middle."""

    async def answer(group: int) -> httpx.Response:
        return httpx.Response(200, json={"choices": [choice(i, [9], "abort") for i in range(2)]})

    servers, fleet = Servers(answer, after(0.01)), build_fleet(2)
    assert len(build_client(servers, fleet).generate(MANY, step=0, version=VERSION)) == 24
    assert "it has broken off a prompt" in fleet.replicas[0].reason


def test_a_broken_connection_to_a_replica_that_is_well_is_tried_again_within_a_bound() -> None:
    broken: list[int] = []

    async def answer(group: int) -> httpx.Response:
        if group == 3 and len(broken) < 2:
            broken.append(group)
            raise httpx.ReadError("connection reset")
        return httpx.Response(200, json=GOOD)

    servers, fleet = Servers(answer), build_fleet()
    assert len(build_client(servers, fleet).generate(MANY, step=0, version=VERSION)) == 24
    assert broken == [3, 3]
    assert fleet.replicas[0].state == "ready"

    with pytest.raises(RolloutError, match=r"prompt 0 \(group 0\) has had no answer in 3 attempts, .*connection reset"):
        build_client(Servers(break_off)).generate(MANY[:1], step=0, version=VERSION)


def test_an_error_of_a_living_replica_is_final() -> None:
    servers, fleet = Servers(fail, after(0.01)), build_fleet(2)
    with pytest.raises(RolloutError, match="answered 500: the engine is dead"):
        build_client(servers, fleet).generate(MANY, step=0, version=VERSION)
    assert [replica.state for replica in fleet.replicas] == ["ready", "ready"]


def test_when_all_that_hold_the_version_are_lost_another_push_is_wanted() -> None:
    servers, fleet = Servers(fail, after(0.01)), build_fleet(2)
    servers.well[0] = False
    fleet.replicas[1].version = "another"
    client = build_client(servers, fleet)
    with pytest.raises(NoReplicaLeftError, match="no replica is left that holds the step's weights"):
        client.generate(MANY, step=0, version=VERSION)
    with pytest.raises(NoReplicaLeftError, match=f"no replica holds the weights of version '{VERSION}'"):
        client.generate(MANY, step=0, version=VERSION)
    assert all(replica == 0 for replica, _ in servers.asked), "a replica with other weights was asked"


def test_a_replica_that_generates_nothing_is_lost() -> None:
    """Its figures are there, and stand still; /health would be 200."""
    servers, fleet = Servers(after(60), after(0.01)), build_fleet(2)
    servers.metrics[0] = "vllm:generation_tokens_total 7.0"
    samples = build_client(servers, fleet, stall_timeout=0.3).generate(MANY, step=0, version=VERSION)
    assert len(samples) == 24
    assert fleet.replicas[0].state == "away"
    assert "has generated nothing for" in fleet.replicas[0].reason


def test_a_replica_that_generates_slowly_is_not_lost() -> None:
    servers, fleet = Servers(after(1.0)), build_fleet()

    class Growing(list[str]):
        def __getitem__(self, index: Any) -> str:
            return f"vllm:generation_tokens_total {time.monotonic()}e3"

    servers.metrics = Growing()
    assert len(build_client(servers, fleet, stall_timeout=0.3).generate(MANY[:1], step=0, version=VERSION)) == 2
    assert fleet.replicas[0].state == "ready"


def test_a_prompt_that_is_not_answered_in_time_loses_the_replica() -> None:
    async def answer(group: int) -> httpx.Response:
        raise httpx.ReadTimeout("")

    servers, fleet = Servers(answer, after(0.01)), build_fleet(2)
    assert len(build_client(servers, fleet).generate(MANY, step=0, version=VERSION)) == 24
    assert "not answered a prompt in time (--rollout-timeout)" in fleet.replicas[0].reason


def test_answers_are_taken_as_they_are_and_the_rest_later() -> None:
    """Of two prompts one is answered at once and the other when it is let go: who does not wait has the first."""
    let_go = threading.Event()

    async def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/metrics" and json.loads(request.content)["token_ids"] == [1]:
            while not let_go.is_set():
                await asyncio.sleep(0.01)
        return httpx.Response(200, json=GOOD)

    with build_client(handler).begin(PROMPTS, step=-1, version=VERSION) as begun:
        found: list[int] = []
        while not found:
            found += [group[0].group for group in begun.groups(seconds=0)]
        assert found == [0]
        start = time.monotonic()
        assert list(begun.groups(seconds=0.3)) == [] and 0.3 <= time.monotonic() - start < 5
        let_go.set()
        assert [group[0].group for group in begun.groups()] == [1]


def test_a_group_is_kept_as_it_ends_whether_or_not_anybody_waits() -> None:
    """And what cannot be kept is heard of by whoever waits: here a disk that is full at the second."""
    kept: queue.SimpleQueue[int] = queue.SimpleQueue()
    let_go = threading.Event()

    async def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/metrics" and json.loads(request.content)["token_ids"] == [1]:
            while not let_go.is_set():
                await asyncio.sleep(0.01)
        return httpx.Response(200, json=GOOD)

    def keep(group: list[Sample]) -> None:
        kept.put(group[0].group)
        if group[0].group == 1:
            raise OSError(errno.ENOSPC, "no space left")

    with build_client(handler).begin(PROMPTS, step=2, version=VERSION, keep=keep) as begun:
        assert kept.get(timeout=60) == 0
        let_go.set()
        assert kept.get(timeout=60) == 1
        with pytest.raises(OSError, match="no space left"):
            list(begun.groups())
