"""What the loop is told when replicas fail or the run is to end, with a server that we write here. Whole runs are
test_train_faults.py's and test_resume.py's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_server import serving

from megatron_rlsc.config import RolloutConfig
from megatron_rlsc.rollout.admission import RefusedError
from megatron_rlsc.rollout.dispatch import NoReplicaLeftError
from megatron_rlsc.rollout.fleet import Fleet, FleetError, Replica
from megatron_rlsc.rollout.responses import StaleSampleError
from megatron_rlsc.run_folder.journal import Journal
from megatron_rlsc.sampler import VllmSampler
from megatron_rlsc.types import Prompt, Sample

PROMPTS: Any = SimpleNamespace(seed=1, after=lambda asked: [Prompt(index=0, text="", token_ids=(1, 2))])


def build_sampler(
    url: str, folder: Path, *, key: str = "secret", lead: int = 0, abandoned: Callable[[], bool] = lambda: False
) -> tuple[VllmSampler, Fleet]:
    fleet = Fleet([Replica(index=0, url=url, key=key)], longest=10, timeout=1.0, retry_seconds=0.1, abandoned=abandoned)
    config, journal = RolloutConfig(samples_per_prompt=2, rollout_lead=lead), Journal(folder)
    sampler = VllmSampler(
        config, PROMPTS, specs=[], fleet=fleet, stop_token_ids=(3,), journal=journal, abandoned=abandoned
    )
    return sampler, fleet


def test_a_step_whose_weights_no_replica_holds_any_more_asks_for_a_push(tmp_path: Path) -> None:
    with serving() as url:
        sampler, fleet = build_sampler(url, tmp_path)
        with sampler:
            sampler.connect()
            fleet.replicas[0].version = "run:0"
            fleet.lose(fleet.replicas[0], "its connection broke")
            assert sampler.sample(1, 0, "run:0") == []
            assert [replica.state for replica in fleet.replicas] == ["ready"], "a push would reach nobody"


def test_a_step_without_any_hope_ends_the_run(tmp_path: Path) -> None:
    with serving() as url:
        sampler, fleet = build_sampler(url, tmp_path)
        with sampler:
            sampler.connect()
    with sampler:
        fleet.lose(fleet.replicas[0], "its connection broke")
        with pytest.raises(FleetError, match=r"no replica was back within 1 s \(--sidecar-timeout\)"):
            sampler.sample(1, 0, "run:0")


def test_a_run_that_is_to_end_waits_for_nobody(tmp_path: Path) -> None:
    """Its sidecars may have had the same SIGTERM. The weights are walked to their end, where the other ranks wait."""
    told = False
    with serving() as url:
        sampler, fleet = build_sampler(url, tmp_path, abandoned=lambda: told)
        with sampler:
            sampler.connect()
    with sampler:
        fleet.lose(fleet.replicas[0], "it has ended")
        told = True
        weights = iter([("a", Any), ("b", Any)])
        assert sampler.push(weights, 0) == "" and next(weights, None) is None
        assert sampler.probe("") == []
        assert sampler.sample(1, 0, "run:0") == []


def siblings(version: str) -> list[Sample]:
    first = Sample(
        group=0,
        sample=0,
        prompt_index=0,
        prompt_token_ids=(1, 2),
        response_token_ids=(3,),
        rollout_logprobs=(-0.5,),
        finish_reason="stop",
        seed=1,
        version=version,
    )
    return [first, replace(first, sample=1)]


@pytest.mark.parametrize(("lead", "version"), [(0, "an earlier run:4"), (1, "an earlier run:4:0")])
def test_a_step_that_the_journal_has_is_asked_of_nobody(lead: int, version: str, tmp_path: Path) -> None:
    sampler, _ = build_sampler("http://127.0.0.1:9", tmp_path, lead=lead)
    group = siblings(version)
    Journal(tmp_path).add(1, group)
    with sampler:
        assert sampler.begin(1, 0, "run:0:0") is None
        assert sampler.sample(1, 0, "run:0:0") == group


def test_the_lag_that_is_permitted_is_one_step(tmp_path: Path) -> None:
    """Also of what another process sampled. Step 5 learns in the policy after step 4."""
    sampler, _ = build_sampler("http://127.0.0.1:9", tmp_path, lead=1)
    journal = Journal(tmp_path)
    with sampler:
        for made_after in (3, 4):
            group = siblings(f"an earlier run:9:{made_after}")
            journal.write(5, group)
            assert sampler.sample(5, 0, "run:0:4") == group
        for version, lag in (("run:9:2", "2 steps"), ("run:9:5", "-1 steps"), ("run:9", "nobody knows how many steps")):
            journal.write(5, siblings(version))
            with pytest.raises(StaleSampleError) as error:
                sampler.sample(5, 0, "run:0:4")
            assert f"of version '{version}', and the policy of 'run:0:4': it lags {lag} behind" in str(error.value)
            assert "--rollout-lead permits 1" in str(error.value)


def test_nothing_is_begun_without_a_replica(tmp_path: Path) -> None:
    with serving() as url:
        sampler, fleet = build_sampler(url, tmp_path, lead=1)
        with sampler:
            sampler.connect()
            fleet.replicas[0].version = "run:0:0"
            with pytest.raises(NoReplicaLeftError, match="no replica holds the weights of version 'run:1:1'"):
                sampler.begin(2, 1, "run:1:1")


def test_a_server_with_another_key_is_refused_before_anything_is_pushed(tmp_path: Path) -> None:
    with serving() as url:
        sampler, _ = build_sampler(url, tmp_path, key="another")
        with sampler, pytest.raises(RefusedError, match=f"{url} refuses our key"):
            sampler.connect()
