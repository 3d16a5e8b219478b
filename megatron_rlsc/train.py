"""RLSC, the whole of it: sample from the policy, weigh each response by its own probability, update, sample anew."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_rlsc.batching import pack
from megatron_rlsc.config import Config
from megatron_rlsc.conversion.folders import hf_config_dir, is_megatron_checkpoint, step_dir
from megatron_rlsc.conversion.hf import copy_config_files, write_hf
from megatron_rlsc.conversion.shape import read_shape
from megatron_rlsc.guard import Guard
from megatron_rlsc.health import ProbeLimit, measure_health
from megatron_rlsc.held_out import NoHeldOut, open_held_out
from megatron_rlsc.interrupt import EXPORT as EXPORT_NOW
from megatron_rlsc.interrupt import STOP, Interruption, Urgency
from megatron_rlsc.journal import Journal, decode, encode
from megatron_rlsc.learning import kl_to_base, learn, urgency
from megatron_rlsc.planning import check_layout
from megatron_rlsc.policy.kernels import choose_kernels, inspect_machine
from megatron_rlsc.policy.parallel import Parallel, destroy_parallel, init_parallel, is_rank_zero, world_size
from megatron_rlsc.policy.policy import Policy
from megatron_rlsc.policy.saver import Saver
from megatron_rlsc.recipe import dump_recipe, flat_settings
from megatron_rlsc.recovery import Recovery
from megatron_rlsc.rewards import NoJudge, open_judge
from megatron_rlsc.rollbacks import rate_scale, read_rollbacks, settle
from megatron_rlsc.run_dir import (
    ALL,
    CHECKPOINTS,
    EXPORT,
    EXPORTS,
    METRICS,
    ROLLOUTS,
    TENSORBOARD,
    open_run_dir,
    write_status,
)
from megatron_rlsc.sampler import Follower, Sampler, build_sampler
from megatron_rlsc.shown import NothingShown, open_shown
from megatron_rlsc.tracking import Timer, Tracker, lines_up_to, require_figure
from megatron_rlsc.types import MicroBatch, Progress, Sample, StepStats


def train(
    config: Config,
    policy: Policy,
    sampler: Sampler,
    tracker: Tracker,
    saver: Saver,
    judge: NoJudge,
    held_out: NoHeldOut,
    shown: NothingShown,
    recovery: Recovery,
    stop: Interruption,
    *,
    progress: Progress,
) -> Progress:
    """The loop, on every rank: from `progress` to `train_iters`, or until the run is told to end; saved either way."""
    parallel, output = policy.parallel, config.train.output_dir
    journal, timer = Journal(output / ROLLOUTS), Timer()
    limit = config.rollout.difference_limit(bf16=config.model.bf16)
    to_batch = partial(
        pack,
        share=parallel.data_share,
        max_tokens=config.train.max_tokens_per_micro_batch,
        device=parallel.device,
        layout=config.model.sequence_layout,
    )
    sync = partial(synchronize, policy, sampler, ProbeLimit(limit), to_batch)
    progress, probed = sync(progress)  # a broken path to the sampler fails here

    while not urgency(stop, parallel):
        if back := recovery.go_back(progress):  # from a collapse, also one that a resumed run has had
            progress, probed = sync(back)
            continue
        if progress.step == config.train.train_iters:
            break
        step = progress.step + 1
        with timer.phase("rollout"):
            while not (samples := share(sampler.sample(step, progress.prompts, progress.version), parallel)):
                if urgency(stop, parallel) is Urgency.AT_ONCE:
                    break
                progress, probed = sync(progress)  # all replicas were lost; one is back, without weights
            if samples and parallel.rank == 0:
                journal.write(step, samples)

        with held_out.meanwhile(progress, timer), timer.phase("train"), shown.meanwhile(progress):
            batch = to_batch(samples) if samples else []
            learned = samples and learn(config, policy, samples, batch, judge, stop, step)
        if not learned:
            break  # SIGTERM; the journal keeps what was sampled, and the policy is what it was
        kl = None
        if config.guard.measures_kl(step):
            with timer.phase("kl"):
                kl = kl_to_base(policy, batch, learned.scores, stop)
        progress = replace(progress, step=step, prompts=progress.prompts + config.data.prompts_per_step)

        with timer.phase("sync"):
            progress, probed = sync(progress)

        seconds = timer.lap()
        health = measure_health(samples, learned.scores, learned.weights, config.objective, learned.rewards)
        stats = StepStats(
            step=step,
            health=health,
            gradient_norm=learned.gradient_norm,
            learning_rate=learned.learning_rate,
            weight_shift=learned.shift,
            pushes=progress.pushes,
            probe_difference=probed,
            tokens_per_second=int(learned.scores.lengths.sum()) / sum(seconds.values()),
            kl_response=kl,
            kl_token=None if kl is None else kl / health.response_length,
            seconds=seconds,
        )
        tracker.log(stats, samples, learned.scores)
        recovery.look(stats)
        if stats.health.weightless:
            tracker.say(WEIGHTLESS)
        saver.look()
        if config.train.saves_after(step):
            saver.save(progress)
        if any(parallel.largest(stop.wants_export() or config.train.exports_after(step))):
            export(policy, step_dir(output / EXPORTS, step), hf_config_dir(config.model.load))
            stop.settle(EXPORT_NOW)

    if progress.step > saver.saved:
        saver.save(progress)
    if progress.step == config.train.train_iters:
        with held_out.meanwhile(progress, timer), shown.meanwhile(progress):
            pass
    saver.wait()
    return progress


WEIGHTLESS = (
    "warning: every response weighs 0, so this step learned nothing: exp(log p_old) of responses this long underflows "
    "in float32, for which --weight-scale batch-max keeps the direction of the loss; or, of a method with rewards, all "
    "siblings of every question had the same one"
)


def run(config: Config, stop: Interruption) -> bool:
    """Checks everything that can be checked, starts the sampler, builds the policy, trains it, and exports it.

    Returns whether all steps are done; False where `stop` has ended the run before, saved and ready for --resume.
    """
    model_dir, output = hf_config_dir(config.model.load), config.train.output_dir
    shape = read_shape(model_dir)
    check_layout(shape, config.parallel, world_size=world_size())
    choose_kernels(config.model, config.optimizer, inspect_machine())  # what cannot work is refused before any start
    require_figure(config.train.keep_best)
    rank_zero = is_rank_zero()
    sampler = build_sampler(config, model_dir, shape, abandoned=lambda: stop.at_once) if rank_zero else Follower()
    judge = open_judge(config, model_dir) if rank_zero else NoJudge()
    run_dir = open_run_dir(output, config, model_dir, shape) if rank_zero else nullcontext(ALL)
    with run_dir as trusted, sampler:  # vLLM comes up while the policy is built
        if rank_zero:
            stop.last_words = partial(write_status, output)
            settle(output)  # a rollback in which the run was killed
            sampler.draw_anew(len(read_rollbacks(output)))
        parallel = init_parallel(config.parallel, seed=config.train.seed)
        policy = Policy(config, shape, parallel)
        scale = parallel.broadcast_bytes(str(rate_scale(output)).encode() if rank_zero else None)
        policy.scale_rate(float(scale.decode()))
        resumes = config.train.resume and is_megatron_checkpoint(output / CHECKPOINTS)
        if config.guard.kl_interval or not resumes:
            policy.load(config.model.load)
        if config.guard.kl_interval:
            policy.keep_base()
        progress = policy.resume(output / CHECKPOINTS) if resumes else Progress()
        if parallel.rank == 0:
            Journal(output / ROLLOUTS).forget_after(progress.step + trusted)  # which may be an earlier one than named
            copy_config_files(model_dir, output / CHECKPOINTS / "hf")
        guard = Guard(config.guard, lines_up_to(output / METRICS, progress.step) if parallel.rank == 0 else ())
        saver = Saver(
            output / CHECKPOINTS,
            policy,
            behind=config.train.async_save,
            keep_last=config.train.keep_last,
            keep_best=config.train.keep_best,
            metrics=output / METRICS,
            settings=dump_recipe(config),
            saved=progress.step,
            sound=lambda: None if config.guard.on_collapse == "warn" else guard.sound_step(),
        )
        sampler.connect()
        stop.begin()
        files, total = (output / METRICS, output / TENSORBOARD), config.train.train_iters
        first, settings = parallel.rank == 0, flat_settings(config)
        with Tracker(*files, start=progress.step, total=total, enabled=first, settings=settings) as tracker:
            tracker.say(describe(config, parallel, progress.step))
            shown = open_shown(config, model_dir, sampler, tracker, start=progress.step)
            with open_held_out(config, model_dir, sampler, tracker, start=progress.step) as held_out, judge:
                recovery = Recovery(config, guard, policy, sampler, tracker, saver, held_out)
                progress = train(
                    config, policy, sampler, tracker, saver, judge, held_out, shown, recovery, stop, progress=progress
                )
            done = progress.step == total
            if done:
                export(policy, output / EXPORT, model_dir)
                tracker.say(f"done: {output / EXPORT} is the trained model, in HF format")
            end = f"done after step {total}" if done else f"stopped after step {progress.step}: {stop.reason()}"
            if parallel.rank == 0:
                if not done:
                    tracker.say(f"{end}; saved, --resume goes on")
                stop.settle(STOP)
                write_status(output, end)
        parallel.barrier()
    destroy_parallel()
    return done


def synchronize(
    policy: Policy,
    sampler: Sampler,
    limit: ProbeLimit,
    to_batch: Callable[[list[Sample]], list[MicroBatch]],
    progress: Progress,
) -> tuple[Progress, float]:
    """The policy's weights into every replica, and the proof that they are live there.

    Returns `progress` with their version, and the largest difference of a replica's log-probabilities of a fixed prompt
    from ours; 0 where nothing was asked.
    """
    pushed = sampler.push(policy.iter_hf_weights())
    version = policy.parallel.broadcast_bytes(pushed.encode()).decode()
    progress = replace(progress, version=version, pushes=progress.pushes + 1)
    probes = share(sampler.probe(version), policy.parallel)
    if not probes:
        return progress, 0.0
    scores = policy.score(to_batch(probes), len(probes), temperature=1.0)
    return progress, limit.require(scores.rollout_difference.tolist(), version=version)


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
    method = config.objective.objective
    constant = f", alpha {config.objective.alpha}" if method.startswith("rlsc") else ""
    return (
        f"RLSC | {config.model.load} | {parallel} on "
        f"{parallel.device.type}, {'bf16' if config.model.bf16 else 'fp32'} | {config.data.prompts_per_step} questions "
        f"x {config.rollout.samples_per_prompt} responses a step, T {config.rollout.temperature} | "
        f"{method}{constant} | lr {config.optimizer.lr} | {config.train.train_iters} steps, {start}"
    )
