"""Memory and time of packed attention against one dense [t, t] mask, on a CPU: benchmarks/attention.md.

python benchmarks/attention.py

Each row is a process of its own, so that its peak is its own: one layer's attention, forward and backward, 8 heads on 2
KV heads of 64.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from provenance import describe
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
DOCUMENT = 1024
PACKS = (2048, 4096, 8192, 16384)


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
        return
    rows = ""
    for tokens in PACKS:
        for document in (DOCUMENT, tokens):
            packed, dense = (run(kind, tokens, document) for kind in ("packed", "dense"))
            what = f"{tokens // document} x {document}"
            rows += (
                f"| {tokens} | {what} | {packed['mib']:.0f} | {dense['mib']:.0f} | {packed['mib'] / dense['mib']:.3f} "
                f"| {packed['seconds'] / dense['seconds']:.2f} |\n"
            )
            print(rows.splitlines()[-1], flush=True)
    page = (
        "# Packed attention\n\nMade by `python benchmarks/attention.py`: one layer's attention, forward and backward, "
        f"{HEADS} heads on {KV_HEADS} KV heads of {HEAD_DIM}, float32, one thread. Peak memory above what the process "
        "and its inputs take. `packed` is `megatron_rlsc/policy/attention.py`, document by document; `dense` is "
        f"torch's attention under one [t, t] mask.\n\n{describe('torch')}.\n\n"
        "| tokens in the pack | documents | packed, MiB | dense, MiB | memory, packed / dense "
        "| time, packed / dense |\n|---|---|---|---|---|---|\n" + rows
    )
    (ROOT / "benchmarks/attention.md").write_text(page)


def run(kind: str, tokens: int, document: int) -> dict[str, float]:
    """The better of two processes."""
    results = [
        json.loads(
            subprocess.run(
                [sys.executable, "-W", "ignore", __file__, kind, str(tokens), str(document)],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            ).stdout.splitlines()[-1]
        )
        for _ in range(2)
    ]
    return {name: min(result[name] for result in results) for name in results[0]}


def measure(kind: str, tokens: int, document: int) -> dict[str, float]:
    torch.set_num_threads(1)
    attend = build_packed(tokens, document) if kind == "packed" else build_dense(tokens, document)
    query = torch.randn(tokens, HEADS, HEAD_DIM, requires_grad=True)
    key, value = (torch.randn(tokens, KV_HEADS, HEAD_DIM, requires_grad=True) for _ in range(2))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of importing torch, is forgotten
    before, start = memory_mib("VmRSS"), time.perf_counter()
    attend(query, key, value).sum().backward()
    return {"mib": memory_mib("VmHWM") - before, "seconds": time.perf_counter() - start}


def build_packed(tokens: int, document: int):
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_rlsc.policy.attention import PackedAttention

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups = ProcessGroupCollection()
    groups.cp = dist.group.WORLD
    config = TransformerConfig(num_layers=1, hidden_size=512, num_attention_heads=HEADS, attention_dropout=0.0)
    layer = PackedAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    bounds = torch.arange(0, tokens + 1, document, dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    return lambda q, k, v: layer(q, k, v, None, packed_seq_params=packed)


def build_dense(tokens: int, document: int):
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        places = torch.arange(tokens)
        documents = places // document
        mask = (documents[:, None] == documents) & (places[:, None] >= places)
        groups = HEADS // KV_HEADS
        q, k, v = (t.transpose(0, 1)[None] for t in (query, *(t.repeat_interleave(groups, 1) for t in (key, value))))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def memory_mib(line: str) -> float:
    """A line of /proc/self/status: VmRSS, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) for text in status if text.startswith(f"{line}:")) / 1024


if __name__ == "__main__":
    main()
