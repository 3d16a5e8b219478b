"""benchmarks/gpu.md: what benchmarks/gpu.py has measured, as tables."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from provenance import describe

GIB = 2**30


def page(results: dict[str, Any], failed: dict[str, str], *, profiled: str, trial: bool) -> str:
    """`failed` has what the others said at their end; `trial` says that no GPU or no real model was there."""
    kernels = results["kernels"]
    rate = kernels["rate"]
    tokens, hidden, vocabulary = kernels["head"]
    where = f"one {kernels['device']}" + (f" of {kernels['memory'] / GIB:.0f} GiB" if kernels["memory"] else "")
    text = "# One GPU\n\n"
    if trial:
        text += "**A trial of the command, which says nothing of a GPU.**\n\n"
    rows = "".join(row(name, found, rate) for name, found in results.items() if name != "kernels")
    for name, said in failed.items():
        rows += f"| {name} | failed: {said.strip().splitlines()[-1] if said.strip() else 'without a word'} |\n"
    text += (
        f"Made by `{shlex.join(['python', 'benchmarks/gpu.py', *sys.argv[1:]])}`, on {where}; "
        f"{describe(*packages())}.\n\n"
        "Random weights in BF16, gradients and AdamW in float32, responses of 3072 tokens to prompts of 128, packed; "
        "medians of three steps after one. MFU: FLOPs that the model needs, nothing that is computed again counted, "
        "over the seconds of the whole step, as a share of a plain product of 8192 x 8192 matrices, which is "
        f"**{rate / 1e12:.1f} TFLOP/s** here. Peak: of tensors, by torch's allocator; planned: what "
        "`megatron_rlsc/memory.py` says of the same.\n\n"
        "| Qwen2.5 | layers | million parameters | tokens a step | forward, backward, s | update, s | tokens/s "
        f"| TFLOP/s | MFU | peak, GiB | planned, GiB |\n{'|---' * 11}|\n{rows}\n"
        f"The log-probability head, {tokens} x {hidden} x {vocabulary}: {1e3 * kernels['head_forward']:.1f} ms "
        f"forwards; forwards and backwards {1e3 * kernels['head_short']:.1f} ms for responses that a chunk holds whole "
        f"(three products, at {kernels['head_flops'] / kernels['head_short'] / rate:.0%} of the matrix rate), "
        f"{1e3 * kernels['head_long']:.1f} ms for longer ones (four); {kernels['head_peak'] / GIB:.2f} GiB beside its "
        "inputs and the buffer of the weight's gradient.\n"
    )
    recorded = results.get(profiled, {}).get("profile", [])
    if recorded:
        total = sum(milliseconds for _, _, milliseconds in recorded)
        text += (
            f"\n## Kernels of a step of {profiled}\n\n{total:.0f} ms in all, the longest 20.\n\n"
            "| kernel | calls | ms | share |\n|---|---|---|---|\n"
        )
        for name, calls, milliseconds in recorded[:20]:
            text += f"| `{name[:90].replace('|', '/')}` | {calls} | {milliseconds:.1f} | {milliseconds / total:.1%} |\n"
    return text


def row(name: str, found: dict[str, Any], rate: float) -> str:
    seconds = found["forward_backward"] + found["update"]
    return (
        f"| {name} | {found['layers']} | {found['parameters'] / 1e6:.0f} | {found['tokens']} "
        f"| {found['forward_backward']:.3f} | {found['update']:.3f} | {found['tokens'] / seconds:.0f} "
        f"| {found['flops'] / seconds / 1e12:.2f} | {found['flops'] / seconds / rate:.1%} "
        f"| {found['peak'] / GIB:.1f} | {found['planned'] / GIB:.1f} |\n"
    )


def packages() -> list[str]:
    """Those of them that are installed."""
    return [name for name in ("torch", "megatron-core", "transformer-engine") if installed(name)]


def installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False
