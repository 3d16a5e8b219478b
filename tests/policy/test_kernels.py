"""Which kernels are chosen on which machine, and that what has none is refused with what would have.

Not covered: that Transformer Engine then takes them (tests/gpu), and reading a real machine.
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rlsc.config import ModelConfig, OptimizerConfig
from megatron_rlsc.policy.kernels import (
    Kernels,
    Machine,
    check_attention,
    choose_kernels,
    inspect_machine,
    shares_prompts,
)

A100, H100, B200, RTX_5090 = (8, 0), (9, 0), (10, 0), (12, 0)
CPU = Machine(capability=None, transformer_engine=None, flash_attn=None)


def machine(
    capability: tuple[int, int], *, transformer_engine: str | None = "2.11.0", flash_attn: str | None = None
) -> Machine:
    return Machine(capability=capability, transformer_engine=transformer_engine, flash_attn=flash_attn)


@pytest.mark.parametrize(
    ("found", "layout", "attention"),
    [
        (machine(H100), "packed", "fused"),
        (machine(H100, flash_attn="2.7.4.post1"), "packed", "fused"),  # what TE itself prefers from sm_90 on
        (machine(B200), "packed", "fused"),
        (machine(A100, flash_attn="2.1.1"), "packed", "flash"),
        (machine(A100, flash_attn="2.7.4.post1"), "packed", "flash"),
        (machine(A100, flash_attn="2.8.3"), "packed", "flash"),
        (machine((8, 9), flash_attn="2.8.3"), "packed", "flash"),
        (machine(RTX_5090, flash_attn="2.8.3"), "packed", "flash"),
        (machine(A100), "padded", "fused"),
        (machine(A100, flash_attn="2.8.3"), "padded", "fused"),
        (machine(H100), "padded", "fused"),
        (machine(A100, transformer_engine="2.9.0", flash_attn="2.8.1"), "packed", "flash"),
    ],
)
def test_the_kernel(found: Machine, layout: str, attention: str) -> None:
    assert check_attention(found, sequence_layout=layout) == attention


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            machine(A100),
            r"sm_80.*flash-attn is not installed.*O\(s\^2\).*2\.8\.3 \(2\.1\.1 or newer.*--sequence-layout padded",
        ),
        (machine(A100, flash_attn="2.0.4"), r"flash-attn 2\.0\.4 is none of 2\.1\.1 to 2\.8\.3"),
        (machine(A100, flash_attn="2.8.4"), r"flash-attn 2\.8\.4 is none of 2\.1\.1 to 2\.8\.3"),
        (machine(A100, transformer_engine="2.9.0", flash_attn="2.8.3"), r"2\.8\.3 is none of 2\.1\.1 to 2\.8\.1"),
        (machine(RTX_5090, flash_attn="2.7.2"), r"sm_120.*flash-attn 2\.7\.2 is none of 2\.7\.3 to 2\.8\.3"),
        (machine((7, 5)), r"sm_75.*need sm_80 \(A100\) or newer.*--transformer-impl local"),
        (machine(H100, transformer_engine="2.12.0"), r"transformer-engine 2\.12\.0 is none.*2\.9, 2\.10, 2\.11"),
    ],
)
def test_packed_sequences_without_a_kernel_are_refused_with_the_remedy(found: Machine, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_attention(found, sequence_layout="packed")


@pytest.mark.parametrize(
    ("found", "model", "kernels"),
    [
        (CPU, ModelConfig(), Kernels(spec="local", attention="local")),
        (CPU, ModelConfig(bf16=True), Kernels(spec="local", attention="local")),
        (machine(H100), ModelConfig(bf16=True), Kernels(spec="transformer_engine", attention="fused")),
        (machine(H100), ModelConfig(), Kernels(spec="local", attention="local")),  # no kernel takes float32
        (machine(H100, transformer_engine=None), ModelConfig(bf16=True), Kernels(spec="local", attention="local")),
        (machine(A100), ModelConfig(bf16=True, transformer_impl="local"), Kernels(spec="local", attention="local")),
        (
            machine(A100),
            ModelConfig(bf16=True, sequence_layout="padded"),
            Kernels(spec="transformer_engine", attention="fused"),
        ),
    ],
)
def test_auto_takes_what_there_is(found: Machine, model: ModelConfig, kernels: Kernels) -> None:
    assert choose_kernels(model, OptimizerConfig(), found) == kernels


def test_auto_does_not_fall_back_in_silence() -> None:
    with pytest.raises(ValueError, match="no attention kernel takes packed sequences"):
        choose_kernels(ModelConfig(bf16=True), OptimizerConfig(), machine(A100))


@pytest.mark.parametrize(
    ("found", "bf16", "message"),
    [
        (CPU, True, r"needs CUDA and the transformer-engine package"),
        (machine(H100, transformer_engine=None), True, r"needs CUDA and the transformer-engine package"),
        (machine(H100), False, r"needs --bf16"),
    ],
)
def test_transformer_engine_asked_for_in_vain(found: Machine, bf16: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_kernels(ModelConfig(bf16=bf16, transformer_impl="transformer_engine"), OptimizerConfig(), found)


def test_a_precision_aware_optimizer_is_transformer_engine_s() -> None:
    """Under the local spec too, where the package is."""
    optimizer = OptimizerConfig(use_precision_aware_optimizer=True)
    for found in (CPU, machine(H100, transformer_engine=None)):
        with pytest.raises(ValueError, match=r"use-precision-aware-optimizer needs Transformer Engine's FusedAdam"):
            choose_kernels(ModelConfig(bf16=True), optimizer, found)
    local = ModelConfig(bf16=True, transformer_impl="local")
    choose_kernels(local, optimizer, machine(A100))
    with pytest.raises(ValueError, match=r"transformer-engine 1\.13\.0 is none that megatron-core 0\.16 runs with"):
        choose_kernels(local, optimizer, machine(A100, transformer_engine="1.13.0"))


def test_this_machine_can_be_read() -> None:
    inspect_machine()


@pytest.mark.parametrize(
    ("asked", "spec", "layout", "cp_size", "shares"),
    [
        ("auto", "local", "packed", 1, True),
        ("auto", "local", "padded", 1, False),
        ("auto", "local", "packed", 2, False),
        ("auto", "transformer_engine", "packed", 1, False),  # until a GPU has run it
        ("on", "transformer_engine", "packed", 1, True),
        ("off", "local", "packed", 1, False),
    ],
)
def test_who_shares_prompts(asked: Any, spec: Any, layout: Any, cp_size: int, shares: bool) -> None:
    assert shares_prompts(ModelConfig(share_prompts=asked, sequence_layout=layout), spec, cp_size=cp_size) == shares
