"""What an HF `config.json` says of a Qwen2 model: its sizes and constants, or a refusal that names the reason."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rlsc.conversion.rope import Yarn, read_yarn, rope_theta, unsupported_rope
from megatron_rlsc.conversion.rules import Rule, rules_for

HEADS = ("num_attention_heads", "num_key_value_heads")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", *HEADS, "max_position_embeddings")
CONSTANTS = ("rms_norm_eps", "rope_theta")
REQUIRED: dict[str, tuple[type, ...]] = {name: (int,) for name in SIZES} | {name: (int, float) for name in CONSTANTS}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A dense Qwen2 or Qwen2.5 model, in HF's names."""

    vocab_size: int
    """Rows of the HF embedding."""
    padded_vocab_size: int
    """Rows of Megatron's embedding and output layer over all ranks; `vocab_size` until `padded_to` says otherwise."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """Divides `num_attention_heads`: each KV head serves a group of query heads."""
    head_dim: int
    max_position_embeddings: int
    """Tokens of prompt and response together."""
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    yarn: Yarn | None = None
    """None: plain rotary positions."""

    @property
    def query_size(self) -> int:
        """Rows of q_proj."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj, and of v_proj."""
        return self.num_key_value_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Of the HF model; a tied embedding counts once."""
        return sum(math.prod(shape) for shape in self.hf_tensors().values())

    def padded_to(self, multiple: int) -> ModelShape:
        """The same model, its vocabulary padded to a multiple (Megatron's: `make_vocab_size_divisible_by` * TP)."""
        return replace(self, padded_vocab_size=-(-self.vocab_size // multiple) * multiple)

    def hf_shapes(self, rule: Rule) -> tuple[tuple[int, ...], ...]:
        """The shape of each HF tensor of a row."""
        return tuple(tuple(getattr(self, axis) for axis in axes) for axes in rule.axes)

    def hf_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every HF tensor of the model, in HF's order."""
        rules = rules_for(num_layers=self.num_hidden_layers, tied=self.tie_word_embeddings, spec="local")
        return {name: shape for rule in rules for name, shape in zip(rule.hf, self.hf_shapes(rule))}


def read_shape(hf_dir: Path) -> ModelShape:
    """Reads `hf_dir/config.json`.

    Raises ValueError where the folder or the file is missing or malformed, the model is no dense Qwen2 causal LM, or it
    uses a feature that the trainer does not have (each named; none is ignored).
    """
    path = Path(hf_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        what = "no config.json in it" if path.parent.is_dir() else "no such folder"
        raise ValueError(f"{path.parent} is no HF model folder: {what}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") != "qwen2":
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: model_type is {found!r}; this package trains qwen2 (Qwen2 and Qwen2.5, dense) only")
    config = {**config, "rope_theta": rope_theta(config)}
    _check_fields(config, path)
    refused = [*_unsupported(config), *unsupported_rope(config), *_sliding_window(config)]
    if refused:
        raise ValueError(f"{path} asks for what is not supported: " + "; ".join(refused))
    return _shape_of(config, path)


def _check_fields(config: Mapping[str, Any], path: Path) -> None:
    missing = [name for name in REQUIRED if config.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    for name, kinds in REQUIRED.items():
        if type(config[name]) not in kinds or config[name] <= 0:
            raise ValueError(f"{path}: {name} must be a positive {kinds[-1].__name__}, not {config[name]!r}")


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """Each feature that the config uses and this package does not have."""
    refusals = {
        f"architectures {config.get('architectures')}": config.get("architectures") not in (None, ["Qwen2ForCausalLM"]),
        f"hidden_act {config.get('hidden_act')!r} (only 'silu')": config.get("hidden_act", "silu") != "silu",
        "quantization_config": config.get("quantization_config") is not None,
        f"attention_dropout {config.get('attention_dropout')}": config.get("attention_dropout", 0.0) != 0.0,
        # vLLM would read it and the trainer not: the 1M-token models have it.
        "dual_chunk_attention_config (delete it to train on contexts of up to its original_max_position_embeddings)": (
            config.get("dual_chunk_attention_config") is not None
        ),
    }
    return [feature for feature, used in refusals.items() if used]


def _sliding_window(config: Mapping[str, Any]) -> list[str]:
    """What keeps a layer from attending to its whole context. Qwen2.5 names a window and uses none.

    As in transformers' Qwen2Config: without `use_sliding_window` there is no window, and with it the layers from
    `max_window_layers` on slide, unless `layer_types` says which.
    """
    layers, context = config["num_hidden_layers"], config["max_position_embeddings"]
    used, types = config.get("use_sliding_window", False), config.get("layer_types")
    window, first = config.get("sliding_window", 4096), config.get("max_window_layers", 28)
    for name, value, kind in (("use_sliding_window", used, bool), ("max_window_layers", first, int)):
        if type(value) is not kind:
            return [f"{name} {value!r} (of type {kind.__name__})"]
    if types is None:
        slides = used and window is not None
        types = ["sliding_attention" if slides and i >= first else "full_attention" for i in range(layers)]
    if not isinstance(types, list) or set(types) - {"full_attention", "sliding_attention"}:
        return [f"layer_types {types!r}"]
    sliding = types.count("sliding_attention")
    if sliding == 0:
        return []
    if used and sliding == len(types) and type(window) is int and window >= context:
        return []  # the window reaches over all of the context
    return [
        f"sliding-window attention, {window} tokens on {sliding} of {layers} layers: set use_sliding_window to false, "
        f"and delete layer_types, for full attention, which is the same on shorter texts"
    ]


def _shape_of(config: Mapping[str, Any], path: Path) -> ModelShape:
    hidden_size, heads, kv_heads = (config[name] for name in ("hidden_size", *HEADS))
    if heads % kv_heads:
        raise ValueError(f"{path}: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    head_dim = config.get("head_dim") or hidden_size // heads
    if heads * head_dim != hidden_size:  # vLLM's Qwen2 knows no other
        raise ValueError(f"{path}: num_attention_heads {heads} x head_dim {head_dim} is not hidden_size {hidden_size}")
    return ModelShape(
        **{name: kinds[-1](config[name]) for name, kinds in REQUIRED.items()},
        padded_vocab_size=config["vocab_size"],
        head_dim=head_dim,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        yarn=read_yarn(config),
    )
