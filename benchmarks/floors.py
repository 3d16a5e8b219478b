"""Parts of a step against their floors, FLOPs over the matrix rate or bytes over the bandwidth: benchmarks/floors.md.

OMP_NUM_THREADS=1 python benchmarks/floors.py

Qwen2.5-0.5B's shape with random weights, in float32 on one thread: a training step of 16 long-tailed responses, a push
of the weights into a vLLM, and as many responses from it. About ten minutes on a slow core, with 20 GB of free memory.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro
from gpu import flops
from provenance import describe
from push import copy_through_memory, fleet_of, running, specs_of, timed
from side_by_side import PACKS
from sides.ours import Ours
from sides.work import Setup, Shape, draw, response_tokens, write_model
from torch.profiler import ProfilerActivity, profile

from megatron_rlsc.breakdown import break_down
from megatron_rlsc.conversion.hf import open_weights
from megatron_rlsc.conversion.shape import ModelShape, read_shape
from megatron_rlsc.ranges import span
from megatron_rlsc.rollout.client import RolloutClient
from megatron_rlsc.rollout.weight_sync import WeightSync
from megatron_rlsc.types import Prompt, Sample

ROOT = Path(__file__).resolve().parents[1]
SHAPE = Shape(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
WORD = 4
"""Bytes of a float32."""
RESPONSE = 64
"""Tokens that vLLM writes at most."""
HEAD, NORM, UPDATE = "logprobs", "gradient-norm", "optimizer"
"""Ranges; what is in none of them is the layers'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    steps: int = 2
    """Of training, after one that warms up."""
    sidecar_python: Path = ROOT / ".venv-sidecar/bin/python"
    """Of the environment that has vLLM."""
    output: Path = ROOT / "benchmarks/floors.md"
    """The table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What one thread of this machine can do."""

    matrix: float
    """FLOP/s of a large product."""
    memory: float
    """Bytes/s, read and written, of a large copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    name: str
    bound: str
    """What the floor is made of."""
    floor: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """By vLLM."""

    generate: float
    """Seconds for all responses."""
    tokens: int
    """Of theirs."""
    rounds: int
    """Of decoding: a token of each response that has not ended."""
    push: float
    """Seconds."""
    copy: float
    """Seconds of the same bytes, through shared memory."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        write_model(SHAPE, model)
        shape = read_shape(model)
        rates = [measure_rates()]
        samples = draw("long-tailed", seed=0, vocabulary=SHAPE.vocab_size)
        steps = train(model, samples, args.steps)
        rates.append(measure_rates())
        served = serve(model, shape, args.sidecar_python, len(samples))
        rates.append(measure_rates())
    best = Rates(matrix=max(each.matrix for each in rates), memory=max(each.memory for each in rates))
    parts = training_parts(shape, samples, steps, best)
    args.output.write_text(page(parts, other_parts(shape, len(samples), served, best), best, samples))
    print(args.output.read_text())


def measure_rates(size: int = 2048, nbytes: int = 2**29) -> Rates:
    """The best of a few of each."""
    left, right = torch.randn(2, size, size)
    source, target = torch.ones(2, nbytes // WORD)
    return Rates(
        matrix=2 * size**3 / min(timed(lambda: left @ right) for _ in range(5)),
        memory=2 * nbytes / min(timed(lambda: target.copy_(source)) for _ in range(5)),
    )


def train(model: Path, samples: list[Sample], count: int) -> list[dict[str, float]]:
    """Seconds of each step by range, the layers' by the name of ``."""
    side = Ours(Setup(model=model, settings=PACKS))
    side.step(samples, 0)
    found = []
    for _ in range(count):
        with profile(activities=[ProfilerActivity.CPU]) as recorded, span("step"):
            side.step(samples, 0)
        found.append(by_range(recorded))
        print({name or "layers": round(seconds, 2) for name, seconds in found[-1].items()}, flush=True)
    return found


def by_range(recorded: profile) -> dict[str, float]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        recorded.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_bytes())["traceEvents"]
    seconds = dict.fromkeys(("", HEAD, NORM, UPDATE), 0.0)
    for path, part in break_down(events).ranges.items():
        names = [name.removesuffix("-backward") for name in path.split("/")]
        seconds[next((name for name in names if name in seconds), "")] += part.seconds
    return seconds


def training_parts(
    shape: ModelShape, samples: Sequence[Sample], steps: Sequence[dict[str, float]], rates: Rates
) -> list[Part]:
    """The floor computes a prompt once, and every product thrice: forwards, and backwards to each of its factors."""
    prompts = {sample.group: len(sample.prompt_token_ids) for sample in samples}
    head = 6 * shape.hidden_size * shape.vocab_size * response_tokens(samples)
    # The prompts by themselves, and of each response what it adds to its prompt.
    layers = flops(shape, list(prompts.values()), 0) + sum(
        flops(shape, [sample.length], 0) - flops(shape, [len(sample.prompt_token_ids)], 0) for sample in samples
    )
    tensors = shape.num_parameters * WORD

    def seconds(name: str) -> float:
        return median(step[name] for step in steps)

    return [
        Part(
            name="layers and embedding, forward and backward",
            bound=f"{layers / 1e12:.2f} TFLOP",
            floor=layers / rates.matrix,
            seconds=seconds(""),
        ),
        Part(
            name="log-probability head, forward and backward",
            bound=f"{head / 1e12:.2f} TFLOP",
            floor=head / rates.matrix,
            seconds=seconds(HEAD),
        ),
        Part(
            name="gradient norm",
            bound=f"gradients read: {tensors / 1e9:.1f} GB",
            floor=tensors / rates.memory,
            seconds=seconds(NORM),
        ),
        Part(
            name="clipping and AdamW",
            bound=f"weights, gradients and moments read, all but gradients written: {7 * tensors / 1e9:.1f} GB",
            floor=7 * tensors / rates.memory,
            seconds=seconds(UPDATE),
        ),
    ]


def serve(model: Path, shape: ModelShape, sidecar_python: Path, responses: int) -> Served:
    """Three rounds of responses and of pushes, after one of each."""
    weights = {name: open_weights(model).tensor(name) for name in shape.hf_tensors()}
    with running(model, sidecar_python, max_model_len=256) as sidecar:
        fleet = fleet_of(sidecar)
        client = RolloutClient(
            fleet,
            samples_per_prompt=responses,
            temperature=0.5,
            max_response_length=RESPONSE,
            stop_token_ids=(0,),
            seed=1,
            max_num_seqs=responses,
            timeout=600,
            stall_timeout=600,
        )
        tokens = 0
        sync = WeightSync(fleet, specs=specs_of(shape), timeout=600, transport="gloo")
        version = sync.push(weights.items())
        prompt = Prompt(index=0, text="", token_ids=tuple(range(1000, 1064)))

        client.generate([prompt], step=0, version=version)
        lengths: list[int] = []
        begun = time.perf_counter()
        for step in range(1, 4):
            samples = client.generate([prompt], step=step, version=version)
            lengths.append(max(len(sample.response_token_ids) for sample in samples))
            tokens += response_tokens(samples)
        generate = time.perf_counter() - begun
        copies, pushes = [], []
        for _ in range(3):
            copies.append(timed(lambda: copy_through_memory(weights)))
            pushes.append(timed(lambda: sync.push(weights.items())))
        sync.close()
    return Served(generate=generate, tokens=tokens, rounds=sum(lengths), push=median(pushes), copy=median(copies))


def other_parts(shape: ModelShape, responses: int, served: Served, rates: Rates) -> list[Part]:
    tensors, product = shape.num_parameters * WORD, 2 * shape.num_parameters * served.tokens
    return [
        Part(
            name=f"{served.tokens} tokens from vLLM, {responses} responses at a time",
            bound=f"weights read {served.rounds} times, {served.rounds * tensors / 1e9:.0f} GB, "
            f"or multiplied, {product / 1e12:.2f} TFLOP",
            floor=max(served.rounds * tensors / rates.memory, product / rates.matrix),
            seconds=served.generate,
        ),
        Part(
            name="weight push",
            bound=f"{tensors / 1e9:.1f} GB written to shared memory, and read",
            floor=served.copy,
            seconds=served.push,
        ),
    ]


def page(parts: Sequence[Part], others: Sequence[Part], rates: Rates, samples: Sequence[Sample]) -> str:
    def row(part: Part) -> str:
        distance = part.seconds / part.floor
        return f"| {part.name} | {part.bound} | {part.floor:.2f} | {part.seconds:.2f} | {distance:.2f} |\n"

    whole = Part(
        name="**the training step**",
        bound="",
        floor=sum(part.floor for part in parts),
        seconds=sum(part.seconds for part in parts),
    )
    prompts = {sample.group: len(sample.prompt_token_ids) for sample in samples}
    return (
        "# Floors\n\n"
        "Made by `OMP_NUM_THREADS=1 python benchmarks/floors.py`: Qwen2.5-0.5B's shape, random weights, float32, one "
        f"thread. A step trains on {len(samples)} long-tailed responses to one prompt, {response_tokens(samples)} + "
        f"{sum(prompts.values())} tokens, as a profiler sees its ranges; medians. The floor of a part is its FLOPs, "
        f"nothing computed twice, over what a large matrix product reaches here ({rates.matrix / 1e9:.0f} GFLOP/s), or "
        f"its bytes over what a large copy reaches ({rates.memory / 1e9:.1f} GB/s, read and written).\n\n"
        f"{describe('torch', 'megatron-core')}, 1 thread.\n\n"
        "| part | its floor | floor, s | today, s | today / floor |\n|---|---|---|---|---|\n"
        f"{''.join(map(row, [*parts, whole, *others]))}"
    )


if __name__ == "__main__":
    main()
