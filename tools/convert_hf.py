"""Converts a Qwen2.5 model between Hugging Face safetensors and a Megatron distributed checkpoint.

python tools/convert_hf.py to-megatron --hf-dir Qwen2.5-Math-7B --megatron-dir checkpoints/qwen2.5-math-7b
python tools/convert_hf.py to-hf --megatron-dir runs/rlsc/checkpoints --hf-dir export
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class ToMegatron:
    """HF folder -> Megatron checkpoint that any layout loads."""

    hf_dir: Path
    """Folder with config.json, safetensors and tokenizer files."""
    megatron_dir: Path
    """Where the checkpoint goes."""
    dtype: Literal["source", "float32", "bfloat16"] = "source"
    """Of the weights in the checkpoint."""
    overwrite: bool = False
    """Replace what is in the target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToHf:
    """Megatron checkpoint -> HF folder for transformers and vLLM."""

    megatron_dir: Path
    """A converted checkpoint, or a run's checkpoints/ folder: its newest step."""
    hf_dir: Path
    """Where the HF model goes."""
    reference_hf_dir: Path | None = None
    """Takes config and tokenizer from here rather than from the checkpoint's own hf/ folder."""
    overwrite: bool = False
    """Replace what is in the target."""


Command = Annotated[ToMegatron, tyro.conf.subcommand("to-megatron")] | Annotated[ToHf, tyro.conf.subcommand("to-hf")]


def main() -> None:
    command = tyro.cli(Command, description=__doc__)
    import torch  # after --help

    from megatron_rlsc.disk import DiskError, full_disk_explained
    from megatron_rlsc.policy.convert import hf_to_megatron, megatron_to_hf

    target = command.megatron_dir if isinstance(command, ToMegatron) else command.hf_dir
    try:
        with full_disk_explained(target.parent):
            if isinstance(command, ToMegatron):
                dtype = None if command.dtype == "source" else getattr(torch, command.dtype)
                hf_to_megatron(command.hf_dir, command.megatron_dir, dtype=dtype, overwrite=command.overwrite)
                print(f"{command.megatron_dir} is a Megatron checkpoint of {command.hf_dir}, for any layout")
            else:
                megatron_to_hf(
                    command.megatron_dir,
                    command.hf_dir,
                    reference_dir=command.reference_hf_dir,
                    overwrite=command.overwrite,
                )
                print(f"{command.hf_dir} is an HF model of {command.megatron_dir}")
    except (ValueError, DiskError) as error:
        sys.exit(f"convert_hf: error: {error}")


if __name__ == "__main__":
    main()
