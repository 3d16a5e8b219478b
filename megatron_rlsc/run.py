"""A run from its settings to the exported model: what is checked, started, built, trained and written."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from megatron_rlsc.ahead import open_ahead
from megatron_rlsc.board import compared_settings
from megatron_rlsc.config import Config
from megatron_rlsc.conversion.folders import hf_config_dir, is_megatron_checkpoint
from megatron_rlsc.conversion.hf import copy_config_files
from megatron_rlsc.conversion.shape import read_shape
from megatron_rlsc.guard import Guard
from megatron_rlsc.held_out import open_held_out
from megatron_rlsc.interrupt import STOP, Interruption
from megatron_rlsc.planning import check_layout
from megatron_rlsc.policy.kernels import choose_kernels, inspect_machine
from megatron_rlsc.policy.parallel import Parallel, destroy_parallel, init_parallel, is_rank_zero, world_size
from megatron_rlsc.policy.policy import Policy
from megatron_rlsc.policy.saver import Saver
from megatron_rlsc.profile import open_profile
from megatron_rlsc.recipe import dump_recipe
from megatron_rlsc.recovery import Recovery
from megatron_rlsc.rewards import NoJudge, open_judge
from megatron_rlsc.run_folder.folder import ALL, open_run_dir, write_status
from megatron_rlsc.run_folder.journal import Journal
from megatron_rlsc.run_folder.names import CHECKPOINTS, EXPORT, METRICS, ROLLOUTS, TENSORBOARD
from megatron_rlsc.run_folder.rollbacks import rate_scale, read_rollbacks, settle
from megatron_rlsc.sampler import Follower, build_sampler
from megatron_rlsc.shown import open_shown
from megatron_rlsc.tracking import Tracker, lines_up_to, require_figure
from megatron_rlsc.train import Parts, export, train
from megatron_rlsc.types import Progress


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
            spared=lambda: () if config.guard.on_collapse == "warn" else guard.spared_steps(),
        )
        sampler.connect()
        stop.begin()
        files, total = (output / METRICS, output / TENSORBOARD), config.train.train_iters
        first, settings = parallel.rank == 0, compared_settings(config)
        with Tracker(*files, start=progress.step, total=total, enabled=first, settings=settings) as tracker:
            tracker.say(describe(config, parallel, progress.step))
            shown = open_shown(config, model_dir, sampler, tracker, start=progress.step)
            with open_held_out(config, model_dir, sampler, tracker, start=progress.step) as held_out, judge:
                parts = Parts(
                    policy=policy,
                    sampler=sampler,
                    judge=judge,
                    recovery=Recovery(config, guard, policy, sampler, tracker, saver, (tracker, held_out, shown)),
                    saver=saver,
                    tracker=tracker,
                    ahead=open_ahead(config, sampler, parallel, tracker, abandoned=lambda: stop.at_once),
                    held_out=held_out,
                    shown=shown,
                    profile=open_profile(config.train, policy, tracker, start=progress.step),
                )
                progress = train(config, parts, stop, progress=progress)
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
