"""Planned times against published ones, and against arithmetic by hand.

Not covered: that they come true on this package, which takes a cluster (benchmarks/README.md).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rlsc.config import Config, ModelConfig, ParallelConfig, RolloutConfig, TrainConfig
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.timing import GPUS, MATRIX_SHARE, MEMORY_SHARE, Work, generate_time, push_time, train_time

A100 = GPUS["a100-80gb"]
TOLERANCE = 0.18
SEQUENCE, VOCABULARY = 2048, 51200
"""Of all the published runs."""


def gpt(hidden: int, layers: int, heads: int) -> ModelShape:
    """As many weights a layer as a GPT: 4 h^2 of attention, and 8 h^2 of an MLP that here has three matrices."""
    return ModelShape(
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=SEQUENCE,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=False,
    )


def planned(shape: ModelShape, tp: int, pp: int, vpp: int, gpus: int, batch: int, micro_batch: int, **layout) -> float:
    config = Config(
        model=ModelConfig(bf16=True),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            sequence_parallel=tp > 1,  # theirs sends a stage's output once a node, as SP does ("scatter/gather")
            **layout,
        ),
        rollout=RolloutConfig(max_response_length=SEQUENCE),
        train=TrainConfig(max_tokens_per_micro_batch=micro_batch * SEQUENCE),
    )
    work = Work(responses=batch, prompt=0, response=SEQUENCE, longest=SEQUENCE)
    return train_time(shape, config, A100, work, dp_size=gpus // (tp * pp)).total


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "tp", "pp", "gpus", "batch", "teraflops"),
    [
        (2304, 24, 24, 1, 1, 32, 512, 137),
        (3072, 30, 32, 2, 1, 64, 512, 138),
        (4096, 36, 32, 4, 1, 128, 512, 142),
        (6144, 40, 48, 8, 1, 256, 1024, 135),
        (8192, 48, 64, 8, 2, 512, 1536, 138),
        (10240, 60, 80, 8, 4, 1024, 1792, 140),
        (12288, 80, 96, 8, 8, 1536, 2304, 148),
        (16384, 96, 128, 8, 16, 1920, 2160, 155),
        (20480, 105, 128, 8, 35, 2520, 2520, 163),
        (25600, 128, 160, 8, 64, 3072, 3072, 163),
    ],
)
def test_iteration_times_with_full_recomputation(
    hidden: int, layers: int, heads: int, tp: int, pp: int, gpus: int, batch: int, teraflops: int
) -> None:
    """arXiv:2104.04473, table 1, whose FLOPs of an iteration are its equation (3)."""
    flops = (
        96 * batch * SEQUENCE * layers * hidden**2 * (1 + SEQUENCE / (6 * hidden) + VOCABULARY / (16 * layers * hidden))
    )
    published = flops / (teraflops * 1e12 * gpus)
    shape = gpt(hidden, layers, heads)
    # It does not say its micro-batches: the best of these.
    times = [planned(shape, tp, pp, 1, gpus, batch, micro_batch, **FULL) for micro_batch in (1, 2, 4)]
    assert min(times) == pytest.approx(published, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "pp", "vpp", "gpus", "batch", "full", "selective"),
    [
        (6144, 48, 64, 1, 1, 8, 4, 1.42, 1.10),
        (12288, 96, 96, 8, 3, 64, 64, 18.13, 13.75),
        (20480, 105, 128, 35, 3, 280, 280, 49.05, 37.83),
        (25600, 128, 160, 64, 1, 512, 512, 94.42, 71.49),
    ],
)
def test_iteration_times_with_selective_recomputation(
    hidden: int, layers: int, heads: int, pp: int, vpp: int, gpus: int, batch: int, full: float, selective: float
) -> None:
    """arXiv:2205.05198, tables 3 and 5."""
    shape, micro_batch = gpt(hidden, layers, heads), 4 if pp == 1 else 1
    run = (8, pp, vpp, gpus, batch, micro_batch)
    assert planned(shape, *run, **FULL) == pytest.approx(full, rel=TOLERANCE)
    assert planned(shape, *run, recompute_granularity="selective") == pytest.approx(selective, rel=TOLERANCE)


TINY = ModelShape(
    vocab_size=1000,
    padded_vocab_size=1000,
    hidden_size=100,
    intermediate_size=200,
    num_hidden_layers=2,
    num_attention_heads=10,
    num_key_value_heads=5,
    head_dim=10,
    max_position_embeddings=1000,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
)


def test_compute_by_hand() -> None:
    """4 responses of 60 tokens behind prompts of 40 are 400 tokens, 2 micro-batches of 200, of which 120 are answers.

    A layer's matrices have 100 * (2 * 100 + 2 * 50) + 3 * 100 * 200 = 90,000 weights: 3 * 2 * 200 * 90,000 = 108e6
    FLOPs. Attention: 3 * 2 * 200 * 100 * 100 = 12e6. The head: 8 * 120 * 100 * 1024 = 98.304e6.
    """
    config = Config(rollout=RolloutConfig(max_response_length=100), train=TrainConfig(max_tokens_per_micro_batch=200))
    work = Work(responses=4, prompt=40, response=60, longest=100)
    time = train_time(TINY, config, A100, work, dp_size=1)
    assert time.micro_batches == 2
    assert time.compute == pytest.approx(2 * (2 * (108e6 + 12e6) + 98.304e6) / (MATRIX_SHARE * 312e12))
    assert time.tensor_parallel == time.pipeline == time.data_parallel == 0


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        ({"pipeline_model_parallel_size": 2}, "pipeline"),
        ({"tensor_model_parallel_size": 2}, "tensor_parallel"),
        ({"context_parallel_size": 2}, "tensor_parallel"),
    ],
)
def test_what_a_layout_costs(layout: dict[str, int], what: str) -> None:
    config = Config(parallel=ParallelConfig(**layout))
    work = Work(responses=4, prompt=40, response=60, longest=100)
    assert getattr(train_time(TINY, config, A100, work, dp_size=1), what) > 0


def test_a_pipeline_waits_less_when_it_is_interleaved() -> None:
    """Of 4 micro-batches over 2 stages: one stage's micro-batch, or half of it."""
    config = Config(
        parallel=ParallelConfig(pipeline_model_parallel_size=2),
        rollout=RolloutConfig(max_response_length=100),
        train=TrainConfig(max_tokens_per_micro_batch=100),
    )
    halved = replace(config.parallel, virtual_pipeline_model_parallel_size=2)
    work, endless = Work(responses=4, prompt=40, response=60, longest=100), replace(A100, nvlink=1e30)
    shape = replace(TINY, num_hidden_layers=4)
    one, two = (
        train_time(shape, replace(config, parallel=layout), endless, work, dp_size=1)
        for layout in (config.parallel, halved)
    )
    assert two.pipeline == pytest.approx(one.pipeline / 2) and two.compute == one.compute


def test_replicas_share_the_work_and_pay_for_it() -> None:
    work = Work(responses=64, prompt=40, response=60, longest=100)
    alone, shared = (train_time(TINY, Config(), A100, work, dp_size=dp_size) for dp_size in (1, 8))
    assert shared.compute == pytest.approx(alone.compute / 8)
    # 2 * 7/8 of the gradients, float32, over NVLink at four fifths
    parameters = 2 * (90_000 + 100 + 100 + 200) + 2 * 1024 * 100 + 100
    assert shared.data_parallel == pytest.approx(2 * 7 / 8 * 4 * parameters / (0.8 * 300e9))


def test_the_published_token_rate() -> None:
    """Llama-3.1-8B, 8.03e9 parameters in BF16, one request of 1024 tokens and 128 more on an A100-40GB: 75 a second."""
    llama = ModelShape(
        vocab_size=128256,
        padded_vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        tie_word_embeddings=False,
    )
    work, gpu = Work(responses=1, prompt=1024, response=128, longest=128), GPUS["a100-40gb"]
    seconds = generate_time(
        llama, RolloutConfig(samples_per_prompt=1), gpu, work, replicas=1, bf16=True, kv_cache=10**10
    )
    assert 128 / seconds == pytest.approx(75, rel=0.1)


def test_decoding_is_bound_by_bytes_and_then_by_products() -> None:
    """The parameters are 2 * 90,400 + 100 of the final norm + 2 * 100,000: 380,900. A token's keys and values are
    2 * 50 * 2 layers * 4 bytes = 800; 40 + 30 of them are read on the way."""
    rollout = RolloutConfig(samples_per_prompt=1, sidecar_max_num_seqs=4, max_response_length=100)
    work = Work(responses=8, prompt=40, response=60, longest=60)
    parameters = TINY.num_parameters
    # 8 responses in 4 lanes: twice 60 tokens, each reading the weights and 4 caches; prefill beside it
    step = (4 * parameters + 4 * 70 * 800) / (MEMORY_SHARE * A100.bandwidth)
    prefill = 2 * parameters * 40 * 8 / (MATRIX_SHARE * A100.matrix)
    seconds = generate_time(TINY, rollout, A100, work, replicas=1, bf16=False, kv_cache=10**9)
    assert seconds == pytest.approx(2 * 60 * step + prefill)
    slow = replace(A100, matrix=1e9)
    product = 2 * parameters * 4 / (MATRIX_SHARE * 1e9)
    seconds = generate_time(TINY, rollout, slow, work, replicas=1, bf16=False, kv_cache=10**9)
    assert seconds == pytest.approx(2 * 60 * product + 2 * parameters * 40 * 8 / (MATRIX_SHARE * 1e9))


def test_the_longest_response_ends_alone() -> None:
    rollout, work = RolloutConfig(max_response_length=100), Work(responses=8, prompt=40, response=60, longest=60)
    long = replace(work, longest=100)
    short, tail = (
        generate_time(TINY, rollout, A100, each, replicas=2, bf16=False, kv_cache=10**9) for each in (work, long)
    )
    one = (4 * TINY.num_parameters + 70 * 800) / (MEMORY_SHARE * A100.bandwidth)
    assert tail - short == pytest.approx(40 * one)


def test_a_push_is_slower_between_nodes() -> None:
    near, far = (push_time(TINY, A100, trainer_gpus=n, sidecar_gpus=n, bf16=True) for n in (4, 8))
    assert near == pytest.approx(2 * 2 * TINY.num_parameters / (0.8 * 300e9))
    assert far == pytest.approx(2 * TINY.num_parameters * (1 / (0.8 * 300e9) + 1 / (0.8 * 25e9)))
