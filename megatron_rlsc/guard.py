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

from megatron_rlsc.guard_config import GuardConfig

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
    """What the threshold is held against: the figure of the first step, the best that it has kept up, or nothing."""
    limit: Callable[[GuardConfig, float], float]
    """The threshold, from the settings and what is normal."""


SIGNS = (
    Sign(
        name="responses get short",
        tag="rollout/response_length",
        falls=True,
        normal="first",
        limit=lambda config, normal: config.length_floor * normal,
    ),
    Sign(
        name="responses do not end",
        tag="rollout/truncated_share",
        falls=False,
        normal="first",
        limit=lambda config, normal: normal + config.truncation_growth,
    ),
    Sign(
        name="responses repeat themselves",
        tag="rollout/repeated_share",
        falls=False,
        normal="first",
        limit=lambda config, normal: normal + config.repetition_growth,
    ),
    Sign(
        name="different questions get the same answer",
        tag="rollout/distinct_answers",
        falls=True,
        normal="first",
        limit=lambda config, normal: config.answers_floor * normal,
    ),
    Sign(
        name="siblings agree less than they did",
        tag="confidence/identical_share",
        falls=True,
        normal="best",
        # The share of pairs varies from step to step as a share does, less where nearly all agree.
        limit=lambda config, normal: normal - config.agreement_fall * max(0.5, 2 * math.sqrt(normal * (1 - normal))),
    ),
    Sign(
        name="tokens get random",
        tag="policy/token_entropy",
        falls=False,
        normal="first",
        limit=lambda config, normal: config.entropy_ceiling * normal,
    ),
    Sign(
        name="nothing is left to sample",
        tag="policy/token_entropy",
        falls=True,
        normal="any",
        limit=lambda config, normal: config.entropy_floor,
    ),
    Sign(
        name="the policy has left the base",
        tag="kl/token",
        falls=False,
        normal="any",
        limit=lambda config, normal: config.kl_ceiling,
    ),
)
"""What tells a collapse."""

AGREEMENT = "confidence/identical_share"


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
        steps = [int(row["step"]) for row in self._rows if sign.tag in row]
        values = [row[sign.tag] for row in self._rows if sign.tag in row]
        if not values:
            return None
        kept = held(values, self._config.guard_patience, highest=sign.falls)
        limit = sign.limit(self._config, kept if sign.normal == "best" else values[0])
        best = max(values) if sign.falls else min(values)  # kept up or not: where the fall began
        well = {"first": (values[0] + limit) / 2, "best": best, "any": limit}[sign.normal]
        beyond = _last_run(values, limit, falls=sign.falls)
        if not beyond:
            return None
        before = len(values) - _last_run(values, well, falls=sign.falls)
        return Finding(
            sign=sign,
            value=values[-1],
            limit=limit,
            since=steps[-beyond],
            steps=beyond,
            well=steps[before - 1] if before else 0,
        )


def held(values: Sequence[float], steps: int, *, highest: bool) -> float:
    """The highest value that a figure has kept up, or exceeded, for so many steps in a row; else the lowest likewise.

    Of 1, 5, 3, 4, for two steps: 3, since 5 was a step's luck. Fewer than so many count together.
    """
    windows = [values[i : i + steps] for i in range(max(1, len(values) - steps + 1))]
    return max(map(min, windows)) if highest else min(map(max, windows))


def _last_run(values: Sequence[float], limit: float, *, falls: bool) -> int:
    """How many of the last values in a row are beyond the limit."""
    count = 0
    for value in reversed(values):
        if not (value < limit if falls else value > limit):
            break
        count += 1
    return count
