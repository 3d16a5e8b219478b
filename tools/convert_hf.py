"""Converts a Qwen2.5 model between Hugging Face safetensors and a Megatron distributed checkpoint, in bounded memory.

python tools/convert_hf.py to-megatron --hf-dir Qwen2.5-Math-7B --megatron-dir checkpoints/qwen2.5-math-7b
python tools/convert_hf.py to-hf --megatron-dir runs/rlsc/checkpoints --hf-dir export
python tools/convert_hf.py verify --hf-dir Qwen2.5-Math-7B --megatron-dir checkpoints/qwen2.5-math-7b
python tools/convert_hf.py inspect checkpoints/qwen2.5-math-7b

Exit codes: 0 done, or the same model; 1 refused, with the reason; 2 a flag is wrong; 3 verify found a difference.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_rlsc.conversion.convert import Conversion
    from megatron_rlsc.conversion.verify import Pair

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and 2 + 2 = 4.",
    "Let $x^2 - 5x + 6 = 0$. Then $(x - 2)(x - 3) = 0$, so the roots are \\boxed{2, 3}.",
    "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n",
    "自信强化学习：模型回答同一个问题越一致，它就越有把握。",
)
"""What `verify` takes the log-probabilities of."""
DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    **{name: name for name in ("bfloat16", "float16", "float32")},
}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MAX_WORKERS = 8
"""Their buffers, 130 MB each, stay within the memory that is promised."""
WAIT_SECONDS = 2.0
"""Between two looks at what another process writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Write:
    """What both directions can be told."""

    overwrite: bool = False
    """Replace what is in the target."""
    dry_run: bool = False
    """Say what would be done, and what disk it needs; write nothing."""
    workers: int = min(4, os.cpu_count() or 1)
    """Files that are written side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToMegatron(Write):
    """HF folder -> Megatron checkpoint that any layout loads."""

    hf_dir: Path
    """Folder with config.json, safetensors and tokenizer files."""
    megatron_dir: Path
    """Where the checkpoint goes."""
    dtype: Literal["source", "bf16", "fp16", "fp32", "bfloat16", "float16", "float32"] = "source"
    """Of the weights in the checkpoint."""
    keep: bool = False
    """Leave a checkpoint of this model that is there already, and wait for one that another process is writing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToHf(Write):
    """Megatron checkpoint -> HF folder for transformers and vLLM."""

    megatron_dir: Path
    """A converted checkpoint, or a run's checkpoints/ folder: its newest step."""
    hf_dir: Path
    """Where the HF model goes."""
    reference_hf_dir: Path | None = None
    """Takes config and tokenizer from here rather than from the checkpoint's own hf/ folder."""
    max_shard_size: str = "5GB"
    """Of one weight file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verify:
    """HF folder and Megatron checkpoint: every tensor compared, and log-probabilities of sample texts."""

    hf_dir: Path
    """The one,"""
    megatron_dir: Path
    """and the other: a converted checkpoint, or a run's newest step."""
    logprobs: bool = True
    """Also compute sample texts, layer by layer."""
    checksums: bool = True
    """Also read every file that a manifest names, and hold it against its SHA-256."""
    workers: int = min(4, os.cpu_count() or 1)
    """Tensors that are compared side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspect:
    """What a folder of either format holds: sizes, dtypes, step, and the layouts that fit."""

    folder: Annotated[Path, tyro.conf.Positional]
    """HF model, converted checkpoint, or a run's checkpoints/ folder."""
    checksums: bool = False
    """Also read every file that the manifest names, and hold it against its SHA-256."""


Command = (
    Annotated[ToMegatron, tyro.conf.subcommand("to-megatron")]
    | Annotated[ToHf, tyro.conf.subcommand("to-hf")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def main() -> None:
    command = tyro.cli(Command, description=__doc__)
    from megatron_rlsc.disk import DiskError  # after --help

    try:
        if isinstance(command, Inspect):
            inspect(command)
        elif isinstance(command, Verify):
            verify(command)
        elif isinstance(command, ToMegatron) and command.keep:
            write_unless_there(command)
        else:
            write(command)
    except (ValueError, DiskError) as error:
        sys.exit(f"convert_hf: error: {error}")


def inspect(command: Inspect) -> None:
    from megatron_rlsc.conversion.manifest import check_sums
    from megatron_rlsc.conversion.overview import look_at
    from megatron_rlsc.planning import fitting_layouts

    found = look_at(command.folder)
    print("\n".join(found.lines()))
    print("  fits: " + "; ".join(fitting_layouts(found.shape)))
    if command.checksums:
        check_sums(found.weights_dir, found.manifest)
        print(f"  checksums: {len(found.manifest)} files as they were written")


def verify(command: Verify) -> None:
    from tqdm import tqdm

    from megatron_rlsc.conversion.verify import check_manifests, compare_logprobs, compare_tensors, open_pair, report

    check_workers(command.workers)
    pair = open_pair(command.hf_dir, command.megatron_dir)
    if command.checksums:
        print(f"checksums: {check_manifests(pair)} files as they were written", flush=True)
    with tqdm(total=pair.nbytes, unit="B", unit_scale=True, disable=None, desc="tensors") as bar:
        differences = compare_tensors(pair, workers=command.workers, progress=bar.update)
    layers, results = [], []
    if command.logprobs:
        with tqdm(total=pair.weights.shape.num_hidden_layers, disable=None, desc="layers") as bar:
            layers, results = compare_logprobs(pair, sample_tokens(pair), bar.update)
    same, lines = report(pair, differences, layers, results)
    print(lines)
    if not same:
        sys.exit(3)


def sample_tokens(pair: Pair) -> list[Tensor]:
    """The texts in the model's own tokens; without a tokenizer, numbers that stand for any."""
    import torch

    from megatron_rlsc.tokenizer import load_tokenizer

    size = pair.weights.shape.vocab_size
    try:
        tokenizer = load_tokenizer(pair.hf_dir)
        texts = [tokenizer.encode(text) for text in TEXTS]
    except (OSError, ValueError) as error:
        print(f"no tokenizer in {pair.hf_dir} ({str(error).splitlines()[0]}): token ids at random instead")
        texts = []
    if not all(len(text) > 1 and max(text) < size for text in texts) or not texts:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(size, (length,), generator=generator) for length in (7, 32, 33)]
    return [torch.tensor(text) for text in texts]


def write_unless_there(command: ToMegatron) -> None:
    """For jobs that begin at once with one model, as those of an array do: the first one writes."""
    from megatron_rlsc.conversion.folders import is_megatron_checkpoint
    from megatron_rlsc.conversion.verify import check_model
    from megatron_rlsc.lock import Held

    if command.overwrite:
        raise ValueError("--keep and --overwrite: one of them")
    waits = False
    while not is_megatron_checkpoint(command.megatron_dir):
        try:
            return write(command)
        except ValueError as error:
            if is_megatron_checkpoint(command.megatron_dir):
                break  # another process has been faster
            if not isinstance(error, Held):
                raise
            if not waits:
                print(f"{error}: this one waits", flush=True)
            waits = True
            time.sleep(WAIT_SECONDS)
    check_model(command.hf_dir, command.megatron_dir)
    print(f"{command.megatron_dir} is there already, a Megatron checkpoint of {command.hf_dir}")


def write(command: ToMegatron | ToHf) -> None:
    import torch

    from megatron_rlsc.conversion.convert import convert, plan_hf, plan_megatron

    check_workers(command.workers)
    if isinstance(command, ToMegatron):
        dtype = None if command.dtype == "source" else getattr(torch, DTYPES[command.dtype])
        plan = plan_megatron(command.hf_dir, command.megatron_dir, dtype=dtype, overwrite=command.overwrite)
        done = f"{command.megatron_dir} is a Megatron checkpoint of {command.hf_dir}, for any layout"
    else:
        plan = plan_hf(
            command.megatron_dir,
            command.hf_dir,
            reference_dir=command.reference_hf_dir,
            max_shard_size=size(command.max_shard_size),
            overwrite=command.overwrite,
        )
        done = f"{command.hf_dir} is an HF model of {command.megatron_dir}"
    print("\n".join(plan.describe()), flush=True)
    if not command.dry_run:
        run(plan, command.workers, convert)
        print(done)


def run(plan: Conversion, workers: int, convert: Callable[..., None]) -> None:
    from tqdm import tqdm

    with tqdm(total=plan.nbytes, unit="B", unit_scale=True, disable=None) as bar:
        convert(plan, workers=workers, progress=bar.update)


def check_workers(workers: int) -> None:
    if not 1 <= workers <= MAX_WORKERS:
        raise ValueError(f"--workers {workers}: 1 to {MAX_WORKERS}, so that memory stays within its bounds")


def size(text: str) -> int:
    """Bytes of `5GB`, as transformers writes it: units of 1000, or of 1024 with an i."""
    digits = text.strip().rstrip("iBbKMGkmg ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        value = float(digits) * UNITS[unit]
    except (ValueError, KeyError):
        raise ValueError(f"--max-shard-size {text!r}: a number with a unit, such as 5GB or 500MB") from None
    if value < 1:
        raise ValueError(f"--max-shard-size {text!r}: above zero")
    return int(value)


if __name__ == "__main__":
    main()
