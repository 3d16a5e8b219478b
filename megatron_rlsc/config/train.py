"""Settings of a run: how long it is, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rlsc.config.check import require

KEPT_BY_RESUME = {
    "model": ("load",),
    "data": ("data_path", "prompt_template", "apply_chat_template", "prompts_per_step"),
    "rollout": ("samples_per_prompt", "temperature", "max_response_length", "rollout_lead", "replay_rollouts"),
    "objective": ("objective", "alpha", "power", "weight_scale"),
    "train": ("seed",),
}
"""{section: settings} that say what a run learns, and from what: resuming with others needs `allow_changed`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    train_iters: int = 20
    """Steps: each samples, updates, and refreshes the sampler."""
    updates_per_rollout: int = 1
    """AdamW updates on each step's responses; p_old stays what it was before the first."""
    max_tokens_per_micro_batch: int = 8192
    """Tokens, prompts included, of one packed micro-batch, over all context-parallel ranks."""
    seed: int = 1234
    """Of the prompt order, the samples and the model."""
    output_dir: Path = Path("runs/rlsc")
    """Everything the run writes: config.toml, metrics.jsonl, tensorboard/, rollouts/, checkpoints/, hf/."""
    save_interval: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    async_save: bool = False
    """Write checkpoints while the next step goes on; takes a copy of a rank's state in host memory."""
    keep_last: int = 0
    """Checkpoints to keep, the newest ones; 0 keeps all."""
    keep_best: str = ""
    """With keep_last: keep the checkpoint as well whose step has the highest value of this figure of metrics.jsonl,
    e.g. `confidence/mean`; with a minus before it, the lowest."""
    export_interval: int = 0
    """Steps between exports in HF format, to exports/ of output_dir; 0 exports at the end alone. A file EXPORT that is
    put into output_dir asks for one after the step."""
    eval_interval: int = 0
    """Steps between evaluations on eval_data_path, from before the first step to after the last; the sampler answers
    while a step trains. 0 does none."""
    eval_data_path: Path | None = None
    """Held-out problems: a JSONL whose lines have a `problem` or a `question`, and an `answer`, which nothing but the
    evaluation sees. They are asked as in training, greedily."""
    eval_samples: int = 1
    """Responses to each of them: more than one are drawn as in training, for avg@k and pass@k, instead of the greedy
    one."""
    show_prompts: int = 3
    """The first so many questions of data_path are answered greedily by every step's weights, while the next step
    trains, for people to read: TensorBoard's texts, and shown.jsonl. 0 shows none."""
    profile: bool = False
    """Record profile_step_start to profile_step_end by torch's profiler, on every rank: output_dir/profile has their
    traces, and a table of where the time went."""
    profile_step_start: int = 2
    """With profile: the first step to be recorded. Step 1 is warming up."""
    profile_step_end: int = 2
    """With profile: the last step to be recorded."""
    grace_seconds: float = 120.0
    """From SIGTERM until a rank ends, whether or not the last update has been saved by then."""
    resume: bool = False
    """Go on from the newest checkpoint of output_dir."""
    allow_changed: tuple[str, ...] = ()
    """With resume: settings of the objective or the data that are meant to differ from those of the run so far, by
    name; any other difference is refused. E.g. `alpha temperature`."""
    overwrite: bool = False
    """Delete what an earlier run left in output_dir."""

    def __post_init__(self) -> None:
        require(self.train_iters > 0, f"train_iters must be at least 1, not {self.train_iters}")
        require(self.updates_per_rollout > 0, "updates_per_rollout must be at least 1")
        require(self.max_tokens_per_micro_batch > 0, "max_tokens_per_micro_batch must be at least 1")
        for name in ("save_interval", "keep_last", "export_interval", "eval_interval", "show_prompts"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, it is {getattr(self, name)}")
        require(self.keep_last > 0 or not self.keep_best, "keep_best is kept beside keep_last checkpoints: give both")
        require(
            (self.eval_interval > 0) == (self.eval_data_path is not None),
            "eval_interval says how often eval_data_path is asked: give both",
        )
        require(self.eval_samples > 0, f"eval_samples must be at least 1, not {self.eval_samples}")
        first, last = self.profile_step_start, self.profile_step_end
        require(
            not self.profile or 1 <= first <= last <= self.train_iters,
            f"--profile-step-start {first} to --profile-step-end {last} are no steps of 1 to --train-iters "
            f"{self.train_iters}: give both",
        )
        require(self.grace_seconds > 0, f"grace_seconds must be positive, not {self.grace_seconds}")
        require(not (self.resume and self.overwrite), "--resume and --overwrite exclude each other")
        require(self.resume or not self.allow_changed, "--allow-changed says what --resume may change: give both")
        kept = [name for names in KEPT_BY_RESUME.values() for name in names]
        unknown = [name for name in self.allow_changed if name not in kept]
        require(
            not unknown,
            f"--allow-changed {' '.join(unknown)}: a resumed run keeps {', '.join(kept)}; all else may change freely",
        )

    def saves_after(self, step: int) -> bool:
        """Every `save_interval` steps, and after the last."""
        return step == self.train_iters or (self.save_interval > 0 and step % self.save_interval == 0)

    def evaluates_after(self, step: int) -> bool:
        """Every `eval_interval` steps, and after the last; after none is before the first."""
        return self.eval_interval > 0 and (step % self.eval_interval == 0 or step == self.train_iters)

    def exports_after(self, step: int) -> bool:
        """Every `export_interval` steps."""
        return self.export_interval > 0 and step % self.export_interval == 0
