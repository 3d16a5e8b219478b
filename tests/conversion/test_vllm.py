"""What to-hf writes is served by vLLM as it is: its config, index, shards and tokenizer, and the weights themselves."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from test_convert import to_hf, to_megatron
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = ["12+34=", "345+678=", "what is 1+2?"]
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
folder, *questions = sys.argv[1:]
llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, disable_log_stats=True)
outputs = llm.generate(questions, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=1))
print("SAID " + json.dumps([
    [o.prompt_token_ids, list(o.outputs[0].token_ids), [[*d.values()][0].logprob for d in o.prompt_logprobs[1:]]]
    for o in outputs
]))
"""


def test_vllm_serves_it_as_transformers_does(base_model, sidecar_python, cluster_environment, tmp_path):
    """Three shards and an index, from a checkpoint; the source by transformers."""
    folder = to_hf(to_megatron(base_model, tmp_path / "m"), tmp_path / "hf", max_shard_size=500_000)
    assert len(list(folder.glob("*.safetensors"))) == 3
    environment = cluster_environment | {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{sidecar_python.parent}:{os.environ['PATH']}"
    command = [sidecar_python, "-c", PROGRAM, folder, *QUESTIONS]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, env=environment)
    said = [line.removeprefix("SAID ") for line in done.stdout.splitlines() if line.startswith("SAID ")]
    assert said, done.stderr[-3000:]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base_model), AutoTokenizer.from_pretrained(base_model)
    for question, (prompt, tokens, logprobs) in zip(QUESTIONS, json.loads(said[0])):
        assert prompt == tokenizer(question).input_ids
        with torch.no_grad():
            rows = model(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
        assert rows[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
        expected = rows[: len(prompt) - 1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        assert logprobs == pytest.approx(expected, abs=1e-3)
