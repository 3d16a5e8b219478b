"""Problems, generation and the two tools, on the tiny base. Does not cover CUDA, nor models of several shards."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rlsc.config import DataConfig
from megatron_rlsc.evaluation.generation import generate
from megatron_rlsc.evaluation.measure import measure
from megatron_rlsc.evaluation.problems import Problem, read_problems
from megatron_rlsc.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent.parent
BASE = ROOT / "checkpoints/rlsc-tiny-base"
STOPS = (256, 258)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def respond(model, prompts, **options):
    defaults = {"temperature": 0.0, "max_response_length": 48, "stop_token_ids": STOPS, "batch_size": 4, "seed": 0}
    return generate(model, prompts, title="", **(defaults | options))


def test_padding_changes_no_response(model):
    """Prompts of 8 to 28 tokens, together and one at a time; the last is cut at 5 tokens."""
    tokenizer = load_tokenizer(BASE)
    prompts = [tokenizer.encode(text) for text in ("345+678=", "1+1=", "what is 100+999, then? 100+999=", "901+901=")]
    together = respond(model, prompts)
    assert together == [respond(model, [prompt])[0] for prompt in prompts]
    assert together[3][-1] == 256 and 256 not in together[3][:-1]
    assert respond(model, prompts[3:], max_response_length=5) == [together[3][:5]]


def test_samples_are_those_of_their_seed(model):
    prompts = [load_tokenizer(BASE).encode("123+456=")] * 8
    first = respond(model, prompts, temperature=1.0, batch_size=8)
    assert first == respond(model, prompts, temperature=1.0, batch_size=8)
    assert first != respond(model, prompts, temperature=1.0, batch_size=8, seed=1)


def test_a_folder_with_its_own_sampling_has_no_say(model):
    """Qwen2.5's generation_config.json has a top-k and a repetition penalty: neither may bend what is measured."""
    prompts = [load_tokenizer(BASE).encode("123+456=")] * 8
    plain = respond(model, prompts, temperature=1.0, batch_size=8)
    model.generation_config.update(top_k=1, repetition_penalty=5.0, do_sample=True)
    assert respond(model, prompts, temperature=1.0, batch_size=8) == plain


def test_read_problems(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "1+1", "answer": 2}\n\n{"question": "q", "answer": 27.0}\n')
    assert read_problems(path) == [Problem(question="1+1", answer="2"), Problem(question="q", answer="27")]
    path.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "q"}\n')
    with pytest.raises(ValueError, match="line 2: `answer` must be a text or a number, not None"):
        read_problems(path)


def test_errors_before_any_response(tmp_path):
    data = DataConfig(data_path=tmp_path / "p.jsonl", prompt_template="plain", apply_chat_template=False)
    data.data_path.write_text('{"problem": "123456", "answer": "2"}\n')
    options = {"temperature": 0.5, "batch_size": 1, "seed": 0}
    with pytest.raises(ValueError, match="no HF model"):
        measure(tmp_path, data, max_response_length=8, **options)
    with pytest.raises(ValueError, match="longest prompt has 6 tokens and the context 4096"):
        measure(BASE, data, max_response_length=4091, **options)


def test_evaluate_and_summarize(tmp_path, cluster_environment):
    """The two command lines on 20 problems, without a home: the base is right at some and wrong at others."""
    lines = (ROOT / "examples/data/addition_heldout.jsonl").read_text().splitlines(keepends=True)[:20]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    run(
        *("tools/evaluate.py", "--hf-dir", BASE, "--config", ROOT / "examples/rlsc_tiny.toml"),
        *("--data", tmp_path / "p.jsonl", "--output", tmp_path / "out/base.json"),
        env=cluster_environment,
    )
    base = json.loads((tmp_path / "out/base.json").read_text())
    assert (base["problems"], base["temperature"], base["prompt_template"]) == (20, 0.5, "{problem}=")
    assert 10 < base["greedy"]["accuracy"] < 80
    checksum = hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()
    assert base["weights_sha256"] == {"model.safetensors": checksum}

    metrics = [{"step": i, "rollout/logprob_difference": 1e-5 / i, "sync/pushes": i + 1.0} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    out = run(
        *("tools/summarize_run.py", "--base", tmp_path / "out/base.json", "--rlsc", tmp_path / "out/base.json"),
        *("--metrics", tmp_path / "metrics.jsonl", "--output", tmp_path / "summary.json"),
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["base"] == summary["rlsc"] and summary["base"]["greedy"] == base["greedy"]["accuracy"]
    assert (summary["steps"], summary["pushes"], summary["worst_logprob_difference"]) == (2, 3, 1e-5)
    assert "20 problems of p.jsonl" in out and "+0.0" in out


def run(*words: object, env: dict[str, str] | None = None) -> str:
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, check=True, text=True, capture_output=True, env=env
    ).stdout
