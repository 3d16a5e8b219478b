"""Rotary positions as config.json has them: plain, or stretched by YaRN; anything else is refused by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

YARN_SIZES = ("factor", "original_max_position_embeddings")
YARN_OPTIONS = ("beta_fast", "beta_slow", "attention_factor")
KEYS = {
    "default": {"rope_type", "type", "rope_theta"},
    "yarn": {"rope_type", "type", "rope_theta", "truncate", *YARN_SIZES, *YARN_OPTIONS},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Yarn:
    """Rotary frequencies stretched for a longer context (arXiv 2309.00071), as transformers' modeling_rope_utils.py has
    them."""

    factor: float
    """How many times longer the context is; above 1."""
    original_max_position_embeddings: int
    """Tokens of the context before."""
    beta_fast: float
    """Turns within the original context: a frequency of more is left as it is,"""
    beta_slow: float
    """one of fewer is divided by `factor`, and those between go from the one to the other in a straight line."""
    attention_factor: float
    """Of every rotated query and key."""
    truncate: bool
    """Whether that line begins and ends at whole dimensions."""


def rope_theta(config: Mapping[str, Any]) -> Any:
    """The base of the frequencies: transformers 5 keeps it in rope_parameters."""
    rope = _rope(config)
    return rope.get("rope_theta", config.get("rope_theta")) if isinstance(rope, dict) else config.get("rope_theta")


def unsupported_rope(config: Mapping[str, Any]) -> list[str]:
    """Each rotary setting that the trainer does not have, with what to do about it."""
    where, rope = "rope_scaling" if config.get("rope_scaling") else "rope_parameters", _rope(config)
    if not isinstance(rope, dict):
        return [f"{where} {rope!r} (an object with rope_type and its settings, or none)"]
    kind = _kind(rope)
    if kind not in KEYS:
        return [
            f"rope_type {kind!r} of {where} (only 'default' and 'yarn': delete it for the plain rotary positions that "
            f"Qwen2.5 was published with, if these weights were not trained otherwise)"
        ]
    refusals = {
        "rope_scaling beside rope_parameters (transformers reads the first alone: put all of it into one)": bool(
            config.get("rope_scaling") and config.get("rope_parameters")
        ),
        "partial_rotary_factor": config.get("partial_rotary_factor") not in (None, 1, 1.0),
        "use_mrope": bool(config.get("use_mrope")),
        "original_max_position_embeddings outside rope_scaling (put it there)": "original_max_position_embeddings"
        in config,
    }
    used = [feature for feature, is_used in refusals.items() if is_used]
    used += [f"{where}.{key} with rope_type {kind!r}" for key in rope.keys() - KEYS[kind]]
    return used + (_unfit_yarn(rope, where, config["max_position_embeddings"]) if kind == "yarn" else [])


def read_yarn(config: Mapping[str, Any]) -> Yarn | None:
    """None for plain rotary positions. The config has passed `unsupported_rope`."""
    rope = _rope(config)
    if _kind(rope) == "default":
        return None
    factor, attention_factor = float(rope["factor"]), rope.get("attention_factor")
    return Yarn(
        factor=factor,
        original_max_position_embeddings=rope["original_max_position_embeddings"],
        beta_fast=float(rope.get("beta_fast", 32)),
        beta_slow=float(rope.get("beta_slow", 1)),
        attention_factor=0.1 * math.log(factor) + 1 if attention_factor is None else float(attention_factor),
        truncate=rope.get("truncate", True),
    )


def _rope(config: Mapping[str, Any]) -> Any:
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _unfit_yarn(rope: Mapping[str, Any], where: str, context: int) -> list[str]:
    """What is wrong with YaRN's numbers."""
    given = [*YARN_SIZES, *(name for name in YARN_OPTIONS if name in rope)]
    wrong = [name for name in given if type(rope.get(name)) not in (int, float) or rope[name] <= 0]
    unfit = [f"{where}.{name} {rope.get(name)!r} (a positive number)" for name in wrong]
    if type(rope.get("truncate", True)) is not bool:
        unfit.append(f"{where}.truncate {rope['truncate']!r} (true or false)")
    if unfit:
        return unfit
    factor, original = (rope[name] for name in YARN_SIZES)
    if type(original) is not int:
        unfit.append(f"{where}.original_max_position_embeddings {original} (a whole number)")
    if factor <= 1:
        unfit.append(f"{where}.factor {factor} (YaRN stretches by more than 1)")
    elif context > factor * original:
        unfit.append(
            f"max_position_embeddings {context} above {where}.factor {factor} x original_max_position_embeddings "
            f"{original} = {factor * original:.0f} (lower the one, or raise the factor)"
        )
    return unfit
