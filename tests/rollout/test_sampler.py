"""What the loop is told when replicas fail, with a server that we write here. Whole runs are test_train_faults.py's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fake_server import serving

from megatron_rlsc.config import RolloutConfig
from megatron_rlsc.rollout.admission import RefusedError
from megatron_rlsc.rollout.fleet import Fleet, FleetError, Replica
from megatron_rlsc.sampler import VllmSampler
from megatron_rlsc.types import Prompt

PROMPTS: Any = SimpleNamespace(seed=1, at=lambda index: [Prompt(index=0, text="", token_ids=(1, 2))])


def build_sampler(url: str, key: str = "secret") -> tuple[VllmSampler, Fleet]:
    fleet = Fleet([Replica(index=0, url=url, key=key)], longest=10, timeout=1.0, retry_seconds=0.1)
    return VllmSampler(RolloutConfig(), PROMPTS, specs=[], fleet=fleet, stop_token_ids=(3,)), fleet


def test_a_step_whose_weights_no_replica_holds_any_more_asks_for_a_push() -> None:
    with serving() as url:
        sampler, fleet = build_sampler(url)
        with sampler:
            sampler.connect()
            fleet.replicas[0].version = "run:0"
            fleet.lose(fleet.replicas[0], "its connection broke")
            assert sampler.sample(1, "run:0") == []
            assert [replica.state for replica in fleet.replicas] == ["ready"], "a push would reach nobody"


def test_a_step_without_any_hope_ends_the_run() -> None:
    with serving() as url:
        sampler, fleet = build_sampler(url)
        with sampler:
            sampler.connect()
    with sampler:
        fleet.lose(fleet.replicas[0], "its connection broke")
        with pytest.raises(FleetError, match=r"no replica was back within 1 s \(--sidecar-timeout\)"):
            sampler.sample(1, "run:0")


def test_a_server_with_another_key_is_refused_before_anything_is_pushed() -> None:
    with serving() as url:
        sampler, _ = build_sampler(url, key="another")
        with sampler, pytest.raises(RefusedError, match=f"{url} refuses our key"):
            sampler.connect()
