"""RLSC, the whole of it: sample from the policy, weigh each response by its own probability, update, sample anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from megatron_rlsc.batching import pack
from megatron_rlsc.config import Config
from megatron_rlsc.conversion.folders import hf_config_dir, is_megatron_checkpoint
from megatron_rlsc.conversion.hf import copy_config_files, write_hf
from megatron_rlsc.conversion.shape import read_shape
from megatron_rlsc.health import ProbeLimit, measure_health, require_sound
from megatron_rlsc.journal import Journal, decode, encode
from megatron_rlsc.objective import response_losses, weight_shift
from megatron_rlsc.planning import check_layout
from megatron_rlsc.policy.kernels import choose_kernels, inspect_machine
from megatron_rlsc.policy.parallel import Parallel, destroy_parallel, init_parallel, is_rank_zero, world_size
from megatron_rlsc.policy.policy import Policy
from megatron_rlsc.run_dir import CHECKPOINTS, EXPORT, METRICS, ROLLOUTS, TENSORBOARD, open_run_dir
from megatron_rlsc.sampler import Follower, Sampler, build_sampler
from megatron_rlsc.tracking import Timer, Tracker
from megatron_rlsc.types import MicroBatch, Sample, StepStats


def train(config: Config, policy: Policy, sampler: Sampler, tracker: Tracker, *, step: int) -> None:
    """The loop, from after `step` to `train_iters`, on every rank."""
    parallel, output = policy.parallel, config.train.output_dir
    journal, timer = Journal(output / ROLLOUTS), Timer()
    alpha, scale = config.objective.alpha, config.objective.weight_scale
    updates, limit = config.train.updates_per_rollout, config.rollout.difference_limit(bf16=config.model.bf16)
    to_batch = partial(
        pack,
        share=parallel.data_share,
        max_tokens=config.train.max_tokens_per_micro_batch,
        device=parallel.device,
        layout=config.model.sequence_layout,
    )
    sync = partial(synchronize, policy, sampler, ProbeLimit(limit), to_batch)
    (version, probed), pushes = sync(), 1  # a broken path to the sampler fails here

    while step < config.train.train_iters:
        step += 1
        with timer.phase("rollout"):
            while not (samples := share(sampler.sample(step, version), parallel)):
                (version, probed), pushes = sync(), pushes + 1  # all replicas were lost; one is back, without weights
            if parallel.rank == 0:
                journal.write(step, samples)

        with timer.phase("train"):
            batch = to_batch(samples)
            # The first update's own pass gives p_old: another is needed for a shift, or for updates after it alone.
            old = policy.score(batch, len(samples)).logprobs if updates > 1 or scale != "none" else None
            shift = 0.0 if old is None else weight_shift(old, alpha, scale)
            objective = partial(response_losses, alpha=alpha, shift=shift)
            for update in range(updates):
                scores = policy.forward_backward(batch, len(samples), objective, old_logprobs=old)
                gradient_norm = policy.gradient_norm()
                if update == 0:
                    first = scores  # the sampler has these weights, and no later ones
                require_sound(scores, gradient_norm, step=step, max_difference=limit if update == 0 else math.inf)
                learning_rate = policy.step()

        with timer.phase("sync"):
            (version, probed), pushes = sync(), pushes + 1

        seconds = timer.lap()
        stats = StepStats(
            step=step,
            health=measure_health(samples, first, alpha=alpha, shift=shift),
            gradient_norm=gradient_norm,
            learning_rate=learning_rate,
            weight_shift=shift,
            pushes=pushes,
            probe_difference=probed,
            tokens_per_second=int(first.lengths.sum()) / sum(seconds.values()),
            seconds=seconds,
        )
        tracker.log(stats)
        if stats.health.underflow:
            tracker.say(UNDERFLOW)
        if config.train.saves_after(step):
            policy.save(output / CHECKPOINTS, step)


UNDERFLOW = (
    "warning: every response weighs 0 in float32, so this step learned nothing: exp(log p_old) of responses this long "
    "underflows. --weight-scale batch-max keeps the direction of the loss"
)


def run(config: Config) -> None:
    """Checks everything that can be checked, starts the sampler, builds the policy, trains it, and exports it."""
    model_dir, output = hf_config_dir(config.model.load), config.train.output_dir
    shape = read_shape(model_dir)
    check_layout(shape, config.parallel, world_size=world_size())
    choose_kernels(config.model, config.optimizer, inspect_machine())  # what cannot work is refused before any start
    sampler = build_sampler(config, model_dir, shape) if is_rank_zero() else Follower()
    run_dir = open_run_dir(output, config, model_dir, shape) if is_rank_zero() else nullcontext()
    with run_dir, sampler:  # vLLM comes up while the policy is built
        parallel = init_parallel(config.parallel, seed=config.train.seed)
        policy = Policy(config, shape, parallel)
        step = 0
        if config.train.resume and is_megatron_checkpoint(output / CHECKPOINTS):
            step = policy.resume(output / CHECKPOINTS)
        else:
            policy.load(config.model.load)
        if parallel.rank == 0:
            copy_config_files(model_dir, output / CHECKPOINTS / "hf")
        sampler.connect()
        files, total = (output / METRICS, output / TENSORBOARD), config.train.train_iters
        with Tracker(*files, start=step, total=total, enabled=parallel.rank == 0) as tracker:
            tracker.say(describe(config, parallel, step))
            train(config, policy, sampler, tracker, step=step)
            export(policy, output / EXPORT, model_dir)
            tracker.say(f"done: {output / EXPORT} is the trained model, in HF format")
    destroy_parallel()


def synchronize(
    policy: Policy, sampler: Sampler, limit: ProbeLimit, to_batch: Callable[[list[Sample]], list[MicroBatch]]
) -> tuple[str, float]:
    """The policy's weights into every replica, and the proof that they are live there.

    Returns their version, and the largest difference of a replica's log-probabilities of a fixed prompt from ours; 0
    where nothing was asked.
    """
    version = sampler.push(policy.iter_hf_weights())
    probes = share(sampler.probe(version), policy.parallel)
    if not probes:
        return version, 0.0
    scores = policy.score(to_batch(probes), len(probes), temperature=1.0)
    return version, limit.require(scores.rollout_difference.tolist(), version=version)


def share(samples: list[Sample] | None, parallel: Parallel) -> list[Sample]:
    """Rank 0's samples on every rank."""
    return decode(parallel.broadcast_bytes(None if samples is None else encode(samples)))


def export(policy: Policy, folder: Path, reference_dir: Path) -> None:
    """The policy as an HF model, written by rank 0 as the weights stream by."""
    weights = policy.iter_hf_weights()
    if policy.parallel.rank == 0:
        write_hf(folder, weights, reference_dir=reference_dir, overwrite=True)
    for _ in weights:
        pass


def describe(config: Config, parallel: Parallel, step: int) -> str:
    """What is about to run, in one line."""
    start = f"resuming after step {step}" if step else "from the start"
    return (
        f"RLSC | {config.model.load} | {parallel} on "
        f"{parallel.device.type}, {'bf16' if config.model.bf16 else 'fp32'} | {config.data.prompts_per_step} questions "
        f"x {config.rollout.samples_per_prompt} responses a step, T {config.rollout.temperature} | "
        f"alpha {config.objective.alpha} | lr {config.optimizer.lr} | {config.train.train_iters} steps, {start}"
    )
