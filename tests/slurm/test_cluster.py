"""The harness itself: that its nodes are as apart as real ones, and that nothing of it stays. No training here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cluster import Cluster
from machine import Machine

pytestmark = pytest.mark.slurm

HERE = Path(__file__).parent
MEET = """
import sys, datetime, torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=float(sys.argv[1])))
total = torch.ones(3) * (dist.get_rank() + 1)
dist.all_reduce(total)
print("sum", total.tolist(), flush=True)
"""


@pytest.fixture(scope="module")
def cluster(cluster_folder: Path) -> Iterator[Cluster]:
    with Cluster(cluster_folder / "c", nodes=2, gpus=8) as cluster:
        yield cluster


def test_nothing_is_left_behind(cluster_folder: Path) -> None:
    """Not by a cluster that is stopped with a job running."""
    with Cluster(cluster_folder / "brief", nodes=2) as brief:
        brief.submit("--nodes=1", "--output=/dev/null", "--wrap=sleep 600").wait_for("RUNNING")
        names = {os.readlink(f"/proc/{machine.pid}/ns/pid") for machine in brief.machines.values()}
        assert len(names) == 3 and names <= process_namespaces()
        # The controller says RUNNING a moment before the node has the job's process.
        brief.wait_until(lambda: "slurmstepd" in str(brief.processes()), "the job has a process", timeout=60)
    assert not names & process_namespaces()
    assert str(brief.folder) not in Path("/proc/self/mounts").read_text()


def process_namespaces() -> set[str]:
    """Of everything that runs on this machine."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/pid"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is not ours to see
            found.add(os.readlink(link))
    return found


def test_nothing_is_left_behind_by_a_killed_test() -> None:
    """A machine goes with the process that made it, whatever ends that."""
    code = "import time; from machine import Machine; print(Machine('m', shared=()).pid, flush=True); time.sleep(600)"
    maker = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    pid = int(maker.stdout.readline())
    assert Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
    maker.send_signal(signal.SIGKILL)
    maker.communicate()
    deadline = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_where_namespaces_are_refused_the_error_says_so() -> None:
    """As in a container without privileges; the tests then fail, and are not skipped."""
    code = "from machine import Machine; Machine('m', shared=())"
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "NoNamespacesError: this machine gives out no namespaces" in done.stderr
    assert "docker run --privileged" in done.stderr


def test_a_job_has_the_gpus_of_its_nodes(cluster: Cluster) -> None:
    show = "echo $SLURM_NODEID $(hostname) $CUDA_VISIBLE_DEVICES"
    done = cluster.run("srun", "--nodes=2", "--gpus-per-node=8", "bash", "-c", show)
    assert sorted(done.stdout.splitlines()) == ["0 node1 0,1,2,3,4,5,6,7", "1 node2 0,1,2,3,4,5,6,7"]


def test_more_than_there_is_is_refused(cluster: Cluster) -> None:
    too_many = cluster.run("sbatch", "--test-only", "--nodes=3", "--wrap=true", check=False)
    assert too_many.returncode == 1 and "Node count specification invalid" in too_many.stderr
    too_large = cluster.run("sbatch", "--test-only", "--gpus-per-node=9", "--wrap=true", check=False)
    assert too_large.returncode == 1 and "node configuration is not available" in too_large.stderr


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
def test_nodes_share_no_private_folder(cluster: Cluster, folder: str) -> None:
    name = f"{folder}/rlsc-{os.getpid()}"
    cluster.on("node1", "touch", name)
    assert cluster.on("node1", "ls", name).returncode == 0
    assert cluster.on("node2", "ls", name, check=False).returncode == 2
    assert not Path(name).exists()


def test_nodes_share_the_shared_folder(cluster: Cluster) -> None:
    cluster.on("node1", "touch", cluster.folder / "seen")
    assert cluster.on("node2", "ls", cluster.folder / "seen").returncode == 0


def test_a_master_on_localhost_fails_between_nodes(cluster: Cluster) -> None:
    """The mistake that one machine with two processes would let pass."""
    (cluster.folder / "meet.py").write_text(MEET)

    def meet(master: str, seconds: int) -> subprocess.CompletedProcess[str]:
        variables = f"MASTER_ADDR={master} MASTER_PORT=29500 WORLD_SIZE=2 RANK=$SLURM_PROCID"
        command = f"{variables} {sys.executable} {cluster.folder}/meet.py {seconds}"
        return cluster.run("srun", "--nodes=2", "--kill-on-bad-exit=1", "bash", "-c", command, check=False)

    met = meet("node1", 100)
    assert met.stdout.splitlines() == ["sum [3.0, 3.0, 3.0]"] * 2, met.stderr
    missed = meet("localhost", 5)
    assert missed.returncode != 0 and "sum" not in missed.stdout
    assert "DistNetworkError" in missed.stderr


def test_a_node_that_is_off_is_silent_and_comes_back_empty(cluster: Cluster) -> None:
    """Its processes' last words reach nobody, as when the power goes: a connection hangs and does not break."""
    cluster.on("node1", "touch", "/tmp/old")
    cluster.power_off("node1")
    assert "node1" not in cluster.machines
    tried = cluster.on("node2", "timeout", "2", "bash", "-c", "exec 3<>/dev/tcp/node1/6818", check=False)
    assert tried.returncode != 0 and "refused" not in tried.stderr
    cluster.power_on("node1")
    assert cluster.on("node1", "ls", "/tmp/old", check=False).returncode == 2
    cluster.run("srun", "--nodelist=node1", "true")


def test_an_error_carries_what_is_needed_to_understand_it(cluster: Cluster) -> None:
    job = cluster.submit("--output", cluster.folder / "out.txt", "--wrap=echo words of the job; exit 3")
    with pytest.raises(TimeoutError, match="is FAILED, and not: COMPLETED") as caught:
        job.wait_for("COMPLETED", timeout=60)
    said = str(caught.value)
    assert "ExitCode=3:0" in said and "log/slurmctld" in said
    assert "words of the job" in caught.value.__notes__[0]


def test_a_machine_runs_what_it_is_told_and_no_longer_than_that() -> None:
    machine = Machine("m", shared=())
    try:
        assert machine.run("hostname").stdout == "m\n"
        with pytest.raises(subprocess.CalledProcessError) as caught:
            machine.run("bash", "-c", "echo why >&2; exit 4")
        assert caught.value.returncode == 4 and "why" in caught.value.__notes__[0]
        assert machine.run("sleep", "60", timeout=0.5, check=False).returncode == 124
        assert machine.processes() == {}
    finally:
        machine.power_off()
