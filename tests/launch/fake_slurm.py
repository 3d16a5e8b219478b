"""Slurm's commands as the launcher calls them, played by a few lines of bash: each call answers from files of a folder.

The real one, on several emulated nodes, is in tests/slurm.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOB = "7"
COMMANDS = {
    # Runs `step-NAME` of the folder, or waits to be ended; its process is the step.
    "srun": """
        for word in "$@"; do case $word in --job-name=*) name=${word#*=} ;; esac; done
        printf '%s\\n' "$*" >>"$FAKE/$name.calls"
        echo $BASHPID >"$FAKE/running-$name"
        # Deaf as it ends: SIGTERM to the process group would end `rm` as well.
        trap 'trap "" TERM; rm -f "$FAKE/running-$name"' EXIT
        script=$FAKE/step-${name%%-*}
        if [[ -f $script ]]; then bash "$script" & else sleep 600 & fi
        child=$!
        trap 'kill -TERM $child' TERM
        wait $child
        code=$?
        kill -0 $child 2>/dev/null && { wait $child; code=$?; }
        exit $code
    """,
    "squeue": """
        i=0
        for file in "$FAKE"/running-*; do
            [[ ! -f $file ]] || echo "7.$((i++)) ${file##*running-}"
        done
        echo "7.batch batch"
    """,
    "scancel": """
        signal=${1#--signal=} i=0
        for file in "$FAKE"/running-*; do
            [[ 7.$((i++)) == "$2" ]] || continue
            echo "$signal ${file##*running-}" >>"$FAKE/signals"
            if [[ $signal == KILL ]]; then pkill -KILL -P $(<"$file"); else kill -"$signal" $(<"$file"); fi
        done
    """,
    "scontrol": """
        case "$*" in
            "show hostnames "*) tr , '\\n' <<<"$3" ;;
            *"show job"*) cat "$FAKE/job" ;;
            *"show partition"*) cat "$FAKE/partition" ;;
            "requeue 7") echo requeued >>"$FAKE/requeued" && kill -KILL $PPID ;;
            *) exit 9 ;;
        esac
    """,
    "sinfo": 'cat "$FAKE/nodes"',
    "sbatch": 'printf "%s\\n" "$@" >"$FAKE/submitted"; echo "Submitted batch job 7"',
}

SCRIPT = """#!/usr/bin/env bash
#SBATCH --nodes={nodes}
MODEL={model}
DATA=examples/data/addition_rollout.jsonl
RUN={run}
RECIPE=examples/rlsc_tiny.toml
TRAINER_NODES={trainer_nodes} SIDECAR_NODES={sidecar_nodes}
TRAINER_PROCESSES_PER_NODE={processes} GPUS_PER_NODE=0
TRAINER_PYTHON={python}
SIDECAR_PYTHON={sidecar_python}
PREFLIGHT={preflight}
{more}
cd {root} || exit 2
source tools/launch.sh "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A script of the tiny model and the machine that it is started on."""

    folder: Path
    trainer_nodes: int = 2
    sidecar_nodes: int = 1
    processes: int = 1
    preflight: str = "no"
    more: str = ""
    """Lines of the script."""
    model: Path | None = None
    """None: whatever passes for one."""
    sidecar_python: Path = Path("sidecar-python")
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def fake(self) -> Path:
        """The folder that the commands answer from."""
        return self.folder / "slurm"

    @property
    def log(self) -> str:
        path = self.run / "launcher" / "launcher.log"
        return path.read_text() if path.exists() else ""

    @property
    def requeues(self) -> int:
        path = self.fake / "requeued"
        return len(path.read_text().split()) if path.exists() else 0

    def calls(self, step: str) -> list[str]:
        """The words that each srun of the step was given."""
        path = self.fake / f"{step}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def make(self, **steps: str) -> None:
        """The script, the commands, and what the steps do: `trainer='...'` in bash, with RUN as $RUN."""
        commands = self.folder / "bin"
        for path in (commands, self.fake, self.run):
            path.mkdir(parents=True, exist_ok=True)
        for name, body in COMMANDS.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (commands / name).chmod(0o755)
        for name, body in steps.items():
            (self.fake / f"step-{name}").write_text(body)
        if self.model is None:  # a folder that passes for a checkpoint, so that nothing is converted
            (self.folder / "model" / "hf").mkdir(parents=True, exist_ok=True)
            (self.folder / "model" / "latest_checkpointed_iteration.txt").write_text("release")
            (self.folder / "model" / "hf" / "config.json").write_text('{"max_position_embeddings": 4096}')
        self.say_job()
        (self.fake / "partition").write_text("PartitionName=gpu PreemptMode=REQUEUE")
        (self.fake / "nodes").write_text("".join(f"node{i + 1} allocated\n" for i in range(3)))
        (self.folder / "job.sh").write_text(
            SCRIPT.format(
                nodes=self.trainer_nodes + self.sidecar_nodes,
                model=self.model or self.folder / "model",
                run=self.run,
                trainer_nodes=self.trainer_nodes,
                sidecar_nodes=self.sidecar_nodes,
                processes=self.processes,
                python=sys.executable,
                sidecar_python=self.sidecar_python,
                preflight=self.preflight,
                more=self.more,
                root=ROOT,
            )
        )

    def say_job(self, *, batch: int = 1, preempted: str = "None", end: str = "Unknown") -> None:
        """What `scontrol show job` says."""
        text = f"JobId=7 JobState=RUNNING Requeue=1 BatchFlag={batch} EndTime={end} PreemptTime={preempted}"
        (self.fake / "job").write_text(text)

    def start(self, *flags: str, life: int = 1, allocated: bool = True) -> subprocess.Popen[str]:
        """The script in its allocation; elsewhere where it is not `allocated`."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment |= {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "FAKE": str(self.fake)}
        environment |= {"RUN": str(self.run)} | self.environment
        if allocated:
            nodes = ",".join(f"node{i + 1}" for i in range(self.trainer_nodes + self.sidecar_nodes))
            environment |= {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": nodes, "SLURM_CPUS_ON_NODE": "2"}
            environment |= {"SLURM_JOB_PARTITION": "gpu"}
            if life > 1:
                environment["SLURM_RESTART_COUNT"] = str(life - 1)
        return subprocess.Popen(
            ["bash", str(self.folder / "job.sh"), *flags],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen[str], *, timeout: float = 60) -> str:
        """All that it has said; whatever it may have left running is killed, and is a failure."""
        try:
            said, _ = process.communicate(timeout=timeout)
        finally:
            left = [path.name for path in self.fake.glob("running-*")]
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert not left, f"left running: {left}\n{said}"
        return said

    def wait_for(self, condition: Callable[[], bool], what: str, *, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what} has not happened:\n{self.log}"
            time.sleep(0.05)


def status(line: str) -> str:
    """Bash of a trainer that says so, as the real one does: a new file in the place of the old."""
    return f'echo "{line}" >"$RUN/status.new" && mv "$RUN/status.new" "$RUN/status"\n'


def step() -> str:
    """Bash of a trainer that makes a step."""
    return 'echo "{}" >>"$RUN/metrics.jsonl"\n'
