"""A full disk: a run that meets one ends in words, keeps what it had, and goes on when there is room.

The disk is a small tmpfs in a mount namespace of the test's own. Not covered: quotas, and file systems of a cluster.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlsc.disk import (
    checkpoint_bytes,
    free_bytes,
    full_disk_explained,
    readable,
    used_bytes,
)

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
PARAMETERS = 329_216
"""Of the tiny base model: 4.0 MB a checkpoint in float32, 1.3 MB an export."""
STEPS = 5


def on_a_small_disk(size: int, script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Runs a bash script whose $DISK is a folder on a disk of that many bytes; its $@ are the words."""
    mount = f'mount -t tmpfs -o size={size} none "$DISK" && set -eu && cd {ROOT}\n'
    namespace = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    folder = Path(os.environ["DISK"])
    if subprocess.run([*namespace, "mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root, or user namespaces")
    command = [*namespace, "bash", "-c", mount + script, "bash", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the small disk is mounted, seen from inside alone."""
    folder = tmp_path / "disk"
    folder.mkdir()
    monkeypatch.setenv("DISK", str(folder))
    return folder


# Its parts


def test_sizes_read_well() -> None:
    assert [readable(size) for size in (0, 999, 1000, 1_549_000, 872_474_443_776, 4_653_197_033_472)] == [
        *("0 bytes", "999 bytes", "1.0 kB", "1.5 MB", "872.5 GB", "4.7 TB")
    ]


def test_what_a_checkpoint_takes() -> None:
    """Bytes of a parameter: 4 + 8 moments; 4 masters more where the optimizer keeps its own; 2 + 4 + 8 in bfloat16."""
    for bf16, distributed, expected in ((0, 0, 12), (0, 1, 16), (1, 0, 14), (1, 1, 14)):
        assert checkpoint_bytes(1, bf16=bool(bf16), use_distributed_optimizer=bool(distributed)) == expected


def test_a_folder_that_is_not_there_yet_is_on_its_parent_s_disk(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_what_a_folder_takes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x" * 50_000)
    (tmp_path / "link").symlink_to("/usr")
    assert 50_000 <= used_bytes(tmp_path) <= 90_000
    assert used_bytes(tmp_path / "absent") == 0


def test_errors_of_other_folders_and_kinds_stay_what_they_are(tmp_path: Path) -> None:
    for error in (OSError(28, "No space left on device", "/elsewhere/file"), FileNotFoundError(2, "No such file")):
        with pytest.raises(OSError) as raised:
            with full_disk_explained(tmp_path):
                raise error
        assert raised.value is error


FILL = 'head -c 1G /dev/zero >"$DISK/filler" 2>/dev/null || true\n'
WRITE = """
import os, sys
from pathlib import Path
from megatron_rlsc.disk import DiskError, full_disk_explained, write_whole
path = Path(os.environ["DISK"], "file")
try:
    with full_disk_explained(path.parent):
        write_whole(path, b"new" * 10_000)
except DiskError as error:
    print(error)
"""


def test_a_file_is_replaced_whole_or_stays(disk: Path) -> None:
    script = f'echo old >"$DISK/file"\n{FILL}"$@"; cat "$DISK/file"; ls "$DISK"'
    done = on_a_small_disk(200_000, script, sys.executable, "-c", WRITE)
    assert done.stdout.splitlines() == [
        f"{disk} takes no more (No space left on device): 0 bytes is free there. What had been written is whole. "
        "Make room and start again; a run goes on with --resume",
        "old",
        "file",
        "filler",
    ], done.stderr


# A run


def flags(output: Path, *more: object) -> list[object]:
    """Of the golden run: five steps from a journal, without a sidecar."""
    golden = (GOLDEN / "flags.txt").read_text().split()
    replay = (f"--replay-rollouts={GOLDEN / 'journal'}", f"--output-dir={output}")
    return [sys.executable, "-m", "megatron_rlsc", *golden, *replay, *more]


def losses(text: str) -> list[float]:
    return [json.loads(line)["loss"] for line in text.splitlines()]


NEIGHBOUR = """
(until [ -d "$DISK/run/checkpoints/iter_0000002" ]; do sleep 0.01; done; head -c 12000000 /dev/zero >"$DISK/filler") &
"""
"""Somebody else on the disk, who takes the room of three checkpoints when the second is there."""
GOES_ON = """
"$@" && exit 3
(cd "$DISK/run" && find . -name "*.partial")
mount -o remount,size=60000000 "$DISK"
"$@" --resume
cp "$DISK/run/metrics.jsonl" {kept}
ls "$DISK/run/hf"
"""


@pytest.mark.parametrize(
    ("neighbour", "told"),
    [
        (NEIGHBOUR, r"/run/checkpoints/iter_000000[345] could not be written \(.*\): after .* of it, .* was free"),
        ("", r"/run has \S+ kB free, the weights take 1\.3 MB"),
    ],
    ids=["checkpoint", "export"],
)
def test_a_run_goes_on_when_there_is_room(disk: Path, tmp_path: Path, neighbour: str, told: str) -> None:
    """Its five checkpoints are a little larger than their tensors, and it journals: 300 kB more than those take are too
    few for the export. What it goes on with is what it would have been without the interruption."""
    size = STEPS * checkpoint_bytes(PARAMETERS, bf16=False, use_distributed_optimizer=False) + 4 * PARAMETERS + 300_000
    script = neighbour + GOES_ON.format(kept=tmp_path / "metrics.jsonl")
    done = on_a_small_disk(size, script, *flags(disk / "run", "--save-interval=1"))
    assert done.returncode == 0, done.stderr
    assert re.search(rf"rlsc: error: {disk}{told}", done.stderr), done.stderr
    assert "Make room and start again; a run goes on with --resume" in done.stderr
    assert ".partial" not in done.stdout
    assert re.search("resuming after step [2345]", done.stdout) and "model.safetensors" in done.stdout
    golden = losses((GOLDEN / "golden.jsonl").read_text())
    assert losses((tmp_path / "metrics.jsonl").read_text()) == pytest.approx(golden, abs=1e-4)


def test_a_run_that_does_not_fit_does_not_start(disk: Path) -> None:
    done = on_a_small_disk(5_000_000, '"$@" || ls "$DISK"', *flags(disk / "run"))
    told = "has 5.0 MB free, and the run will write 5.3 MB: 1 checkpoint of 4.0 MB and an export of 1.3 MB. Make room"
    assert told in " ".join(done.stderr.split())
    assert done.stdout == ""  # not even a folder


def test_weights_that_do_not_fit_shared_memory_are_refused(disk: Path, sidecar_python: Path) -> None:
    golden = (GOLDEN / "flags.txt").read_text().split()
    start = (sys.executable, "-m", "megatron_rlsc", *golden, f"--sidecar-python={sidecar_python}")
    script = 'mount -t tmpfs -o size=64K none /dev/shm\n"$@" || ls "$DISK"'
    done = on_a_small_disk(50_000_000, script, *start, f"--output-dir={disk / 'run'}")
    told = "/dev/shm has 65.5 kB free, and the weights on their way to the sidecars take 1.3 MB there: give it more"
    assert told in done.stderr
    assert done.stdout == ""


def test_a_conversion_that_does_not_fit_leaves_nothing(disk: Path) -> None:
    base = ROOT / "checkpoints" / "rlsc-tiny-base"
    convert = (sys.executable, ROOT / "tools/convert_hf.py", "to-megatron", "--hf-dir", base, "--megatron-dir")
    done = on_a_small_disk(1_000_000, '"$@" || ls -A "$DISK"', *convert, disk / "out")
    assert f"convert_hf: error: {disk}" in done.stderr and "free" in done.stderr and "Make room" in done.stderr
    assert done.stdout == ""


FILLS_UP = """
import os, sys
from pathlib import Path
from megatron_rlsc.conversion import hashed_file
from megatron_rlsc.conversion.convert import convert, plan_hf, plan_megatron
from megatron_rlsc.disk import DiskError

direction, buffer, source = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
disk = Path(os.environ["DISK"])
hashed_file.BUFFER_BYTES = buffer
if direction == "to-megatron":
    plan = plan_megatron(source, disk / "out", dtype=None, overwrite=False)
else:
    plan = plan_hf(source, disk / "out", reference_dir=None, max_shard_size=10**9, overwrite=False)

def neighbour(count):
    with open(disk / "filler", "ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError:
            pass

try:
    convert(plan, progress=neighbour)
except DiskError as error:
    print(error)
print(sorted(path.name for path in disk.iterdir()))
"""


@pytest.mark.parametrize("buffer", [2**13, 2**24], ids=["in-the-middle", "at-the-end"])
@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_a_disk_that_fills_up_during_a_conversion(disk: Path, tmp_path: Path, direction: str, buffer: int) -> None:
    """There was room when it began; somebody else took it."""
    source = ROOT / "checkpoints" / "rlsc-tiny-base"
    if direction == "to-hf":
        convert = (sys.executable, ROOT / "tools/convert_hf.py", "to-megatron", "--hf-dir", source, "--megatron-dir")
        subprocess.run([*map(str, convert), str(tmp_path / "m")], check=True, capture_output=True)
        source = tmp_path / "m"
    done = on_a_small_disk(3_000_000, '"$@"', sys.executable, "-c", FILLS_UP, direction, buffer, source)
    told, left = done.stdout.splitlines()
    assert told.startswith(f"{disk} takes no more (No space left on device)") and "Make room" in told, done.stderr
    assert left == "['filler']"


def train(output: Path, *more: object) -> subprocess.CompletedProcess[str]:
    words = [*map(str, flags(output, *more))]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has done one."""
    output = tmp_path_factory.mktemp("one-step") / "run"
    done = train(output, "--train-iters=1")
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("file", ["metrics.jsonl", "rollouts/step-000002.jsonl.partial"], ids=["metrics", "journal"])
def test_a_file_that_cannot_be_written_ends_the_run(one_step: Path, tmp_path: Path, file: str) -> None:
    """/dev/full is a full disk for everybody. What there was is there still, and with room the run goes on."""
    output = tmp_path / "run"
    shutil.copytree(one_step, output)
    (output / file).unlink(missing_ok=True)
    (output / file).symlink_to("/dev/full")
    done = train(output, "--train-iters=2", "--resume")
    assert done.returncode == 2
    assert f"rlsc: error: {output} takes no more (No space left on device)" in done.stderr
    assert (output / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "1"
    (output / file).unlink(missing_ok=True)
    shutil.copyfile(one_step / "metrics.jsonl", output / "metrics.jsonl")
    done = train(output, "--train-iters=2", "--resume")
    assert "resuming after step 1" in done.stdout
    golden = losses((GOLDEN / "golden.jsonl").read_text())[:2]
    assert losses((output / "metrics.jsonl").read_text()) == pytest.approx(golden, abs=1e-4)
