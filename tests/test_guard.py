"""The signs of a collapse by hand, on rows as metrics.jsonl has them.

Not covered: that real collapses show these signs (benchmarks/collapse.py), and what is done about one
(tests/test_recovery.py).
"""

from __future__ import annotations

import pytest

from megatron_rlsc.config import GuardConfig
from megatron_rlsc.guard import SIGNS, Guard, Row
from megatron_rlsc.tracking import tags_of_a_step

WELL = {
    "rollout/response_length": 40.0,
    "rollout/truncated_share": 0.1,
    "rollout/repeated_share": 0.05,
    "rollout/distinct_answers": 0.8,
    "confidence/identical_share": 0.5,
    "policy/token_entropy": 0.2,
}


def rows(tag: str, *values: float) -> list[Row]:
    """A step a value, all else as it was."""
    return [WELL | {"step": step, tag: value} for step, value in enumerate(values, start=1)]


def signs(tag: str, *values: float, **settings: object) -> list[str]:
    return [str(found) for found in Guard(GuardConfig(**settings), rows(tag, *values)).collapse()]  # type: ignore[arg-type]


def test_every_sign_is_of_a_figure_that_steps_have():
    assert {sign.tag for sign in SIGNS} <= set(tags_of_a_step())


@pytest.mark.parametrize(
    ("tag", "first", "within", "beyond", "limit"),
    [
        ("rollout/response_length", 40.0, 12.1, 11.9, "12"),  # 0.3 * 40
        ("rollout/truncated_share", 0.1, 0.39, 0.41, "0.4"),  # 0.1 + 0.3
        ("rollout/repeated_share", 0.05, 0.34, 0.36, "0.35"),  # 0.05 + 0.3
        ("rollout/distinct_answers", 0.8, 0.41, 0.39, "0.4"),  # 0.5 * 0.8
        ("policy/token_entropy", 0.2, 0.39, 0.41, "0.4"),  # 2 * 0.2
        ("policy/token_entropy", 0.2, 1.1e-4, 9e-5, "0.0001"),
    ],
)
def test_two_steps_beyond_a_threshold_are_a_collapse(
    tag: str, first: float, within: float, beyond: float, limit: str
) -> None:
    assert not signs(tag, first, within, within, within)
    assert not signs(tag, first, beyond, within, beyond), "one at a time"
    (found,) = signs(tag, first, within, beyond, beyond)
    assert f"({tag} {beyond:.3g}, " in found and found.endswith(f" {limit} since step 3)")
    assert signs(tag, first, beyond, guard_patience=1)
    assert not signs(tag, first, beyond, beyond, guard_patience=3)


@pytest.mark.parametrize(
    ("tag", "worst", "off"),
    [
        ("rollout/response_length", 0.0, {"length_floor": 0.0}),
        ("rollout/truncated_share", 1.0, {"truncation_growth": 1.0}),
        ("rollout/repeated_share", 1.0, {"repetition_growth": 1.0}),
        ("rollout/distinct_answers", 0.0, {"answers_floor": 0.0}),
        ("confidence/identical_share", 0.0, {"agreement_fall": 1.0}),
        ("policy/token_entropy", 9e9, {"entropy_ceiling": float("inf")}),
        ("policy/token_entropy", 0.0, {"entropy_floor": 0.0}),
    ],
)
def test_a_sign_can_be_switched_off(tag: str, worst: float, off: dict[str, float]) -> None:
    values = (WELL[tag], WELL[tag], worst, worst)
    assert signs(tag, *values)
    assert not signs(tag, *values, **off)


def test_siblings_that_agree_less_than_they_did():
    """Without an error to speak of, 0.05 below 0.9 is 0.85. The best is that of the last ten steps."""
    tag = "confidence/identical_share"
    assert not signs(tag, 0.3, 0.9, 0.86, 0.86)
    assert not signs(tag, 0.3, 0.9, 0.84, 0.86, 0.84), "one at a time"
    (found,) = signs(tag, 0.3, 0.9, 0.84, 0.84)
    assert found.endswith("0.84, below 0.85 since step 3)")
    slowly = [0.9 - 0.004 * step for step in range(40)]
    assert not signs(tag, *slowly)


def test_a_fall_must_be_more_than_the_luck_of_the_questions():
    """Errors of 0.03 and 0.04 are 0.05 of a difference, and three of them 0.15: below 0.75."""
    tag, error = "confidence/identical_share", "confidence/identical_error"
    steps = [(0.3, 0.03), (0.9, 0.03), (0.76, 0.04), (0.76, 0.04)]
    made: list[Row] = [{"step": i, tag: value, error: spread} for i, (value, spread) in enumerate(steps, start=1)]
    assert not Guard(GuardConfig(), made).collapse()
    (found,) = Guard(
        GuardConfig(), [*made, *(row | {"step": 5 + i, tag: 0.74} for i, row in enumerate(made[2:]))]
    ).collapse()
    assert (found.limit, found.since) == (pytest.approx(0.75), 5)
    assert Guard(GuardConfig(agreement_errors=2), made).collapse()


def test_sharpening_is_no_collapse():
    """Entropy to a thirtieth, agreement from 0.3 to 0.97, lengths doubled: the newcomer's run."""
    guard = Guard(GuardConfig())
    for step in range(1, 21):
        part = step / 20
        guard.look(
            {
                "step": step,
                "confidence/identical_share": 0.3 + 0.67 * part,
                "policy/token_entropy": 0.15 * (1 - part) + 0.005,
                "rollout/response_length": 20 * (1 + part),
                "rollout/distinct_answers": 1.0 - 0.06 * (step % 2),
            }
        )
        assert not guard.collapse()
    assert guard.sound_step() == 19


def test_what_to_go_back_to():
    """Half-way to 0.4 from 0.1 is 0.25. Step 4 is past it, so step 3 was the last one well, and its responses came from
    the weights after step 2."""
    tag = "rollout/truncated_share"
    guard = Guard(GuardConfig(), rows(tag, 0.1, 0.2, 0.2, 0.3))
    assert guard.sound_step() == 3, "on its way to a threshold is not beyond it"
    for row in rows(tag, 0.1, 0.2, 0.2, 0.3, 0.5, 0.6)[4:]:
        guard.look(row)
    assert guard.sound_step() == 2
    assert [found.since for found in guard.news()] == [5]
    guard.forget_after(2)
    assert not guard.collapse() and guard.sound_step() == 1
    assert Guard(GuardConfig()).sound_step() == 0


def test_the_peak_of_agreement_is_where_the_fall_began():
    guard = Guard(GuardConfig(), rows("confidence/identical_share", 0.3, 0.8, 0.9, 0.85, 0.5, 0.5))
    assert guard.collapse() and guard.sound_step() == 2
    guard.forget_after(4)
    assert guard.spared_steps() == [3, 2], "for whatever sign may come, and for this one"


def test_a_collapse_is_news_once():
    guard = Guard(GuardConfig())
    news = []
    for row in rows("rollout/truncated_share", 0.1, 0.9, 0.9, 0.9, 0.1, 0.9, 0.9):
        guard.look(row)
        news.append(bool(guard.news()))
    assert news == [False, False, True, False, False, False, True]


def test_steps_without_a_figure_say_nothing():
    """Of a divergence that is measured every third step, two measurements in a row count; and a run may be older than
    all of the figures."""
    config = GuardConfig(kl_interval=3, kl_ceiling=0.5)
    measured: list[Row] = [{"step": step} | ({"kl/token": 0.6} if step % 3 == 1 else {}) for step in range(1, 7)]
    assert not Guard(config, measured[:3]).collapse()
    (found,) = Guard(config, measured).collapse()
    assert (found.sign.tag, found.since, found.steps) == ("kl/token", 1, 2)
    assert not Guard(config, [{"step": 1}, {"step": 2}]).collapse()


def test_saturation_is_said_once_and_is_no_collapse():
    guard = Guard(GuardConfig(saturation=0.9))
    said = []
    for row in rows("confidence/identical_share", 0.5, 0.95, 0.93, 0.96, 0.96):
        guard.look(row)
        said.append(guard.saturates())
    assert said == [False, False, True, False, False]
    assert not guard.collapse()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"guard_patience": 0}, "guard_patience must be at least 1"),
        ({"length_floor": -1.0}, "length_floor must not be negative"),
        ({"entropy_ceiling": 1.0}, "entropy_ceiling is times the first step's"),
        ({"kl_ceiling": 0.5}, r"kl_ceiling 0\.5 is of what kl_interval measures: give both"),
        ({"rollback_rate": 1.0}, "rollback_rate must be between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense(setting: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuardConfig(**setting)  # type: ignore[arg-type]
