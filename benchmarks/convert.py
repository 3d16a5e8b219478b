"""Memory and speed of tools/convert_hf.py on random checkpoints of real shapes, against `cp`: benchmarks/convert.md.

python benchmarks/convert.py --folder /a/disk/with/room

Writes each checkpoint itself (7B: 46 GB of disk at the worst moment) and deletes everything after. Dropping the page
cache takes root; without it the page says so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro
from provenance import describe

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools/convert_hf.py"
DROP = Path("/proc/sys/vm/drop_caches")
COMMON = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
SIZES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}
"""As Qwen published them."""
GB, MIB = 10**9, 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    folder: Path
    """On the disk that is measured; a folder of its own is made in it, and deleted."""
    sizes: tuple[str, ...] = ("1.5B", "7B")
    """Of SIZES."""
    repeats: int = 3
    """Runs of each; the fastest counts, of cp's too."""
    output: Path = ROOT / "benchmarks/convert.md"
    """The table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The best of several runs."""

    seconds: float
    peak: int = 0
    """Bytes, VmHWM summed over processes."""
    runs: list[float] = field(default_factory=list)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    work = args.folder / "convert-benchmark"
    work.mkdir(parents=True)
    try:
        rows = [row for size in args.sizes for row in measure(size, work, args.repeats)]
    finally:
        shutil.rmtree(work)
    args.output.write_text(page(rows))
    print(args.output.read_text())


def measure(size: str, work: Path, repeats: int) -> list[str]:
    """Both directions of one size, as rows of the table."""
    source, megatron, back = (work / name for name in ("hf", "megatron", "back"))
    nbytes, largest = write_random_model(source, size)
    bound = 2**31 + largest
    copied, there = side_by_side(
        ["cp", "-r", "--reflink=never", source, work / "copy"],
        [TOOL, "to-megatron", "--hf-dir", source, "--megatron-dir", megatron],
        repeats,
    )
    copied_back, and_back = side_by_side(
        ["cp", "-r", "--reflink=never", megatron, work / "copy"],
        [TOOL, "to-hf", "--megatron-dir", megatron, "--hf-dir", back],
        repeats,
    )
    for file in sorted(source.glob("*.safetensors*")):
        subprocess.run(["cmp", file, back / file.name], check=True)
    checked = best([timed([TOOL, "verify", "--hf-dir", source, "--megatron-dir", megatron], None)])
    for folder in (source, megatron, back):
        shutil.rmtree(folder)
    rows = []
    for name, run, copy in (
        ("to-megatron", there, copied),
        ("to-hf", and_back, copied_back),
        ("verify", checked, None),
    ):
        ratio = f"{copy.seconds / run.seconds:.2f}" if copy else ""
        seconds = f"{copy.seconds:.1f} s" if copy else ""
        rows.append(
            f"| {size}, {nbytes / GB:.1f} GB | {name} | {run.peak / MIB:.0f} | {bound / MIB:.0f} "
            f"| {run.seconds:.1f} s | {nbytes / run.seconds / GB:.2f} | {seconds} | {ratio} "
            f"| {', '.join(f'{each:.1f}' for each in run.runs)} "
            f"| {', '.join(f'{each:.1f}' for each in copy.runs) if copy else ''} |\n"
        )
        print(rows[-1], end="", flush=True)
    return rows


def side_by_side(copy: list[object], ours: list[object], repeats: int) -> tuple[Measured, Measured]:
    """One run of each in turn, so that a busy minute of the machine falls on both."""
    runs: list[list[tuple[float, int]]] = [[], []]
    for _ in range(repeats):
        runs[0].append(timed(copy, copy[-1]))
        shutil.rmtree(Path(str(copy[-1])))
        runs[1].append(timed(ours, ours[-1]))
    return best(runs[0]), best(runs[1])


def best(runs: list[tuple[float, int]]) -> Measured:
    seconds = [each for each, _ in runs]
    return Measured(seconds=min(seconds), peak=max(peak for _, peak in runs), runs=seconds)


def timed(command: list[object], target: object) -> tuple[float, int]:
    """Seconds of a command from a cold cache to what it has written being on disk, and the peak of one of ours."""
    if target is not None and Path(str(target)).exists():
        shutil.rmtree(Path(str(target)))
    drop_caches()
    start, peak = time.perf_counter(), 0
    words = [str(word) for word in command]
    if words[0] == str(TOOL):
        peak = run_measured([sys.executable, *words])
    else:
        subprocess.run(words, check=True)
        subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - start
    print(f"{words[0]} {words[1]}: {seconds:.1f} s, peak {peak / MIB:.0f} MiB", flush=True)
    return seconds, peak


def run_measured(command: list[str]) -> int:
    """Bytes: VmHWM of the process and of all that it starts, summed. Mapped file pages are in it."""
    peaks: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            for pid in tree(process.pid):
                peaks[pid] = max(peaks.get(pid, 0), high_water(pid))
            time.sleep(0.01)
        assert process.stdout is not None
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {process.stdout.read()}")
    return sum(peaks.values())


def tree(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def high_water(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def drop_caches() -> None:
    subprocess.run(["sync"], check=True)
    if can_drop():
        DROP.write_text("3")


def can_drop() -> bool:
    try:
        DROP.open("w").close()
    except OSError:
        return False
    return True


def write_random_model(folder: Path, size: str) -> tuple[int, int]:
    """Bytes of all tensors, and of the largest. The same 32 MiB of numbers over and over, turned for each tensor."""
    from megatron_rlsc.conversion.hf import plan_shards, write_index
    from megatron_rlsc.conversion.shape import read_shape
    from megatron_rlsc.conversion.tensor_file import build_header

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**COMMON, **dict(zip(NAMES, SIZES[size]))}))
    (folder / "tokenizer_config.json").write_text("{}")
    shapes = read_shape(folder).hf_tensors()
    nbytes = {name: torch.Size(shape).numel() * 2 for name, shape in shapes.items()}
    torch.manual_seed(0)
    noise = torch.randn(2**24).mul_(0.02).bfloat16().view(torch.uint8).numpy()
    shards = plan_shards(shapes, torch.bfloat16, 5 * GB)
    for i, (file, tensors) in enumerate(shards.items()):
        with (folder / file).open("wb") as out:
            out.write(build_header(tensors, torch.bfloat16))
            for j, name in enumerate(tensors):
                turned = np.roll(noise, 2 * (1000 * i + j))
                for start in range(0, nbytes[name], turned.nbytes):
                    out.write(turned[: nbytes[name] - start].data)
    write_index(folder, shards, sum(nbytes.values()))
    return sum(nbytes.values()), max(nbytes.values())


def page(rows: list[str]) -> str:
    cold = "with a cold page cache" if can_drop() else "with a page cache that this user may not drop"
    return (
        "# Conversion\n\n"
        "Made by `python benchmarks/convert.py --folder DISK`: random bfloat16 checkpoints of the published shapes, "
        f"HF to Megatron and back, {cold}; what comes back is byte-equal to what was written. Peak: `VmHWM` summed "
        "over processes, mapped file pages counted. Bound: 2 GiB plus the largest tensor. `cp`: "
        "`cp -r --reflink=never` of the same source folder, and `sync`. Both are timed from the start of their "
        "process to the bytes being on disk, SHA-256 of all of them included in ours; the fastest run counts for "
        "both, and the last columns have all of them.\n\n"
        f"{describe('torch')}.\n\n"
        "| checkpoint | command | peak, MiB | bound, MiB | time | GB/s | `cp` | speed, of `cp`'s "
        "| our runs, s | `cp`'s, s |\n|---|---|---|---|---|---|---|---|---|---|\n" + "".join(rows)
    )


if __name__ == "__main__":
    main()
