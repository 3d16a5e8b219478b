"""The policy: what the loop may ask of it. Scores responses, learns from them, streams its weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from megatron_rlsc.batching import pack
from megatron_rlsc.config import Config
from megatron_rlsc.conversion.folders import is_megatron_checkpoint, latest_checkpoint
from megatron_rlsc.conversion.hf import open_weights
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.policy.checkpoint import check_manifest, load_checkpoint
from megatron_rlsc.policy.curtail import Curtailed
from megatron_rlsc.policy.kept_base import KeptBase
from megatron_rlsc.policy.kernels import choose_kernels, inspect_machine, shares_prompts
from megatron_rlsc.policy.model import LogprobGPTModel, build_model
from megatron_rlsc.policy.optimizer import build_optimizer, forget_updates, gradient_norm, scale_rate, wrap_model
from megatron_rlsc.policy.parallel import Parallel
from megatron_rlsc.policy.save import Save, begin_save, write_now
from megatron_rlsc.policy.weights import iter_hf_weights, load_hf_weights, require_finite
from megatron_rlsc.ranges import span
from megatron_rlsc.run_folder.checkpoints import candidates
from megatron_rlsc.timing import token_work
from megatron_rlsc.types import MicroBatch, Progress, ResponseScores

Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]
"""log p_theta without its gradient, tokens, and rows in the global batch, of d responses, [d] each -> weights, [d]."""


class Policy:
    """One rank's part of the trained model with its optimizer. Every method is a collective of all ranks."""

    def __init__(self, config: Config, shape: ModelShape, parallel: Parallel) -> None:
        self.shape = shape.padded_to(config.model.make_vocab_size_divisible_by * parallel.tp_size)
        kernels = choose_kernels(config.model, config.optimizer, inspect_machine())
        self.spec = kernels.spec
        self.parallel = parallel
        self.pack = partial(
            pack,
            share=parallel.data_share,
            max_tokens=config.train.max_tokens_per_micro_batch,
            device=parallel.device,
            layout=config.model.sequence_layout,
            share_prompts=shares_prompts(config.model, kernels.spec, cp_size=parallel.cp_size),
            work=token_work(self.shape),
        )
        """Samples as this rank's micro-batches, as the model takes them."""
        self.chunks: list[LogprobGPTModel] = build_model(
            self.shape,
            model=config.model,
            spec=kernels.spec,
            attention=kernels.attention,
            layout=config.parallel,
            parallel=parallel,
            temperature=config.rollout.temperature,
        )
        self.ddp = wrap_model(self.chunks, config.parallel, main_grads_dtype=config.optimizer.main_grads_dtype)
        self.optimizer, self.schedule = build_optimizer(
            self.ddp,
            config.optimizer,
            updates=config.train.train_iters * config.train.updates_per_rollout,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        )
        self.chunks[0].config.grad_scale_func = self.optimizer.scale_loss
        self._base: KeptBase | None = None

    def score(
        self,
        micro_batches: Sequence[MicroBatch],
        num_samples: int,
        *,
        temperature: float | None = None,
        abandoned: Callable[[], bool] | None = None,
    ) -> ResponseScores:
        """What the policy says of every response of the global batch; nothing is learned.

        Args:
            micro_batches: this replica's share; as many as every other replica's.
            num_samples: B, the responses of the global batch.
            temperature: of the log-probabilities, if not the sampling temperature.
            abandoned: see `forward_backward`.
        """
        with torch.no_grad(), self._at(temperature):
            return self._run(micro_batches, num_samples, None, abandoned)

    def keep_base(self) -> None:
        """Copies the weights, which must be the base's now, to host memory, for `score_base`."""
        self._base = KeptBase(self.chunks)

    def score_base(
        self, micro_batches: Sequence[MicroBatch], num_samples: int, *, abandoned: Callable[[], bool] | None = None
    ) -> ResponseScores:
        """What the base says of every response, at the sampling temperature; the policy is what it was. See `score`."""
        assert self._base is not None, "keep_base() was not called"
        self._gather_params()
        with self._base.in_place():
            return self.score(micro_batches, num_samples, abandoned=abandoned)

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        num_samples: int,
        weigh: Weigh,
        *,
        abandoned: Callable[[], bool] | None = None,
    ) -> ResponseScores:
        """Scores every response and accumulates the gradient of -w log p_theta, its mean over the global batch.

        No weight changes before `step`, so what the scores show can still stop the update.

        Args:
            weigh: gives w. Where the policy is still p_old, the log p that it is given is p_old's.
            abandoned: looked at between micro-batches; a pass that is cut short is worth nothing (curtail.py).
        """
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(micro_batches, num_samples, weigh, abandoned)

    @span("gradient-norm")
    def gradient_norm(self) -> float:
        """Of the whole model's gradient, before clipping."""
        return gradient_norm(self.optimizer)

    @span("optimizer")
    def step(self) -> float:
        """One AdamW update with the accumulated, clipped gradient. Returns the learning rate that it used."""
        learning_rate = self.optimizer.param_groups[0]["lr"]
        updated, _, _ = self.optimizer.step()
        assert updated, "only a loss scaler skips updates, and there is none"
        self.schedule.step(increment=1)
        return learning_rate

    def scale_rate(self, factor: float) -> None:
        """Multiplies the learning rate of all updates to come."""
        scale_rate(self.optimizer, self.schedule, factor)

    def forget_updates(self) -> None:
        """The optimizer and its schedule are as if none had been made, but for the rate's scale; load weights next."""
        forget_updates(self.optimizer, self.schedule)

    def load_hf_weights(self, read: Callable[[str], Tensor], *, source: str = "the HF model") -> None:
        """Takes the weights of the HF model `source`; `read` returns a whole tensor by its HF name."""
        load_hf_weights(self.chunks, read, shape=self.shape, spec=self.spec, parallel=self.parallel, source=source)
        self.optimizer.reload_model_params()  # float32 master weights, where the model is in bfloat16

    def load(self, folder: Path) -> None:
        """Takes the weights of an HF model folder or of a Megatron checkpoint's newest step, all finite."""
        if is_megatron_checkpoint(folder):
            path = latest_checkpoint(folder)
            check_manifest(path, parallel=self.parallel)
            load_checkpoint(path, chunks=self.chunks)
            self._require_finite(path)
            self.optimizer.reload_model_params()
        else:
            self.load_hf_weights(open_weights(folder).tensor, source=str(folder))

    def save(self, folder: Path, step: int) -> None:
        """Weights, optimizer, schedule and generators after `step`, as the newest checkpoint of `folder`."""
        write_now(self.begin_save(folder, Progress(step=step)), self.parallel)

    def begin_save(self, folder: Path, progress: Progress, *, settings: str = "") -> Save:
        """The same, planned and not yet written; see checkpoint.py."""
        self._gather_params()
        return begin_save(
            folder,
            progress.step,
            chunks=self.chunks,
            parallel=self.parallel,
            optimizer=self.optimizer,
            schedule=self.schedule,
            progress=progress,
            settings=settings,
        )

    def resume(self, folder: Path) -> Progress:
        """Everything that the newest sound checkpoint holds, from any layout. One that is damaged is reported, and the
        one before it is taken; ValueError where none is left."""
        damaged: list[str] = []

        def warn(text: str) -> None:
            damaged.append(text)
            if self.parallel.rank == 0:
                print(f"warning: {text}", file=sys.stderr, flush=True)

        for path in candidates(folder, warn=warn):
            try:
                check_manifest(path, parallel=self.parallel)
            except ValueError as error:
                warn(f"{error} The checkpoint before it is tried")
            else:
                return self._resume(path)
        raise ValueError("\n".join([f"no checkpoint of {folder} is sound:", *damaged]))

    def _resume(self, path: Path) -> Progress:
        progress = load_checkpoint(
            path, chunks=self.chunks, optimizer=self.optimizer, schedule=self.schedule, parallel=self.parallel
        )
        if progress is None:
            raise ValueError(f"{path} is a converted model, not a step of a run: --load it instead of resuming")
        self._require_finite(path)
        return progress

    @contextmanager
    def _at(self, temperature: float | None) -> Iterator[None]:
        before = [chunk.temperature for chunk in self.chunks]
        try:
            for chunk in self.chunks:
                chunk.temperature = chunk.temperature if temperature is None else temperature
            yield
        finally:
            for chunk, own in zip(self.chunks, before):
                chunk.temperature = own

    def _require_finite(self, path: Path) -> None:
        require_finite(self.chunks, path, shape=self.shape, spec=self.spec, parallel=self.parallel)

    def iter_hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, full tensor) on rank 0, in HF's order; nothing elsewhere, but every rank must exhaust it."""
        self._gather_params()
        return iter_hf_weights(self.chunks, shape=self.shape, spec=self.spec, parallel=self.parallel)

    def _gather_params(self) -> None:
        """Under overlap_param_gather the parameters would wait for the next forward pass to be whole."""
        for chunk in self.ddp:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        num_samples: int,
        weigh: Weigh | None,
        abandoned: Callable[[], bool] | None,
    ) -> ResponseScores:
        """One pass of Megatron's schedule. `weigh` None is forward only."""
        interleaved = len(self.ddp) > 1
        batches = micro_batches if abandoned is None else Curtailed(micro_batches, abandoned, self.parallel)
        loss = partial(_loss, weigh=weigh, parallel=self.parallel)
        results: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, loss=loss, weigh=weigh),
            data_iterator=[iter(batches) for _ in self.ddp] if interleaved else iter(batches),
            model=self.ddp if interleaved else self.ddp[0],
            num_microbatches=len(micro_batches),
            seq_length=1,  # never read: variable_seq_lengths
            micro_batch_size=1,
            forward_only=weigh is None,
        )
        return self._gather_scores(results, num_samples)

    def _gather_scores(self, results: list[dict[str, Tensor]], num_samples: int) -> ResponseScores:
        """Every response's row from the one rank that has it to all ranks: a sum over zeros."""
        table = torch.zeros(num_samples, 4, dtype=torch.float64, device=self.parallel.device)
        if self.parallel.is_last_stage and self.parallel.tp_rank == 0 and self.parallel.cp_rank == 0:
            for result in results:
                real = result["sample_ids"] >= 0
                table[result["sample_ids"][real]] = result["rows"][real]
        logprobs, entropy, lengths, difference = self.parallel.sum(table).cpu().unbind(1)
        return ResponseScores(logprobs=logprobs, entropy=entropy, lengths=lengths.long(), rollout_difference=difference)


def _forward_step(
    data_iterator: Iterator[MicroBatch], model: Any, *, loss: Callable[..., Any], weigh: Weigh | None
) -> tuple[Any, Any]:
    """Megatron's forward_step_func (pipeline_parallel/schedules.py)."""
    batch = next(data_iterator)
    foresee = None if weigh is None else partial(_foresee, batch=batch, weigh=weigh)
    return model(batch, foresee), partial(loss, batch=batch)


def _foresee(logprobs: Tensor, tokens: slice, documents: slice, *, batch: MicroBatch, weigh: Weigh) -> Tensor:
    """[c] what `_loss` will give back to the log-probabilities of whole responses: see logprobs.Foresee. Megatron
    scales a loss before its backward pass for float16 alone, which is not trained in."""
    rows, segments = batch.sample_ids[documents], batch.segments[tokens] - documents.start
    sums = logprobs.new_zeros(2, len(rows))
    sums.index_add_(1, segments, torch.stack([logprobs, torch.ones_like(logprobs)]))
    return -(weigh(sums[0], sums[1], rows).to(logprobs) * (rows >= 0))[segments]


def _loss(
    output: tuple[Tensor, Tensor],
    *,
    batch: MicroBatch,
    weigh: Weigh | None,
    parallel: Parallel,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(summed loss, responses, this micro-batch's scores), as calculate_per_token_loss has it: Megatron divides the
    gradient by the responses of all micro-batches and replicas."""
    token_logprobs, token_entropy = output
    documents = len(batch.sample_ids)

    def per_response(tokens: Tensor) -> Tensor:
        return tokens.new_zeros(documents).index_add(0, batch.segments, tokens)

    # Summed over CP before it is weighed: every CP rank has the whole loss, and its own tokens' part of the gradient.
    logprobs = reduce_from_tensor_model_parallel_region(per_response(token_logprobs), group=parallel.cp_group)
    with torch.no_grad():
        difference = (token_logprobs - batch.rollout_logprobs).abs()
        worst = difference.new_zeros(documents).scatter_reduce(0, batch.segments, difference, "amax")
        sums = torch.stack([per_response(token_entropy), per_response(torch.ones_like(token_logprobs))])
        if parallel.cp_size > 1:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=parallel.cp_group)
            dist.all_reduce(sums, group=parallel.cp_group)
        rows = torch.stack([logprobs, *sums, worst], dim=1).double()
    real = batch.sample_ids >= 0
    loss = logprobs.new_zeros(())
    if weigh is not None:
        weights = weigh(logprobs.detach(), sums[1], batch.sample_ids).to(logprobs)
        # A filler is multiplied by zero rather than left out, so that its backward pass runs like any other.
        loss = -(weights * logprobs * real).sum()
    count = real.sum().int() if parallel.cp_rank == 0 else real.new_zeros((), dtype=torch.int32)
    return loss, count, {"sample_ids": batch.sample_ids, "rows": rows}
