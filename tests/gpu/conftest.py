"""Tests that need a GPU: `make test-gpu`, or python -m pytest tests/gpu. Nothing else collects them.

They need torch, megatron-core, transformers and pytest, and Transformer Engine for what is its own: one rank, one GPU.
RLSC_TEST_DEVICE=cpu runs what needs neither CUDA nor Transformer Engine, on the two-layer model: it shows that the
tests run, and nothing of a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

DEVICE = os.environ.get("RLSC_TEST_DEVICE", "cuda")
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # megatron-core takes a GPU where torch sees one

import torch  # noqa: E402
from hf import MODELS, Model  # noqa: E402

from megatron_rlsc.config import ParallelConfig  # noqa: E402
from megatron_rlsc.conversion.rules import Spec  # noqa: E402
from megatron_rlsc.policy.parallel import Parallel, destroy_parallel, init_parallel  # noqa: E402


@pytest.fixture(scope="session")
def parallel() -> Iterator[Parallel]:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    yield init_parallel(ParallelConfig(), seed=1)
    destroy_parallel()


@pytest.fixture(params=["local", "transformer_engine"])
def spec(request: pytest.FixtureRequest, parallel: Parallel) -> Spec:
    if request.param == "transformer_engine":
        require_transformer_engine(parallel)
    return request.param


def require_transformer_engine(parallel: Parallel) -> None:
    if parallel.device.type == "cpu":
        pytest.skip("Transformer Engine needs a GPU")
    pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")


@pytest.fixture
def transformer_engine(parallel: Parallel) -> None:
    """For what is about Transformer Engine alone."""
    require_transformer_engine(parallel)


@pytest.fixture
def gpu(parallel: Parallel) -> torch.device:
    """For what a CPU has no counterpart of: memory that is measured."""
    if parallel.device.type == "cpu":
        pytest.skip("the memory of a GPU is what is measured")
    return parallel.device


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest, parallel: Parallel) -> Iterator[Model]:
    """Random weights of real shapes."""
    found = MODELS[request.param]
    if parallel.device.type == "cpu" and found.shape.num_hidden_layers > 2:
        pytest.skip("too large for a CPU")
    yield found
    if parallel.device.type == "cuda":
        torch.cuda.empty_cache()
