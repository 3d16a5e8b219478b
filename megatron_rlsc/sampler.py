"""Where a step's responses come from: the vLLM sidecar, or the journal of an earlier run.

Rank 0 holds one of the two; the other ranks hold a `Follower`, which walks the weight stream along with it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_rlsc.config import Config, RolloutConfig
from megatron_rlsc.conversion.folders import is_megatron_checkpoint, latest_checkpoint
from megatron_rlsc.conversion.hf import open_weights
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.data import PromptSource
from megatron_rlsc.disk import free_bytes, readable
from megatron_rlsc.journal import Journal
from megatron_rlsc.planning import check_token_budget
from megatron_rlsc.rollout.client import RolloutClient, RolloutError
from megatron_rlsc.rollout.sidecar import Sidecar
from megatron_rlsc.rollout.weight_sync import NoSync, SyncError, WeightSync
from megatron_rlsc.rollout.wire import KEY_VARIABLE, memory_backed_root
from megatron_rlsc.run_dir import SIDECAR_LOG
from megatron_rlsc.tokenizer import check_vocabulary, load_tokenizer, stop_token_ids
from megatron_rlsc.types import Sample

if TYPE_CHECKING:
    from torch import Tensor


DYING_SECONDS = 10.0
"""What a sidecar that has failed is given to end, so that the end of its log can be shown."""


class Sampler(Protocol):
    """What the loop asks for responses."""

    def connect(self) -> None:
        """Returns when samples can be had; called when the policy is built, so that both start up at once."""

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Gives the sampler the policy's weights, on every rank; returns their version."""

    def sample(self, step: int, version: str) -> list[Sample] | None:
        """A step's responses, ordered by (group, sample), all of `version`; None where rank 0 has them."""

    def __enter__(self) -> Sampler: ...

    def __exit__(self, *error: object) -> None: ...


class Follower:
    """Ranks other than 0: takes part in the weight stream, whose every tensor may be a collective."""

    def connect(self) -> None:
        pass

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        return NoSync().push(weights)

    def sample(self, step: int, version: str) -> list[Sample] | None:
        return None

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Replay(Follower):
    """Responses from the journal of an earlier run (`--replay-rollouts`): nothing is pushed, nothing is drawn."""

    def __init__(self, folder: Path, steps: int, *, vocab_size: int) -> None:
        """Raises ValueError unless the journal has the first of them and the last, of a model of `vocab_size` rows."""
        self._journal = Journal(folder)
        self._vocab_size = vocab_size
        for step in (1, steps):
            self.sample(step, "")

    def sample(self, step: int, version: str) -> list[Sample] | None:
        samples = self._journal.read(step)
        largest = max(max(sample.prompt_token_ids + sample.response_token_ids) for sample in samples)
        if largest >= self._vocab_size:  # a tensor-parallel embedding would take it for zeros, in silence
            raise ValueError(
                f"{self._journal.path(step)} has token id {largest}, the model only {self._vocab_size} rows "
                f"(vocab_size of config.json): --replay-rollouts needs the journal of a model with this one's tokenizer"
            )
        return samples


class VllmSampler:
    """Responses from a vLLM sidecar: one that starts with this context, or one that runs already (`--rollout-url`)."""

    def __init__(
        self, config: RolloutConfig, prompts: PromptSource, *, sidecar: Sidecar | None, stop_token_ids: tuple[int, ...]
    ) -> None:
        """
        Args:
            prompts: of every step.
            sidecar: to be started and stopped with this sampler; None where `config.rollout_url` has one.
            stop_token_ids: the run's one stop set.
        """
        self._config = config
        self._prompts = prompts
        self._sidecar = sidecar
        self._stop_token_ids = stop_token_ids

    def __enter__(self) -> VllmSampler:
        if self._sidecar is not None:
            self._sidecar.start()
        url, key = self._address()
        self._sync = WeightSync(url, key=key, timeout=self._config.sidecar_timeout)
        self._client = RolloutClient(
            url,
            key=key,
            samples_per_prompt=self._config.samples_per_prompt,
            temperature=self._config.temperature,
            max_response_length=self._config.max_response_length,
            stop_token_ids=self._stop_token_ids,
            seed=self._prompts.seed,
            timeout=self._config.rollout_timeout,
        )
        return self

    def _address(self) -> tuple[str, str]:
        """(url, key)"""
        if self._sidecar is not None:
            return self._sidecar.url, self._sidecar.key
        assert self._config.rollout_url is not None
        if KEY_VARIABLE not in os.environ:
            raise ValueError(f"--rollout-url needs the key of that sidecar in the environment variable {KEY_VARIABLE}")
        return self._config.rollout_url, os.environ[KEY_VARIABLE]

    def connect(self) -> None:
        if self._sidecar is not None:
            self._sidecar.wait_until_ready()
        self._client.connect(longest_prompt=self._prompts.longest_prompt)

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        try:
            return self._sync.push(weights)
        except SyncError:
            self._explain()
            raise

    def sample(self, step: int, version: str) -> list[Sample] | None:
        try:
            return self._client.generate(self._prompts.at(step - 1), step=step, version=version)
        except RolloutError:
            self._explain()
            raise

    def __exit__(self, *error: object) -> None:
        self._sync.close()
        if self._sidecar is not None:
            self._sidecar.stop()

    def _explain(self) -> None:
        """A dead sidecar is the cause of any error over HTTP: raises with the end of its log instead."""
        if self._sidecar is not None:
            self._sidecar.check_alive(wait=DYING_SECONDS)


def build_sampler(config: Config, model_dir: Path, shape: ModelShape) -> Sampler:
    """Rank 0's sampler, with all that it needs checked: the model's files, the prompts, vLLM. Nothing is written yet.

    Args:
        model_dir: HF config and tokenizer.
        shape: of the model.
    """
    if is_megatron_checkpoint(config.model.load):
        latest_checkpoint(config.model.load)
    else:
        open_weights(config.model.load)
    if config.rollout.replay_rollouts is not None:
        return Replay(config.rollout.replay_rollouts, config.train.train_iters, vocab_size=shape.vocab_size)
    rollout = config.rollout
    tokenizer = load_tokenizer(model_dir)
    stops = stop_token_ids(tokenizer, model_dir)
    check_vocabulary(tokenizer, stops, vocab_size=shape.vocab_size, folder=model_dir)
    prompts = PromptSource(
        config.data,
        tokenizer,
        seed=config.train.seed,
        max_prompt_tokens=shape.max_position_embeddings - rollout.max_response_length,
    )
    longest = prompts.longest_prompt + rollout.max_response_length
    check_token_budget(longest, config.parallel, max_tokens=config.train.max_tokens_per_micro_batch)
    sidecar = None
    if rollout.rollout_url is None:
        sidecar = Sidecar(
            rollout.sidecar_python,
            model_dir,
            dtype="bfloat16" if config.model.bf16 else "float32",
            max_model_len=longest,
            seed=config.train.seed,
            log_path=config.train.output_dir / SIDECAR_LOG,
            port=rollout.sidecar_port,
            tensor_parallel_size=rollout.sidecar_tensor_parallel_size,
            max_num_seqs=max(rollout.sidecar_max_num_seqs, rollout.samples_per_prompt),
            gpu_memory_utilization=rollout.sidecar_gpu_memory_utilization,
            kv_cache_gib=rollout.sidecar_kv_cache_gib,
            timeout=rollout.sidecar_timeout,
        )
        sidecar.check()
        _require_room_for_a_push(shape.num_parameters * (2 if config.model.bf16 else 4))
    return VllmSampler(rollout, prompts, sidecar=sidecar, stop_token_ids=stops)


def _require_room_for_a_push(nbytes: int) -> None:
    """Containers start with 64 MB of shared memory, and the first push would be what finds out."""
    folder = memory_backed_root() or Path(tempfile.gettempdir())
    if nbytes > (free := free_bytes(folder)):
        raise ValueError(
            f"{folder} has {readable(free)} free, and the weights on their way to the sidecar take {readable(nbytes)} "
            f"there: give it more (docker run --shm-size, or mount -o remount,size=... {folder})"
        )
