"""Measures an HF model on problems with answers: greedy, and sampled at a temperature. Uses transformers alone.

python tools/evaluate.py --hf-dir runs/rlsc/hf --data aime24.jsonl --output aime24.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    hf_dir: Path
    """The model."""
    data: Path
    """Problems: a JSONL whose lines have a `problem` or a `question`, and an `answer`."""
    output: Path
    """Where the measurement goes, as JSON."""
    temperature: float = 0.5
    """Of the sampled responses."""
    max_response_length: int = 3072
    """Tokens of a response, the stop token included."""
    prompt_template: str = "qwen25-math-cot"
    """As in training: `qwen25-math-cot`, `plain`, or a text of your own with `{problem}` in it."""
    apply_chat_template: bool = True
    """As in training: wrap the prompt in the tokenizer's chat template."""
    batch_size: int = 64
    """Responses generated at one time."""
    seed: int = 1234
    """Of the sampled responses."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    from megatron_rlsc.config import DataConfig
    from megatron_rlsc.evaluation.measure import measure  # torch and transformers, after --help

    try:
        data = DataConfig(
            data_path=args.data, prompt_template=args.prompt_template, apply_chat_template=args.apply_chat_template
        )
        measurement = measure(
            args.hf_dir,
            data,
            temperature=args.temperature,
            max_response_length=args.max_response_length,
            batch_size=args.batch_size,
            seed=args.seed,
        )
    except ValueError as error:
        sys.exit(f"evaluate: error: {error}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(asdict(args) | asdict(measurement), indent=2, default=str) + "\n")
    print(
        f"{args.hf_dir}: {measurement.problems} problems, greedy {measurement.greedy.accuracy:.1f} %, "
        f"T={args.temperature} {measurement.sampled.accuracy:.1f} %"
    )


if __name__ == "__main__":
    main()
