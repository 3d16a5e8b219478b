"""The architecture as a test: who may import whom, and what stays cheap to import."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_rlsc"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "config": 0,
    "deadline": 0,
    "disk": 0,
    "interrupt": 0,
    "lock": 0,
    "ranges": 0,
    "recipe": 0,
    "types": 0,
    "batching": 1,
    "board": 1,
    "breakdown": 1,
    "conversion": 1,
    "data": 1,
    "evaluation": 1,
    "guard": 1,
    "health": 1,
    "hub": 1,
    "memory": 1,
    "objective": 1,
    "packing": 1,
    "planning": 1,
    "proposals": 1,
    "rewards": 1,
    "reporting": 1,
    "run_folder": 1,
    "timing": 1,
    "tokenizer": 1,
    "tracking": 1,
    "policy": 2,
    "rollout": 2,
    "ahead": 3,
    "held_out": 3,
    "learning": 3,
    "preflight": 3,
    "profile": 3,
    "recovery": 3,
    "responder": 3,
    "sampler": 3,
    "servers": 3,
    "shown": 3,
    "run": 3,
    "train": 3,
    "__main__": 3,
}
"""Files and packages of megatron_rlsc; one imports lower floors, or its own package."""

NEIGHBOURS = {
    ("ahead", "sampler"),
    ("recipe", "config"),  # what it reads
    ("recovery", "sampler"),
    ("train", "recovery"),
    ("memory", "conversion"),  # counted from the shape of a model
    ("planning", "memory"),
    ("proposals", "conversion"),  # of the shape of a model
    ("proposals", "memory"),
    ("proposals", "planning"),
    ("proposals", "timing"),
    ("timing", "conversion"),
    ("timing", "packing"),  # what packs are balanced by
    ("batching", "packing"),  # the packs that it lays out
    ("timing", "memory"),
    ("planning", "conversion"),  # a layout is checked against the shape of a model, read where its config.json is
    ("run_folder", "conversion"),  # checkpoints there are of Megatron's format, and all are of one model
    ("health", "objective"),  # the weights that a step's figures are about
    ("data", "tokenizer"),  # prompts are token ids
    ("evaluation", "data"),  # questions are asked as they are in training
    ("evaluation", "tokenizer"),
    ("reporting", "evaluation"),  # the arithmetic of the table
    ("reporting", "run_folder"),
    ("reporting", "tokenizer"),  # a journal has token ids alone
    ("preflight", "sampler"),  # what the trainer's first rank checks, by the function that it does it with
    ("responder", "servers"),
    ("rewards", "data"),  # the lines of labels are those of questions
    ("rewards", "evaluation"),  # an answer is right here as it is there
    ("rewards", "objective"),  # which method takes which reward
    ("rewards", "tokenizer"),
    ("sampler", "held_out"),  # the sidecar must take its prompts as well
    ("sampler", "servers"),
    ("run", "ahead"),
    ("run", "held_out"),
    ("run", "profile"),
    ("run", "recovery"),
    ("run", "sampler"),
    ("run", "shown"),
    ("run", "train"),
    ("train", "ahead"),
    ("train", "held_out"),
    ("train", "learning"),
    ("train", "profile"),
    ("shown", "held_out"),  # the sampler is asked as it is there
    ("tracking", "board"),
    ("train", "sampler"),
    ("train", "shown"),
    ("__main__", "run"),
}
"""Of one floor, and yet."""


def name_of(path: Path) -> str:
    """`rollout/client.py` -> `megatron_rlsc.rollout.client`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, wherever in the file: `a.b` and `a.b.c` for `from a.b import c`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(library: str) -> set[str]:
    return {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name == library or name.startswith(f"{library}.") for name in imports(path))
    }


def own_parts(path: Path) -> set[str]:
    """Files and packages of ours that a file imports: `rollout` for `megatron_rlsc.rollout.client`."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("megatron_rlsc.")} & FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        assert not own_parts(path)
        return
    assert part in FLOORS, f"{part} has no floor: give it one in FLOORS and in docs/architecture.md"
    for other in own_parts(path) - {part}:
        allowed = FLOORS[other] < FLOORS[part] or (part, other) in NEIGHBOURS
        assert allowed, f"{part} (floor {FLOORS[part]}) imports {other} (floor {FLOORS[other]})"


def test_megatron_is_imported_in_policy_only():
    assert {Path(file).parts[0] for file in importers("megatron")} == {"policy"}


def test_parallel_state_is_read_in_one_file():
    assert importers("megatron.core.parallel_state") == {"policy/parallel.py"}


def test_vllm_is_imported_in_the_sidecar_only():
    assert importers("vllm") <= {"rollout/serve.py", "rollout/engine.py"}


@pytest.mark.parametrize("path", [*sorted((PACKAGE / "config").glob("*.py")), PACKAGE / "types.py"], ids=name_of)
def test_the_ground_floor_stands_on_the_standard_library(path):
    """`types` names torch for type checkers alone."""
    roots = {name.split(".")[0] for name in imports(path)}
    foreign = roots - sys.stdlib_module_names - {"megatron_rlsc"}
    assert foreign <= ({"torch"} if path.name == "types.py" else set())


def test_the_objective_knows_tensors_and_nothing_else():
    roots = {name.split(".")[0] for name in imports(PACKAGE / "objective.py")}
    assert roots - sys.stdlib_module_names == {"torch", "megatron_rlsc"}
    assert own_parts(PACKAGE / "objective.py") == {"config"}
    assert not any(name.startswith("torch.distributed") for name in imports(PACKAGE / "objective.py"))


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.parametrize(
    "name", ["config", "types", "conversion.rules", "conversion.shape", "reporting.page", "rollout.client"]
)
def test_imports_no_torch(name):
    done = run(f"import sys, megatron_rlsc.{name}; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


WITHOUT = """
import sys
for name in ("dacite", "httpx", "psutil", "tensorboard", "tomli_w", "tqdm", "tyro", "vllm"):
    sys.modules[name] = None
import megatron_rlsc.policy.policy, megatron_rlsc.conversion.convert
"""


def test_the_policy_needs_no_command_line_and_no_sampler():
    """A machine that is lent to look at kernels has torch and megatron-core, and may have no more."""
    done = run(WITHOUT)
    assert done.returncode == 0, done.stderr


HELP = """
import runpy, sys
sys.argv = ["train", "--help"]
try:
    runpy.run_module("megatron_rlsc", run_name="__main__")
finally:
    print("heavy:", sorted({"torch", "megatron", "transformers", "numpy"} & sys.modules.keys()))
"""


def test_help_answers_at_once_and_without_torch():
    """Half a second on an idle machine; three here, since tests share theirs. Better of two: the first fills caches."""
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        done = run(HELP)
        seconds.append(time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
        assert "--tensor-model-parallel-size" in done.stdout
        assert "heavy: []" in done.stdout
    assert min(seconds) < 3
