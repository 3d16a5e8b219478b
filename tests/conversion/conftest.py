"""A tiny Qwen2 as `transformers` itself writes it: 2 layers, 8 heads on 2 KV heads, 50 words, tied and untied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    hf_dir: Path
    state: dict[str, Tensor]
    """What is in the folder: `state_dict()`, less the second name of a tied embedding."""


def save_tiny(hf_dir: Path, *, tied: bool, max_shard_size: str = "5GB") -> TinyModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: a fresh model has them at 0 and 1
            parameter.normal_()
    model.save_pretrained(hf_dir, max_shard_size=max_shard_size)
    (hf_dir / "tokenizer.json").write_text("{}")
    (hf_dir / "chat_template.jinja").write_text("{{ messages }}")
    state = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    return TinyModel(hf_dir=hf_dir, state=state)


@pytest.fixture(params=["tied", "untied"])
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> TinyModel:
    return save_tiny(tmp_path / "tiny", tied=request.param == "tied")


@pytest.fixture
def untied(tmp_path: Path) -> TinyModel:
    return save_tiny(tmp_path / "tiny", tied=False)


@pytest.fixture
def sharded(tmp_path: Path) -> TinyModel:
    """Several files and an index."""
    return save_tiny(tmp_path / "tiny", tied=False, max_shard_size="20KB")
