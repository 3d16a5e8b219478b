"""The settings of the collapse guard: what is done about a collapse, and every threshold that tells one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    """What is done when the policy collapses: say so and go on; end the run, saved, with status `failed`; or go back to
    the last good checkpoint and on from there with new samples and a lower rate. docs/collapse.md has the signs."""
    guard_patience: int = 2
    """Steps in a row that must be beyond a threshold."""
    length_floor: float = 0.3
    """Mean response length below this share of the first step's; 0 does not look. RLSC may well halve it."""
    truncation_growth: float = 0.3
    """Share of responses cut at the limit above the first step's by this much; 1 does not look."""
    repetition_growth: float = 0.3
    """Share of repeated runs of 8 tokens above the first step's by this much; 1 does not look."""
    answers_floor: float = 0.5
    """Different answers a prompt below this share of the first step's; 0 does not look."""
    agreement_fall: float = 0.05
    """Share of equal pairs of siblings below the best of the last 10 steps, by this much and by agreement_errors: the
    opposite of what RLSC does; 1 does not look."""
    agreement_errors: float = 3.0
    """Standard errors of that difference, from how the share varies between the questions of a step."""
    saturation: float = 0.975
    """Share of equal pairs of siblings from which on a run is told that nothing is left to learn; that is all that
    comes of it. More than 1 does not look."""
    entropy_floor: float = 1e-4
    """Mean token entropy below this, in nats; 0 does not look."""
    entropy_ceiling: float = 2.0
    """Mean token entropy above this many times the first step's; inf does not look."""
    kl_ceiling: float = math.inf
    """KL to the base above this, in nats a token, in the steps that measure it (kl_interval); inf does not look."""
    kl_interval: int = 0
    """Steps between measurements of the KL to the base, from the first on; 0 makes none. A copy of the base's weights
    is kept in host memory, and takes the model's place for a forward pass over the step's responses."""
    rollback_rate: float = 0.1
    """What each rollback multiplies the learning rate by, of all steps to come."""
    max_rollbacks: int = 3
    """Rollbacks of a run, resumed or not; a collapse after the last of them ends it."""

    def __post_init__(self) -> None:
        for name in ("guard_patience", "max_rollbacks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        shares = ("length_floor", "truncation_growth", "repetition_growth", "answers_floor", "agreement_fall")
        for name in (*shares, "agreement_errors", "entropy_floor", "saturation"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, it is {getattr(self, name)}")
        if not self.entropy_ceiling > 1:
            raise ValueError(f"entropy_ceiling is times the first step's: more than 1, not {self.entropy_ceiling}")
        if not self.kl_ceiling > 0:
            raise ValueError(f"kl_ceiling must be positive, it is {self.kl_ceiling}")
        if self.kl_interval < 0:
            raise ValueError(f"kl_interval must not be negative, it is {self.kl_interval}")
        if self.kl_ceiling < math.inf and self.kl_interval == 0:
            raise ValueError(f"kl_ceiling {self.kl_ceiling} is of what kl_interval measures: give both")
        if not 0 < self.rollback_rate < 1:
            raise ValueError(f"rollback_rate must be between 0 and 1, it is {self.rollback_rate}")

    def measures_kl(self, step: int) -> bool:
        """Every `kl_interval` steps, from the first on."""
        return self.kl_interval > 0 and (step - 1) % self.kl_interval == 0
