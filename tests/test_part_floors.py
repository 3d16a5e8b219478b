"""benchmarks/floors.py counts as by hand, and finds the parts of a step in a profile.

Not covered: seconds, and what a machine reaches.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from floors import Rates, Served, by_range, other_parts, training_parts  # noqa: E402
from sides.work import Shape, samples_of, write_model  # noqa: E402

from megatron_rlsc.conversion.shape import read_shape  # noqa: E402
from megatron_rlsc.ranges import span  # noqa: E402

SHAPE = Shape(vocab_size=16, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
PROMPT, RESPONSES = 5, (3, 1)
RATES = Rates(matrix=1.0, memory=1.0)


def test_floors_of_a_step(tmp_path: Path) -> None:
    """A prompt counts once, and nothing is computed twice."""
    write_model(SHAPE, tmp_path)
    shape = read_shape(tmp_path)
    samples = samples_of([(PROMPT, list(RESPONSES))], SHAPE.vocab_size, seed=0)
    seconds = {"": 8.0, "logprobs": 4.0, "gradient-norm": 2.0, "optimizer": 1.0}
    layers, head, norm, update = training_parts(shape, samples, [seconds], RATES)

    kv = 2 * 16
    weights = 2 * 64 * 64 + 2 * 64 * kv + 3 * 64 * 96
    products = 2 * weights * (PROMPT + sum(RESPONSES))
    # Of q k' and p v, two FLOPs each for a query, a key that it sees, and a channel; of its own, half.
    keys = PROMPT**2 / 2 + sum(response * PROMPT + response**2 / 2 for response in RESPONSES)
    assert layers.floor == 3 * 2 * (products + 4 * 64 * keys)
    assert head.floor == 3 * 2 * 64 * 16 * sum(RESPONSES)
    parameters = 16 * 64 + 2 * (weights + 64 + 2 * kv + 2 * 64) + 64
    assert (norm.floor, update.floor) == (4 * parameters, 7 * 4 * parameters)
    assert [part.seconds for part in (layers, head, norm, update)] == [8.0, 4.0, 2.0, 1.0]


def test_floors_of_what_vllm_does(tmp_path: Path) -> None:
    """Few responses wait for the weights to be read, many for them to be multiplied."""
    write_model(SHAPE, tmp_path)
    shape = read_shape(tmp_path)
    few, push = other_parts(shape, 1, Served(generate=3.0, tokens=10, rounds=10, push=2.0, copy=1.0), RATES)
    assert (few.floor, push.floor) == (10 * 4 * shape.num_parameters, 1.0)
    many, _ = other_parts(shape, 100, Served(generate=3.0, tokens=1000, rounds=10, push=2.0, copy=1.0), RATES)
    assert many.floor == 2 * shape.num_parameters * 1000


def test_parts_of_a_profile() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as recorded, span("step"):
        for name in ("logprobs", "logprobs-backward", "optimizer"):
            with span(name):
                time.sleep(0.1)
        time.sleep(0.3)
    found = by_range(recorded)
    slept = {"": 0.3, "logprobs": 0.2, "gradient-norm": 0.0, "optimizer": 0.1}  # or longer, on a busy machine
    assert found.keys() == slept.keys() and found["gradient-norm"] == 0
    assert all(found[name] >= least for name, least in slept.items())
