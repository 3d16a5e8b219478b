"""benchmarks/gpu.py runs from end to end, and counts FLOPs as by hand.

Not covered: a GPU, and so all that it measures.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from gpu import CASES, flops, shape_of_case  # noqa: E402


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    """The case whose layers are counted and that whose kernels are, and the one without an optimizer."""
    names = ["1.5B", "7B, layers that fit", "7B, no optimizer"]
    command = ["benchmarks/gpu.py", "--device", "cpu", "--tiny", "--output", tmp_path / "gpu.md", "--cases", *names]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "gpu.md").read_text()
    assert "says nothing of a GPU" in page
    for name in names:
        assert f"| {name} | 2 |" in page
    assert "failed" not in page
    assert "## Kernels of a step of 1.5B" in page and "`aten::mm`" in page


def test_flops() -> None:
    """2 layers of 128, MLP 256, 4 heads on 2 KV heads of 32, vocabulary 1003; documents of 10 and 20 tokens, of which 5
    and 7 are responses."""
    shape = shape_of_case(CASES["0.5B"], tiny=True)
    # q and o 128 x 128, k and v 128 x 64 each, three matrices of 128 x 256
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256
    # q k' and p v of 128 columns, half of each: 10^2 + 20^2 pairs, 2 FLOPs
    attention = 2 * (100 + 400) * 128
    assert flops(shape, [10, 20], 12) == 2 * (6 * layer * 30 + 3 * attention) + 6 * 128 * 1003 * 12


def test_the_shapes_are_qwens() -> None:
    """Parameters of the models' cards: 0.49, 1.54 and 7.61 billion."""
    sizes = {name: shape_of_case(case, tiny=False).num_parameters / 1e9 for name, case in CASES.items()}
    assert [round(size, 2) for size in sizes.values()] == [0.49, 1.54, 7.62, 7.62]
    assert not shape_of_case(replace(CASES["0.5B"], tied=False), tiny=False).tie_word_embeddings
