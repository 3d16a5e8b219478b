"""A Slurm cluster of emulated nodes, for as long as a `with` block lasts: real daemons, real commands, nothing left.

Facts that its settings rest on: cred_expire=5 brings a requeued job's start from 120 s down to some seconds; without
EnforcePartLimits a job that is too large waits for ever; GPUs must be character devices.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from machine import Machine

ROOT = Path(__file__).parents[2]

SLURM_CONF = """
ClusterName=test
SlurmctldHost=login(10.99.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,bf_continue,sched_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preemption}
EnforcePartLimits=ALL
JobRequeue=1
KillWait=60
MinJobAge=3600
SlurmdTimeout=15
MessageTimeout=15
InactiveLimit=0
NodeName={names} CPUs={cpus} Sockets=2 CoresPerSocket={cores} RealMemory={memory} Gres=gpu:a100:{gpus}
PartitionName=batch Nodes=ALL Default=YES MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=1-00:00:00 PriorityTier=10 PreemptMode=OFF
"""
GRES_CONF = "AutoDetect=off\nName=gpu Type=a100 File={folder}/dev/nvidia[0-{last}] Flags=nvidia_gpu_env\n"

DAEMONS = {"munged", "slurmctld", ":", "slurmd"}
"""First words of their command lines; slurmctld's helper calls itself `: slurmscriptd`."""

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
"""States of a job that it does not leave."""

LOOK_SECONDS = 3
"""Between two looks at a job while something else is waited for: the cores are the job's."""


class Cluster:
    """`login` and node1 ... nodeN, where `login` has no slurmd.

    `folder`: for the daemons' files; short, since sockets lie in it. `shared`: what all machines see of /tmp beside it.
    `cpus` and `memory_gb` are what a node pretends to have. `warns_of_preemption`: a job's --signal comes before it is
    preempted too (preempt_send_user_signal), which few clusters are set up for.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int,
        shared: Iterable[Path] = (),
        cpus: int = 128,
        memory_gb: int = 1000,
        gpus: int = 0,
        warns_of_preemption: bool = True,
    ) -> None:
        self.folder = folder
        self.shared = (folder, ROOT, Path(sys.prefix), Path(sys.base_prefix), *shared)
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self.addresses = {name: f"10.99.0.{10 + number}" for number, name in enumerate(self.names, 1)}
        self.gpus = gpus
        self.machines: dict[str, Machine] = {}
        self.settings = SLURM_CONF.format(
            folder=folder,
            names=f"node[1-{nodes}]",
            cpus=cpus,
            cores=cpus // 2,
            memory=memory_gb * 1000,
            gpus=gpus,
            preemption="SlurmctldParameters=preempt_send_user_signal" if warns_of_preemption else "",
        )

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Raises FileNotFoundError where Slurm is not installed, NoNamespacesError where there can be no machines."""
        for command in ("slurmctld", "slurmd", "sbatch", "munged", "ip"):
            if shutil.which(command, path=self.environment()["PATH"]) is None:
                raise FileNotFoundError(f"{command} is not installed: `bash tests/slurm/install.sh`, as root")
        for name in ("etc", "log", "state", "dev", *(f"spool/{name}" for name in self.names)):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "etc/slurm.conf").write_text(self.settings)
        (self.folder / "etc/gres.conf").write_text(
            GRES_CONF.format(folder=self.folder, last=self.gpus - 1) if self.gpus else ""
        )
        for device in self.devices():
            device.touch()
        hosts = {"localhost": "127.0.0.1", "login": "10.99.0.1", **self.addresses}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

        login = self.machines["login"] = self.build_machine("login")
        login.run("ip", "link", "add", "bridge", "type", "bridge")
        login.run("ip", "address", "add", "10.99.0.1/24", "dev", "bridge")
        login.run("ip", "link", "set", "bridge", "up")
        munge = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        paths = [f"--{flag}={self.folder / name}" for flag, name in munge.items()]
        login.run("munged", "--force", *paths, f"--log-file={self.folder}/log/munged", env=self.environment())
        login.run("slurmctld", env=self.environment())
        for name in self.names:
            self.power_on(name)
        self.wait_until(lambda: self.idle() == set(self.names), "all nodes are idle", timeout=120)

    def stop(self) -> None:
        for machine in reversed(self.machines.values()):
            machine.power_off()
        self.machines.clear()

    def devices(self) -> list[Path]:
        return [self.folder / "dev" / f"nvidia{number}" for number in range(self.gpus)]

    def build_machine(self, name: str) -> Machine:
        machine = Machine(name, shared=self.shared)
        machine.run("mount", "--bind", self.folder / "hosts", "/etc/hosts")
        machine.run("mount", "--bind", self.folder / "etc", "/etc/slurm")
        for device in self.devices():
            machine.run("mount", "--bind", "/dev/null", device)
        return machine

    def power_on(self, name: str) -> None:
        """Cabled to the switch, with slurmd started."""
        machine = self.machines[name] = self.build_machine(name)
        # In login's network, but with this machine's process ids.
        cable = f"nsenter --target={self.machines['login'].pid} --net ip link add {name} type veth peer name eth0"
        subprocess.run([*cable.split(), "netns", str(machine.pid)], check=True)
        self.machines["login"].run("ip", "link", "set", name, "master", "bridge", "up")
        machine.run("ip", "address", "add", f"{self.addresses[name]}/24", "dev", "eth0")
        machine.run("ip", "link", "set", "eth0", "up")
        machine.run("slurmd", "-N", name, env=self.environment())

    def power_off(self, name: str) -> None:
        """The cable first: the last words of its processes reach nobody."""
        self.machines["login"].run("ip", "link", "delete", name)
        self.machines.pop(name).power_off()

    def environment(self) -> dict[str, str]:
        """A user's on `login`: this process's, but for what an outer Slurm or torchrun has put there."""
        inner = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return inner | {"PATH": inner.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin"}

    def on(
        self, name: str, *command: object, cwd: Path = ROOT, timeout: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command on a node, past Slurm."""
        return self.machines[name].run(*command, cwd=cwd, env=self.environment(), timeout=timeout, check=check)

    def run(
        self, *command: object, cwd: Path = ROOT, timeout: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command as a user types it on the login node."""
        return self.on("login", *command, cwd=cwd, timeout=timeout, check=check)

    def submit(self, *words: object, cwd: Path = ROOT) -> Job:
        """What `sbatch` takes: flags, the script and its arguments."""
        return Job(self, self.run("sbatch", "--parsable", *words, cwd=cwd).stdout.strip())

    def fill(self) -> Job:
        """A short job on all nodes, which takes them from those of `batch`."""
        size = f"--nodes={len(self.names)}"
        return self.submit("--partition=urgent", size, "--exclusive", "--output=/dev/null", "--wrap=sleep 3")

    def idle(self) -> set[str]:
        return set(
            self.run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N", check=False).stdout.split()
        )

    def processes(self) -> dict[str, list[str]]:
        """Node -> command lines of what runs there, but for the daemons."""
        running = {name: machine.processes().values() for name, machine in self.machines.items()}
        words = {
            name: [command for command in commands if command.split()[0] not in DAEMONS]
            for name, commands in running.items()
        }
        return {name: commands for name, commands in words.items() if commands}

    def wait_until(self, condition: Callable[[], bool], what: str, *, timeout: float) -> None:
        """Raises TimeoutError with the state of everything."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout:.0f} s: {what}\n{self.report()}")
            time.sleep(0.25)

    def report(self) -> str:
        """Nodes, jobs, processes and the ends of the daemons' and of the jobs' logs, for an error."""
        parts, outputs = [], []
        if "login" in self.machines:
            for command in ("sinfo --Node --long", "scontrol show jobs"):
                done = self.run(*command.split(), check=False, timeout=30)
                parts.append(f"---- {command}\n{done.stdout}{done.stderr}")
                outputs += re.findall(r"StdOut=(\S+)", done.stdout)
        parts += [f"---- {name} runs {command}" for name, commands in self.processes().items() for command in commands]
        for path in (*sorted((self.folder / "log").iterdir()), *filter(Path.is_file, map(Path, outputs))):
            parts.append(f"---- the end of {path}\n{tail(path)}")
        return "\n".join(parts)


@dataclass(frozen=True)
class Job:
    cluster: Cluster
    number: str

    def record(self) -> dict[str, str]:
        """`scontrol show job`; values end at their first space."""
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number).stdout
        return dict(re.findall(r"(?:^| )([\w:/]+)=(\S*)", shown))

    @property
    def state(self) -> str:
        return self.record()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.record()["Restarts"])

    @property
    def nodes(self) -> list[str]:
        """Where it runs, or ran."""
        return self.cluster.run("scontrol", "show", "hostnames", self.record()["NodeList"]).stdout.split()

    @property
    def output(self) -> str:
        path = Path(self.record()["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, *states: str, timeout: float = 300) -> None:
        """Until it is in one of these states. Raises TimeoutError, also when it has ended in another for good."""
        self.wait_until(lambda: self.state in states, " or ".join(states), timeout=timeout)

    def wait_until(self, condition: Callable[[], bool], what: str, *, timeout: float = 300) -> None:
        """Raises TimeoutError with the job's log and the state of everything, also when it has ended before."""

        next_look = time.monotonic() + LOOK_SECONDS

        def met() -> bool:
            nonlocal next_look
            looks = time.monotonic() > next_look
            over = looks and self.state in ENDED  # before the condition, which may come true with the job's end
            if condition():
                return True
            if over:
                raise TimeoutError(f"job {self.number} is {self.state}, and not: {what}\n{self.cluster.report()}")
            next_look = time.monotonic() + LOOK_SECONDS if looks else next_look
            return False

        try:
            self.cluster.wait_until(met, what, timeout=timeout)
        except TimeoutError as error:
            error.add_note(f"---- the log of job {self.number}\n{self.output[-8000:]}")
            raise

    def signal(self, name: str) -> None:
        """To the batch shell alone, as --signal=B: does."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", self.number)

    def cancel(self) -> None:
        self.cluster.run("scancel", self.number)


def tail(path: Path, size: int = 2000) -> str:
    return path.read_text(errors="replace")[-size:]
