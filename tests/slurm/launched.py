"""A run of the launcher on the emulated cluster: its script, what it says, and what every run must show in the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cluster import ROOT, Cluster, Job
from safetensors.torch import load_file

from megatron_rlsc.run_folder.journal import Journal

STEPS = 8
"""Of tiny.toml."""
TENSOR, PIPELINE = ("--tensor-model-parallel-size=2",), ("--pipeline-model-parallel-size=2",)

SCRIPT = """#!/usr/bin/env bash
# As a user edits examples/run_rlsc_7b.sh, for nodes without GPUs.
#SBATCH --job-name={name}
#SBATCH --nodes=3
#SBATCH --exclusive
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={folder}.log

MODEL={model}
DATA={data}
RUN={folder}
RECIPE=tests/slurm/tiny.toml
TRAINER_NODES=2 SIDECAR_NODES=1
TRAINER_PROCESSES_PER_NODE=1 GPUS_PER_NODE=0
TRAINER_PYTHON={trainer_python}
SIDECAR_PYTHON={sidecar_python}
TRAINER_ENV=(GLOO_SOCKET_IFNAME=eth0)
PREFLIGHT={preflight}

source tools/launch.sh "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """`folder`: RUN of the script, which lies beside it, as the job's log does."""

    cluster: Cluster
    folder: Path
    model: Path
    questions: Path
    sidecar_python: Path
    flags: tuple[str, ...] = TENSOR
    preflight: bool = False

    def submit(self, *flags: str) -> Job:
        """As a user does on the login node."""
        script = self.folder.with_suffix(".sh")
        script.write_text(
            SCRIPT.format(
                name=self.folder.name,
                folder=self.folder,
                model=self.model,
                data=self.questions,
                trainer_python=sys.executable,
                sidecar_python=self.sidecar_python,
                preflight="yes" if self.preflight else "no",
            )
        )
        said = self.cluster.run("bash", script, *self.flags, *flags).stdout
        return Job(self.cluster, said.split()[-1])

    @property
    def metrics(self) -> list[dict[str, float]]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def status(self) -> str:
        return (self.folder / "status").read_text().strip()

    @property
    def said(self) -> str:
        """By the launcher, over all lives of the job."""
        return (self.folder / "launcher/launcher.log").read_text()

    @property
    def trainer_said(self) -> str:
        """Likewise."""
        return (self.folder / "launcher/trainer.log").read_text()

    def stopped_after(self) -> int:
        """The step that a run that was told to end has saved, the last in its metrics."""
        found = re.match(r"stopped after step (\d+): ", self.status)
        assert found, self.status
        assert [row["step"] for row in self.metrics] == list(range(1, int(found[1]) + 1))
        assert int(found[1]) < STEPS
        return int(found[1])

    def wait_for_step(self, job: Job, step: int) -> None:
        job.wait_until(lambda: len(self.metrics) >= step, f"step {step} of {self.folder.name}", timeout=600)

    def ranks(self, node: str) -> list[int]:
        """Process ids of the trainer's rank on a node, and of what it has forked, in the order of their start."""
        running = self.cluster.machines[node].processes().items()
        return sorted(pid for pid, command in running if re.match(r"\S*python\S* -m megatron_rlsc ", command))

    def engine(self, node: str) -> list[int]:
        """Process ids of vLLM's engine and worker on a node."""
        running = self.cluster.machines[node].processes().items()
        return [pid for pid, command in running if command.startswith("VLLM::")]

    @contextmanager
    def held(self, job: Job) -> Iterator[None]:
        """vLLM stands still for the length of the block, and with it the run, in the middle of a step."""
        frozen = self.engine(job.nodes[-1])
        assert frozen
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in frozen:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def check_finished(self, job: Job, *, restarts: int) -> None:
        """What must hold of every run in the end, whatever befell it."""
        job.wait_for("COMPLETED", timeout=600)
        assert job.restarts == restarts, self.said
        assert self.status == f"done after step {STEPS}"
        assert f"done: {self.folder}/hf is the trained model" in self.said
        self.check_nothing_runs()
        self.check_steps()

    def check_nothing_runs(self) -> None:
        """On no node, nor in the memory that its processes shared."""
        self.cluster.wait_until(lambda: not self.cluster.processes(), "nothing is left running", timeout=120)
        for name in self.cluster.machines:
            assert self.cluster.on(name, "ls", "/dev/shm").stdout == "", name

    def check_steps(self) -> None:
        """Every step once, all samples of a step of one version, and the run's own journal, replayed in a world of
        processes on this machine at the run's layout, gives its figures and its weights, bit by bit."""
        assert [row["step"] for row in self.metrics] == list(range(1, STEPS + 1))
        assert max(row["rollout/logprob_difference"] for row in self.metrics) < 1e-3
        for step in range(1, STEPS + 1):
            samples = Journal(self.folder / "rollouts").read(step)
            assert [(sample.group, sample.sample) for sample in samples] == [(g, i) for g in range(8) for i in range(8)]
        replayed = self.replay()
        for first, second in zip(self.metrics, replayed.metrics, strict=True):
            for tag in ("step", "loss", "confidence/mean", "optimizer/gradient_norm"):
                assert second[tag] == first[tag], (first["step"], tag)
        weights, again = (load_file(run.folder / "hf/model.safetensors") for run in (self, replayed))
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[name], again[name]) for name in weights)

    def replay(self) -> Run:
        replayed = replace(self, folder=self.folder.with_name(f"{self.folder.name}-replayed"))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        recipe = ("--config", self.folder / "config.toml", "--replay-rollouts", self.folder / "rollouts")
        done = subprocess.run(
            [*command, "-m", "megatron_rlsc", *map(str, recipe), "--output-dir", str(replayed.folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return replayed
