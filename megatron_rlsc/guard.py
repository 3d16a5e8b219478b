"""Is the policy collapsing? The signs of it, each a figure of the step with a threshold; docs/collapse.md has the why.

RLSC is meant to sharpen: siblings agree more and entropy falls, in the best of runs. So neither of that is a sign. A
collapse is known by what sharpening leaves as it is, that questions have answers of their own, that responses end, say
things once and keep their length; and by the opposite of sharpening. What is normal is the first step's: its responses
come from the base policy, before any update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_rlsc.config import GuardConfig

Row = Mapping[str, float]
"""A step's figures by their tags, as a line of metrics.jsonl has them; `step` among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """A figure and its threshold."""

    name: str
    tag: str
    falls: bool
    """Whether it is below the threshold that tells a collapse."""
    normal: Literal["first", "best", "any"]
    """What the threshold is held against: the figure of the first step, the best of the last RECENT, or nothing."""
    limit: Callable[[GuardConfig, float, float], float]
    """The threshold, from the settings, what is normal, and the standard error of a difference from that (0 where the
    figure has none)."""
    error_tag: str = ""
    """Of the figure's standard error."""


SIGNS = (
    Sign(
        name="responses get short",
        tag="rollout/response_length",
        falls=True,
        normal="first",
        limit=lambda config, normal, error: config.length_floor * normal,
    ),
    Sign(
        name="responses do not end",
        tag="rollout/truncated_share",
        falls=False,
        normal="first",
        limit=lambda config, normal, error: normal + config.truncation_growth,
    ),
    Sign(
        name="responses repeat themselves",
        tag="rollout/repeated_share",
        falls=False,
        normal="first",
        limit=lambda config, normal, error: normal + config.repetition_growth,
    ),
    Sign(
        name="different questions get the same answer",
        tag="rollout/distinct_answers",
        falls=True,
        normal="first",
        limit=lambda config, normal, error: config.answers_floor * normal,
    ),
    Sign(
        name="siblings agree less than they did",
        tag="confidence/identical_share",
        falls=True,
        normal="best",
        limit=lambda config, normal, error: normal - max(config.agreement_fall, config.agreement_errors * error),
        error_tag="confidence/identical_error",
    ),
    Sign(
        name="tokens get random",
        tag="policy/token_entropy",
        falls=False,
        normal="first",
        limit=lambda config, normal, error: config.entropy_ceiling * normal,
    ),
    Sign(
        name="nothing is left to sample",
        tag="policy/token_entropy",
        falls=True,
        normal="any",
        limit=lambda config, normal, error: config.entropy_floor,
    ),
    Sign(
        name="the policy has left the base",
        tag="kl/token",
        falls=False,
        normal="any",
        limit=lambda config, normal, error: config.kl_ceiling,
    ),
)
"""What tells a collapse."""

AGREEMENT = "confidence/identical_share"
RECENT = 10
"""Steps among which the best of a figure is looked for: the best of hundreds is luck."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A sign that is beyond its threshold in the last steps that have its figure."""

    sign: Sign
    value: float
    """In the last of them."""
    limit: float
    since: int
    """The first of them."""
    steps: int
    """How many they are."""
    well: int
    """The last step before them that was no further than half-way from the first step to the threshold; of a figure
    that is held against its best, the step that had it."""

    def __str__(self) -> str:
        word = "below" if self.sign.falls else "above"
        return f"{self.sign.name} ({self.sign.tag} {self.value:.3g}, {word} {self.limit:.3g} since step {self.since})"


class Guard:
    """What a run's steps show. One that is beyond a threshold is suspicious, `guard_patience` of them a collapse."""

    def __init__(self, config: GuardConfig, rows: Iterable[Row] = ()) -> None:
        """
        Args:
            config: the thresholds.
            rows: of the steps that are done; all that the guard knows of a run is in its metrics.jsonl.
        """
        self._config = config
        self._rows = list(rows)

    def look(self, row: Row) -> None:
        """Takes note of a step."""
        self._rows.append(row)

    def forget_after(self, step: int) -> None:
        """The run has gone back: later steps are no part of it."""
        self._rows = [row for row in self._rows if row["step"] <= step]

    def collapse(self) -> list[Finding]:
        """The signs of a collapse after the last step; none where all is well."""
        return [finding for finding in self._suspicions() if finding.steps >= self._config.guard_patience]

    def news(self) -> list[Finding]:
        """Those of them that the last step has made one."""
        return [finding for finding in self.collapse() if finding.steps == self._config.guard_patience]

    def sound_step(self) -> int:
        """The last step after which the policy is known to be sound: its weights have been sampled from, and no sign
        was then on its way to where it is now, beyond its threshold. 0 is the base."""
        if not self._rows:
            return 0
        last = int(self._rows[-1]["step"])
        well = min((finding.well for finding in self._suspicions()), default=last)
        return max(0, well - 1)  # a step's responses come from the weights of the step before

    def spared_steps(self) -> list[int]:
        """What the run would go back to, were it to collapse from here on: by a sign that is held against the first
        step, or by one that is held against its best."""
        known = [(sign, [row for row in self._rows if sign.tag in row]) for sign in SIGNS if sign.normal == "best"]
        peaks = [int(_normal(sign, rows, len(rows))["step"]) for sign, rows in known if rows]
        return [self.sound_step(), *(max(0, peak - 1) for peak in peaks)]

    def saturates(self) -> bool:
        """Whether the last step makes it `guard_patience` steps in which siblings all but agree: no collapse, but the
        gradient is all but gone, and there is no reason to go on."""
        agreed = [row[AGREEMENT] >= self._config.saturation for row in self._rows if AGREEMENT in row]
        patience = self._config.guard_patience
        return agreed[-patience:] == [True] * patience and not any(agreed[-patience - 1 : -patience])

    def _suspicions(self) -> list[Finding]:
        found = (self._suspicion(sign) for sign in SIGNS)
        return [finding for finding in found if finding is not None]

    def _suspicion(self, sign: Sign) -> Finding | None:
        """A step without the figure says nothing: the KL is not of every step, and a run may be older than a figure."""
        rows = [row for row in self._rows if sign.tag in row]
        limits: list[float] = []
        for end in range(len(rows), 0, -1):  # from the newest back, until one is within its threshold
            normal = _normal(sign, rows, end)
            error = math.hypot(normal.get(sign.error_tag, 0.0), rows[end - 1].get(sign.error_tag, 0.0))
            limit = sign.limit(self._config, normal[sign.tag], error)
            if not _beyond(sign, rows[end - 1], limit):
                break
            limits.append(limit)
        if not limits:
            return None
        if sign.normal == "best":
            well = _normal(sign, rows, len(rows) - len(limits) + 1)["step"]
        else:
            half_way = limits[0] if sign.normal == "any" else (rows[0][sign.tag] + limits[0]) / 2
            well = next((row["step"] for row in reversed(rows) if not _beyond(sign, row, half_way)), 0)
        return Finding(
            sign=sign,
            value=rows[-1][sign.tag],
            limit=limits[0],
            since=int(rows[-len(limits)]["step"]),
            steps=len(limits),
            well=int(well),
        )


def _normal(sign: Sign, rows: Sequence[Row], end: int) -> Row:
    """What the last of the first `end` steps is held against."""
    if sign.normal != "best":
        return rows[0]
    return (max if sign.falls else min)(rows[max(0, end - RECENT) : end], key=lambda row: row[sign.tag])


def _beyond(sign: Sign, row: Row, limit: float) -> bool:
    return row[sign.tag] < limit if sign.falls else row[sign.tag] > limit
