"""The quickest layout of Qwen2.5 on 8 to 512 A100s, as tools/plan_parallelism.py predicts it: benchmarks/plans.md.

python benchmarks/plans.py

Arithmetic: no GPU, no model, a minute on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from qwen2_5 import SIZES, shape_of

from megatron_rlsc.config import Config, DataConfig, ModelConfig, TrainConfig
from megatron_rlsc.memory import GIB
from megatron_rlsc.proposals import Proposal, propose
from megatron_rlsc.timing import GPUS, Work

ROOT = Path(__file__).resolve().parents[1]
GPU = "a100-80gb"
NUMBERS = (8, 16, 32, 64, 128, 256, 512)
WORK = Work(responses=64 * 16, prompt=128, response=1024, longest=3072)
SIZES_SHOWN = "7B", "14B", "32B", "72B"


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    output: Path = ROOT / "benchmarks/plans.md"
    """The table."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    config = Config(
        model=ModelConfig(bf16=True),
        data=DataConfig(prompts_per_step=64),
        train=TrainConfig(max_tokens_per_micro_batch=4096),
    )
    rows = [row(name, number, config) for name in SIZES_SHOWN for number in NUMBERS]
    args.output.write_text(
        "# Layouts on A100s: predicted, not measured\n\n"
        "Made by `python benchmarks/plans.py`: the quickest split and layout that fits, as `tools/plan_parallelism.py` "
        f"predicts it, for a step of {WORK.responses:,} responses (64 questions x 16) of {WORK.response:,} tokens, "
        f"{WORK.longest:,} the longest, in BF16 on A100-80GB. Seconds. What the arithmetic knows and what it assumes: "
        "`megatron_rlsc/timing.py`; nothing in this table has run.\n\n"
        "| Qwen2.5 | GPUs | train on | sample on | TP x PP (VPP) x CP x DP | recompute | tokens a micro-batch | GiB "
        "| generate | train | push | step |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|\n" + "".join(rows)
    )
    print(args.output.read_text())


def row(name: str, gpus: int, config: Config) -> str:
    try:
        best = propose(shape_of(SIZES[name], tied=False), config, GPUS[GPU], gpus=gpus, work=WORK)[0]
    except ValueError:
        return f"| {name} | {gpus} | does not fit | | | | | | | | | |\n"
    return f"| {name} | {gpus} | {cells(best)} |\n"


def cells(best: Proposal) -> str:
    layout, rollout = best.config.parallel, best.config.rollout
    vpp = layout.virtual_pipeline_model_parallel_size
    sizes = (
        f"{layout.tensor_model_parallel_size} x {layout.pipeline_model_parallel_size}{f' ({vpp})' if vpp > 1 else ''} "
        f"x {layout.context_parallel_size} x {best.dp_size}"
    )
    return (
        f"{best.trainer_gpus} | {rollout.sidecar_replicas} x TP {rollout.sidecar_tensor_parallel_size} | {sizes} "
        f"| {layout.recompute_granularity or ''} | {best.config.train.max_tokens_per_micro_batch:,} "
        f"| {best.memory / GIB:.0f} | {best.generate:.0f} | {best.train.total:.0f} | {best.push:.1f} "
        f"| {best.seconds:.0f}"
    )


if __name__ == "__main__":
    main()
