"""Memory of a GPU, per pipeline stage, in closed form: what stays, and what comes and goes with a micro-batch.

Letters, as in the formulas below: t tokens of a micro-batch on a rank (its response positions are taken to be as many),
e bytes of a number of the model's dtype, h hidden, f intermediate, q rows of q_proj, kv of k_proj, v rows of the
vocabulary's shard. Activations are counted tensor by tensor, as Korthikanti et al. do (arXiv:2205.05198, section 4),
for a layer without dropout, with grouped queries, a gated MLP and attention that keeps no matrix of scores.

The local spec is what a CPU was measured to keep (tests/policy/test_planned_memory.py). Transformer Engine's is read
off its modules (release 2.11: what they save for the backward pass) and has not been measured on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlsc.config import Config, OptimizerConfig, ParallelConfig
from megatron_rlsc.conversion.rules import Spec
from megatron_rlsc.conversion.shape import ModelShape

GIB = 2**30
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
"""Of a number, by Megatron-LM's words for dtypes."""
HEAD_ROWS, HEAD_WORDS = 32, 16384
"""ROWS and WORDS of policy/logprobs.py, a floor above; a test measures what comes of them."""
FIXED_ALLOWANCE = 4 * GIB
"""An assumption, not measured: the CUDA context, NCCL's buffers for TP, PP, DP and the world, workspaces of cuBLAS and
cuDNN, and the 0.8 GiB that a GPU of 80 GiB does not hand out."""
FRAGMENTATION = 0.1
"""An assumption, not measured: what the allocator holds beyond the tensors, as a share of those that come and go."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """A GPU of one pipeline stage, in bytes. The update and the save come when no activation is left."""

    stage: int
    layers: int
    parameters: int
    """Of one GPU: a TP rank's shards."""
    in_flight: int
    """Runs of layers (a stage's own one, without interleaving) whose backward pass is still to come, at most."""
    weights: int
    gradients: int
    """Megatron's buffers, in which they add up."""
    optimizer: int
    """Master weights and moments."""
    activations: int
    """Kept for backward passes to come, of all micro-batches in flight."""
    backward: int
    """What one layer's backward pass, or the embedding's, needs beside them."""
    logprobs: int
    """What the log-probability head needs beside them: on the last stage."""
    update: int
    """Beside the optimizer's state, while it steps."""
    save: int
    """While a distributed optimizer's state is gathered for a checkpoint."""

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def passing(self) -> int:
        """The most that comes and goes at one time."""
        return max(self.activations + max(self.backward, self.logprobs), self.update, self.save)

    @property
    def allowance(self) -> int:
        """What is no tensor: an assumption."""
        return FIXED_ALLOWANCE + math.ceil(FRAGMENTATION * self.passing)

    @property
    def total(self) -> int:
        return self.state + self.passing + self.allowance


def choose_planned_spec(config: Config) -> Spec:
    """The layers that a machine with GPUs and Transformer Engine would run: `auto` is its with bf16."""
    asked = config.model.transformer_impl
    return ("transformer_engine" if config.model.bf16 else "local") if asked == "auto" else asked


def plan_memory(
    shape: ModelShape, config: Config, *, dp_size: int, spec: Spec, micro_batches: int | None = None
) -> tuple[StageMemory, ...]:
    """Every stage's memory, for a layout that has passed `planning.check_layout`.

    Args:
        dp_size: replicas.
        spec: the layers.
        micro_batches: of a replica, a step; None: enough to fill the pipeline.
    """
    shape = shape.padded_to(config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size)
    pp = config.parallel.pipeline_model_parallel_size
    return tuple(
        _stage(stage, shape, config, dp_size=dp_size, spec=spec, micro_batches=micro_batches) for stage in range(pp)
    )


def count_parameters(shape: ModelShape, layout: ParallelConfig, *, stage: int) -> list[list[int]]:
    """The sizes of the parameters of each of a stage's runs of layers, on one TP rank.

    `shape` has its vocabulary padded for the layout. A tied embedding is on the first stage and, of a pipeline, on the
    last one too.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    vpp = layout.virtual_pipeline_model_parallel_size
    h, f = shape.hidden_size, shape.intermediate_size
    qkv = (shape.query_size + 2 * shape.kv_size) // tp
    layer = [h, qkv * h, qkv, shape.query_size // tp * h, h, 2 * f // tp * h, f // tp * h]
    vocabulary = shape.padded_vocab_size // tp * h
    runs = [layer * (shape.num_hidden_layers // (pp * vpp)) for _ in range(vpp)]
    if stage == 0:
        runs[0] = [vocabulary, *runs[0]]
    if stage == pp - 1:
        runs[-1] = [*runs[-1], h]
        if pp > 1 or not shape.tie_word_embeddings:
            runs[-1].append(vocabulary)
    return runs


def runs_in_flight(layout: ParallelConfig, *, stage: int, micro_batches: int | None) -> int:
    """The most runs of layers that a stage has gone through forwards and not yet backwards, in Megatron's 1F1B
    (get_pp_rank_microbatches of pipeline_parallel/schedules.py), and one more: the one that is at its end."""
    pp, vpp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    warm_up = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    return min(warm_up + 1, warm_up + 1 if micro_batches is None else micro_batches * vpp)


def _stage(
    stage: int, shape: ModelShape, config: Config, *, dp_size: int, spec: Spec, micro_batches: int | None
) -> StageMemory:
    layout = config.parallel
    runs = count_parameters(shape, layout, stage=stage)
    replicas = dp_size * layout.context_parallel_size
    buffers = sum(_buffer(run, layout, replicas) for run in runs)
    parameters = sum(map(sum, runs))
    shard = min(parameters, -(-buffers // replicas)) if layout.use_distributed_optimizer else parameters
    state, update = _optimizer(config, spec)
    in_flight = runs_in_flight(layout, stage=stage, micro_batches=micro_batches)
    pass_through = _Pass(shape, config, stage=stage, spec=spec)
    return StageMemory(
        stage=stage,
        layers=shape.num_hidden_layers // layout.pipeline_model_parallel_size,
        parameters=parameters,
        in_flight=in_flight,
        weights=buffers * (2 if config.model.bf16 else 4),
        gradients=buffers * BYTES[config.optimizer.main_grads_dtype],
        optimizer=shard * state,
        activations=in_flight * pass_through.kept + pass_through.held,
        backward=pass_through.backward,
        logprobs=pass_through.logprobs,
        update=shard * update,
        save=_save(runs, layout, replicas, stage=stage) if layout.use_distributed_optimizer else 0,
    )


def _buffer(sizes: list[int], layout: ParallelConfig, replicas: int) -> int:
    """Numbers of Megatron's buffer for a run's parameters; the distributed optimizer's has parameters begin at 64ths
    and its end padded for equal shards (distributed/param_and_grad_buffer.py)."""
    if not layout.use_distributed_optimizer:
        return sum(sizes)
    return _up(sum(_up(size, 64) for size in sizes), math.lcm(replicas, 128))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _optimizer(config: Config, spec: Spec) -> tuple[int, int]:
    """Bytes a parameter: of master weights and moments; and of what is made while they are stepped.

    TE's FusedAdam (optimizers/fused_adam.py) makes float32 copies of all that it holds in fewer bits; torch's on a GPU
    makes one number for each.
    """
    asked: OptimizerConfig = config.optimizer
    held = [asked.exp_avg_dtype, asked.exp_avg_sq_dtype, *([asked.main_params_dtype] if config.model.bf16 else [])]
    copies = sum(4 for dtype in held if dtype != "fp32")
    return sum(BYTES[dtype] for dtype in held), copies if spec == "transformer_engine" else 4


def _save(runs: list[list[int]], layout: ParallelConfig, replicas: int, *, stage: int) -> int:
    """A shard in float32, and those of all replicas: of the largest bucket, one of three tensors at a time
    (get_parameter_state_dp_zero of optimizer/distrib_optimizer.py). Only buckets that overlap are small, and only the
    first stage's first run has such."""
    buckets = [_buffer(run, layout, replicas) for run in runs]
    if layout.overlap_grad_reduce and stage == 0:
        buckets[0] = min(buckets[0], max(40_000_000, 1_000_000 * replicas) + max(runs[0]))
    return math.ceil(4 * max(buckets) * (1 + 1 / replicas))


class _Pass:
    """What a micro-batch's way through one run of layers, there and back, takes on a rank; bytes."""

    def __init__(self, shape: ModelShape, config: Config, *, stage: int, spec: Spec) -> None:
        layout = config.parallel
        self.config, self.layout, self.shape = config, layout, shape
        self.te = spec == "transformer_engine"
        self.tp = layout.tensor_model_parallel_size
        self.e = 2 if config.model.bf16 else 4
        self.upcast = 4 if self.e == 2 and not self.te else 0
        """A CPU adds bfloat16 to float32 by way of a float32 copy."""
        self.t = -(-config.train.max_tokens_per_micro_batch // layout.context_parallel_size)
        self.hidden = self.t * shape.hidden_size * self.e
        """[t, h], whole."""
        self.stream = self.hidden // (self.tp if layout.sequence_parallel else 1)
        """[t, h] as it lies between the matrices."""
        self.mlp = self.t * shape.intermediate_size // self.tp * self.e
        """[t, f] of this rank."""
        pp, vpp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
        self.run = shape.num_hidden_layers // (pp * vpp)
        self.first, self.last = stage == 0, stage == pp - 1
        self.alone = pp == 1
        self.receives, self.sends = vpp > 1 or not self.first, vpp > 1 or not self.last

    @property
    def norm(self) -> int:
        """Kept by an RMSNorm and what takes its output: the input and the output; torch's on a CPU has what lies
        between them too, in float32 like the input."""
        return 2 * self.stream if self.te else self.stream // self.e * (8 + self.e)

    @property
    def attention(self) -> int:
        """Kept between the two norms. TE: q and k with their positions, v, and the output. Local: q, k and v with a
        head for every query head, the output as it is made and as o_proj takes it; angles of q and of k. Under CP the
        local one has the keys and values of all ranks, and queries and outputs filled up to them."""
        q, kv = (self.t * size // self.tp * self.e for size in (self.shape.query_size, self.shape.kv_size))
        log_sums = 4 * self.t * self.shape.num_attention_heads // self.tp
        angles = 4 * self.t * self.shape.head_dim * self.e
        again = self.layout.recompute_granularity == "selective"
        if self.te:
            unfused = 0 if self.shape.yarn is None else angles
            return 2 * q + 2 * kv + unfused + (0 if again else log_sums)
        if again:
            return angles + 3 * q + 3 * kv
        cp = self.layout.context_parallel_size
        filled = cp * q + (q // 2 if cp > 1 else 0)
        return angles + 2 * filled + 2 * cp * q + q + log_sums

    @property
    def layer(self) -> int:
        """Kept by a layer. Of the MLP, TE: gate and up, and their product; local: also silu(gate), and up once more."""
        return 2 * self.norm + self.attention + (3 if self.te else 5) * self.mlp

    @property
    def kept(self) -> int:
        """By the run of layers: whole layers, or the inputs of those that are computed again."""
        recomputed, inputs = 0, 0
        if self.layout.recompute_granularity == "full":
            count = self.layout.recompute_num_layers or 1
            uniform = self.layout.recompute_method == "uniform"
            recomputed, inputs = (self.run, -(-self.run // count)) if uniform else (min(count, self.run),) * 2
        kept = (self.run - recomputed) * self.layer + inputs * self.stream
        # The schedule holds what came in, which else only a norm in float32 does without, and what went out.
        received = self.receives and self.upcast and not recomputed
        return kept + self.stream * (bool(received) + self.sends)

    @property
    def held(self) -> int:
        """Whatever is in flight: the input that each run has received last, with its gradient; and the buffer in which
        megatron-core's own linears gather what SP has cut."""
        vpp = self.layout.virtual_pipeline_model_parallel_size
        buffer = self.hidden if self.layout.sequence_parallel and not self.te else 0
        return 2 * self.stream * (vpp - self.first) + buffer

    @property
    def backward(self) -> int:
        """The most beside `kept`: in the last layer, from its MLP's second matrix to its first."""
        h, f, e = self.shape.hidden_size, self.shape.intermediate_size, self.e
        matrix = f // self.tp * h
        gathered = self.hidden if self.layout.sequence_parallel else 0  # the gradient of fc2's output
        input_again = gathered if self.te else 0
        mlp_kept = (3 if self.te else 5) * self.mlp
        layer = self.stream + max(
            gathered + self.mlp + matrix * e,  # fc2: the gradients of its input and of its weight
            matrix * (e + self.upcast),  # the latter on its way into the buffer
            2 * self.mlp,  # SwiGLU, fc2's input being gone
            2 * self.mlp - mlp_kept + input_again + self.hidden + 2 * matrix * (e + self.upcast),  # fc1
        )
        if self.layout.recompute_granularity == "full":
            count = self.layout.recompute_num_layers or 1
            uniform = self.layout.recompute_method == "uniform"
            layer += self.layer * (min(count, self.run) if uniform else int(count >= self.run))
        return layer

    @property
    def logprobs(self) -> int:
        """policy/logprobs.py, from the last norm on: a chunk's logits in float32; some of its rows once more, or some
        of its words in a narrower dtype, with their parts of the gradients of hidden states and weight; the gradient
        of all hidden states."""
        if not self.last:
            return 0
        tokens, words = min(self.config.model.logprob_chunk_tokens, self.t), self.shape.padded_vocab_size // self.tp
        norm = self.stream if self.te else self.norm - self.stream
        gathered = self.hidden if self.layout.sequence_parallel else 0
        logits, few = 4 * tokens * words, min(HEAD_WORDS, words)
        low = tokens * (self.e * few + (4 + self.e) * self.shape.hidden_size) if self.e < 4 else 0
        wider = BYTES[self.config.optimizer.main_grads_dtype] > self.e
        product = few * self.shape.hidden_size * (self.e + self.upcast) if wider else 0
        sums = 4 * min(HEAD_ROWS, tokens) * words
        return norm + self.stream + gathered + 2 * self.hidden + logits + max(low + product, sums)
