"""TensorBoard as a cockpit: figures, a page of charts, distributions, texts, and a run's settings beside its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_rlsc.config import Config
from megatron_rlsc.types import ResponseScores, Sample

LAYOUT = {
    "Confidence": {
        "p of a response, and share of equal siblings": [
            "Multiline",
            ["confidence/mean", "confidence/identical_share"],
        ],
        "p of a token": ["Multiline", ["confidence/token_probability"]],
        "entropy of a token, nats": ["Multiline", ["policy/token_entropy"]],
        "tokens of a response": ["Multiline", ["rollout/response_length"]],
    },
    "Health": {
        "cut, negligible": ["Multiline", ["rollout/truncated_share", "weights/negligible_share"]],
        "repeated runs of tokens, distinct responses and answers": [
            "Multiline",
            ["rollout/repeated_share", "rollout/distinct_share", "rollout/distinct_answers"],
        ],
        "sampler against trainer, nats": ["Multiline", ["rollout/logprob_difference", "sync/probe_difference"]],
        "loss": ["Multiline", ["loss"]],
        "gradient norm": ["Multiline", ["optimizer/gradient_norm"]],
    },
    "Speed": {
        "seconds of the phases": ["Multiline", ["time/"]],
        "response tokens a second": ["Multiline", ["speed/tokens_per_second"]],
        "padding, imbalance of replicas, prompts computed once": ["Multiline", ["packing/"]],
    },
    "Held out": {
        "accuracy, %, in its 95 % interval": [
            "Margin",
            ["held_out/accuracy", "held_out/accuracy_low", "held_out/accuracy_high"],
        ],
        "tokens of a response": ["Multiline", ["held_out/response_length"]],
    },
}
"""{section: {chart: [kind, figures]}} of the page Custom Scalars, where figures are how their names begin."""
COMPARED = {
    "model": ("load", "bf16"),
    "parallel": ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    "data": ("data_path", "prompts_per_step"),
    "rollout": ("samples_per_prompt", "temperature", "max_response_length", "rollout_lead"),
    "objective": (),
    "optimizer": ("lr", "lr_decay_style", "weight_decay", "clip_grad"),
    "train": ("train_iters", "updates_per_rollout", "seed"),
}
"""{section: settings} by which HParams compares runs, none being all of the section; config.toml has the others."""
FINAL = ("confidence/mean", "policy/token_entropy", "rollout/response_length", "held_out/accuracy")
"""Figures that stand beside a run's settings on the page HParams: their last values."""


def compared_settings(config: Config) -> dict[str, bool | float | str]:
    """{name: value} of those that are set."""
    found: dict[str, Any] = {}
    for section, names in COMPARED.items():
        values = dataclasses.asdict(getattr(config, section))
        found |= {name: values[name] for name in names or values if values[name] is not None}
    return {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in found.items()}


class Board:
    """A run's event files."""

    def __init__(self, folder: Path, *, start: int, settings: Mapping[str, bool | float | str]) -> None:
        """
        Args:
            folder: of event files; points past `start`, the last step that is done, are hidden.
            settings: {name: value}, for HParams (`compared_settings`).
        """
        self._writer = SummaryWriter(str(folder), purge_step=start + 1)
        self._writer.add_custom_scalars(LAYOUT)
        experiment, session, self._end = hparams(dict(settings), dict.fromkeys(FINAL, 0.0))
        for summary in (experiment, session):
            self._add_summary(summary)

    def add_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """{tag: value}."""
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, step)

    def add_distributions(self, step: int, samples: Sequence[Sample], scores: ResponseScores) -> None:
        """What the means are of: log p of each response and of each token, and each response's mean token entropy."""
        tokens = np.concatenate([np.asarray(sample.rollout_logprobs, dtype=np.float32) for sample in samples])
        values = {
            "response_logprob": scores.logprobs.cpu().numpy(),
            "token_logprob": tokens,
            "token_entropy": (scores.entropy / scores.lengths).cpu().numpy(),
        }
        for tag, each in values.items():
            if np.isfinite(each).all() and len(each):
                self._writer.add_histogram(f"distribution/{tag}", each, step)

    def add_text(self, step: int, tag: str, parts: Mapping[str, str]) -> None:
        """{heading: text as it is}: indented, Markdown shows it and does not obey it."""
        blocks = (f"**{heading}**\n\n{_indented(text)}" for heading, text in parts.items())
        self._writer.add_text(tag, "\n\n".join(blocks), step)

    def end(self) -> None:
        """The last step is done."""
        self._add_summary(self._end)

    def _add_summary(self, summary: Any) -> None:
        """As it is: `SummaryWriter.add_hparams` would make a run of its own of it, in a folder beside the figures."""
        self._writer._get_file_writer().add_summary(summary)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.replace("\r", "\n").split("\n"))
