"""Layouts for a model on so many GPUs, the quickest first, with the recipe's lines: predicted, before any is rented.

python tools/plan_parallelism.py --model HF_DIR --gpus 64 [--gpu a100-80gb] [--config examples/rlsc_7b.toml]

Reads config.json alone; needs neither torch nor a GPU. What the times are made of, and how far from published ones:
megatron_rlsc/timing.py. Memory: megatron_rlsc/memory.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from megatron_rlsc.config import Config, ModelConfig
from megatron_rlsc.conversion.folders import hf_config_dir
from megatron_rlsc.conversion.shape import read_shape
from megatron_rlsc.memory import GIB
from megatron_rlsc.proposals import Proposal, changed_settings, propose
from megatron_rlsc.recipe import load_recipe
from megatron_rlsc.timing import GPUS, Work

HEAD = ("trainer", "sidecars", "TP", "PP", "VPP", "CP", "DP", "recompute", "tokens", "GiB", "generate", "train", "push")


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    model: Path
    """HF folder or Megatron checkpoint: its config.json."""
    gpus: int
    """Trainer's and sidecars' together."""
    gpu: Literal["a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb"] = "a100-80gb"
    """Which."""
    config: Path | None = None
    """Recipe with the questions a step, responses a question, lengths and dtypes; without it the defaults, in BF16."""
    prompt_tokens: int = 128
    """Mean, of a question."""
    response_tokens: int = 0
    """Mean; 0 takes a third of --max-response-length."""
    rows: int = 10
    """Of the table."""


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    try:
        config = load_recipe(args.config) if args.config else Config(model=ModelConfig(bf16=True))
        work = step_work(config, prompt=args.prompt_tokens, response=args.response_tokens)
        shape = read_shape(hf_config_dir(args.model))
        budget = max(config.train.max_tokens_per_micro_batch, work.prompt + work.longest)
        config = replace(config, train=replace(config.train, max_tokens_per_micro_batch=budget))
        found = propose(shape, config, GPUS[args.gpu], gpus=args.gpus, work=work)
    except ValueError as error:
        print(f"plan_parallelism: error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.model}: {shape.num_parameters / 1e9:.2f} G parameters; a step of {work.responses} responses of "
        f"{work.response} tokens, {work.longest} the longest, behind {work.prompt}; {args.gpus} x {args.gpu}. "
        "Predicted, not measured; seconds.\n"
    )
    print(table(found[: args.rows]))
    print(f"{len(found)} splits and layouts fit. The first, as the recipe's lines:\n")
    print(changed_settings(config, found[0].config))
    return 0


def step_work(config: Config, *, prompt: int, response: int) -> Work:
    longest = config.rollout.max_response_length
    if not 0 <= response <= longest:
        raise ValueError(f"--response-tokens {response} is not between 1 and --max-response-length, {longest}")
    return Work(
        responses=config.data.prompts_per_step * config.rollout.samples_per_prompt,
        prompt=prompt,
        response=response or longest // 3,
        longest=longest,
    )


def table(proposals: list[Proposal]) -> str:
    rows = [" ".join(f"{head:>9}" for head in (*HEAD, "step"))]
    for one in proposals:
        layout, rollout = one.config.parallel, one.config.rollout
        cells = (
            str(one.trainer_gpus),
            f"{rollout.sidecar_replicas} x TP{rollout.sidecar_tensor_parallel_size}",
            str(layout.tensor_model_parallel_size),
            str(layout.pipeline_model_parallel_size),
            str(layout.virtual_pipeline_model_parallel_size),
            str(layout.context_parallel_size),
            str(one.dp_size),
            layout.recompute_granularity or "-",
            str(one.config.train.max_tokens_per_micro_batch),
            f"{one.memory / GIB:.1f}",
            f"{one.generate:.1f}",
            f"{one.train.total:.1f}",
            f"{one.push:.2f}",
            f"{one.seconds:.1f}",
        )
        rows.append(" ".join(f"{cell:>9}" for cell in cells))
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
