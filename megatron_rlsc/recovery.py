"""What is done about a collapse, by all ranks alike: nothing but a warning, the end of the run, or a step back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from megatron_rlsc.config import Config
from megatron_rlsc.guard import Finding, Guard
from megatron_rlsc.policy.policy import Policy
from megatron_rlsc.policy.saver import Saver
from megatron_rlsc.run_folder.journal import Journal
from megatron_rlsc.run_folder.names import CHECKPOINTS, GUARD, ROLLOUTS
from megatron_rlsc.run_folder.rollbacks import Rollback, newest_sound, read_rollbacks, roll_back
from megatron_rlsc.sampler import Sampler
from megatron_rlsc.tracking import Tracker, flatten
from megatron_rlsc.types import Progress, StepStats

SATURATED = (
    "note: saturated, siblings all but agree (--saturation): there is next to nothing left to learn, and what the run "
    "does from here on is as likely to harm. touch STOP in its folder ends it"
)

REMEDY = "Lower --lr; --on-collapse rollback goes back by itself, --on-collapse stop ends the run (docs/collapse.md)"


class CollapseError(ValueError):
    """The policy has collapsed, and the run ends there: to start it again as it is would end it again."""


class Rewindable(Protocol):
    """What keeps figures of steps."""

    def rewind(self, step: int) -> None:
        """The run goes on from a step: what was said of later ones is dropped."""


class Recovery:
    """Rank 0 looks at the steps and decides; every rank follows. Every method is a collective of all ranks."""

    def __init__(
        self,
        config: Config,
        guard: Guard,
        policy: Policy,
        sampler: Sampler,
        tracker: Tracker,
        saver: Saver,
        others: Sequence[Rewindable],
    ) -> None:
        """
        Args:
            guard: knows the steps that are done; on ranks other than 0 nobody asks it.
            policy, sampler, tracker, saver, others: what a step back takes along.
        """
        self._config, self._guard, self._policy, self._sampler = config.guard, guard, policy, sampler
        self._tracker, self._saver, self._others = tracker, saver, others
        self._run, self._load = config.train.output_dir, config.model.load

    def look(self, stats: StepStats) -> None:
        """Takes note of a step, and says what is new about it."""
        self._guard.look(flatten(stats))
        if found := self._guard.news():
            self._note(stats.step, "collapse", _words(found))
            if self._config.on_collapse == "warn":
                self._tracker.say(f"warning: collapse, after step {stats.step}: {_words(found)}. {REMEDY}")
        if self._guard.saturates():
            self._note(stats.step, "saturation", SATURATED)
            self._tracker.say(SATURATED)

    def go_back(self, progress: Progress) -> Progress | None:
        """Where all is well, None. Otherwise the policy is that of the last good checkpoint, or the base, at a lower
        rate, the run's files are as they were then, and what comes back is how far that was: push its weights next.

        Raises CollapseError where the run is to end instead; `progress` is saved first.
        """
        parallel = self._policy.parallel
        acts = parallel.rank == 0 and self._config.on_collapse != "warn" and bool(self._guard.collapse())
        if not any(parallel.largest(acts)):
            return None
        self._saver.wait()
        decision = json.loads(parallel.broadcast_bytes(json.dumps(self._decide(progress)).encode() if acts else None))
        if "end" in decision:
            if progress.step > self._saver.saved:
                self._saver.save(progress)
                self._saver.wait()
            raise CollapseError(decision["end"])
        rollback = Rollback(**decision)
        if parallel.rank == 0:
            roll_back(self._run, rollback)
        parallel.barrier()
        self._policy.scale_rate(rollback.rate)
        self._policy.forget_updates()  # also of the schedule, which adds a checkpoint's steps to those that it has
        if rollback.to:
            back = self._policy.resume(self._run / CHECKPOINTS)
        else:
            self._policy.load(self._load)
            back = Progress()
        self._rewind(back.step)
        where = f"the checkpoint of step {back.step}" if back.step else "the base"
        went = f"Back to {where}, with new samples and {rollback.rate:g} times the learning rate"
        self._note(progress.step, "rollback", went)
        self._tracker.say(f"collapse, after step {progress.step}: {rollback.why}. {went}")
        return replace(back, pushes=progress.pushes, version=progress.version)

    def _note(self, step: int, what: str, text: str) -> None:
        """In guard.jsonl, where it stays whatever becomes of the step; a step that is made again says it once."""
        path = self._run / GUARD
        line = json.dumps({"step": step, "what": what, "text": text}) + "\n"
        if self._policy.parallel.rank == 0 and not (path.is_file() and line in path.read_text()):
            with path.open("a") as file:
                file.write(line)

    def _decide(self, progress: Progress) -> dict[str, object]:
        """On rank 0: the fields of a Rollback, or the `end` of the run in words."""
        done = len(read_rollbacks(self._run))
        why, sound = _words(self._guard.collapse()), newest_sound(self._run, self._guard.sound_step())
        if self._config.on_collapse == "rollback" and done < self._config.max_rollbacks:
            return {"step": progress.step, "to": sound, "rate": self._config.rollback_rate, "why": why}
        spent = f" All {done} rollbacks (--max-rollbacks) are used up." if done else ""
        from_there = (
            f"Write {sound} into {self._run / CHECKPOINTS / 'latest_checkpointed_iteration.txt'}, the last good "
            f"checkpoint, and --resume"
            if sound
            else "No checkpoint is older than the turn: begin anew (--overwrite)"
        )
        return {
            "end": f"collapse, after step {progress.step}: {why}.{spent} The run is saved as it is. {from_there} "
            f"with a lower --lr, or --resume with --on-collapse rollback; warn goes on as if nothing were"
        }

    def _rewind(self, step: int) -> None:
        if self._policy.parallel.rank == 0:
            Journal(self._run / ROLLOUTS).forget_after(step)
            self._sampler.draw_anew(len(read_rollbacks(self._run)))
        self._guard.forget_after(step)
        for other in self._others:
            other.rewind(step)
        self._saver.saved = step


def _words(found: list[Finding]) -> str:
    return "; ".join(map(str, found))
