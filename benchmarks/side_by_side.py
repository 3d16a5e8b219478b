"""A training step of this package beside the plain HF loop, TRL and plain megatron-core: benchmarks/side_by_side.md.

bash benchmarks/sides/trl_env.sh /tmp/trl
python benchmarks/side_by_side.py --trl-python /tmp/trl/bin/python

Random models of Qwen2.5's architecture in float32, random responses. Each micro-batch size of each side is a process of
its own: the memory that it takes is its own, and so is the heap that its steps leave behind, in which later ones find
memory without asking the kernel. One works at a time, in turn. About an hour on one slow core, with 24 GB of free
memory: the HF loop takes 8 of it at micro-batch 16. --quick is a few minutes on a small model, and says less.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from provenance import describe
from sides.compare import Entry, compare
from sides.growth import SHAPE, grow
from sides.page import comparison, growth
from sides.processes import ROOT, Variant, Worker
from sides.work import LONGEST, MEDIAN, PROMPT, SPREAD, UNIFORM, Lengths, Setup, Shape, draw, write_model

SHAPES = {
    "a vocabulary of 152064": Shape(vocab_size=152064, hidden_size=256, intermediate_size=1408, num_hidden_layers=8),
    "a vocabulary of 8192": Shape(vocab_size=8192, hidden_size=512, intermediate_size=2816, num_hidden_layers=6),
}
QUICK = {"a vocabulary of 19008": Shape(vocab_size=19008, hidden_size=128, intermediate_size=512, num_hidden_layers=4)}
PACKS = {"model": {"logprob_chunk_tokens": 256}, "train": {"max_tokens_per_micro_batch": 512}}
"""Best on a CPU, as a micro-batch is chosen for the others; the defaults, 1024 and 8192, are a GPU's."""
OURS = Variant(name="ours", module="ours", settings=PACKS)
ALONE = Variant(
    name="ours, prompts not shared",
    module="ours",
    settings=PACKS | {"model": PACKS["model"] | {"share_prompts": "off"}},
)
RECOMPUTED = Variant(
    name="ours, layers recomputed",
    module="ours",
    settings=PACKS
    | {"parallel": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}},
)
LARGE = Variant(name="ours, packs of up to 8192 tokens", module="ours", settings={"model": PACKS["model"]})
HF = Variant(name="(a) HF loop", module="hf", micro_batches=(1, 2, 4, 16), shown=(4, 16))
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""For glibc: freed memory stays in the process. As it comes, large tensors are the kernel's again and again."""
HF_KEEPS = replace(HF, name="(a) HF loop, freed memory kept", micro_batches=(1, 4), shown=(), environment=KEPT)
OURS_KEEPS = replace(OURS, name="ours, freed memory kept", environment=KEPT)
PLAIN = Variant(name="(c) plain megatron-core", module="plain_megatron", micro_batches=(1, 4))


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    trl_python: Path | None = None
    """Python of the environment that benchmarks/sides/trl_env.sh makes; without it (b) is left out."""
    draws: int = 2
    """Of long-tailed lengths."""
    repeats: int = 3
    """Steps of each side on each draw, after one that warms up."""
    groups: int = 1
    """Prompts a step, of 16 responses each."""
    vocabularies: tuple[Literal[152064, 8192], ...] = (152064, 8192)
    """Of the two models, or of one of them."""
    lengths: tuple[Lengths, ...] = ("long-tailed", "uniform")
    """Of the responses."""
    threads: int = 1
    """Of torch, in each side."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the models are."""
    growth: bool = True
    """Measure growth as well."""
    quick: bool = False
    """A small model, and one repeat."""
    output: Path = ROOT / "benchmarks/side_by_side.md"
    """The tables."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    repeats = 1 if args.quick else args.repeats
    sides = [OURS, ALONE, RECOMPUTED, LARGE, OURS_KEEPS, HF, HF_KEEPS, PLAIN]
    if args.trl_python is not None:
        python = args.trl_python.absolute()  # not resolved: a link to it is what makes an environment
        sides.insert(-1, Variant(name="(b) TRL GRPOTrainer", module="trl_grpo", python=python, micro_batches=(4, 16)))
    page = head(args)
    shapes = QUICK if args.quick else {t: s for t, s in SHAPES.items() if s.vocab_size in args.vocabularies}
    for title, shape in shapes.items():
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            write_model(shape, Path(folder))
            setup = Setup(model=Path(folder), device=args.device)
            workers = {
                Entry(name=side.name, micro_batch=size): stack.enter_context(Worker(side, setup, threads=args.threads))
                for side in sides
                for size in side.micro_batches
            }
            small = draw("uniform", seed=0, vocabulary=shape.vocab_size)[:4]
            for entry, worker in workers.items():
                worker.step(small, min(entry.micro_batch, 4))  # makes the optimizer's state
            parameters = next(iter(workers.values())).parameters
            page += f"## {title[0].upper()}{title[1:]}, {parameters / 1e6:.0f} million parameters\n\n"
            kinds: dict[str, tuple[Lengths, int]] = {
                "Long-tailed lengths": ("long-tailed", args.draws),
                "Uniform lengths": ("uniform", 1),
            }
            for name, (lengths, draws) in kinds.items():
                if lengths not in args.lengths:
                    continue
                found = compare(
                    workers,
                    lengths,
                    vocabulary=shape.vocab_size,
                    draws=draws,
                    repeats=repeats,
                    groups=args.groups,
                )
                page += comparison(name, found)
                args.output.write_text(page)  # an hour's work: what comes may fail
    if args.growth:
        setup = Setup(model=Path(), device=args.device)
        page += growth(grow([LARGE, HF], setup, threads=args.threads, repeats=repeats), SHAPE)
    args.output.write_text(page.rstrip() + "\n")
    print(args.output.read_text())


def head(args: Args) -> str:
    command = shlex.join(["python", "benchmarks/side_by_side.py", *sys.argv[1:]])
    return (
        "# Side by side\n\n"
        f"Made by `{command}`: one training step, from lists of tokens to updated weights, of the same responses by "
        f"each side. {args.groups} x 16 responses, to prompts of {PROMPT[0]} to {PROMPT[1]} tokens; long-tailed "
        f"lengths are log-normal (median {MEDIAN}, sigma {SPREAD}, {LONGEST} at most), uniform ones {UNIFORM}. "
        f"Float32, threads of each side: {args.threads}. AdamW at rate 0, so that all steps are on the same weights; "
        "p_old of such responses underflows (tests/test_side_by_side.py has short ones). Every step's loss and "
        "gradient norm, the latter taken in float64, are held against ours.\n\n"
        "Medians, with ranges in brackets; ratios are of steps of the same round. The peak is memory above weights and "
        "moments, gradients included. (a) pads to the right, micro-batch by micro-batch, and takes the log-softmax of "
        "the positions behind the prompt; (b) is TRL's trainer with the same responses and loss, without "
        "checkpointing; (c) is megatron-core's GPTModel with its own attention and cross entropy, in our DDP and "
        "optimizer. Each at its best micro-batch, (a) also at 4 and 16, ours in packs of 512 tokens with logits of 256 "
        "at a time. Every row is a process of its own, with glibc's heap as it comes; where freed memory is kept, "
        f"glibc is told to by {' '.join(f'{name}={value}' for name, value in KEPT.items())}.\n\n"
        f"{describe('torch', 'transformers', 'megatron-core')}{', trl 1.16.0' if args.trl_python else ''}.\n\n"
    )


if __name__ == "__main__":
    main()
