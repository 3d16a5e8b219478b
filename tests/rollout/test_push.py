"""Weights into a real vLLM, through files and through a group: what is live after a push, and what it refuses.

Processes that hang or die meanwhile are in test_push_faults.py. Not covered: GPUs, bfloat16.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pushing import SMALL, build_sync, difference, specs_of
from served_tiny import MAX_MODEL_LEN, PROMPTS, TinyModel, build_tiny

from megatron_rlsc.rollout import buckets, weight_sync
from megatron_rlsc.rollout.client import RolloutClient
from megatron_rlsc.rollout.fleet import Fleet, Replica
from megatron_rlsc.rollout.link import SyncError
from megatron_rlsc.rollout.responses import StaleSampleError
from megatron_rlsc.rollout.sidecar import Sidecar
from megatron_rlsc.rollout.transport import FileChannel, GroupChannel
from megatron_rlsc.rollout.weight_sync import NoSync, WeightSync
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


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen a push, as a large model has them."""
    monkeypatch.setattr(
        weight_sync,
        "fill_buckets",
        lambda stream, device: buckets.fill_buckets(stream, device=device, bucket_bytes=SMALL),
    )


TRANSPORTS = pytest.mark.parametrize("transport", ["file", "gloo"])


@TRANSPORTS
def test_what_was_pushed_is_live(sidecar: Sidecar, tiny: TinyModel, small_buckets: None, transport: str) -> None:
    """Push after push, in buckets; and the probe finds one that was left out."""
    sync = build_sync(sidecar, tiny, transport=transport)
    for _ in range(3):
        version = sync.push(tiny.weights().items())
        assert difference(tiny, sync, version) < 1e-3
        tiny.step()
    assert difference(tiny, sync, version) > 0.1
    sync.close()


def test_tensor_parallel_workers_have_it_too(sidecar_python: Path, tmp_path: Path, small_buckets: None) -> None:
    """Both ways, into two workers that cut it, of an untied model."""
    tiny = build_tiny(tmp_path / "model", tied=False)
    with Sidecar(
        sidecar_python,
        tiny.folder,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        seed=1,
        log_path=tmp_path / "vllm.log",
        tensor_parallel_size=2,
        timeout=600,
    ) as sidecar:
        sidecar.wait_until_ready()
        for transport in ("gloo", "file", "auto"):
            sync = build_sync(sidecar, tiny, transport=transport)
            for _ in range(2):
                version = sync.push(tiny.weights().items())
                assert difference(tiny, sync, version) < 1e-3
                tiny.step()
            sync.close()


def test_versions_are_never_reused(sidecar: Sidecar, tiny: TinyModel, sync: WeightSync) -> None:
    """A second WeightSync, as after a resume, counts from 0 again under another run id."""
    resumed = build_sync(sidecar, tiny)
    versions = [pusher.push(tiny.weights().items()) for pusher in (sync, sync, resumed, resumed)]
    assert len(set(versions)) == 4
    assert [version.split(":")[1] for version in versions] == ["0", "1", "0", "1"]


def test_after_a_rollback_an_old_sample_is_refused(
    sidecar: Sidecar, tiny: TinyModel, sync: WeightSync, client: RolloutClient
) -> None:
    """The same weights, the same step's number: what was sampled before the rollback is still of another version."""
    before = sync.push(tiny.weights().items())
    kept = tiny.weights()
    tiny.step()
    sync.push(tiny.weights().items())
    tiny.model.load_state_dict(kept, strict=False)  # to the checkpoint
    after = build_sync(sidecar, tiny).push(tiny.weights().items())
    assert before.split(":")[1] == after.split(":")[1] == "0"
    with pytest.raises(StaleSampleError, match=rf"{after}.* not all of '{before}'"):
        client.generate(PROMPTS, step=0, version=before)


def test_a_push_in_the_middle_of_responses_leaves_no_mixed_one(
    sidecar: Sidecar, tiny: TinyModel, sync: WeightSync
) -> None:
    """What is under way when it begins is aborted, and none of it is of two versions."""
    old = sync.push(tiny.weights().items())
    body = {"token_ids": list(PROMPTS[0].token_ids), "sampling_params": LONG}
    with (
        httpx.Client(base_url=sidecar.url, headers=bearer(sidecar.key), timeout=300) as http,
        ThreadPoolExecutor(30) as pool,
    ):
        choices: list[dict[str, Any]] = []
        answered, pushed = threading.Event(), threading.Event()

        def ask_on() -> None:
            while not pushed.is_set():
                choices.extend(http.post("/inference/v1/generate", json=body).json()["choices"])
                answered.set()

        asking = [pool.submit(ask_on) for _ in range(30)]
        try:
            assert answered.wait(300)
            new = sync.push(tiny.weights().items())
        finally:
            pushed.set()
        for asked in asking:
            asked.result()
    assert "abort" in {choice["finish_reason"] for choice in choices}
    versions = [{span["version"] for span in choice["weight_versions"] or ()} for choice in choices]
    assert all(found <= {old} or found <= {new} for found in versions)


def test_a_request_during_a_push_waits_for_it(
    sidecar: Sidecar, tiny: TinyModel, small_buckets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two buckets, where vLLM alone would run into weights that are not there."""
    body = {"token_ids": list(PROMPTS[0].token_ids), "sampling_params": {"max_tokens": 4, "temperature": 0.0}}
    offer, asked = FileChannel.offer, []
    with ThreadPoolExecutor(1) as pool:

        def ask_first(self, bucket, label):
            if not asked:
                url, headers = f"{sidecar.url}/inference/v1/generate", bearer(sidecar.key)
                asked.append(pool.submit(httpx.post, url, json=body, headers=headers, timeout=60))
                time.sleep(0.5)
            assert not asked[0].done()
            return offer(self, bucket, label)

        monkeypatch.setattr(FileChannel, "offer", ask_first)
        sync = build_sync(sidecar, tiny, transport="file")
        version = sync.push(tiny.weights().items())
        (choice,) = asked[0].result().json()["choices"]
    assert [span["version"] for span in choice["weight_versions"]] == [version]
    assert difference(tiny, sync, version) < 1e-3


LONG = {"n": 16, "max_tokens": 300, "temperature": 0.5, "ignore_eos": True, "detokenize": False}


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
        (with_a_wrong_shape, r"up_proj\.weight is float32 \[96, 63\], the model wants float32 \[96, 64\]"),
        (in_bfloat16, r"is bfloat16 .*, the model wants float32"),
    ],
)
def test_a_push_of_another_model_is_refused_before_it_is_touched(
    sidecar: Sidecar, tiny: TinyModel, sync: WeightSync, change: Callable[[Weights], Weights], message: str
) -> None:
    sync.push(tiny.weights().items())
    weights = change(tiny.weights())
    other = build_sync(sidecar, tiny, specs=specs_of(weights))
    with pytest.raises(SyncError, match=rf"^start: replica 0 .* answered 500.*{message}"):
        other.push(weights.items())
    headers = bearer(sidecar.key)
    assert httpx.get(f"{sidecar.url}/is_paused", headers=headers).json() == {"is_paused": True}
    assert httpx.post(f"{sidecar.url}/resume", headers=headers).is_success
    assert httpx.get(f"{sidecar.url}/weight_info", headers=headers).json()["weight_version"].endswith(":0")


@TRANSPORTS
def test_a_flipped_bit_is_caught_and_a_whole_push_mends_it(
    sidecar: Sidecar, tiny: TinyModel, small_buckets: None, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """In the sixth bucket, when layers have been loaded; on its way, so that either side computes its checksum."""
    channel = FileChannel if transport == "file" else GroupChannel
    offer, offered = channel.offer, []

    def flip(self, bucket, label):
        offered.append(label)
        if len(offered) == 6:
            bucket.data[100] ^= 1
        return offer(self, bucket, label)

    monkeypatch.setattr(channel, "offer", flip)
    sync = build_sync(sidecar, tiny, transport=transport)
    with pytest.raises(SyncError, match=r"^transfer: .*checksum of a bucket is [0-9a-f]{32} here and [0-9a-f]{32}"):
        sync.push(tiny.weights().items())
    assert len(offered) == 6
    monkeypatch.undo()
    tiny.step()
    again = build_sync(sidecar, tiny, transport=transport)
    assert difference(tiny, again, again.push(tiny.weights().items())) < 1e-3


def test_a_tensor_that_was_announced_and_does_not_come(
    sidecar: Sidecar, tiny: TinyModel, sync: WeightSync, small_buckets: None
) -> None:
    with pytest.raises(SyncError, match=r"^finish: .*500.*1 tensors did not come: .*k_proj\.bias"):
        sync.push(without_a_tensor(tiny.weights()).items())
    again = build_sync(sidecar, tiny)
    assert difference(tiny, again, again.push(tiny.weights().items())) < 1e-3


@pytest.mark.parametrize("left", [0, 100])
def test_a_file_that_is_cut_is_refused(
    sidecar: Sidecar, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    offer = FileChannel.offer

    def cut(self, bucket, label):
        offered = offer(self, bucket, label)
        os.truncate(self._file, left)
        return offered

    monkeypatch.setattr(FileChannel, "offer", cut)
    with pytest.raises(SyncError, match=rf"^transfer: .*500.*bucket has {left} bytes, its tensors take \d+"):
        build_sync(sidecar, tiny, transport="file").push(tiny.weights().items())
    monkeypatch.undo()
    again = build_sync(sidecar, tiny)
    assert difference(tiny, again, again.push(tiny.weights().items())) < 1e-3


def test_a_tensor_that_comes_twice(sidecar: Sidecar, tiny: TinyModel, sync: WeightSync) -> None:
    weights = [*tiny.weights().items()]
    with pytest.raises(SyncError, match=r"^transfer: .*500.*comes twice, or was not announced so"):
        sync.push([*weights, weights[3]])
    again = build_sync(sidecar, tiny)
    assert difference(tiny, again, again.push(tiny.weights().items())) < 1e-3


class SwallowUpdates(httpx.HTTPTransport):
    """A network on which buckets are acknowledged and never arrive: vLLM would answer 200 to all of it."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if b'"checksum"' in request.read() or request.url.path == "/finish_weight_update":
            return httpx.Response(200, json={})
        return super().handle_request(request)


def test_a_live_parameter_that_is_not_what_was_sent(sidecar: Sidecar, tiny: TinyModel, sync: WeightSync) -> None:
    sync.push(tiny.weights().items())
    tiny.step()
    deaf = build_sync(sidecar, tiny, http_transport=SwallowUpdates())
    with pytest.raises(SyncError, match=r"^verify: replica 0 .*worker 0: \d of 5 live parameters are not what was"):
        deaf.push(tiny.weights().items())
    again = build_sync(sidecar, tiny)
    assert difference(tiny, again, again.push(tiny.weights().items())) < 1e-3


def test_weights_that_are_not_finite_are_not_sent(sidecar: Sidecar, tiny: TinyModel, sync: WeightSync) -> None:
    weights = tiny.weights()
    weights["model.norm.weight"][3] = float("nan")
    with pytest.raises(SyncError, match=r"^transfer: model\.norm\.weight holds NaN"):
        sync.push(weights.items())
    again = build_sync(sidecar, tiny)
    assert difference(tiny, again, again.push(tiny.weights().items())) < 1e-3


@pytest.mark.parametrize("file", ["../weights.bucket", "/etc/hostname", "sub/weights.bucket", ".."])
def test_only_the_push_directory_is_read(sidecar: Sidecar, tiny: TinyModel, sync: WeightSync, file: str) -> None:
    sync.push(tiny.weights().items())
    headers = bearer(sidecar.key)
    assert httpx.post(f"{sidecar.url}/start_weight_update", headers=headers).is_success
    announced = {"announced": [spec.to_json() for spec in specs_of(tiny.weights())]}
    body = {"tensors": [["model.norm.weight", "float32", [64]]], "file": file}
    for update in (announced, body):
        answer = httpx.post(f"{sidecar.url}/update_weights", headers=headers, json={"update_info": update})
    assert answer.status_code == 500
    assert "is no file of the push directory" in answer.text
    sync.push(tiny.weights().items())


def test_the_push_directory_is_private_and_empty_between_pushes(
    sidecar: Sidecar, tiny: TinyModel, sync: WeightSync
) -> None:
    sync.push(tiny.weights().items())
    body = {"method": "describe_transfer"}
    answer = httpx.post(f"{sidecar.url}/collective_rpc", headers=bearer(sidecar.key), json=body)
    directory = Path(answer.json()["results"][0]["directory"])
    assert directory.stat().st_mode & 0o777 == 0o700
    assert list(directory.iterdir()) == []


def test_a_directory_that_is_not_here_is_refused(sidecar: Sidecar, tiny: TinyModel, tmp_path: Path) -> None:
    sync = build_sync(sidecar, tiny, transport="file", push_dir=tmp_path / "nowhere")
    with pytest.raises(SyncError, match=r"^init: replica 0 .* reads /.*which is not on this machine.*--push-dir"):
        sync.push(tiny.weights().items())


def test_other_ranks_walk_the_stream_to_its_end() -> None:
    """Each tensor may be a collective: rank 0 would wait for a rank that stopped early."""
    stream = iter([("a", torch.ones(1)), ("b", torch.ones(1))])
    assert NoSync().push(stream) == ""
    assert next(stream, None) is None


# Against a server that is written here

ONE = {"w": torch.ones(1 << 20)}


def answering(answer: Callable[[httpx.Request], httpx.Response], push_dir: Path) -> WeightSync:
    return WeightSync(
        Fleet([Replica(index=0, url="http://sidecar", key="k")]),
        specs=specs_of(ONE),
        timeout=1,
        transport="file",
        push_dir=push_dir,
        http_transport=httpx.MockTransport(answer),
    )


def test_a_full_disk_is_named_and_left_clean(tmp_path: Path) -> None:
    """A limit on the size of files stands in for it. The stream is walked to its end."""
    sync = answering(lambda request: httpx.Response(200, json={"results": [{"directory": "", "host": ""}]}), tmp_path)
    stream = iter(ONE.items())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(SyncError, match=r"^transfer to replica 0 .*File too large"):
            sync.push(stream)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert next(stream, None) is None
    assert list(tmp_path.iterdir()) == []


PHASES = {
    "init": "/init_weight_transfer_engine",
    "pause": "/pause",
    "start": "/start_weight_update",
    "transfer": "/update_weights",
    "finish": "/finish_weight_update",
    "verify": "/collective_rpc",
    "resume": "/resume",
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_refusal_names_its_phase_and_is_never_followed_by_resume(tmp_path: Path, phase: str) -> None:
    """Of a replica whose engine lives; the stream is walked to its end, and no file is left."""
    paths: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        broken = request.url.path == PHASES[phase]
        if phase == "transfer":
            broken &= b'"checksum"' in request.read()
        if phase == "verify":
            broken &= b"live_checksums" in request.read()
        body = {"results": [{"directory": str(tmp_path), "host": ""}], "error": "out of order"}
        return httpx.Response(500 if broken else 200, json=body)

    stream = iter(ONE.items())
    with pytest.raises(SyncError, match=rf"^{phase}: replica 0 \(http://sidecar\) answered 500: .*out of order"):
        answering(answer, tmp_path).push(stream)
    assert next(stream, None) is None
    assert phase == "resume" or "/resume" not in paths
    assert list(tmp_path.iterdir()) == []
