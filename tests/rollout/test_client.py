"""The client against a server that we write here: what it sends, and every malformed answer. No vLLM."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from megatron_rlsc.rollout.client import RolloutClient, RolloutError, request_seed
from megatron_rlsc.rollout.responses import MalformedAnswerError, StaleSampleError
from megatron_rlsc.types import Prompt

Handler = Callable[[httpx.Request], httpx.Response]
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


def build_client(handler: Handler) -> RolloutClient:
    return RolloutClient(
        "http://sidecar",
        key="secret",
        samples_per_prompt=2,
        temperature=0.5,
        max_response_length=LIMIT,
        stop_token_ids=(OTHER_STOP, STOP),
        seed=1,
        timeout=1,
        transport=httpx.MockTransport(handler),
    )


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
        (edit(FIRST, choice(1, [], "abort")), "finished by 'abort'"),
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
    assert paths == ["/inference/v1/generate"]


def test_a_server_that_is_not_there() -> None:
    client = RolloutClient(
        "http://127.0.0.1:9",
        key="k",
        samples_per_prompt=1,
        temperature=1.0,
        max_response_length=1,
        stop_token_ids=(0,),
        seed=0,
        timeout=5,
    )
    with pytest.raises(RolloutError, match=r"GET http://127\.0\.0\.1:9/health: ConnectError"):
        client.connect(longest_prompt=1)


def serving(model: str, unlocked_status: int) -> Handler:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.headers.get("Authorization") != "Bearer secret":
            return httpx.Response(unlocked_status)
        return httpx.Response(200, json={"data": [{"id": model, "max_model_len": 10}]})

    return handler


def test_a_server_without_a_lock_is_refused() -> None:
    with pytest.raises(RolloutError, match="answers 200 to a request without the key"):
        build_client(serving("policy", 200)).connect(longest_prompt=6)


def test_a_server_that_is_not_ours_is_refused() -> None:
    with pytest.raises(RolloutError, match="serves Qwen, not 'policy'"):
        build_client(serving("Qwen", 401)).connect(longest_prompt=6)


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_sent() -> None:
    client = build_client(serving("policy", 401))
    client.connect(longest_prompt=6)
    long = Prompt(index=0, text="", token_ids=(1,) * 7)
    with pytest.raises(RolloutError, match="a prompt of 7 tokens and a response of 4 need 11, the sidecar holds 10"):
        client.generate([long], step=0, version=VERSION)


def test_an_empty_stop_set_is_refused() -> None:
    with pytest.raises(ValueError, match="stop_token_ids is empty"):
        RolloutClient(
            "http://sidecar",
            key="k",
            samples_per_prompt=1,
            temperature=1.0,
            max_response_length=1,
            stop_token_ids=(),
            seed=0,
            timeout=1,
        )
