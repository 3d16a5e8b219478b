"""Time of a step in closed form: training, generation and the push between them, on GPUs that nobody has rented yet.

Matrix products by their FLOPs, everything else by its bytes, each at a share of what the data sheet says. That share
of the matrix rate is one constant for all models and layouts; with it the published iteration times of GPTs from 1.7B
to a trillion parameters on A100s come out within 18 % (tests/test_timing.py; Narayanan et al., arXiv:2104.04473, table
1; Korthikanti et al., arXiv:2205.05198, table 5). Generation has one published point to go by. **Predicted, not
measured.**
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlsc import packing
from megatron_rlsc.config import Config, RolloutConfig
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.memory import BYTES, GIB, count_parameters

NODE = 8
"""GPUs that NVLink joins."""
MATRIX_SHARE = 0.62
"""Of the matrix rate, by dense products with the work between them: the one constant that the published figures fix."""
MEMORY_SHARE = 0.77
"""Of the memory's bandwidth, while decoding: 75 tokens a second of Llama-3.1-8B from vLLM 0.23 on an A100-40GB, one
request at a time, are 77 % of what its weights allow (johnmusgrave.com/p/vllm-throughput-latency-sweep-on)."""
LINK_SHARE = 0.8
"""Of a link's bandwidth, by NCCL with large messages. An assumption."""
DECODE_OVERHEAD = 10e-6
"""Seconds of each of a decoding step's two all-reduces a layer, beyond their bytes. An assumption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """What a data sheet says; bytes and FLOPs a second."""

    memory: int
    """Bytes."""
    matrix: float
    """Dense BF16 products."""
    bandwidth: float
    """Of its memory."""
    nvlink: float
    """To the GPUs of its node, one way."""
    network: float
    """Its part of the node's, to other nodes, one way: one 200 Gb/s or 400 Gb/s port a GPU."""


GPUS = {
    "a100-40gb": Gpu(memory=40 * GIB, matrix=312e12, bandwidth=1.555e12, nvlink=300e9, network=25e9),
    "a100-80gb": Gpu(memory=80 * GIB, matrix=312e12, bandwidth=2.039e12, nvlink=300e9, network=25e9),
    "h100-80gb": Gpu(memory=80 * GIB, matrix=989e12, bandwidth=3.35e12, nvlink=450e9, network=50e9),
    "h200-141gb": Gpu(memory=131 * GIB, matrix=989e12, bandwidth=4.8e12, nvlink=450e9, network=50e9),
}
"""SXM modules, as NVIDIA's data sheets have them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A step's responses."""

    responses: int
    prompt: int
    """Mean tokens."""
    response: int
    """Mean tokens."""
    longest: int
    """Tokens of the longest response: generation ends with it."""

    @property
    def tokens(self) -> int:
        return self.responses * (self.prompt + self.response)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainTime:
    """Seconds of a GPU of the slowest stage."""

    micro_batches: int
    """Of a replica."""
    compute: float
    tensor_parallel: float
    """TP's all-reduces, and CP's exchange of keys and values; none is hidden behind compute."""
    pipeline: float
    """Waiting for the pipeline to fill and to drain, and for messages between stages."""
    data_parallel: float
    """Gradients summed and parameters gathered over the replicas."""
    optimizer: float

    @property
    def total(self) -> float:
        return self.compute + self.tensor_parallel + self.pipeline + self.data_parallel + self.optimizer


def train_time(shape: ModelShape, config: Config, gpu: Gpu, work: Work, *, dp_size: int) -> TrainTime:
    """Of one update from `work`, for a layout that has passed `planning.check_layout`."""
    layout = config.parallel
    tp, pp, cp = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
    )
    vpp, size = layout.virtual_pipeline_model_parallel_size, 2 if config.model.bf16 else 4
    shape = shape.padded_to(config.model.make_vocab_size_divisible_by * tp)
    multiple = pp if vpp > 1 else 1
    least = math.ceil(work.tokens / (dp_size * config.train.max_tokens_per_micro_batch))
    micro_batches = max(1, math.ceil(least / multiple)) * multiple
    tokens = work.tokens / (dp_size * micro_batches * cp)  # of a micro-batch, on a rank
    answered = tokens * work.response / (work.prompt + work.response)
    layers = shape.num_hidden_layers / pp

    # Forward, a layer: two FLOPs a weight; of attention the lower half of q k^T and of its product with v.
    full, selective = layout.recompute_granularity == "full", layout.recompute_granularity == "selective"
    matrices = 2 * tokens * _layer_weights(shape)
    attention = 2 * tokens * shape.query_size * (work.prompt + work.response)
    layer = (4 if full else 3) * matrices + (4 if full or selective else 3) * attention
    head = 8 * answered * shape.hidden_size * shape.padded_vocab_size  # four products: logits twice, and two gradients
    rate = MATRIX_SHARE * gpu.matrix * tp

    hidden = tokens * shape.hidden_size * size
    node = LINK_SHARE * gpu.nvlink
    between = LINK_SHARE * (gpu.nvlink if tp * cp * pp * dp_size <= NODE else gpu.network)
    passes = 6 if full else 4
    exchanged = passes * 2 * (tp - 1) / tp * hidden / node
    keys = (
        (3 if full else 2)
        * 2
        * 2
        * (cp - 1)
        * tokens
        * shape.kv_size
        / tp
        * size
        / (node if tp * cp <= NODE else LINK_SHARE * gpu.network)
    )
    one_compute, one_exchange = (layers * layer + head) / rate, layers * (exchanged + keys)
    message = 2 * vpp * hidden / (tp if layout.sequence_parallel else 1) / between if pp > 1 else 0.0
    bubble = (pp - 1) / vpp * (layers * layer / rate + one_exchange)

    parameters = max(sum(map(sum, count_parameters(shape, layout, stage=stage))) for stage in {0, pp - 1})
    replicas = dp_size * cp
    gradients = BYTES[config.optimizer.main_grads_dtype] * parameters
    shared = layout.use_distributed_optimizer
    moved = (gradients + size * parameters) if shared else 2 * gradients
    held = BYTES[config.optimizer.exp_avg_dtype] + BYTES[config.optimizer.exp_avg_sq_dtype] + 4
    touched = gradients + (2 * held + size) * parameters / (replicas if shared else 1)
    return TrainTime(
        micro_batches=micro_batches,
        compute=micro_batches * one_compute,
        tensor_parallel=micro_batches * one_exchange,
        pipeline=bubble + micro_batches * message,
        data_parallel=(replicas - 1) / replicas * moved / between,
        optimizer=touched / (MEMORY_SHARE * gpu.bandwidth),
    )


def generate_time(
    shape: ModelShape, rollout: RolloutConfig, gpu: Gpu, work: Work, *, replicas: int, bf16: bool, kv_cache: int
) -> float:
    """Seconds until the last response has ended, of so many vLLM servers.

    Their lanes are full until the mean response has been written in all of them; what the longest has beyond that, it
    writes in a server that is nearly empty.

    Args:
        kv_cache: bytes of it on a GPU (`planning.plan_sidecar`), which bound the lanes.
    """
    mine = math.ceil(work.responses / replicas)
    tp, size = rollout.sidecar_tensor_parallel_size, 2 if bf16 else 4
    heads = max(1, shape.num_key_value_heads // tp)
    token = 2 * heads * shape.head_dim * shape.num_hidden_layers * size
    lanes = min(mine, rollout.sidecar_max_num_seqs, max(1, kv_cache // (token * (work.prompt + work.response))))
    weights = shape.num_parameters * size / tp

    def step(lanes: float) -> float:
        """One token in each lane."""
        read = weights + lanes * (work.prompt + work.response / 2) * token
        product = 2 * shape.num_parameters * lanes / tp
        waits = 2 * shape.num_hidden_layers * DECODE_OVERHEAD if tp > 1 else 0.0
        return max(read / (MEMORY_SHARE * gpu.bandwidth), product / (MATRIX_SHARE * gpu.matrix)) + waits

    prefill = 2 * shape.num_parameters * work.prompt * mine / rollout.samples_per_prompt / tp
    tail = max(0, work.longest - work.response)
    return prefill / (MATRIX_SHARE * gpu.matrix) + mine / lanes * work.response * step(lanes) + tail * step(1)


def push_time(shape: ModelShape, gpu: Gpu, *, trainer_gpus: int, sidecar_gpus: int, bf16: bool) -> float:
    """Seconds from the trainer's shards to every server: all weights into the first rank, and out of it again."""
    weights = shape.num_parameters * (2 if bf16 else 4)
    inside = LINK_SHARE * (gpu.nvlink if trainer_gpus <= NODE else gpu.network)
    outside = LINK_SHARE * (gpu.nvlink if trainer_gpus + sidecar_gpus <= NODE else gpu.network)
    return weights / inside + weights / outside


def token_work(shape: ModelShape) -> packing.Work:
    """What packs are balanced by: FLOPs of attention and of the output head over those of a token's layers, forward and
    backward."""
    layer = _layer_weights(shape)
    return packing.Work(
        attention=2 * shape.query_size / layer,
        head=4 / 3 * shape.hidden_size * shape.padded_vocab_size / (shape.num_hidden_layers * layer),
    )


def _layer_weights(shape: ModelShape) -> int:
    """Of a layer's matrices."""
    attention = shape.hidden_size * (2 * shape.query_size + 2 * shape.kv_size)
    return attention + 3 * shape.hidden_size * shape.intermediate_size
