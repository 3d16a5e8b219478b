"""Seconds of a weight push into a live vLLM, against copying the same bytes, and a soak: benchmarks/push.md.

OMP_NUM_THREADS=1 python benchmarks/push.py

Random float32 models of real shapes, on this machine's CPU: through files in shared memory, and through a gloo group.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch
import tyro
from provenance import describe

from megatron_rlsc.conversion.shape import ModelShape, read_shape
from megatron_rlsc.rollout.buckets import TensorSpec, checksum
from megatron_rlsc.rollout.client import RolloutClient
from megatron_rlsc.rollout.fleet import Fleet, Replica
from megatron_rlsc.rollout.sidecar import Sidecar
from megatron_rlsc.rollout.weight_sync import WeightSync
from megatron_rlsc.rollout.wire import memory_backed_root
from megatron_rlsc.types import Prompt

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {"0.1B": (512, 2048, 12, 8, 2), "0.5B": (896, 4864, 24, 14, 2)}
"""0.5B as Qwen published it; 0.1B with half of its vocabulary."""
VOCABULARY = {"0.1B": 75968, "0.5B": 151936}
GB, MIB = 10**9, 2**20
PROBE = tuple(range(1000, 1064))


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    sizes: tuple[str, ...] = ("0.1B", "0.5B")
    """Of SHAPES."""
    pushes: int = 5
    """Of each transport; the median counts."""
    rounds: int = 50
    """Of the soak: push, then generate, on the tiny base model; 0 leaves it out."""
    sidecar_python: Path = ROOT / ".venv-sidecar/bin/python"
    """Of the environment that has vLLM."""
    output: Path = ROOT / "benchmarks/push.md"
    """The tables."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    rows = [row for size in args.sizes for row in measure(size, args)]
    soaked = soak(args) if args.rounds else ""
    args.output.write_text(page(rows, soaked))
    print(args.output.read_text())


def measure(size: str, args: Args) -> list[str]:
    """Both transports of one shape, as rows of the table."""
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder)
        sizes = dict(zip(NAMES, SHAPES[size])) | {"vocab_size": VOCABULARY[size]}
        (model_dir / "config.json").write_text(json.dumps(CONFIG | sizes))
        shape = read_shape(model_dir)
        specs = specs_of(shape)
        weights = {spec.name: torch.randn(spec.shape) * 0.02 for spec in specs}
        nbytes = sum(spec.nbytes for spec in specs)
        with running(model_dir, args.sidecar_python, max_model_len=256) as sidecar:
            return [row(size, transport, sidecar, specs, weights, nbytes, args) for transport in ("file", "gloo")]


def row(
    size: str,
    transport: str,
    sidecar: Sidecar,
    specs: list[TensorSpec],
    weights: dict[str, torch.Tensor],
    nbytes: int,
    args: Args,
) -> str:
    sync = WeightSync(fleet_of(sidecar), specs=specs, timeout=600, transport=transport)  # type: ignore[arg-type]
    version = sync.push(weights.items())  # meets, and warms up
    pushes, copies, sums = [], [], []
    for _ in range(args.pushes):
        pushes.append(timed(lambda: sync.push(weights.items())))
        copies.append(timed(lambda: copy_through_memory(weights)))
        sums.append(timed(lambda: [checksum(value.view(-1).view(torch.uint8)) for value in weights.values()]))
    version = sync.push(weights.items())
    probe = median(timed(lambda: sync.probe(PROBE, version)) for _ in range(args.pushes))
    sync.close()
    push, copy, total = median(pushes), median(copies), median(sums)
    found = (
        f"| {size}, {nbytes / GB:.2f} GB | {transport} | {push:.2f} s | {nbytes / push / GB:.2f} | {copy:.2f} s "
        f"| {push / copy:.1f} | {2 * total:.2f} s | {probe:.3f} s |\n"
    )
    print(found, end="", flush=True)
    return found


def copy_through_memory(weights: dict[str, torch.Tensor]) -> None:
    """Written to a file in shared memory by one side, and read into memory of its own by the other: the least that a
    push through files does."""
    with tempfile.NamedTemporaryFile(dir=memory_backed_root()) as file:
        for value in weights.values():
            file.write(value.numpy().data)
            file.flush()
        file.seek(0)
        for value in weights.values():
            file.readinto(torch.empty_like(value).numpy().data)  # type: ignore[attr-defined]


def soak(args: Args) -> str:
    """Push and generate, again and again: memory of both sides."""
    base = ROOT / "checkpoints/rlsc-tiny-base"
    specs = specs_of(read_shape(base))
    weights = {spec.name: torch.randn(spec.shape) * 0.02 for spec in specs}
    prompts = [Prompt(index=i, text="", token_ids=tuple(range(i, i + 8))) for i in range(8)]
    lines, begun = "", time.perf_counter()
    # Of a small KV cache all pages have soon been used; of a large one the system gives page after page.
    with running(base, args.sidecar_python, max_model_len=128, flags=("--num-gpu-blocks-override", "128")) as sidecar:
        fleet = fleet_of(sidecar)
        client = RolloutClient(
            fleet,
            samples_per_prompt=16,
            temperature=0.5,
            max_response_length=48,
            stop_token_ids=(256,),
            seed=1,
            max_num_seqs=64,
            timeout=300,
            stall_timeout=300,
        )
        for number in range(1, args.rounds + 1):
            sync = WeightSync(fleet, specs=specs, timeout=60, transport="gloo" if number % 2 else "file")
            version = sync.push((name, value.add_(0.001)) for name, value in weights.items())
            samples = client.generate(prompts, step=number, version=version)
            assert len(samples) == 128
            sync.close()
            if number == 1 or number % (args.rounds // 5) == 0:
                lines += soaked(f"{number}", begun)
        for number in range(args.rounds):
            sync = WeightSync(fleet, specs=specs, timeout=60, transport="gloo" if number % 2 else "file")
            sync.push(weights.items())
            sync.close()
        lines += soaked(f"and {args.rounds} pushes alone", begun)
    return lines


def soaked(what: str, begun: float) -> str:
    """A row: memory of this process, and of the sidecar's."""
    ours, theirs = memory([psutil.Process()]), memory(psutil.Process().children(recursive=True))
    row = f"| {what} | {time.perf_counter() - begun:.0f} s | {ours:.0f} | {theirs:.0f} |\n"
    print(row, end="", flush=True)
    return row


@contextmanager
def running(
    model_dir: Path, sidecar_python: Path, *, max_model_len: int, flags: Sequence[str] = ()
) -> Iterator[Sidecar]:
    """A sidecar that generates."""
    log = Path(tempfile.gettempdir()) / "benchmark-push.log"
    with Sidecar(
        sidecar_python,
        model_dir,
        dtype="float32",
        max_model_len=max_model_len,
        seed=1,
        log_path=log,
        more_flags=flags,
        timeout=900,
    ) as sidecar:
        sidecar.wait_until_ready()
        yield sidecar


def fleet_of(sidecar: Sidecar) -> Fleet:
    return Fleet([Replica(index=0, url=sidecar.url, key=sidecar.key)])


def specs_of(shape: ModelShape) -> list[TensorSpec]:
    return [TensorSpec(name=name, dtype=torch.float32, shape=size) for name, size in shape.hf_tensors().items()]


def memory(processes: list[psutil.Process]) -> float:
    """MiB that belong to them alone."""
    return sum(process.memory_full_info().uss for process in processes) / MIB


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "torch_dtype": "float32",
    "tie_word_embeddings": True,
}


def page(rows: list[str], soaked: str) -> str:
    text = (
        "# Weight push\n\n"
        "Made by `OMP_NUM_THREADS=1 python benchmarks/push.py`: random float32 models into a live vLLM on this "
        "machine's CPU, the median of several pushes after the first. A push is everything from pause to resume: "
        "gather, checksums on both sides, transfer, the load into vLLM's packed layers, the read-back of live "
        "parameters. `copy`: the same bytes written to a file in shared memory and read back into memory, in turn with "
        "the pushes. `checksums`: what of the push both sides spend on them. `probe`: the fixed prompt behind it.\n\n"
        f"{describe('torch')}.\n\n"
        "| model | transport | push | GB/s | copy | push, in copies | checksums | probe |\n"
        "|---|---|---|---|---|---|---|---|\n" + "".join(rows)
    )
    if soaked:
        text += (
            "\n## Soak\n\nA push and 128 responses, round after round, on the tiny base model; files and gloo in turn, "
            "each with a connection of its own. Memory that belongs to the processes alone (USS), MiB. "
            "The KV cache is kept small, so that all of its pages are soon in use.\n\n"
            "| round | after | trainer | sidecar |\n|---|---|---|---|\n" + soaked
        )
    return text


if __name__ == "__main__":
    main()
