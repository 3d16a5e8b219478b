"""RLSC, the whole of it: sample from the policy, weigh each response by its own probability, update, sample anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_rlsc.ahead import NoAhead
from megatron_rlsc.config import Config
from megatron_rlsc.conversion.folders import hf_config_dir, step_dir
from megatron_rlsc.conversion.hf import write_hf
from megatron_rlsc.health import ProbeLimit, measure_health
from megatron_rlsc.held_out import NoHeldOut
from megatron_rlsc.interrupt import EXPORT as EXPORT_NOW
from megatron_rlsc.interrupt import Interruption, Urgency
from megatron_rlsc.learning import kl_to_base, learn, urgency
from megatron_rlsc.policy.parallel import Parallel
from megatron_rlsc.policy.policy import Policy
from megatron_rlsc.policy.saver import Saver
from megatron_rlsc.profile import NoProfile
from megatron_rlsc.recovery import Recovery
from megatron_rlsc.rewards import NoJudge
from megatron_rlsc.run_folder.journal import Journal, decode, encode
from megatron_rlsc.run_folder.names import EXPORTS, ROLLOUTS
from megatron_rlsc.sampler import Sampler
from megatron_rlsc.shown import NothingShown
from megatron_rlsc.tracking import Timer, Tracker
from megatron_rlsc.types import Progress, Sample, StepStats


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the loop works with; on ranks other than 0, what follows the first's."""

    policy: Policy
    sampler: Sampler
    judge: NoJudge
    recovery: Recovery
    saver: Saver
    tracker: Tracker
    ahead: NoAhead
    held_out: NoHeldOut
    shown: NothingShown
    profile: NoProfile


def train(config: Config, parts: Parts, stop: Interruption, *, progress: Progress) -> Progress:
    """The loop, on every rank: from `progress` to `train_iters`, or until the run is told to end; saved either way."""
    policy, sampler, saver, recovery = parts.policy, parts.sampler, parts.saver, parts.recovery
    parallel, output = policy.parallel, config.train.output_dir
    journal, timer = Journal(output / ROLLOUTS), Timer()
    limit = config.rollout.difference_limit(bf16=config.model.bf16)
    sync = partial(synchronize, policy, sampler, ProbeLimit(limit))
    progress, probed = sync(progress)  # a broken path to the sampler fails here

    while not urgency(stop, parallel):
        if back := recovery.go_back(progress):  # from a collapse, also one that a resumed run has had
            progress, probed = sync(back)
            continue
        if progress.step == config.train.train_iters:
            break
        step = progress.step + 1
        parts.profile.start(step)
        with timer.phase("rollout"):
            while not (samples := share(sampler.sample(step, progress.prompts, progress.version), parallel)):
                if urgency(stop, parallel) is Urgency.AT_ONCE:
                    break
                progress, probed = sync(progress)  # all replicas were lost; one is back, without weights
            if samples and parallel.rank == 0:
                journal.write(step, samples)

        with (
            parts.ahead.meanwhile(progress, timer),
            parts.held_out.meanwhile(progress, timer),
            timer.phase("train"),
            parts.shown.meanwhile(progress),
        ):
            batch = policy.pack(samples) if samples else None
            learned = learn(config, policy, samples, batch.micro_batches, parts.judge, stop, step) if batch else None
        if batch is None or learned is None:
            break  # SIGTERM; the journal keeps what was sampled, and the policy is what it was
        asks_base = config.guard.measures_kl(step)
        kl = kl_to_base(policy, batch.micro_batches, learned.old_logprobs, stop, timer) if asks_base else None
        progress = replace(progress, step=step, prompts=progress.prompts + config.data.prompts_per_step)

        with timer.phase("sync"):
            progress, probed = sync(progress)

        seconds = timer.lap()
        parts.profile.stop()
        health = measure_health(
            samples, learned.scores, learned.weights, config.objective, learned.rewards, learned.sampled
        )
        stats = StepStats(
            step=step,
            health=health,
            load=batch.load,
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
        parts.tracker.log(stats, samples, learned.scores)
        recovery.look(stats)
        if stats.health.weightless:
            parts.tracker.say(WEIGHTLESS)
        saver.look()
        if config.train.saves_after(step):
            saver.save(progress)
        if any(parallel.largest(stop.wants_export() or config.train.exports_after(step))):
            export(policy, step_dir(output / EXPORTS, step), hf_config_dir(config.model.load))
            stop.settle(EXPORT_NOW)

    parts.profile.drop()  # of a step that was cut short
    if progress.step > saver.saved:
        saver.save(progress)
    if progress.step == config.train.train_iters:
        with parts.held_out.meanwhile(progress, timer), parts.shown.meanwhile(progress):
            pass
    saver.wait()
    return progress


WEIGHTLESS = (
    "warning: every response weighs 0, so this step learned nothing: exp(log p_old) of responses this long underflows "
    "in float32, for which --weight-scale batch-max keeps the direction of the loss; or, of a method with rewards, all "
    "siblings of every question had the same one"
)


def synchronize(
    policy: Policy,
    sampler: Sampler,
    limit: ProbeLimit,
    progress: Progress,
) -> tuple[Progress, float]:
    """The policy's weights into every replica, and the proof that they are live there.

    Returns `progress` with their version, and the largest difference of a replica's log-probabilities of a fixed prompt
    from ours; 0 where nothing was asked.
    """
    pushed = sampler.push(policy.iter_hf_weights(), progress.step)
    version = policy.parallel.broadcast_bytes(pushed.encode()).decode()
    progress = replace(progress, version=version, pushes=progress.pushes + 1)
    probes = share(sampler.probe(version), policy.parallel)
    if not probes:
        return progress, 0.0
    scores = policy.score(policy.pack(probes).micro_batches, len(probes), temperature=1.0)
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
