"""What a real vLLM answers: the one stop set, seeds, order. Not covered: responses of thousands of tokens."""

from __future__ import annotations

import pytest
from served_tiny import MAX_MODEL_LEN, PROMPTS, VOCAB_SIZE, OneServerClient, TinyModel, build_client

from megatron_rlsc.rollout.admission import RefusedError, admit
from megatron_rlsc.rollout.request import request_seed
from megatron_rlsc.rollout.sidecar import Sidecar
from megatron_rlsc.rollout.weight_sync import WeightSync
from megatron_rlsc.types import Prompt


def likely_tokens(tiny: TinyModel, count: int) -> tuple[int, ...]:
    """What the model most probably answers PROMPTS[0] with, first token."""
    return tuple(tiny.logprobs(PROMPTS[0].token_ids)[-1].topk(count).indices.tolist())


def test_order_and_identity(tiny: TinyModel, sync: WeightSync, client: OneServerClient) -> None:
    version = sync.push(tiny.weights().items())
    samples = client.generate(PROMPTS, step=3, version=version)
    assert [(sample.group, sample.sample) for sample in samples] == [(g, s) for g in range(3) for s in range(4)]
    assert [sample.prompt_index for sample in samples] == [4] * 4 + [9] * 4 + [2] * 4
    assert all(sample.prompt_token_ids == PROMPTS[sample.group].token_ids for sample in samples)
    assert all(sample.seed == request_seed(1, 3, sample.group) for sample in samples)


def test_the_first_stop_token_is_counted_and_ends_the_response(
    sidecar: Sidecar, tiny: TinyModel, sync: WeightSync
) -> None:
    """Two stop ids, the likeliest first tokens: some responses are the stop token alone, and count as one token."""
    stop_token_ids = likely_tokens(tiny, 2)
    version = sync.push(tiny.weights().items())
    client = build_client(sidecar.url, sidecar.key, stop_token_ids=stop_token_ids)
    samples = [sample for step in range(4) for sample in client.generate(PROMPTS, step=step, version=version)]
    stopped = [sample for sample in samples if sample.finish_reason == "stop"]
    alone = [sample for sample in stopped if len(sample.response_token_ids) == 1]
    assert {sample.response_token_ids[-1] for sample in stopped} == set(stop_token_ids)
    assert alone
    assert len(alone) < len(stopped)
    assert tiny.largest_difference(stopped) < 1e-4


def test_only_the_given_stop_set_stops(sidecar: Sidecar, tiny: TinyModel, sync: WeightSync) -> None:
    """The eos of config.json and generation_config.json is a token like any other unless it is in the set."""
    (eos,) = likely_tokens(tiny, 1)
    (never,) = tiny.logprobs(PROMPTS[0].token_ids)[-1].topk(1, largest=False).indices.tolist()
    version = sync.push(tiny.weights().items())
    samples = build_client(sidecar.url, sidecar.key, stop_token_ids=(never,)).generate(PROMPTS, step=0, version=version)
    passed = [sample for sample in samples if eos in sample.response_token_ids[:-1]]
    assert passed
    assert any(sample.finish_reason == "length" and len(sample.response_token_ids) == 24 for sample in passed)


def test_generation_config_does_not_bend_the_distribution(
    tiny: TinyModel, sync: WeightSync, client: OneServerClient
) -> None:
    """The served folder asks for top_k 1, which would make siblings equal; /v1/completions would heed it."""
    version = sync.push(tiny.weights().items())
    siblings = client.generate(PROMPTS[1:2], step=0, version=version)
    assert len({sample.response_token_ids for sample in siblings}) > 1


def test_the_seed_decides(sidecar: Sidecar, tiny: TinyModel, sync: WeightSync, client: OneServerClient) -> None:
    """Same run seed and step, same samples (one batch composition, one machine); another of either, others."""
    version = sync.push(tiny.weights().items())

    def tokens(client: OneServerClient, step: int) -> list[tuple[int, ...]]:
        return [sample.response_token_ids for sample in client.generate(PROMPTS, step=step, version=version)]

    reference = tokens(client, 0)
    assert tokens(build_client(sidecar.url, sidecar.key), 0) == reference
    assert tokens(client, 1) != reference
    assert tokens(build_client(sidecar.url, sidecar.key, seed=2), 0) != reference


def test_the_real_server_is_admitted_with_its_key_and_for_what_it_holds(sidecar: Sidecar) -> None:
    """vLLM would cut a longer response in silence."""
    admit(sidecar.url, sidecar.key, longest=MAX_MODEL_LEN)
    with pytest.raises(RefusedError, match=rf"need 321 tokens, {sidecar.url} holds 320"):
        admit(sidecar.url, sidecar.key, longest=MAX_MODEL_LEN + 1)
    with pytest.raises(RefusedError, match=f"{sidecar.url} refuses our key"):
        admit(sidecar.url, "wrong", longest=1)


def test_more_prompt_tokens_at_once_than_a_pass_takes(sidecar: Sidecar, tiny: TinyModel, sync: WeightSync) -> None:
    """64 prompts of 250 tokens, 4 responses each: were a prompt split over two passes, vLLM would rewind the generator
    of its seed, which CPU generators cannot do, and the engine would die."""
    version = sync.push(tiny.weights().items())
    prompts = [
        Prompt(index=i, text="", token_ids=tuple((i * 7 + j * j) % VOCAB_SIZE for j in range(250))) for i in range(64)
    ]
    samples = build_client(sidecar.url, sidecar.key).generate(prompts, step=0, version=version)
    assert len(samples) == 64 * 4
