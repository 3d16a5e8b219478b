"""Traces of a few events, taken apart by hand, and the tables of two ranks.

Not covered: traces that a GPU has recorded. The one here is written from what Kineto says of its format.
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rlsc.breakdown import Breakdown, Part, break_down, tables

Event = dict[str, Any]


def event(name: str, begin: float, end: float, category: str, *, thread: int = 1, **args: int) -> Event:
    """Microseconds; `_` in the name of an argument is a space."""
    named = {key.replace("_", " "): value for key, value in args.items()}
    return {
        **{"ph": "X", "cat": category, "name": name, "pid": 7, "tid": thread},
        **{"ts": begin, "dur": end - begin, "args": named},
    }


def range_(name: str, begin: float, end: float, *, thread: int = 1) -> Event:
    return event(f"rlsc/{name}", begin, end, "user_annotation", thread=thread)


def op(name: str, begin: float, end: float, *, thread: int = 1, **args: int) -> Event:
    return event(name, begin, end, "cpu_op", thread=thread, **args)


def gloo(name: str, begin: float, end: float, *, thread: int = 9) -> Event:
    return event(f"gloo:{name}", begin, end, "user_annotation", thread=thread)


def microseconds(parts: Any) -> dict[str, tuple[float, int]]:
    return {name: (pytest.approx(1e6 * part.seconds), part.calls) for name, part in parts.items()}


def test_a_step_of_a_cpu() -> None:
    events: list[Event] = [
        {"ph": "M", "name": "process_name", "pid": 7, "args": {"name": "python"}},
        op("aten::before", -50, -10),
        range_("step", 0, 1000),
        range_("train", 100, 900),
        range_("forward-compute", 200, 600),
        range_("attention", 250, 350),
        op("aten::mm", 260, 340),
        # Waits for a collective inside an operator of its own, once it has made its buffer.
        op("_Reduce", 400, 500),
        op("aten::empty", 400, 410),
        gloo("all_reduce", 405, 480),
        op("aten::view", 406, 408, thread=9),
        # A collective behind a product of matrices
        gloo("all_reduce", 620, 680),
        op("aten::mm", 630, 660),
        range_("backward", 700, 750, thread=2),
        gloo("send", 300, 5000, thread=1),
        gloo("broadcast", 950, 960),
    ]
    found = break_down(events)
    assert microseconds(found.ranges) == {
        "": (1000 - 800, 1),
        "train": (800 - 400 - 50 - 30, 1),
        "train/forward-compute": (400 - 100 - 70, 1),
        "train/forward-compute/attention": (100, 1),
        "train/forward-compute/communication": (480 - 410, 1),
        "train/communication": (10 + 20, 1),
        "train/backward": (50, 1),
    } | {"": (1000 - 800, 2)}  # the step, and a collective between its phases
    assert microseconds(found.operators) == {
        "aten::before": (0, 1),
        "aten::mm": (80 + 30, 2),
        "_Reduce": (100 - 10 - 70, 1),
        "aten::empty": (10, 1),
        "gloo:all_reduce": (70 + 30, 2),
        "gloo:broadcast": (10, 1),
    }


def test_a_step_of_a_gpu() -> None:
    """What runs belongs to who launched it, not to who is on the host meanwhile; a backward pass has a thread of its
    own there."""
    events = [
        range_("step", 0, 1000),
        range_("train", 100, 900),
        range_("forward-compute", 200, 300),
        op("aten::mm", 205, 215, External_id=5),
        event("cudaLaunchKernel", 210, 214, "cuda_runtime", correlation=1),
        event("gemm", 220, 500, "kernel", thread=70, correlation=1, External_id=5),
        range_("backward-compute", 300, 400),
        event("cuLaunchKernelEx", 310, 312, "cuda_driver", thread=2, correlation=2),
        event("fused", 500, 800, "kernel", thread=70, correlation=2),
        event("cudaLaunchKernel", 320, 322, "cuda_runtime", thread=2, correlation=3),
        event("ncclDevKernel_AllReduce", 700, 850, "kernel", thread=71, correlation=3),
        event("rlsc/train", 220, 850, "gpu_user_annotation", thread=70),
        event("cudaMemcpyAsync", 50, 55, "cuda_runtime", correlation=4),
        event("Memcpy DtoH", 60, 80, "gpu_memcpy", thread=70, correlation=4),
    ]
    found = break_down(events)
    assert microseconds(found.ranges) == {
        "": (200, 1),
        "train": (0, 1),
        "train/forward-compute": (280, 1),
        "train/backward-compute": (300, 1),
        "train/backward-compute/communication": (850 - 800, 1),  # hidden behind `fused` until then
        "train/GPU idle": (120 + 50, 0),
    }
    assert microseconds(found.operators) == {
        "aten::mm": (280, 1),
        "fused": (300, 1),
        "ncclDevKernel_AllReduce": (50, 1),
        "Memcpy DtoH": (20, 1),
    }


def test_tables_of_two_ranks() -> None:
    """The second rank has no head, and waits for the first: 3 s each."""
    first = Breakdown(
        ranges={"": Part(0.2, 1), "train": Part(0.5, 1), "train/pass": Part(1.3, 2), "train/pass/head": Part(1, 4)},
        operators={"aten::mm": Part(2, 9), "aten::exp": Part(0.1, 1)},
    )
    second = Breakdown(
        ranges={"": Part(0.2, 1), "train": Part(0.5, 1), "train/pass": Part(1.3, 2), "train/recv": Part(1, 2)},
        operators={"aten::mm": Part(1, 5)},
    )
    assert tables([first, second]) == "\n".join(
        [
            "| phase          | mean, s | max, s |     % |",
            "| -------------- | ------: | -----: | ----: |",
            "| train          |   2.800 |  2.800 |  93.3 |",
            "| between phases |   0.200 |  0.200 |   6.7 |",
            "| all            |   3.000 |  3.000 | 100.0 |",
            "",
            "| in train | calls | mean, s | max, s | own: mean, s |    % |",
            "| -------- | ----: | ------: | -----: | -----------: | ---: |",
            "| pass     |     2 |   1.800 |  2.300 |        1.300 | 46.4 |",
            "| · head   |     4 |   0.500 |  1.000 |        0.500 | 17.9 |",
            "| recv     |     2 |   0.500 |  1.000 |        0.500 | 17.9 |",
            "| the rest |       |   0.500 |  0.500 |        0.500 | 17.9 |",
            "",
            "| operator  | calls | own: mean, s | max, s | % of the step |",
            "| --------- | ----: | -----------: | -----: | ------------: |",
            "| aten::mm  |     9 |        1.500 |  2.000 |          50.0 |",
            "| aten::exp |     1 |        0.050 |  0.100 |           1.7 |",
            "",
        ]
    )


def test_a_table_has_the_fifteen_operators_that_took_longest() -> None:
    operators = {f"aten::{i:02d}": Part(i, 1) for i in range(20)}
    lines = tables([Breakdown(ranges={"": Part(190, 1)}, operators=operators)]).splitlines()
    assert [line.split()[1] for line in lines if "aten" in line] == [f"aten::{i:02d}" for i in range(19, 4, -1)]
