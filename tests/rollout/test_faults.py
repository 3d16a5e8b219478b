"""Two real vLLMs, of which one fails while it generates: the step is finished by the other, and the lost one is back
for the next push. `make test-faults` has every process of the tree, killed and stopped.

Not covered: GPUs; faults inside a push, which are the weight sync's tests.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from processes import is_running, processes, shared_memory
from served_tiny import MAX_MODEL_LEN, TinyModel, build_fleet_client, build_tiny

from megatron_rlsc.rollout.client import RolloutClient
from megatron_rlsc.rollout.dispatch import NoReplicaLeftError
from megatron_rlsc.rollout.fleet import Fleet, Replica
from megatron_rlsc.rollout.metrics import read_metrics
from megatron_rlsc.rollout.sidecar import Sidecar, core_shares
from megatron_rlsc.rollout.weight_sync import WeightSync
from megatron_rlsc.rollout.wire import bearer
from megatron_rlsc.types import Prompt, Sample

PROMPTS = [Prompt(index=i, text="", token_ids=(2 + i, 7, 100 - i)) for i in range(24)]
NEVER = 1
"""The one stop token, which the model hardly ever says: responses are long, and there is time to fail in."""

CLOSE = 1e-3
"""Nats. 200 tokens at T=0.5 of a model made of noise differ by 1e-4 or 2e-4 in float32, other weights by whole nats."""


class Run:
    """A fleet of replicas that are ours, with what a trainer has of it."""

    def __init__(self, python: Path, tiny: TinyModel, logs: Path, *, replicas: int, tensor_parallel_size: int = 1):
        cores = core_shares(replicas, tensor_parallel_size)
        sidecars = [
            Sidecar(
                python,
                tiny.folder,
                dtype="float32",
                max_model_len=MAX_MODEL_LEN,
                seed=1,
                log_path=logs / f"{index}.log",
                tensor_parallel_size=tensor_parallel_size,
                cores=cores[index],
            )
            for index in range(replicas)
        ]
        self.tiny, self.first = tiny, tiny.weights()
        self.fleet = Fleet(
            [Replica(index=i, url="", key=sidecar.key, sidecar=sidecar) for i, sidecar in enumerate(sidecars)],
            longest=MAX_MODEL_LEN,
            restarts=20,
        )
        self.sync = WeightSync(self.fleet, specs=tiny.specs(), timeout=300)

    def change(self) -> None:
        """Other weights, about the first ones, so that a replica that missed a push shows."""
        with torch.no_grad():
            for name, value in self.tiny.model.named_parameters():
                value.copy_(self.first[name] + 0.1 * torch.randn_like(value))

    def push(self) -> str:
        return self.sync.push(self.tiny.weights().items())

    def client(self, *, stall_timeout: float = 300) -> RolloutClient:
        return build_fleet_client(
            self.fleet,
            max_response_length=200,
            stop_token_ids=(NEVER,),
            max_num_seqs=16,
            stall_timeout=stall_timeout,
            poll_seconds=0.2,
        )

    def wait_until_all_are_back(self) -> None:
        deadline = time.monotonic() + 300
        while len(self.fleet.ready()) < len(self.fleet.replicas):
            assert time.monotonic() < deadline, [str(replica.reason) for replica in self.fleet.replicas]
            time.sleep(0.2)


@pytest.fixture(scope="module")
def pair(sidecar_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Two replicas that are ready; a test that loses one leaves it to the next to wait for it."""
    folder = tmp_path_factory.mktemp("pair")
    run = Run(sidecar_python, build_tiny(folder / "model", tied=True), folder, replicas=2)
    with run.fleet:
        run.fleet.wait_until_ready()
        yield run
        run.sync.close()


def generate_while(run: Run, fault: int, name: str, *, stall_timeout: float = 300) -> tuple[list[Sample], Replica]:
    """A step, with `fault` sent to a process of replica 0 when the first group has come; whom it was sent to."""
    run.change()
    version = run.push()
    victim = run.fleet.replicas[0]
    assert victim.sidecar is not None
    process = processes(victim.sidecar)[name]
    stream = run.client(stall_timeout=stall_timeout).stream(PROMPTS, step=1, version=version)
    groups = [next(stream)]
    os.kill(process, fault)
    groups += stream
    assert sorted(group[0].group for group in groups) == list(range(len(PROMPTS)))
    return [sample for group in groups for sample in group], victim


def test_two_replicas_share_a_step(pair: Run) -> None:
    version = pair.push()
    before = [generated_tokens(replica) for replica in pair.fleet.replicas]
    samples = pair.client().generate(PROMPTS, step=0, version=version)
    after = [generated_tokens(replica) for replica in pair.fleet.replicas]
    assert len(samples) == 4 * len(PROMPTS)
    assert pair.tiny.largest_difference(samples) < CLOSE
    shares = [now - then for now, then in zip(after, before)]
    assert sum(shares) == sum(len(sample.response_token_ids) for sample in samples)
    # Not halves: each gets as much as it is fast, on cores that other tests may be busy with.
    assert min(shares) > sum(shares) / 10, f"of {sum(shares)} tokens the replicas generated {shares}"


def generated_tokens(replica: Replica) -> int:
    answer = httpx.get(f"{replica.url}/metrics", headers=bearer(replica.key), trust_env=False)
    return read_metrics(answer.text).generation_tokens


def assert_back_with_the_next_push(
    run: Run, victim: Replica, tree: dict[str, int], segments: set[Path], run_dir: Path
) -> None:
    """After its loss: nothing of it is left, and it is started again and holds the next version."""
    assert victim.version == ""
    run.wait_until_all_are_back()
    assert victim.version == "", "it is back, and has had no push"
    assert [name for name, pid in tree.items() if is_running(pid)] == []
    assert not run_dir.exists()
    assert [segment for segment in segments if segment.exists()] == []
    run.change()
    version = run.push()
    assert [replica.version for replica in run.fleet.replicas] == [version] * len(run.fleet.replicas)
    before = generated_tokens(victim)
    samples = run.client().generate(PROMPTS, step=2, version=version)
    assert run.tiny.largest_difference(samples) < CLOSE
    assert generated_tokens(victim) > before


def test_a_replica_whose_engine_is_killed_is_replaced_and_comes_back(pair: Run) -> None:
    sidecar = pair.fleet.replicas[0].sidecar
    assert sidecar is not None and sidecar.run_dir is not None
    tree, run_dir, url = processes(sidecar), sidecar.run_dir, sidecar.url
    segments = shared_memory(tree.values())
    assert segments
    assert tree.keys() == {"keeper", "server", "engine", "worker 0"}
    samples, victim = generate_while(pair, signal.SIGKILL, "engine")
    assert pair.tiny.largest_difference(samples) < CLOSE
    assert f"POST {url}/inference/v1/generate" in victim.reason
    assert "EngineDeadError" in victim.reason, "the end of its log tells of no dead engine"
    assert_back_with_the_next_push(pair, victim, tree, segments, run_dir)


def test_a_replica_whose_engine_hangs_is_replaced(pair: Run) -> None:
    """A stopped engine leaves the server answering, /health with 200."""
    pair.wait_until_all_are_back()
    samples, victim = generate_while(pair, signal.SIGSTOP, "engine", stall_timeout=3)
    assert pair.tiny.largest_difference(samples) < CLOSE
    assert "it has generated nothing for" in victim.reason


@pytest.mark.faults
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("name", ["keeper", "server", "engine", "worker 0"])
def test_every_process_killed_and_stopped(pair: Run, fault: int, name: str) -> None:
    """A stopped keeper is no fault: it only waits, until it is wanted."""
    pair.wait_until_all_are_back()
    sidecar = pair.fleet.replicas[0].sidecar
    assert sidecar is not None and sidecar.run_dir is not None
    tree, run_dir = processes(sidecar), sidecar.run_dir
    segments = shared_memory(tree.values())
    samples, victim = generate_while(pair, fault, name, stall_timeout=3)
    assert pair.tiny.largest_difference(samples) < CLOSE
    if (name, fault) == ("keeper", signal.SIGSTOP):
        assert victim.state == "ready"
        pair.fleet.lose(victim, "the test says so")
    assert_back_with_the_next_push(pair, victim, tree, segments, run_dir)


@pytest.mark.faults
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("name", ["engine", "worker 1"])
def test_every_process_of_the_only_replica(sidecar_python: Path, tmp_path: Path, fault: int, name: str) -> None:
    """At TP 2. Nobody is left: another push is wanted, and the step is sampled again."""
    run = Run(sidecar_python, build_tiny(tmp_path / "model", tied=True), tmp_path, replicas=1, tensor_parallel_size=2)
    with run.fleet:
        run.fleet.wait_until_ready()
        (victim,) = run.fleet.replicas
        sidecar = victim.sidecar
        assert sidecar is not None and sidecar.run_dir is not None
        tree, run_dir = processes(sidecar), sidecar.run_dir
        segments = shared_memory(tree.values())
        assert tree.keys() == {"keeper", "server", "engine", "worker 0", "worker 1"}
        with pytest.raises(NoReplicaLeftError):
            generate_while(run, fault, name, stall_timeout=3)
        assert run.fleet.wait_for_one() == [victim]
        assert_back_with_the_next_push(run, victim, tree, segments, run_dir)
        run.sync.close()
