"""Which layers and attention kernels a policy runs on: chosen from what the machine has, or refused with the remedy.

Left alone, Transformer Engine computes whole matrices of scores where no kernel takes the input, in silence: O(s^2).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from packaging.version import Version

from megatron_rlsc.config import ModelConfig, OptimizerConfig
from megatron_rlsc.conversion.rules import Spec

Attention = Literal["local", "fused", "flash"]
"""Megatron's AttnBackend: plain torch, cuDNN through Transformer Engine, or flash-attn through it."""

FLASH_ATTN = {"2.9": ("2.1.1", "2.8.1"), "2.10": ("2.1.1", "2.8.3"), "2.11": ("2.1.1", "2.8.3")}
"""By Transformer Engine's minor version, all that megatron-core 0.16 runs with: the flash-attn releases that it takes
(FlashAttentionUtils in its attention/dot_product_attention/utils.py)."""
FLASH_ATTN_BLACKWELL = "2.7.3"
"""The oldest of them on sm_100 and above."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What decides which kernels there are."""

    capability: tuple[int, int] | None
    """Of the GPU: (8, 0) is sm_80, an A100; (9, 0) sm_90, an H100. None without CUDA."""
    transformer_engine: str | None
    """Its version, where it is installed and loads."""
    flash_attn: str | None
    """The same of flash-attn 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """What a model is built of."""

    spec: Spec
    attention: Attention


def inspect_machine() -> Machine:
    """Of this process. Raises ValueError where Transformer Engine or flash-attn is installed and does not load."""
    if not torch.cuda.is_available():
        return Machine(capability=None, transformer_engine=None, flash_attn=None)
    # flash-attn first: where it does not load, neither does Transformer Engine.
    flash_attn = _loaded("flash-attn", module="flash_attn_2_cuda")
    return Machine(
        capability=torch.cuda.get_device_capability(),
        transformer_engine=_loaded("transformer-engine", module="transformer_engine.pytorch"),
        flash_attn=flash_attn,
    )


def _loaded(package: str, *, module: str) -> str | None:
    """The version of an installed package, once its compiled part has been imported."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return None
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{package} {found} is installed and does not load: {error}. It was built for another torch or CUDA: build "
            f"it anew, or uninstall it"
        ) from None
    return found


def choose_kernels(model: ModelConfig, optimizer: OptimizerConfig, machine: Machine) -> Kernels:
    """Raises ValueError where the settings ask for what the machine has not."""
    spec = choose_spec(model, machine)
    if optimizer.use_precision_aware_optimizer:
        check_precision_aware(machine)
    if spec == "local":
        return Kernels(spec=spec, attention="local")
    return Kernels(spec=spec, attention=check_attention(machine, sequence_layout=model.sequence_layout))


def shares_prompts(model: ModelConfig, spec: Spec, *, cp_size: int) -> bool:
    """Whether a prompt is computed once for its responses: see `ModelConfig.share_prompts`."""
    if model.share_prompts != "auto":
        return model.share_prompts == "on"
    return spec == "local" and model.sequence_layout == "packed" and cp_size == 1


def choose_spec(model: ModelConfig, machine: Machine) -> Spec:
    """`auto` is Transformer Engine where CUDA, its package and bfloat16 are. Raises ValueError where it is asked for in
    vain."""
    available = machine.capability is not None and machine.transformer_engine is not None
    if model.transformer_impl == "auto":
        return "transformer_engine" if available and model.bf16 else "local"
    if model.transformer_impl == "transformer_engine":
        if not available:
            raise ValueError(
                "transformer_impl=transformer_engine needs CUDA and the transformer-engine package "
                "(pip install 'megatron-rlsc[gpu]'); --transformer-impl local runs without"
            )
        if not model.bf16:
            raise ValueError(
                "transformer_impl=transformer_engine needs --bf16: its attention kernels take no float32; "
                "--transformer-impl local does"
            )
    return model.transformer_impl


def check_attention(machine: Machine, *, sequence_layout: Literal["packed", "padded"]) -> Attention:
    """The kernel of Transformer Engine's that takes bfloat16 sequences of this layout.

    cuDNN takes packed ones from sm_90 on, but for sm_120, and padded ones from sm_80 on; flash-attn takes either from
    sm_80 on. Raises ValueError where none does, with what would.
    """
    assert machine.capability is not None and machine.transformer_engine is not None
    minor = _minor(machine.transformer_engine)
    sm = f"sm_{machine.capability[0]}{machine.capability[1]}"
    if machine.capability < (8, 0):
        raise ValueError(
            f"this GPU is {sm}; Transformer Engine's attention kernels need sm_80 (A100) or newer. "
            f"--transformer-impl local runs on plain torch"
        )
    if sequence_layout == "padded" or (machine.capability >= (9, 0) and machine.capability != (12, 0)):
        return "fused"
    oldest, newest = FLASH_ATTN[minor]
    if machine.capability >= (10, 0):
        oldest = FLASH_ATTN_BLACKWELL
    if machine.flash_attn is None:
        found = "flash-attn is not installed"
    elif Version(oldest) <= Version(machine.flash_attn) <= Version(newest):
        return "flash"
    else:
        found = f"flash-attn {machine.flash_attn} is none of {oldest} to {newest}"
    raise ValueError(
        f"no attention kernel takes packed sequences on this GPU ({sm}): cuDNN's needs sm_90 (H100), and {found}. "
        f"Transformer Engine {machine.transformer_engine} would compute O(s^2) scores instead, in silence. Install "
        f"flash-attn {newest} ({oldest} or newer; pip install --no-build-isolation flash-attn=={newest} compiles it), "
        f"or pad the documents (--sequence-layout padded), or --transformer-impl local"
    )


def check_precision_aware(machine: Machine) -> None:
    """Raises ValueError where there is no optimizer that keeps its state in other dtypes than float32."""
    if machine.capability is None or machine.transformer_engine is None:
        raise ValueError(
            "--use-precision-aware-optimizer needs Transformer Engine's FusedAdam, and so CUDA and its package "
            "(pip install 'megatron-rlsc[gpu]'); leave the flag away to run without"
        )
    _minor(machine.transformer_engine)


def _minor(transformer_engine: str) -> str:
    """Its minor version. Raises ValueError where megatron-core does not run with it."""
    minor = ".".join(transformer_engine.split(".")[:2])
    if minor not in FLASH_ATTN:
        raise ValueError(
            f"transformer-engine {transformer_engine} is none that megatron-core 0.16 runs with: install "
            f"{', '.join(FLASH_ATTN)} (pip install 'megatron-rlsc[gpu]'), or --transformer-impl local"
        )
    return minor
