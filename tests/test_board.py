"""Event files read back by TensorBoard's own reader. What a person sees of them: docs/reports.md."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from megatron_rlsc.board import FINAL, LAYOUT, Board, compared_settings
from megatron_rlsc.config import Config
from megatron_rlsc.types import Health, Load, ResponseScores, Sample, StepStats

SETTINGS = compared_settings(Config())


def sample(logprobs: tuple[float, ...]) -> Sample:
    return Sample(
        group=0,
        sample=0,
        prompt_index=0,
        prompt_token_ids=(1,),
        response_token_ids=(2,) * len(logprobs),
        rollout_logprobs=logprobs,
        finish_reason="stop",
        seed=0,
        version="v",
    )


def scores(logprobs: list[float], entropy: list[float], lengths: list[int]) -> ResponseScores:
    return ResponseScores(
        logprobs=torch.tensor(logprobs, dtype=torch.float64),
        entropy=torch.tensor(entropy, dtype=torch.float64),
        lengths=torch.tensor(lengths),
        rollout_difference=torch.zeros(len(lengths), dtype=torch.float64),
    )


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"histograms": 0, "tensors": 0}).Reload()


def test_the_distributions_of_a_step(tmp_path: Path) -> None:
    """Two responses of 2 and 1 tokens: token log p -1, -2 and -4, sums -3 and -4, entropies 0.6 / 2 and 0.1 / 1."""
    board = Board(tmp_path, start=0, settings={})
    board.add_distributions(1, [sample((-1.0, -2.0)), sample((-4.0,))], scores([-3.0, -4.0], [0.6, 0.1], [2, 1]))
    board.close()
    found = read(tmp_path)
    expected = {
        "response_logprob": (2, -4.0, -3.0, -7.0),
        "token_logprob": (3, -4.0, -1.0, -7.0),
        "token_entropy": (2, 0.1, 0.3, 0.4),
    }
    for tag, (number, least, most, total) in expected.items():
        (event,) = found.Histograms(f"distribution/{tag}")
        values = event.histogram_value
        assert (event.step, values.num) == (1, number)
        assert (values.min, values.max, values.sum) == pytest.approx((least, most, total))


def test_a_distribution_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    board = Board(tmp_path, start=0, settings={})
    board.add_distributions(1, [sample((-1.0,))], scores([-np.inf], [0.1], [1]))
    board.close()
    assert sorted(read(tmp_path).Tags()["histograms"]) == ["distribution/token_entropy", "distribution/token_logprob"]


def test_the_settings_stand_beside_the_last_figures(tmp_path: Path) -> None:
    """In the run's own event file: a folder of their own would be a second run."""
    board = Board(tmp_path, start=0, settings=SETTINGS)
    board.end()
    board.close()
    assert len(list(tmp_path.iterdir())) == 1
    found = read(tmp_path)
    begun = content(found, "_hparams_/session_start_info").session_start_info.hparams
    assert begun["alpha"].number_value == 0.1
    assert begun["weight_scale"].string_value == "none"
    assert begun["bf16"].bool_value is False
    figures = content(found, "_hparams_/experiment").experiment.metric_infos
    assert [info.name.tag for info in figures] == list(FINAL)
    assert content(found, "_hparams_/session_end_info").session_end_info.status


def content(found: EventAccumulator, tag: str) -> plugin_data_pb2.HParamsPluginData:
    return plugin_data_pb2.HParamsPluginData.FromString(found.SummaryMetadata(tag).plugin_data.content)


def test_the_page_of_charts(tmp_path: Path) -> None:
    Board(tmp_path, start=0, settings={}).close()
    (event,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    assert [chart.title for chart in layout.category[2].chart] == list(LAYOUT["Speed"])


def test_every_chart_has_a_figure() -> None:
    """TensorBoard matches a pattern from the name's beginning on. Of held_out, tests/test_train.py has the names."""
    records = [field for record in (Health, Load, StepStats) for field in dataclasses.fields(record)]
    tags = ["time/rollout", *(field.metadata["tag"] for field in records if field.metadata)]
    for kind, patterns in (chart for section in LAYOUT.values() for chart in section.values()):
        for pattern in patterns:
            known = any(re.match(pattern, tag) for tag in tags)
            assert known or (kind, pattern.split("/")[0]) in (("Margin", "held_out"), ("Multiline", "held_out")), (
                pattern
            )


def test_text_of_a_model_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    """Every line of it is code to Markdown, whatever it closes or opens."""
    board = Board(tmp_path, start=0, settings={})
    board.add_text(3, "shown/1", {"answer": "a\n```\n\n# <script>\r\n![x](http://x)"})
    board.close()
    (event,) = read(tmp_path).Tensors("shown/1/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 3
    body = text.removeprefix("**answer**\n\n")
    assert all(line.startswith("    ") for line in body.split("\n"))
    assert body.replace("    ", "") == "a\n```\n\n# <script>\n\n![x](http://x)"


def test_a_resumed_run_has_no_point_twice(tmp_path: Path) -> None:
    """Three steps, and from step 1 on again: figures and distributions of steps 2 and 3 are the later ones."""
    for start, value in ((0, 1.0), (1, 2.0)):
        board = Board(tmp_path, start=start, settings=SETTINGS)
        for step in range(start + 1, 4):
            board.add_figures(step, {"loss": value})
            board.add_distributions(step, [sample((-value,))], scores([-value], [0.1], [1]))
        board.close()
        time.sleep(1.1)  # an event file's name has its second
    found = read(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 2.0)]
    sums = [(e.step, e.histogram_value.sum) for e in found.Histograms("distribution/response_logprob")]
    assert sums == [(1, -1.0), (2, -2.0), (3, -2.0)]
