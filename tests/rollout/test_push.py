"""Weights into a real vLLM: what it samples from after a push, and what it refuses.

Not covered: GPUs, bfloat16, vLLM's own tensor parallelism, and faults in the middle of a load.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from served_tiny import PROMPTS, TinyModel, build_client

from megatron_rlsc.rollout.client import RolloutClient
from megatron_rlsc.rollout.responses import StaleSampleError
from megatron_rlsc.rollout.sidecar import Sidecar
from megatron_rlsc.rollout.weight_sync import NoSync, SyncError, WeightSync
from megatron_rlsc.rollout.wire import bearer

Weights = dict[str, torch.Tensor]


def prefix_cache_hits(sidecar: Sidecar) -> float:
    """Tokens whose KV came from the prefix cache, since the sidecar started."""
    metrics = httpx.get(f"{sidecar.url}/metrics", headers=bearer(sidecar.key)).text
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
    return float(lines[0].split()[-1])


def test_samples_come_from_the_pushed_weights(
    sidecar: Sidecar, tiny: TinyModel, sync: WeightSync, client: RolloutClient
) -> None:
    """Log-probs at T=0.5 equal HF's after each push, with the KV of old weights in the prefix cache in between."""
    for step in range(2):
        version = sync.push(tiny.weights().items())
        first = client.generate(PROMPTS, step=step, version=version)
        hits = prefix_cache_hits(sidecar)
        again = client.generate(PROMPTS, step=step + 10, version=version)
        assert prefix_cache_hits(sidecar) > hits, "the prefix cache was not in play, so the test shows nothing of it"
        assert tiny.largest_difference(first + again) < 1e-4
        tiny.step()
    assert tiny.largest_difference(first) > 0.1, "weights that were not pushed go unnoticed"


def test_a_sample_of_an_older_push_is_refused(tiny: TinyModel, sync: WeightSync, client: RolloutClient) -> None:
    old = sync.push(tiny.weights().items())
    new = sync.push(tiny.weights().items())
    assert old != new
    assert {sample.version for sample in client.generate(PROMPTS, step=0, version=new)} == {new}
    with pytest.raises(StaleSampleError, match=rf"{new}.* not all of '{old}'"):
        client.generate(PROMPTS, step=0, version=old)


def test_versions_are_never_reused(sidecar: Sidecar, tiny: TinyModel, sync: WeightSync) -> None:
    """A second WeightSync, as after a resume, counts from 0 again under another run id."""
    resumed = WeightSync(sidecar.url, key=sidecar.key, timeout=300)
    versions = [pusher.push(tiny.weights().items()) for pusher in (sync, sync, resumed, resumed)]
    assert len(set(versions)) == 4
    assert [version.split(":")[1] for version in versions] == ["0", "1", "0", "1"]


def without_a_tensor(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if name != "model.layers.1.self_attn.k_proj.bias"}


def with_an_extra_tensor(weights: Weights) -> Weights:
    return {**weights, "model.layers.2.input_layernorm.weight": torch.ones(64)}


def with_a_wrong_shape(weights: Weights) -> Weights:
    return {**weights, "model.layers.0.mlp.up_proj.weight": torch.ones(96, 63)}


def in_bfloat16(weights: Weights) -> Weights:
    return {name: value.bfloat16() for name, value in weights.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_tensor, r"1 of 26 tensors are missing: model\.layers\.1\.self_attn\.k_proj\.bias"),
        (with_an_extra_tensor, r"1 tensors are not in the model: model\.layers\.2\.input_layernorm\.weight"),
        (with_a_wrong_shape, r"up_proj\.weight is F32 \[96, 63\], the model wants F32 \[96, 64\]"),
        (in_bfloat16, r"is BF16 .*, the model wants F32"),
    ],
)
def test_a_push_of_another_model_is_refused(
    sidecar: Sidecar, tiny: TinyModel, sync: WeightSync, change: Callable[[Weights], Weights], message: str
) -> None:
    with pytest.raises(SyncError, match=f"^update: .*500.*{message}"):
        sync.push(change(tiny.weights()).items())
    assert_untouched(sidecar, tiny, sync)


class FlipOneBit(httpx.HTTPTransport):
    """The network, but for a bit of the pushed file that turns over before the sidecar reads it."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/update_weights":
            (file,) = self.directory.iterdir()
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        return super().handle_request(request)


def test_a_flipped_bit_is_refused(sidecar: Sidecar, tiny: TinyModel) -> None:
    directory = push_directory(sidecar)
    sync = WeightSync(sidecar.url, key=sidecar.key, timeout=300, transport=FlipOneBit(directory))
    with pytest.raises(SyncError, match=r"^update: .*sha256"):
        sync.push(tiny.weights().items())
    assert_untouched(sidecar, tiny, sync)


def test_weights_that_are_not_finite_are_never_sent(tiny: TinyModel, sync: WeightSync, client: RolloutClient) -> None:
    version = sync.push(tiny.weights().items())
    weights = tiny.weights()
    weights["model.norm.weight"][3] = float("nan")
    with pytest.raises(SyncError, match=r"^gather: 1 of 26 .*model\.norm\.weight"):
        sync.push(weights.items())
    assert tiny.largest_difference(client.generate(PROMPTS, step=0, version=version)) < 1e-4


@pytest.mark.parametrize("file", ["../weights.safetensors", "/etc/hostname", "sub/weights.safetensors", ".."])
def test_only_the_push_directory_is_read(sidecar: Sidecar, tiny: TinyModel, sync: WeightSync, file: str) -> None:
    sync.push(tiny.weights().items())
    headers = bearer(sidecar.key)
    assert httpx.post(f"{sidecar.url}/start_weight_update", headers=headers).is_success
    update = {"update_info": {"file": file, "sha256": ""}}
    answer = httpx.post(f"{sidecar.url}/update_weights", headers=headers, json=update)
    assert answer.status_code == 500
    assert "is no file of the push directory" in answer.text


def test_the_push_directory_is_private_and_empty_between_pushes(
    sidecar: Sidecar, tiny: TinyModel, sync: WeightSync
) -> None:
    sync.push(tiny.weights().items())
    directory = push_directory(sidecar)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert list(directory.iterdir()) == []


def test_other_ranks_walk_the_stream_to_its_end() -> None:
    """Each tensor may be a collective: rank 0 would wait for a rank that stopped early."""
    stream = iter([("a", torch.ones(1)), ("b", torch.ones(1))])
    assert NoSync().push(stream) == ""
    assert next(stream, None) is None


def test_a_full_disk_is_named_and_left_clean(tmp_path: Path) -> None:
    """A limit on the size of files stands in for it. The sidecar has not been paused."""
    paths: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        return httpx.Response(200, json={})

    sync = WeightSync("http://sidecar", key="k", timeout=1, push_dir=tmp_path, transport=httpx.MockTransport(answer))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(SyncError, match=f"^write to {tmp_path}: .*File too large"):
            sync.push([("w", torch.ones(1 << 20))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert paths == ["/init_weight_transfer_engine"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("failing", "phase", "sealed"),
    [
        ("/collective_rpc", "init", False),
        ("/init_weight_transfer_engine", "init", False),
        ("/pause", "pause", False),
        ("/start_weight_update", "start", True),
        ("/update_weights", "update", True),
        ("/finish_weight_update", "finish", True),
        ("/resume", "resume", False),
    ],
)
def test_an_error_names_its_phase_and_never_resumes(tmp_path: Path, failing: str, phase: str, sealed: bool) -> None:
    """A sidecar that fails at each phase in turn; one that failed inside the update is given up."""
    paths: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        broken = request.url.path == failing
        return httpx.Response(500 if broken else 200, json={"error": "out of order", "results": [str(tmp_path)]})

    sync = WeightSync("http://sidecar", key="k", timeout=1, transport=httpx.MockTransport(answer))
    for _ in range(2):
        with pytest.raises(SyncError, match=f"^{phase}: .*500.*out of order"):
            sync.push([("w", torch.ones(1))])
        if sealed:
            with pytest.raises(SyncError, match="an earlier push failed, restart the sidecar"):
                sync.push([("w", torch.ones(1))])
            break
    assert failing == "/resume" or "/resume" not in paths
    assert list(tmp_path.iterdir()) == []


def push_directory(sidecar: Sidecar) -> Path:
    body = {"method": "push_directory"}
    answer = httpx.post(f"{sidecar.url}/collective_rpc", headers=bearer(sidecar.key), json=body)
    return Path(answer.json()["results"][0])


def assert_untouched(sidecar: Sidecar, tiny: TinyModel, refused: WeightSync) -> None:
    """After a refusal: sealed and paused, yet alive, so that a whole push (as after a restart) brings it back."""
    with pytest.raises(SyncError, match="an earlier push failed"):
        refused.push(tiny.weights().items())
    paused = httpx.get(f"{sidecar.url}/is_paused", headers=bearer(sidecar.key))
    assert paused.json() == {"is_paused": True}
    version = WeightSync(sidecar.url, key=sidecar.key, timeout=300).push(tiny.weights().items())
    samples = build_client(sidecar.url, sidecar.key).generate(PROMPTS, step=0, version=version)
    assert tiny.largest_difference(samples) < 1e-4
