"""Speed and memory of training on one GPU, in BF16 with Transformer Engine: benchmarks/gpu.md. Not yet run on a GPU.

make bench-gpu

Under eight minutes on an H100 or H200, with torch, megatron-core and Transformer Engine: Qwen2.5's 0.5B and 1.5B whole,
as many layers of its 7B as fit with AdamW in float32, and the whole 7B without an optimizer. Random weights, responses
of 3072 tokens. Each is a process of its own, so that its peak is its own. `--device cpu --tiny` shows that all of it
runs, and nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from gpu_kernels import measure_kernels, profile
from gpu_page import page
from qwen2_5 import SIZES, Sizes, shape_of

if TYPE_CHECKING:
    from megatron_rlsc.conversion.shape import ModelShape

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3
"""That are timed, after one that is not."""
PROMPT, RESPONSE = 128, 3072
HEAD = 8192, 4096, 131072
"""Tokens, hidden size and vocabulary of the log-probability head."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is trained, and how."""

    sizes: Sizes
    tied: bool
    max_tokens: int
    """Of a micro-batch."""
    responses: int
    """A step."""
    optimizer: bool = True
    fit: bool = False
    """Fewer layers, where not all of them fit."""


CASES = {
    "0.5B": Case(sizes=SIZES["0.5B"], tied=True, max_tokens=16384, responses=20),
    "1.5B": Case(sizes=SIZES["1.5B"], tied=True, max_tokens=8192, responses=16),
    "7B, layers that fit": Case(sizes=SIZES["7B"], tied=False, max_tokens=4096, responses=8, fit=True),
    "7B, no optimizer": Case(sizes=SIZES["7B"], tied=False, max_tokens=4096, responses=4, optimizer=False),
}
PROFILED = "1.5B"
SEES_GPU = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def main() -> None:
    args = parse(sys.argv[1:])
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # megatron-core takes a GPU where torch sees one
    if args.case is not None:
        print(json.dumps(measure_kernels(HEAD, args) if args.case == "kernels" else measure(args.case, args)))
        return
    if args.device == "cuda" and subprocess.run([sys.executable, "-c", SEES_GPU]).returncode != 0:
        sys.exit("torch sees no GPU here; `--device cpu --tiny` shows that the command runs")
    results, failed = {}, {}
    for name in ("kernels", *args.cases):
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--case", name]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": python_path()})
        if done.returncode == 0:
            results[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, {key: value for key, value in results[name].items() if key != "profile"}, flush=True)
        else:
            failed[name] = done.stderr
            print(f"{name} failed:\n{done.stderr[-4000:]}", file=sys.stderr, flush=True)
    if "kernels" in results:
        args.output.write_text(page(results, failed, profiled=PROFILED, trial=args.tiny or args.device == "cpu"))
        print(args.output.read_text())
    sys.exit(bool(failed))


def parse(argv: list[str]) -> argparse.Namespace:
    """By the standard library: tyro need not be where the GPU is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two-layer models, to see that it runs")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/gpu.md", help="the page")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES), help="what is trained")
    parser.add_argument("--case", choices=("kernels", *CASES), help="measure this alone, and print it as JSON")
    return parser.parse_args(argv)


def python_path() -> str:
    """The package is run from its source."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def shape_of_case(case: Case, *, tiny: bool) -> ModelShape:
    return shape_of((128, 256, 2, 4, 2, 1003) if tiny else case.sizes, tied=case.tied)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step's two parts, FLOPs, peak and planned bytes; the kernels, of the one that is profiled."""
    import torch

    from megatron_rlsc.batching import pack
    from megatron_rlsc.config import Config, ModelConfig, TrainConfig
    from megatron_rlsc.conversion.rules import Spec
    from megatron_rlsc.memory import plan_memory
    from megatron_rlsc.policy.parallel import init_parallel
    from megatron_rlsc.timing import token_work

    case = CASES[name]
    shape = shape_of_case(case, tiny=args.tiny)
    prompt, response, max_tokens, responses = PROMPT, RESPONSE, case.max_tokens, case.responses
    if args.tiny:
        prompt, response, max_tokens, responses = 8, 24, 128, 4
    spec: Spec = "transformer_engine" if args.device == "cuda" else "local"
    config = Config(
        model=ModelConfig(bf16=True, transformer_impl=spec), train=TrainConfig(max_tokens_per_micro_batch=max_tokens)
    )
    parallel = init_parallel(config.parallel, seed=1)
    available = torch.cuda.mem_get_info()[0] if args.device == "cuda" else 80 * GIB

    def planned(layers: int) -> int:
        """Bytes of tensors."""
        (stage,) = plan_memory(replace(shape, num_hidden_layers=layers), config, dp_size=1, spec=spec)
        if not case.optimizer:
            return stage.weights + stage.gradients + stage.activations + max(stage.backward, stage.logprobs)
        return stage.state + stage.passing

    if case.fit:
        fitting = [layers for layers in range(1, shape.num_hidden_layers + 1) if planned(layers) < 0.9 * available]
        if not fitting:
            raise ValueError(f"not one layer fits {available / GIB:.0f} GiB: {planned(1) / GIB:.0f} are needed")
        shape = replace(shape, num_hidden_layers=fitting[-1])

    samples = draw_samples(responses, prompt, response, vocabulary=shape.vocab_size)
    batches = pack(
        samples, parallel.data_share, max_tokens=max_tokens, device=parallel.device, work=token_work(shape)
    ).micro_batches
    step = build_step(shape, config, parallel, batches, len(samples), optimizer=case.optimizer)
    step()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [step() for _ in range(STEPS)]
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else 0
    lengths = [sample.length for sample in samples]
    return {
        "layers": shape.num_hidden_layers,
        "parameters": shape.num_parameters,
        "tokens": sum(lengths),
        "forward_backward": median(first for first, _ in times),
        "update": median(second for _, second in times),
        "flops": flops(shape, lengths, responses * response),
        "peak": peak,
        "planned": planned(shape.num_hidden_layers),
        "profile": profile(step, args.device) if name == PROFILED else [],
    }


def draw_samples(responses: int, prompt: int, response: int, *, vocabulary: int) -> list[Any]:
    """Of random tokens; each response has a prompt of its own, so that there is nothing to share."""
    import torch

    from megatron_rlsc.types import Sample

    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (count,), generator=generator).tolist())

    return [
        Sample(
            group=number,
            sample=0,
            prompt_index=number,
            prompt_token_ids=tokens(prompt),
            response_token_ids=tokens(response),
            rollout_logprobs=(0.0,) * response,
            finish_reason="length",
            seed=0,
            version="benchmark",
        )
        for number in range(responses)
    ]


def build_step(
    shape: Any, config: Any, parallel: Any, batches: Sequence[Any], count: int, *, optimizer: bool
) -> Callable[[], tuple[float, float]]:
    """A step that answers with its seconds, until the gradient and from there on."""
    import torch

    from megatron_rlsc.policy.kernels import choose_kernels, inspect_machine
    from megatron_rlsc.policy.model import build_model
    from megatron_rlsc.policy.optimizer import wrap_model
    from megatron_rlsc.policy.policy import Policy

    def now() -> float:
        if parallel.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    if optimizer:
        policy = Policy(config, shape, parallel)

        def learn() -> tuple[float, float]:
            begun = now()
            policy.forward_backward(batches, count, lambda logprobs, lengths, rows: torch.ones_like(logprobs))
            between = now()
            policy.gradient_norm()
            policy.step()
            return between - begun, now() - between

        return learn

    kernels = choose_kernels(config.model, config.optimizer, inspect_machine())
    chunks = build_model(
        shape.padded_to(config.model.make_vocab_size_divisible_by),
        model=config.model,
        spec=kernels.spec,
        attention=kernels.attention,
        layout=config.parallel,
        parallel=parallel,
        temperature=config.rollout.temperature,
    )
    (ddp,) = wrap_model(chunks, config.parallel)

    def pass_through() -> tuple[float, float]:
        begun = now()
        ddp.zero_grad_buffer()
        for batch in batches:
            logprobs, _ = ddp(batch)
            (-logprobs.sum() / count).backward()
        return now() - begun, 0.0

    return pass_through


def flops(shape: Any, lengths: Sequence[int], response_tokens: int) -> int:
    """Of a step: 6 a weight and token in the layers' matrices, 6 a weight and response token in the head, and causal
    attention's products; forwards once and backwards twice, and nothing that is computed again."""
    h, q, kv, f = shape.hidden_size, shape.query_size, shape.kv_size, shape.intermediate_size
    layer = h * (q + 2 * kv) + q * h + 3 * h * f
    # q k' and p v, each half of 2 l^2 q
    attention = 2 * sum(length**2 for length in lengths) * q
    layers = shape.num_hidden_layers * (6 * layer * sum(lengths) + 3 * attention)
    return layers + 6 * h * shape.vocab_size * response_tokens


if __name__ == "__main__":
    main()
