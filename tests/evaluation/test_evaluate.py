"""The command lines, on the tiny base, with a real vLLM: in a sidecar, and as an OpenAI-compatible server. On CPUs; the
hub is not asked."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from megatron_rlsc.evaluation.measure import BEGUN, RESULT, SAMPLES

ROOT = Path(__file__).parents[2]
RECIPE = ("--config", ROOT / "examples/rlsc_tiny.toml", "--protocol", "recipe")


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 additions: the base is right at some and wrong at others."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    lines = (ROOT / "examples/data/addition_heldout.jsonl").read_text().splitlines(keepends=True)[:60]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def evaluated(problems: Path, base_model: Path, sidecar_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, greedy and sampled, without a home."""
    output = tmp_path_factory.mktemp("evaluated")
    said = run(
        *("tools/evaluate.py", "--model", base_model, *RECIPE, "--data", problems, "--output", output),
        *("--temperature", "0", "0.5", "--samples", "4", "--sidecar-python", sidecar_python),
    )
    greedy, sampled = said.splitlines()
    assert re.fullmatch(r"sums, greedy: \d+\.\d \[.*\] % of 60 problems; \d+ tokens, 0\.0 % cut", greedy)
    assert re.fullmatch(r"sums, T=0\.5: .* % of 60 problems x 4 samples; pass@4 .* %, maj@4 .* %; .* cut.*", sampled)
    return output


def run(*words: object, check: bool = True, **options) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, text=True, capture_output=True, **options)
    assert (done.returncode == 0) == check, done.stdout + done.stderr
    return done.stdout if check else done.stderr


def result(folder: Path) -> dict:
    return json.loads((folder / RESULT).read_text())


def test_what_is_written(evaluated: Path, base_model: Path) -> None:
    greedy, sampled = (result(evaluated / "sums" / how) for how in ("greedy", "T0.5"))
    assert (greedy["problems"], greedy["samples"], sampled["samples"]) == (60, 1, 4)
    assert 20 < greedy["accuracy"]["value"] < 80 and greedy["verdicts"].keys() <= {"right", "wrong"}
    assert sampled["pass_at"]["1"] == pytest.approx(sampled["accuracy"]["value"])
    assert sampled["pass_at"]["1"] < sampled["pass_at"]["2"] < sampled["pass_at"]["4"]
    settings = json.loads((evaluated / "sums/greedy/settings.json").read_text())
    checksum = hashlib.sha256((base_model / "model.safetensors").read_bytes()).hexdigest()
    assert settings["weights_sha256"] == {"model.safetensors": checksum} and settings["template"] == "{problem}="
    lines = [json.loads(line) for line in (evaluated / "sums/T0.5" / SAMPLES).read_text().splitlines()]
    assert len(lines) == 240 and len({line["response"] for line in lines[:40]}) > 10


def test_killed_and_resumed(
    evaluated: Path, problems: Path, base_model: Path, sidecar_python: Path, tmp_path: Path
) -> None:
    """SIGKILL in the middle, SIGTERM in the middle, and on: each response is asked for once, and the result is that of
    the run that nobody touched."""
    command = [
        sys.executable,
        "tools/evaluate.py",
        "--model",
        base_model,
        *RECIPE,
        "--data",
        problems,
        "--output",
        tmp_path,
    ]
    command += ["--sidecar-python", sidecar_python, "--sidecar-max-num-seqs", "16"]
    begun, so_far = tmp_path / "sums/greedy" / BEGUN, 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 300
        while not (begun.exists() and begun.read_bytes().count(b"\n") > so_far):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 143)
        so_far = begun.read_bytes().count(b"\n")
        assert so_far < 60, "it had ended already"
        assert not (tmp_path / "sums/greedy" / RESULT).exists()
    assert said == f"stopped after {so_far} of 60 responses of sums, greedy: SIGTERM; the same command goes on\n"
    assert (tmp_path / "status").read_text() == said.replace("; the same command goes on", "")
    run(*command[1:])
    assert (tmp_path / "status").read_text() == "done: 1 sets of problems\n"
    assert result(tmp_path / "sums/greedy") == result(evaluated / "sums/greedy")
    assert begun.read_bytes().count(b"\n") in (60, 61)  # a line that the kill had cut
    said = run(*command[1:], "--seed", "9", check=False)
    assert "has responses of other settings (seed; seed: 1234 there, 9 now)" in said


def test_a_training_checkpoint(
    evaluated: Path, problems: Path, base_model: Path, sidecar_python: Path, tmp_path: Path
) -> None:
    run("tools/convert_hf.py", "to-megatron", "--hf-dir", base_model, "--megatron-dir", tmp_path / "megatron")
    run(
        *(
            "tools/evaluate.py",
            "--model",
            tmp_path / "megatron",
            *RECIPE,
            "--data",
            problems,
            "--output",
            tmp_path / "out",
        ),
        *("--sidecar-python", sidecar_python),
    )
    assert result(tmp_path / "out/sums/greedy") == result(evaluated / "sums/greedy")


@pytest.fixture
def endpoint(base_model: Path, sidecar_python: Path, tmp_path: Path) -> Iterator[str]:
    """vLLM's own OpenAI server, with the model's weights and tokenizer from its folder."""
    held = socket.socket()  # nobody else gets the port; vLLM, which sets SO_REUSEADDR too, does
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    log = (tmp_path / "vllm.log").open("wb")
    process = subprocess.Popen(
        [
            *(sidecar_python, "-m", "vllm.entrypoints.openai.api_server", "--model", base_model, "--port", str(port)),
            *("--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--api-key", "secret"),
            *("--served-model-name", "tiny", "--host", "127.0.0.1", "--generation-config", "vllm"),
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    url, deadline = f"http://127.0.0.1:{port}/v1", time.monotonic() + 300
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "vllm.log").read_text()[-3000:]
            try:
                if httpx.get(f"{url}/models", headers={"Authorization": "Bearer secret"}).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.3)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        log.close()
        held.close()


def test_an_endpoint(evaluated: Path, problems: Path, endpoint: str, tmp_path: Path) -> None:
    """The same responses as by the sidecar, which got token ids and weights on another way."""
    key = tmp_path / "key"
    key.write_text("secret\n")
    command = ("tools/evaluate.py", "--url", endpoint, *RECIPE, "--data", problems, "--output", tmp_path / "out")
    said = run(*command, check=False)
    assert "/models answered 401" in said
    run(*command, "--key-file", key)
    ours, theirs = (
        [json.loads(line) for line in (folder / "sums/greedy" / SAMPLES).read_text().splitlines()]
        for folder in (evaluated, tmp_path / "out")
    )
    assert [line["response"] for line in ours] == [line["response"] for line in theirs]
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
    said = run(*command, "--key-file", key, "--served-model", "huge", "--overwrite", check=False)
    assert "huge" in said and "404" in said


def test_before_and_after(evaluated: Path, tmp_path: Path) -> None:
    metrics = [{"step": i, "rollout/logprob_difference": 1e-5 / i, "sync/pushes": i + 1.0} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    said = run(
        *("tools/summarize_run.py", "--base", evaluated, "--rlsc", evaluated),
        *("--metrics", tmp_path / "metrics.jsonl", "--output", tmp_path / "summary.json"),
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["base"] == summary["rlsc"]
    assert summary["base"]["greedy"] == result(evaluated / "sums/greedy")["accuracy"]["value"]
    assert summary["base"]["sampled"] == result(evaluated / "sums/T0.5")["accuracy"]["value"]
    assert (summary["steps"], summary["pushes"], summary["worst_logprob_difference"]) == (2, 3, 1e-5)
    assert "| sums (greedy)" in said and "+0.0 [" in said
    table = run("tools/compare_evaluations.py", evaluated, evaluated, "--output", tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() in table


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to measure: --benchmarks names some"),
        (["--benchmarks", "aime42"], "no benchmark is called aime42; there are aime24, "),
        (["--benchmarks", "aime24", "--data-dir", "nowhere"], "nowhere has no aime24"),
        (["--data", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--data", "{sums}", "--url", "http://x/v1"], "give one of the two"),
        (["--data", "{sums}", "--temperature", "-1"], "--temperature must be 0, for greedy, or more"),
        (["--data", "{sums}", "--samples", "0"], "--samples must be at least 1, not 0"),
        (["--data", "{sums}", "{sums}"], "two of sums, sums have one name"),
        (["--data", "{sums}", "--max-response-length", "4090"], "no room for --max-response-length 4090"),
        (["--data", "{sums}", "--sidecar-python", sys.executable], "has no vLLM"),
    ],
)
def test_mistakes(words: list[str], said: str, problems: Path, base_model: Path, tmp_path: Path) -> None:
    words = [str(problems) if word == "{sums}" else word for word in words]
    error = run("tools/evaluate.py", "--model", base_model, *RECIPE, "--output", tmp_path / "out", *words, check=False)
    assert error.startswith("evaluate: error: ") and said in error, error


def test_no_model(problems: Path, tmp_path: Path) -> None:
    error = run(
        "tools/evaluate.py", "--model", tmp_path, *RECIPE, "--data", problems, "--output", tmp_path / "out", check=False
    )
    assert "is no HF model, nor a Megatron checkpoint" in error


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments(
    evaluated: Path, problems: Path, base_model: Path, sidecar_python: Path, tmp_path: Path, seed: int
) -> None:
    """While vLLM starts, while it answers, while answers are graded: four times in a row, and then to the end."""
    command = [sys.executable, "tools/evaluate.py", "--model", base_model, *RECIPE, "--data", problems]
    command += ["--output", tmp_path, "--sidecar-python", sidecar_python, "--sidecar-max-num-seqs", "16"]
    draw, alive = random.Random(seed), 0
    for _ in range(4):
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            process.wait(draw.uniform(5, 45))
        except subprocess.TimeoutExpired:
            alive += 1
            process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            process.wait(60)
    assert alive
    run(*command[1:])
    assert result(tmp_path / "sums/greedy") == result(evaluated / "sums/greedy")
