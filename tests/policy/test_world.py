"""The harness itself: what fails or hangs on a rank must fail the test.

Not covered: a machine that has too little memory for four processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from world import RankError, World


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    """A world of its own, for what costs it its processes."""
    pair = World(2)
    yield pair
    pair.close()


def rank_sum(value: int) -> tuple[int, int]:
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("broken on purpose")
    dist.barrier()


def sleep() -> None:
    time.sleep(60)


def test_each_run_has_a_process_group_of_its_size(world: World) -> None:
    assert world.run(2, rank_sum, 10) == [(0, 21), (1, 21)]  # 10 + 11
    assert world.run(4, rank_sum, 0) == [(0, 6), (1, 6), (2, 6), (3, 6)]  # 0 + 1 + 2 + 3
    assert world.run(1, rank_sum, 5) == [(0, 5)]


def test_a_rank_that_raises_fails_the_run_though_the_others_wait_for_it(pair: World) -> None:
    with pytest.raises(RankError, match=r"rank 1:(.|\n)*fail_on(.|\n)*broken on purpose"):
        pair.run(2, fail_on, 1)


def test_a_rank_that_hangs_fails_the_run_and_the_next_run_has_fresh_ranks(pair: World) -> None:
    with pytest.raises(RankError, match=r"ranks \[0, 1\] gave no answer"):
        pair.run(2, sleep, timeout=5)
    assert pair.run(2, rank_sum, 10) == [(0, 21), (1, 21)]
