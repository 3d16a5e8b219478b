"""Converts a Qwen2.5 model between Hugging Face safetensors and a Megatron distributed checkpoint, in bounded memory.

python tools/convert_hf.py to-megatron --hf-dir Qwen2.5-Math-7B --megatron-dir checkpoints/qwen2.5-math-7b
python tools/convert_hf.py to-hf --megatron-dir runs/rlsc/checkpoints --hf-dir export
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from megatron_rlsc.conversion.convert import Conversion

DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    **{name: name for name in ("bfloat16", "float16", "float32")},
}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MAX_WORKERS = 8
"""Their buffers, 100 MB each, stay within the memory that is promised."""


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


Command = Annotated[ToMegatron, tyro.conf.subcommand("to-megatron")] | Annotated[ToHf, tyro.conf.subcommand("to-hf")]


def main() -> None:
    command = tyro.cli(Command, description=__doc__)
    from megatron_rlsc.disk import DiskError  # after --help

    try:
        write(command)
    except (ValueError, DiskError) as error:
        sys.exit(f"convert_hf: error: {error}")


def write(command: ToMegatron | ToHf) -> None:
    import torch

    from megatron_rlsc.conversion.convert import convert, plan_hf, plan_megatron

    if not 1 <= command.workers <= MAX_WORKERS:
        raise ValueError(f"--workers {command.workers}: 1 to {MAX_WORKERS}, so that memory stays within its bounds")
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
