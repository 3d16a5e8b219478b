"""Who is asked next, as arithmetic."""

from __future__ import annotations

from megatron_rlsc.rollout.fleet import Replica
from megatron_rlsc.rollout.load import Load, ResponseLength, choose


def loads(*prompts: dict[int, int]) -> list[Load]:
    """Loads of replicas that have been asked for prompts, {group: tokens}, at 4 samples a prompt."""
    made = []
    for index, asked in enumerate(prompts):
        load = Load(replica=Replica(index=index, url=f"http://{index}", key="k"), samples_per_prompt=4)
        for group, tokens in asked.items():
            load.send(group, tokens)
        made.append(load)
    return made


def chosen(*prompts: dict[int, int], response_length: float, max_num_seqs: int = 64) -> int | None:
    load = choose(loads(*prompts), response_length=response_length, max_num_seqs=max_num_seqs)
    return None if load is None else load.replica.index


def test_tokens_decide_and_not_the_number_of_prompts() -> None:
    # 4 x (900 + 100) = 4000 against 4 x (10 + 20 + 30 + 3 x 100) = 1440
    assert chosen({0: 900}, {1: 10, 2: 20, 3: 30}, response_length=100) == 1
    # 4 x (900 + 1000) = 7600 against 4 x (60 + 3 x 1000) = 12240
    assert chosen({0: 900}, {1: 10, 2: 20, 3: 30}, response_length=1000) == 0


def test_expected_tokens() -> None:
    (load,) = loads({0: 10, 1: 20})
    assert load.expected_tokens(7.5) == 4 * (10 + 20 + 2 * 7.5)
    load.finish(0)
    assert load.expected_tokens(7.5) == 4 * (20 + 7.5)


def test_the_first_of_equals_is_asked_first() -> None:
    assert chosen({}, {}, response_length=5) == 0


def test_one_prompt_waits_behind_what_a_replica_decodes_and_no_more() -> None:
    # 8 sequences are decoded at one time: 2 prompts of 4 fill it, a third may wait, a fourth may not.
    assert chosen({0: 1, 1: 1}, response_length=5, max_num_seqs=8) == 0
    assert chosen({0: 1, 1: 1, 2: 1}, response_length=5, max_num_seqs=8) is None
    # The one with room is asked, although it has more tokens to go.
    assert chosen({0: 1, 1: 1, 2: 1}, {3: 10**6}, response_length=5, max_num_seqs=8) == 1


def test_room_is_what_vllm_has_left_and_not_what_it_has_answered() -> None:
    """12 sequences are without an answer, and 9 of them may be done: one long sibling holds back the answer of all."""
    (load,) = loads({0: 1, 1: 1, 2: 1})
    assert load.unfinished == 12
    load.polled(12)
    load.polled(3)
    assert load.unfinished == 3
    load.send(3, 1)
    assert load.unfinished == 3 + 4
    load.polled(4)  # what was sent since the poll before may have come after it
    assert load.unfinished == 4 + 4
    load.polled(4)
    assert load.unfinished == 4


def test_more_than_was_asked_for_is_never_taken_for_ours() -> None:
    (load,) = loads({0: 1})
    load.polled(100)
    assert load.unfinished == 4


def test_the_length_to_expect() -> None:
    length = ResponseLength(100)
    assert length.expected == 100
    for tokens in (10, 20, 60):
        length.add(tokens)
    assert length.expected == 30
