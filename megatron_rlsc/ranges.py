"""Ranges: the parts of a step, named for a profiler to see. Where none looks, one costs microseconds."""

from __future__ import annotations

from torch.profiler import record_function

PREFIX = "rlsc/"
"""Of the names of ours: a trace has those of others, too."""
STEP = f"{PREFIX}step"
"""The range that holds all others of a step."""


def span(name: str) -> record_function:
    """A context manager, or the decorator of a function that does not call itself."""
    return record_function(f"{PREFIX}{name}")
