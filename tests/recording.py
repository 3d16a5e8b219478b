"""Runs `python -m megatron_rlsc`, and writes down in which order some functions of rank 0 begin and end.

    RLSC_EVENTS="FILE"    a line each: `begin call 2` is that `begin` was called with step=2

The program is not changed: Python's profiler hook sees every call, in every thread.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
from types import FrameType
from typing import Any

WATCHED = {
    ("sampler.py", "begin"): ("call",),
    ("sampler.py", "push"): ("call",),
    ("learning.py", "learn"): ("call", "return"),
    ("ahead.py", "_wait"): ("call", "return"),
    ("journal.py", "add"): ("call",),
}
path = os.environ["RLSC_EVENTS"]


def look(frame: FrameType, what: str, _: Any) -> None:
    code = frame.f_code
    if what in WATCHED.get((os.path.basename(code.co_filename), code.co_name), ()):
        with open(path, "a") as file:
            file.write(f"{code.co_name} {what} {frame.f_locals['step']}\n")


if os.environ.get("RANK", "0") == "0":
    sys.setprofile(look)
    threading.setprofile(look)
runpy.run_module("megatron_rlsc", run_name="__main__", alter_sys=True)
