"""Where a step's responses come from: the fleet of vLLM sidecars, or the journal of an earlier run.

Rank 0 holds one of the two; the other ranks hold a `Follower`, which walks the weight stream along with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

from megatron_rlsc.config import Config, RolloutConfig
from megatron_rlsc.conversion.folders import is_megatron_checkpoint, latest_checkpoint
from megatron_rlsc.conversion.hf import open_weights
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.data import PromptSource
from megatron_rlsc.held_out import read_held_out
from megatron_rlsc.planning import check_token_budget
from megatron_rlsc.rollout.buckets import TensorSpec
from megatron_rlsc.rollout.client import BegunRollout, RolloutClient
from megatron_rlsc.rollout.dispatch import NoReplicaLeftError
from megatron_rlsc.rollout.fleet import Fleet, FleetError
from megatron_rlsc.rollout.link import SyncError
from megatron_rlsc.rollout.request import RolloutError, again_seed
from megatron_rlsc.rollout.responses import require_lag
from megatron_rlsc.rollout.weight_sync import NoSync, WeightSync
from megatron_rlsc.run_folder.journal import Journal
from megatron_rlsc.run_folder.names import ROLLOUTS, SIDECAR_LOGS
from megatron_rlsc.servers import build_fleet, decoded_at_one_time, tensor_specs
from megatron_rlsc.tokenizer import check_vocabulary, load_tokenizer, stop_token_ids
from megatron_rlsc.types import Prompt, Sample

if TYPE_CHECKING:
    from torch import Tensor


PROBE_TOKENS = 64
"""Of the prompt that every push is proven by, at most."""


class Sampler(Protocol):
    """What the loop asks for responses."""

    def connect(self) -> None:
        """Returns when samples can be had; called when the policy is built, so that both start up at once."""

    def push(self, weights: Iterable[tuple[str, Tensor]], step: int) -> str:
        """Gives the sampler the policy's weights, those after `step`, on every rank; returns their version."""

    def probe(self, version: str) -> list[Sample] | None:
        """A fixed prompt with the log-probabilities, at T=1, of every replica that has `version`, one sample each: what
        proves that a push is live. Empty where nothing was pushed; None where rank 0 has them."""

    def sample(self, step: int, asked: int, version: str) -> list[Sample] | None:
        """A step's responses, ordered by (group, sample), to the prompts after the first `asked`; None where rank 0 has
        them. Those that are not in the journal yet are of `version`. Empty where no replica holds `version` any more:
        push again. Raises StaleSampleError where the journal's lag behind it by more than --rollout-lead."""

    def begin(self, step: int, asked: int, version: str) -> BegunRollout | None:
        """Asks for a step's responses, which go into the journal as they end, while the caller does something else:
        `sample` has them then. None where there is nothing to ask for. Raises NoReplicaLeftError where no replica holds
        `version`."""

    def draw_anew(self, times: int) -> None:
        """From here on other samples than before: the run has gone back so many times, and would walk into the same."""

    def __enter__(self) -> Sampler: ...

    def __exit__(self, *error: object) -> None: ...


class Follower:
    """Ranks other than 0: takes part in the weight stream, whose every tensor may be a collective."""

    def connect(self) -> None:
        pass

    def push(self, weights: Iterable[tuple[str, Tensor]], step: int) -> str:
        return NoSync().push(weights)

    def probe(self, version: str) -> list[Sample] | None:
        return None

    def sample(self, step: int, asked: int, version: str) -> list[Sample] | None:
        return None

    def begin(self, step: int, asked: int, version: str) -> BegunRollout | None:
        return None

    def draw_anew(self, times: int) -> None:
        pass

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
            self.sample(step, 0, "")

    def probe(self, version: str) -> list[Sample] | None:
        return []

    def sample(self, step: int, asked: int, version: str) -> list[Sample] | None:
        samples = self._journal.read(step)
        largest = max(max(sample.prompt_token_ids + sample.response_token_ids) for sample in samples)
        if largest >= self._vocab_size:  # a tensor-parallel embedding would take it for zeros, in silence
            raise ValueError(
                f"{self._journal.path(step)} has token id {largest}, the model only {self._vocab_size} rows "
                f"(vocab_size of config.json): --replay-rollouts needs the journal of a model with this one's tokenizer"
            )
        return samples


class VllmSampler:
    """Responses from vLLM sidecars: those that start with this context, or that run already (`--rollout-urls`)."""

    def __init__(
        self,
        config: RolloutConfig,
        prompts: PromptSource,
        *,
        specs: Sequence[TensorSpec],
        fleet: Fleet,
        stop_token_ids: tuple[int, ...],
        journal: Journal,
        abandoned: Callable[[], bool],
    ) -> None:
        """
        Args:
            specs: what a push consists of.
            prompts: of every step.
            fleet: to be started and stopped with this sampler.
            stop_token_ids: the run's one stop set.
            journal: what was sampled already is taken from it, and each group put into it as it ends.
            abandoned: whether the run is to end at once: then `push` and `sample` come back with nothing.
        """
        self._journal = journal
        self._abandoned = abandoned
        self._config = config
        self._prompts = prompts
        self._specs = specs
        self._fleet = fleet
        self._stop_token_ids = stop_token_ids
        self._begun = 0

    def __enter__(self) -> VllmSampler:
        self._fleet.__enter__()
        self._sync = WeightSync(
            self._fleet,
            specs=self._specs,
            transport=self._config.weight_transport,
            timeout=self._config.sync_timeout,
            push_dir=self._config.push_dir,
        )
        self.draw_anew(0)
        return self

    def draw_anew(self, times: int) -> None:
        seed = again_seed(self._prompts.seed, times)
        self._client = self._open_client(self._config.samples_per_prompt, self._config.temperature, seed)

    def _open_client(self, samples_per_prompt: int, temperature: float, seed: int) -> RolloutClient:
        return RolloutClient(
            self._fleet,
            samples_per_prompt=samples_per_prompt,
            temperature=temperature,
            max_response_length=self._config.max_response_length,
            stop_token_ids=self._stop_token_ids,
            seed=seed,
            max_num_seqs=decoded_at_one_time(self._config),
            timeout=self._config.rollout_timeout,
            stall_timeout=self._config.stall_timeout,
            abandoned=self._abandoned,
        )

    def connect(self) -> None:
        self._fleet.wait_until_ready()

    def push(self, weights: Iterable[tuple[str, Tensor]], step: int) -> str:
        stream = iter(weights)
        try:
            self._fleet.wait_for_one()
            return NoSync().push(stream) if self._abandoned() else self._sync.push(stream, step=step)
        except (FleetError, SyncError):  # a SIGTERM may have reached the sidecars as well
            if not self._abandoned():
                raise
            return NoSync().push(stream)

    def probe(self, version: str) -> list[Sample] | None:
        prompt = self._prompts.after(0)[0]
        token_ids = (prompt.token_ids * 2)[:PROBE_TOKENS]  # two at least
        answers = [] if self._abandoned() else self._sync.probe(token_ids, version)
        return [
            Sample(
                group=replica,
                sample=0,
                prompt_index=prompt.index,
                prompt_token_ids=token_ids[:1],
                response_token_ids=token_ids[1:],
                rollout_logprobs=logprobs,
                finish_reason="length",
                seed=0,
                version=version,
            )
            for replica, logprobs in enumerate(answers)
        ]

    def sample(self, step: int, asked: int, version: str) -> list[Sample] | None:
        prompts, groups = self._find(step, asked)
        try:
            if len(groups) < len(prompts):
                for group in self._client.stream(prompts, step=step, version=version, without=groups.keys()):
                    self._journal.add(step, group)
                    groups[group[0].group] = group
        except NoReplicaLeftError:
            if not self._abandoned():
                self._fleet.wait_for_one()
        except (FleetError, RolloutError):  # a SIGTERM may have reached the sidecars as well
            if not self._abandoned():
                raise
        if len(groups) < len(prompts):
            return []
        samples = [sample for number in range(len(prompts)) for sample in groups[number]]
        if self._config.rollout_lead:
            require_lag(samples, step=step, version=version, lead=self._config.rollout_lead)
        return samples

    def begin(self, step: int, asked: int, version: str) -> BegunRollout | None:
        prompts, groups = self._find(step, asked)
        if len(groups) == len(prompts):
            return None
        self._begun, keep = step, partial(self._journal.add, step)
        return self._client.begin(prompts, step=step, version=version, without=groups.keys(), keep=keep)

    def _find(self, step: int, asked: int) -> tuple[list[Prompt], dict[int, list[Sample]]]:
        """A step's prompts, and what of their responses the journal has."""
        prompts = self._prompts.after(asked)
        groups = self._journal.finished(step, prompts, self._config.samples_per_prompt)
        if groups and step != self._begun:
            tqdm.write(f"rollout: step {step} has {len(groups)} of {len(prompts)} questions in the journal already")
        return prompts, groups

    def answer(self, prompts: Sequence[Prompt], version: str, *, samples: int = 1, step: int = 0) -> BegunRollout:
        """Responses to prompts of no step, one greedy one each or `samples` as in training: begun, while the caller
        goes on with something else. `step` is in the requests' names: what is under way at one time needs different
        ones."""
        temperature = 0.0 if samples == 1 else self._config.temperature
        return self._open_client(samples, temperature, self._prompts.seed).begin(prompts, step=step, version=version)

    def __exit__(self, *error: object) -> None:
        self._sync.close()
        self._fleet.stop()


def build_sampler(
    config: Config, model_dir: Path, shape: ModelShape, *, abandoned: Callable[[], bool] = lambda: False
) -> Sampler:
    """Rank 0's sampler, with all that it needs checked: the model's files, the prompts, vLLM. Nothing is written yet.

    Args:
        model_dir: HF config and tokenizer.
        shape: of the model.
        abandoned: whether the run is to end at once.
    """
    if is_megatron_checkpoint(config.model.load):
        latest_checkpoint(config.model.load)
    else:
        open_weights(config.model.load)
    if config.rollout.replay_rollouts is not None:
        if config.train.eval_interval:
            raise ValueError("--replay-rollouts has no sampler, which --eval-interval needs: give up either")
        return Replay(config.rollout.replay_rollouts, config.train.train_iters, vocab_size=shape.vocab_size)
    rollout = config.rollout
    tokenizer = load_tokenizer(model_dir)
    stops = stop_token_ids(tokenizer, model_dir)
    check_vocabulary(tokenizer, stops, vocab_size=shape.vocab_size, folder=model_dir)
    room = shape.max_position_embeddings - rollout.max_response_length
    prompts = PromptSource(
        config.data,
        tokenizer,
        seed=config.train.seed,
        max_prompt_tokens=room,
    )
    longest = prompts.longest_prompt + rollout.max_response_length
    held_out = max(
        (len(prompt.token_ids) for _, prompt in read_held_out(config, tokenizer, max_prompt_tokens=room)), default=0
    )
    check_token_budget(longest, config.parallel, max_tokens=config.train.max_tokens_per_micro_batch)
    specs = tensor_specs(shape, bf16=config.model.bf16)
    fleet = build_fleet(
        rollout,
        model_dir,
        specs,
        bf16=config.model.bf16,
        longest=max(longest, held_out + rollout.max_response_length),
        seed=config.train.seed,
        logs=config.train.output_dir / SIDECAR_LOGS,
        abandoned=abandoned,
    )
    return VllmSampler(
        rollout,
        prompts,
        specs=specs,
        fleet=fleet,
        stop_token_ids=stops,
        journal=Journal(config.train.output_dir / ROLLOUTS),
        abandoned=abandoned,
    )
