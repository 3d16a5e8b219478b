"""One real vLLM on a tiny random Qwen2 for all of tests/rollout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served_tiny import MAX_MODEL_LEN, OneServerClient, TinyModel, build_client, build_tiny

from megatron_rlsc.rollout.fleet import Fleet, Replica
from megatron_rlsc.rollout.sidecar import Sidecar
from megatron_rlsc.rollout.weight_sync import WeightSync


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def sidecar(sidecar_python: Path, tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    log_path = tmp_path_factory.mktemp("sidecar") / "vllm.log"
    with Sidecar(
        sidecar_python,
        tiny.folder,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        seed=1,
        log_path=log_path,
        timeout=600,
    ) as sidecar:
        sidecar.wait_until_ready()
        yield sidecar


@pytest.fixture
def sync(sidecar: Sidecar, tiny: TinyModel) -> Iterator[WeightSync]:
    fleet = Fleet([Replica(index=0, url=sidecar.url, key=sidecar.key)])
    sync = WeightSync(fleet, specs=tiny.specs(), timeout=300)
    yield sync
    sync.close()


@pytest.fixture
def client(sidecar: Sidecar) -> OneServerClient:
    return build_client(sidecar.url, sidecar.key)
