"""Runs `python -m megatron_rlsc`, and sends this process a signal at one point of the program, given by RLSC_END.

    RLSC_END="RANK SIGNAL FILE FUNCTION EVENT COUNT"    0 SIGKILL journal.py write return 2

is: on rank 0, when `write` of a file that ends in journal.py returns for the second time. RANK `*` is every rank. The
program is not changed: Python's profiler hook sees every call, in every thread.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from types import FrameType
from typing import Any

rank, name, file, function, event, count = os.environ["RLSC_END"].split()
left = int(count)


def look(frame: FrameType, what: str, _: Any) -> None:
    global left
    code = frame.f_code
    if what == event and code.co_name == function and code.co_filename.endswith(file):
        left -= 1
        if left == 0:
            sys.setprofile(None)
            print(f"ending.py: {name} at {file}:{function}", flush=True)
            os.kill(os.getpid(), signal.Signals[name])


if rank in ("*", os.environ.get("RANK", "0")):
    sys.setprofile(look)
    threading.setprofile(look)
runpy.run_module("megatron_rlsc", run_name="__main__", alter_sys=True)
