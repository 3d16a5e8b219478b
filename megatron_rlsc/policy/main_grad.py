"""Gradients that a backward pass adds to Megatron's `main_grad` itself, with no second tensor of the weight's size."""

from __future__ import annotations

from typing import Any


def in_main_grad(parameter: Any) -> None:
    """Tells the hook of distributed_data_parallel.py that `main_grad` has the gradient of this use already.

    It wants to see some gradient besides, which here takes no memory. Where a tied weight is used twice on a stage,
    Megatron's own `zero_out_wgrad` would have that one added: both uses say this instead.
    """
    parameter.grad_added_to_main_grad, parameter.zero_out_wgrad = True, False
    parameter.grad = parameter.new_zeros(()).expand_as(parameter)
