"""Every setting: frozen dataclasses of the standard library alone, checked when they are made; recipe.py reads them.

Names are Megatron's and vLLM's where they have one. The docstring under a field is its `--help`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from megatron_rlsc.guard_config import GuardConfig


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    load: Path = Path("checkpoints/base")
    """The base model: an HF Qwen2.5 folder, or a Megatron checkpoint that tools/convert_hf.py or a run has made."""
    bf16: bool = False
    """Compute in bfloat16 with float32 master weights (GPUs); otherwise float32."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Megatron's layers: plain torch, or Transformer Engine; auto takes the latter where CUDA, TE and bf16 are."""
    sequence_layout: Literal["packed", "padded"] = "packed"
    """A micro-batch's documents lie end to end, or are padded to the longest of them, for a GPU whose attention kernels
    take no others (an A100 without flash-attn). Padding counts in max_tokens_per_micro_batch."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times TP; padding rows never take probability."""
    logprob_chunk_tokens: int = 1024
    """Response tokens whose logits are in memory at one time."""

    def __post_init__(self) -> None:
        _require(self.make_vocab_size_divisible_by > 0, "make_vocab_size_divisible_by must be positive")
        _require(self.logprob_chunk_tokens > 0, "logprob_chunk_tokens must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    """TP: ranks that share each matrix. Must divide the attention heads."""
    pipeline_model_parallel_size: int = 1
    """PP: stages of layers. PP x virtual stages must divide the layers."""
    virtual_pipeline_model_parallel_size: int = 1
    """VPP: runs of layers on each stage, interleaved: a smaller bubble for more messages. Needs PP of 2 or more."""
    context_parallel_size: int = 1
    """CP: ranks that share each document's tokens, two chunks of it each."""
    sequence_parallel: bool = False
    """Shard the activations between the matrices over the TP ranks as well."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over data-parallel ranks (ZeRO 1)."""
    overlap_grad_reduce: bool = False
    """Sum gradients over replicas while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather the distributed optimizer's parameters while the next forward pass runs. The weight push after every step
    waits for all of them, so it gains only with updates_per_rollout > 1."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Save memory: compute again in the backward pass the core attention alone, or whole layers."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Of full: all layers, in runs of recompute_num_layers, or that many of a stage's first layers."""
    recompute_num_layers: int | None = None
    """Of full: see recompute_method."""
    distributed_timeout_minutes: int = 30
    """A collective that takes longer than this ends the run."""

    def __post_init__(self) -> None:
        sizes = [field.name for field in dataclasses.fields(self) if field.name.endswith("_size")]
        for name in (*sizes, "distributed_timeout_minutes"):
            _require(getattr(self, name) > 0, f"{name} must be at least 1, not {getattr(self, name)}")
        pp, vpp = self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size
        _require(
            vpp == 1 or pp > 1,
            f"virtual_pipeline_model_parallel_size {vpp} interleaves the layers of two or more pipeline stages, and "
            f"pipeline_model_parallel_size is {pp}",
        )
        _require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence_parallel shards over the tensor-parallel ranks, and tensor_model_parallel_size is 1",
        )
        _require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce",
        )
        full = self.recompute_granularity == "full"
        _require(
            full == (self.recompute_method is not None) == (self.recompute_num_layers is not None),
            "recompute_granularity full needs recompute_method and recompute_num_layers, and only full does",
        )
        _require((self.recompute_num_layers or 1) > 0, "recompute_num_layers must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    data_path: Path = Path("prompts.jsonl")
    """Questions: a JSONL whose lines have a `problem` or a `question`. Labels are read by the objective `verified`
    alone."""
    prompt_template: str = "qwen25-math-cot"
    """`qwen25-math-cot` (the paper's system prompt), `plain`, or a text of your own with `{problem}` in it."""
    apply_chat_template: bool = True
    """Wrap the prompt in the tokenizer's chat template, up to where the assistant speaks."""
    prompts_per_step: int = 32
    """Questions a step; their order is a shuffle by (seed, epoch)."""
    allow_duplicate_prompts: bool = False
    """Ask a question that stands on several lines as often as it stands there; otherwise such a file is refused."""

    def __post_init__(self) -> None:
        _require(self.prompts_per_step > 0, f"prompts_per_step must be at least 1, not {self.prompts_per_step}")
        known = self.prompt_template in ("qwen25-math-cot", "plain")
        _require(
            known or "{problem}" in self.prompt_template,
            f"prompt_template {self.prompt_template!r} is neither qwen25-math-cot nor plain, and has no {{problem}}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    samples_per_prompt: int = 16
    """Responses drawn for each question."""
    temperature: float = 0.5
    """Of sampling, and of every log-probability in the loss (the paper's Algorithm 1)."""
    max_response_length: int = 3072
    """Tokens of a response, the stop token included."""
    top_p: float = 1.0
    """Must stay 1: a cut distribution is not p_old."""
    top_k: int = 0
    """Must stay 0 (off): a cut distribution is not p_old."""
    repetition_penalty: float = 1.0
    """Must stay 1: a penalised distribution is not p_old."""
    rollout_urls: tuple[str, ...] = ()
    """Running `python -m megatron_rlsc.rollout.serve`s, as http://host:port, with spaces or commas between; without any
    the trainer starts its own. Reached directly, whatever proxy variables say: a proxy would see the key."""
    rollout_key_file: Path | None = None
    """File with the key of rollout_urls, readable by its owner alone; without it, the variable RLSC_ROLLOUT_KEY."""
    sidecar_python: Path = Path(sys.executable)
    """Python of the environment that has vLLM."""
    sidecar_replicas: int = 1
    """vLLM servers that the trainer starts; questions are spread over them."""
    sidecar_tensor_parallel_size: int = 1
    """TP of each vLLM."""
    sidecar_devices: tuple[int, ...] = ()
    """GPUs of the sidecars, by their index on this machine: sidecar_tensor_parallel_size for the first, as many for the
    next. Empty leaves them all the GPUs that the trainer sees."""
    sidecar_port: int = 0
    """Port of the first sidecar on 127.0.0.1, the next ones follow; 0 takes free ones."""
    sidecar_restarts: int = 3
    """How often, all in all, a run starts a sidecar of its own again that has died or hangs."""
    sidecar_max_num_seqs: int = 64
    """Responses that each vLLM decodes at one time; of rollout_urls, their --max-num-seqs."""
    sidecar_gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory that vLLM takes (on CPUs, see sidecar_kv_cache_gib)."""
    sidecar_kv_cache_gib: int = 1
    """GiB of KV cache of a CPU sidecar."""
    sidecar_timeout: float = 600.0
    """Seconds until a sidecar must generate, when it starts and when all are lost."""
    stall_timeout: float = 300.0
    """Seconds after which a sidecar that has been asked for responses and generates no token is given up."""
    sync_timeout: float = 300.0
    """Seconds that each phase of a weight push may take."""
    rollout_timeout: float = 7200.0
    """Seconds until a question that a sidecar has been asked must be answered, vLLM's own queue included."""
    weight_transport: Literal["auto", "file", "nccl", "gloo"] = "auto"
    """How weights travel: through files (to this machine, or by push_dir), or over the network in a process group; auto
    takes what is there."""
    push_dir: Path | None = None
    """Directory on a file system that this machine shares with the sidecars of other nodes: theirs as mounted here."""
    max_logprob_difference: float | None = None
    """The largest |sampler - trainer| log-probability of a token, above which the run stops: the sampler then does not
    hold the policy's weights. Default 1e-3 in float32; 1.0 in bfloat16, where it catches gross errors alone."""
    replay_rollouts: Path | None = None
    """Train from this journal (a run's rollouts/ folder) without a sidecar."""

    def difference_limit(self, *, bf16: bool) -> float:
        """`max_logprob_difference`, or its default for the dtype; nats."""
        return (1.0 if bf16 else 1e-3) if self.max_logprob_difference is None else self.max_logprob_difference

    def __post_init__(self) -> None:
        _require(self.samples_per_prompt > 0, f"samples_per_prompt must be at least 1, not {self.samples_per_prompt}")
        _require(
            0 < self.temperature < math.inf,
            f"temperature must be positive and finite, not {self.temperature}: greedy responses are no samples",
        )
        _require(self.max_response_length > 0, "max_response_length must be at least 1")
        for name, neutral in (("top_p", 1.0), ("top_k", 0), ("repetition_penalty", 1.0)):
            _require(
                getattr(self, name) == neutral,
                f"{name}={getattr(self, name)} is refused in training: its samples would not come from p_old, which "
                f"the loss takes them for. Leave it at {neutral}.",
            )
        urls = [url.rstrip("/") for entry in self.rollout_urls for url in entry.split(",") if url]
        object.__setattr__(self, "rollout_urls", tuple(urls))
        for url in urls:
            _require(_is_server(url), f"rollout_urls: {url!r} is not of the form http://host:port")
        _require(len(set(urls)) == len(urls), f"rollout_urls names a server twice: {' '.join(urls)}")
        _require(bool(urls) or self.rollout_key_file is None, "rollout_key_file is the key of rollout_urls: give both")
        replicas, tensor_parallel = self.sidecar_replicas, self.sidecar_tensor_parallel_size
        for name in ("sidecar_replicas", "sidecar_tensor_parallel_size", "sidecar_max_num_seqs"):
            _require(getattr(self, name) > 0, f"{name} must be at least 1, not {getattr(self, name)}")
        _require(
            not urls or (replicas == 1 and not self.sidecar_devices),
            "rollout_urls names servers that run already; sidecar_replicas and sidecar_devices are of those that the "
            "trainer starts: give up either",
        )
        _require(
            len(self.sidecar_devices) in (0, replicas * tensor_parallel),
            f"sidecar_devices names {len(self.sidecar_devices)} GPUs, sidecar_replicas {replicas} x "
            f"sidecar_tensor_parallel_size {tensor_parallel} take {replicas * tensor_parallel}",
        )
        _require(
            len(set(self.sidecar_devices)) == len(self.sidecar_devices) and min(self.sidecar_devices, default=0) >= 0,
            f"sidecar_devices must be different GPUs, from 0 on, not {' '.join(map(str, self.sidecar_devices))}",
        )
        _require(
            0 <= self.sidecar_port <= 65536 - replicas, f"no {replicas} ports from sidecar_port {self.sidecar_port} on"
        )
        _require(self.sidecar_restarts >= 0, f"sidecar_restarts must not be negative, it is {self.sidecar_restarts}")
        for name in ("sidecar_timeout", "stall_timeout", "sync_timeout", "rollout_timeout"):
            _require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")


def _is_server(url: str) -> bool:
    """Whether it is http://host:port, or https, and nothing more: a key in a URL would end up in logs."""
    try:
        parts = urlsplit(url)
        return (
            url == f"{parts.scheme}://{parts.netloc}"
            and parts.scheme in ("http", "https")
            and (parts.port is not None and bool(parts.hostname) and parts.username is None)
        )
    except ValueError:  # of a port that is no number
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    objective: Literal[
        "rlsc",
        "rlsc-length",
        "rlsc-group",
        "rlsc-power",
        "negative-entropy",
        "ttrl",
        "self-sft",
        "random",
        "verified",
    ] = "rlsc"
    """What a response weighs in the loss: see docs/objectives.md. `verified` alone reads labels, the `answer` of each
    line of data_path."""
    alpha: float = 0.1
    """The constant of L2; 0 gives L1. Of the rlsc methods alone."""
    power: float = 0.5
    """Of rlsc-power: the exponent of p_old."""
    weight_scale: Literal["none", "batch-max"] = "none"
    """`none`: the paper's weights. `batch-max`: all divided by the largest of the global batch, so that L1 keeps its
    direction where exp(log p) of a long response underflows; costs one more forward pass."""

    def __post_init__(self) -> None:
        _require(self.alpha >= 0, f"alpha must not be negative, it is {self.alpha}")
        _require(self.power > 0, f"power must be positive, it is {self.power}")
        _require(
            self.weight_scale == "none" or self.objective in ("rlsc", "rlsc-power"),
            f"weight_scale {self.weight_scale} is for weights that underflow, and those of {self.objective} do not: "
            f"give up either",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    min_lr: float = 0.0
    """Learning rate at the end of a decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Of the rate over train_iters."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Of matrices; biases and norms have none."""
    adam_beta1: float = 0.9
    """First moment's decay."""
    adam_beta2: float = 0.999
    """Second moment's decay."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    use_precision_aware_optimizer: bool = False
    """Hold the optimizer's tensors in the dtypes below, to save memory: Transformer Engine's FusedAdam does. Needs bf16
    and use_distributed_optimizer."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the gradients that add up over micro-batches and replicas."""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """Of the master weights."""
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Of the first moment."""
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Of the second moment."""

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "weight_decay", "clip_grad", "adam_eps", "lr_warmup_iters"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, it is {getattr(self, name)}")
        _require(self.min_lr <= self.lr, f"min_lr {self.min_lr} is more than lr {self.lr}")
        for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            _require(
                self.use_precision_aware_optimizer or getattr(self, name) == "fp32",
                f"{name}={getattr(self, name)} needs use_precision_aware_optimizer; without it all of them are fp32",
            )


KEPT_BY_RESUME = {
    "model": ("load",),
    "data": ("data_path", "prompt_template", "apply_chat_template", "prompts_per_step"),
    "rollout": ("samples_per_prompt", "temperature", "max_response_length", "replay_rollouts"),
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
        _require(self.train_iters > 0, f"train_iters must be at least 1, not {self.train_iters}")
        _require(self.updates_per_rollout > 0, "updates_per_rollout must be at least 1")
        _require(self.max_tokens_per_micro_batch > 0, "max_tokens_per_micro_batch must be at least 1")
        for name in ("save_interval", "keep_last", "export_interval", "eval_interval", "show_prompts"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, it is {getattr(self, name)}")
        _require(self.keep_last > 0 or not self.keep_best, "keep_best is kept beside keep_last checkpoints: give both")
        _require(
            (self.eval_interval > 0) == (self.eval_data_path is not None),
            "eval_interval says how often eval_data_path is asked: give both",
        )
        _require(self.eval_samples > 0, f"eval_samples must be at least 1, not {self.eval_samples}")
        _require(self.grace_seconds > 0, f"grace_seconds must be positive, not {self.grace_seconds}")
        _require(not (self.resume and self.overwrite), "--resume and --overwrite exclude each other")
        _require(self.resume or not self.allow_changed, "--allow-changed says what --resume may change: give both")
        kept = [name for names in KEPT_BY_RESUME.values() for name in names]
        unknown = [name for name in self.allow_changed if name not in kept]
        _require(
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Train Qwen2.5 on its own confidence: RLSC on megatron-core, with vLLM for the responses."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What is trained."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Where it lies; data parallelism is what is left of the world."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it is asked."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How it answers."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What it learns."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How fast."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What a collapse is, and what is done about it."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, and where it is written."""

    def __post_init__(self) -> None:
        cp = self.parallel.context_parallel_size
        _require(
            self.model.sequence_layout == "packed" or cp == 1,
            f"sequence_layout padded does not go with context parallelism (context_parallel_size {cp}): give up either",
        )
        _require(
            not self.optimizer.use_precision_aware_optimizer
            or (self.model.bf16 and self.parallel.use_distributed_optimizer),
            "use_precision_aware_optimizer needs bf16 and use_distributed_optimizer: its shards are what changes dtype",
        )
        alone = self.objective.objective in ("rlsc", "rlsc-length", "rlsc-power", "self-sft")
        _require(
            alone or self.rollout.samples_per_prompt > 1,
            f"{self.objective.objective} weighs a response against its siblings, and samples_per_prompt is 1",
        )
