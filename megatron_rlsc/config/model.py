"""Settings of what is trained, and of where it lies."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_rlsc.config.check import require


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
    share_prompts: Literal["auto", "on", "off"] = "auto"
    """Compute a prompt once for all of its responses in a micro-batch, exactly. auto: packed documents on plain torch's
    layers, without context parallelism; on: with Transformer Engine's as well, whose kernels for it no GPU has run."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times TP; padding rows never take probability."""
    logprob_chunk_tokens: int = 1024
    """Response tokens whose logits are in memory at one time."""

    def __post_init__(self) -> None:
        require(self.make_vocab_size_divisible_by > 0, "make_vocab_size_divisible_by must be positive")
        require(self.logprob_chunk_tokens > 0, "logprob_chunk_tokens must be positive")
        require(
            self.share_prompts != "on" or self.sequence_layout == "packed",
            "share_prompts on is for documents that lie end to end (sequence_layout packed): give up either",
        )


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
            require(getattr(self, name) > 0, f"{name} must be at least 1, not {getattr(self, name)}")
        pp, vpp = self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size
        require(
            vpp == 1 or pp > 1,
            f"virtual_pipeline_model_parallel_size {vpp} interleaves the layers of two or more pipeline stages, and "
            f"pipeline_model_parallel_size is {pp}",
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence_parallel shards over the tensor-parallel ranks, and tensor_model_parallel_size is 1",
        )
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce",
        )
        full = self.recompute_granularity == "full"
        require(
            full == (self.recompute_method is not None) == (self.recompute_num_layers is not None),
            "recompute_granularity full needs recompute_method and recompute_num_layers, and only full does",
        )
        require((self.recompute_num_layers or 1) > 0, "recompute_num_layers must be at least 1")
