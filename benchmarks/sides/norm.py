"""The gradient's norm in float64, by which sides are compared: torch's own of a large float32 tensor on a CPU has but
four digits, and each side groups its tensors as it likes."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sides.measure import Cost
from sides.work import CLIP, Outcome

PIECE = 2**20
"""Elements that are in float64 at a time: what a step takes at its peak is not to show it."""


class NormBeforeClipping:
    """Looks at the gradient of every optimizer of this process before its steps, at nobody's expense."""

    def __init__(self) -> None:
        self._clipped = self._seconds = self._cpu = 0.0
        register_optimizer_step_pre_hook(self._look)

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        begun, cpu = time.perf_counter(), time.process_time()
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        squares = [
            piece.double().square().sum()
            for gradient in gradients
            if gradient is not None
            for piece in gradient.flatten().split(PIECE)
        ]
        self._clipped = math.sqrt(sum(square.item() for square in squares))
        self._seconds, self._cpu = time.perf_counter() - begun, time.process_time() - cpu

    def exact(self, outcome: Outcome) -> Outcome:
        """`outcome` of the last step with the norm of what was clipped by the one that it has."""
        factor = min(1.0, CLIP / (outcome.gradient_norm + 1e-6))  # of torch and Megatron alike
        return replace(outcome, gradient_norm=self._clipped / factor)

    def without(self, cost: Cost) -> Cost:
        """What the last step cost, less what looking did."""
        return replace(cost, seconds=cost.seconds - self._seconds, cpu=cost.cpu - self._cpu)
