"""The log-probability head against its floor, the matrix products that it cannot do without: benchmarks/head.md.

python benchmarks/head.py [--tokens 1024 2048 4096] [--hidden 896 3584] [--vocabulary 152064] [--threads 2]
python benchmarks/head.py --dtype bfloat16 --tokens 32768 --hidden 3584 --repeats 0 --output benchmarks/head_32k.md

Forward and backward, in turn with the products alone and with plain torch (all logits, log_softmax), on one rank. The
bytes are what is live at most beyond hidden states, weight and the buffer of its gradient. Plain torch is left out
where its logits do not fit a fifth of the machine's memory; without repeats nothing is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from provenance import describe
from torch import Tensor

from megatron_rlsc.policy.logprobs import vocab_parallel_logprobs

ROOT = Path(__file__).resolve().parents[1]
TEMPERATURE = 0.5
RESPONSE = 512
"""Tokens of each response: two are a chunk."""
CHUNK = 1024
Pass = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--hidden", type=int, nargs="+", default=[896, 3584])
    parser.add_argument("--vocabulary", type=int, default=152064)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU and bfloat16 on a GPU")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/head.md", help="the page")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    rows = ""
    for hidden_size in args.hidden:
        for tokens in args.tokens:
            rows += measure(tokens, hidden_size, args.vocabulary, dtype, args.device, args.repeats)
            print(rows.splitlines()[-1], flush=True)
    command = shlex.join(["python", "benchmarks/head.py", *sys.argv[1:]])
    page = (
        f"# The log-probability head\n\nMade by `{command}`: log p and entropy of every token, with the "
        f"gradients, in {str(dtype).removeprefix('torch.')}; a vocabulary of {args.vocabulary}, chunks of {CHUNK} "
        f"tokens, responses of {RESPONSE}. A floor is the matrix products alone, chunk by chunk into the same buffer: "
        "three (logits, dX, dW) where a chunk holds whole responses, four (logits again) where it does not. `whole` is "
        "the head as a training step runs it, `cut` as it runs for responses longer than a chunk; `plain` makes all "
        "logits, log_softmax in float32, and autograd. Medians of rounds in which all take turns; memory is what is "
        "live at most beyond hidden states, weight and its gradient's buffer.\n\n"
        f"{describe('torch')}, {args.device}, {args.threads} thread{'s' if args.threads > 1 else ''}.\n\n"
        "| hidden | tokens | floor of 3, s | whole / floor of 3 | whole / floor of 4 | cut / floor of 4 "
        "| plain / whole | whole, MiB | cut, MiB | plain, MiB |\n|---|---|---|---|---|---|---|---|---|---|\n" + rows
    )
    args.output.write_text(page)
    dist.destroy_process_group()


def measure(tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, device: str, repeats: int) -> str:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device=device, dtype=dtype).requires_grad_()
    weight = (hidden_size**-0.5 * torch.randn(vocabulary, hidden_size, device=device, dtype=dtype)).requires_grad_()
    buffer = torch.zeros_like(weight, dtype=torch.float32)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    passes: dict[str, Pass] = {
        "floor": lambda: products(hidden, weight, buffer, logits_again=False),
        "floor of 4": lambda: products(hidden, weight, buffer, logits_again=True),
        "whole": lambda: ours(hidden, weight, buffer, targets, foreseen=True),
        "cut": lambda: ours(hidden, weight, buffer, targets, foreseen=False),
    }
    if 4 * tokens * vocabulary < memory(device) / 5:
        passes["plain"] = lambda: plain(hidden, weight, targets)
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(repeats + 1 if repeats else 0):
        for name, run in passes.items():
            taken = timed(run, device)
            if turn:  # the first is a warm-up
                seconds[name].append(taken)
    s = {name: statistics.median(values) for name, values in seconds.items() if values}

    def ratio(name: str, to: str) -> str:
        return f"{s[name] / s[to]:.2f}" if name in s and to in s else ""

    def peak_of(name: str) -> str:
        hidden.grad = weight.grad = None
        return f"{peak(passes[name], device) / 2**20:.0f}" if name in passes else ""

    cells = [hidden_size, tokens, f"{s['floor']:.3g}" if s else "", ratio("whole", "floor")]
    cells += [ratio("whole", "floor of 4"), ratio("cut", "floor of 4"), ratio("plain", "whole")]
    cells += [peak_of("whole"), peak_of("cut"), peak_of("plain")]
    return f"| {' | '.join(map(str, cells))} |\n"


def memory(device: str) -> int:
    """Bytes that the device has."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@torch.no_grad()
def products(hidden: Tensor, weight: Tensor, buffer: Tensor, *, logits_again: bool) -> None:
    for rows in hidden.split(CHUNK):
        logits = rows @ weight.t()
        if logits_again:
            logits = rows @ weight.t()
        logits @ weight
        if buffer.dtype == rows.dtype:
            buffer.addmm_(logits.t(), rows)
        else:
            for part, columns in zip(buffer.split(16384), logits.split(16384, dim=1)):
                part += columns.t() @ rows


def ours(hidden: Tensor, weight: Tensor, buffer: Tensor, targets: Tensor, *, foreseen: bool) -> None:
    hidden.grad = weight.grad = None
    weight.main_grad = buffer  # type: ignore[attr-defined]
    logprobs, _ = vocab_parallel_logprobs(
        hidden,
        weight,
        targets,
        temperature=TEMPERATURE,
        vocab_size=len(weight),
        group=dist.group.WORLD,  # type: ignore[arg-type]
        chunk_tokens=CHUNK,
        responses=(RESPONSE,) * (len(targets) // RESPONSE),
        foresee=(lambda logprobs, tokens, responses: torch.ones_like(logprobs)) if foreseen else None,
    )
    logprobs.sum().backward()


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    hidden.grad = weight.grad = None
    table = ((hidden @ weight.t()).float() / TEMPERATURE).log_softmax(-1)
    table.gather(1, targets[:, None]).sum().backward()
    hidden.grad = weight.grad = None


def timed(run: Pass, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(run: Pass, device: str) -> int:
    """Bytes beyond what is there before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
