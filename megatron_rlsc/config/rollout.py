"""Settings of what the model is asked, and of how it answers."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from megatron_rlsc.config.check import require


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
        require(self.prompts_per_step > 0, f"prompts_per_step must be at least 1, not {self.prompts_per_step}")
        known = self.prompt_template in ("qwen25-math-cot", "plain")
        require(
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
    rollout_lead: int = 0
    """1 has the next step's responses generated while a step trains, by weights that are one step older than the policy
    that learns from them; p_old is then what the sampler says of them. 0 has them generated after the step's push."""
    replay_rollouts: Path | None = None
    """Train from this journal (a run's rollouts/ folder) without a sidecar."""

    def difference_limit(self, *, bf16: bool) -> float:
        """`max_logprob_difference`, or its default for the dtype; nats."""
        return (1.0 if bf16 else 1e-3) if self.max_logprob_difference is None else self.max_logprob_difference

    def __post_init__(self) -> None:
        require(self.samples_per_prompt > 0, f"samples_per_prompt must be at least 1, not {self.samples_per_prompt}")
        require(
            0 < self.temperature < math.inf,
            f"temperature must be positive and finite, not {self.temperature}: greedy responses are no samples",
        )
        require(self.max_response_length > 0, "max_response_length must be at least 1")
        for name, neutral in (("top_p", 1.0), ("top_k", 0), ("repetition_penalty", 1.0)):
            require(
                getattr(self, name) == neutral,
                f"{name}={getattr(self, name)} is refused in training: its samples would not come from p_old, which "
                f"the loss takes them for. Leave it at {neutral}.",
            )
        urls = [url.rstrip("/") for entry in self.rollout_urls for url in entry.split(",") if url]
        object.__setattr__(self, "rollout_urls", tuple(urls))
        for url in urls:
            require(_is_server(url), f"rollout_urls: {url!r} is not of the form http://host:port")
        require(len(set(urls)) == len(urls), f"rollout_urls names a server twice: {' '.join(urls)}")
        require(bool(urls) or self.rollout_key_file is None, "rollout_key_file is the key of rollout_urls: give both")
        replicas, tensor_parallel = self.sidecar_replicas, self.sidecar_tensor_parallel_size
        for name in ("sidecar_replicas", "sidecar_tensor_parallel_size", "sidecar_max_num_seqs"):
            require(getattr(self, name) > 0, f"{name} must be at least 1, not {getattr(self, name)}")
        require(
            not urls or (replicas == 1 and not self.sidecar_devices),
            "rollout_urls names servers that run already; sidecar_replicas and sidecar_devices are of those that the "
            "trainer starts: give up either",
        )
        require(
            len(self.sidecar_devices) in (0, replicas * tensor_parallel),
            f"sidecar_devices names {len(self.sidecar_devices)} GPUs, sidecar_replicas {replicas} x "
            f"sidecar_tensor_parallel_size {tensor_parallel} take {replicas * tensor_parallel}",
        )
        require(
            len(set(self.sidecar_devices)) == len(self.sidecar_devices) and min(self.sidecar_devices, default=0) >= 0,
            f"sidecar_devices must be different GPUs, from 0 on, not {' '.join(map(str, self.sidecar_devices))}",
        )
        require(
            0 <= self.sidecar_port <= 65536 - replicas, f"no {replicas} ports from sidecar_port {self.sidecar_port} on"
        )
        require(self.sidecar_restarts >= 0, f"sidecar_restarts must not be negative, it is {self.sidecar_restarts}")
        require(
            self.rollout_lead in (0, 1),
            f"rollout_lead must be 0 or 1, not {self.rollout_lead}: responses are generated while one step trains, not "
            f"several",
        )
        for name in ("sidecar_timeout", "stall_timeout", "sync_timeout", "rollout_timeout"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")


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
