"""The word embedding alone, against torch's; that layouts agree is test_layouts.py's.

Not covered: CUDA.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from live_bytes import counted, peak
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from world import World

from megatron_rlsc.policy import cpu
from megatron_rlsc.policy.embedding import VocabParallelEmbedding

VOCABULARY, HIDDEN = 16, 6
TOKENS = (3, 15, 3, 0, 8, 4, 3, 11)


def build(vocabulary: int, hidden: int, *, sequence_parallel: bool, dtype: torch.dtype) -> VocabParallelEmbedding:
    """One shard, over all ranks; `weight` holds what every rank can compute for itself."""
    cpu.install()
    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=ranks,
        tensor_model_parallel_size=ranks,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
    )
    embedding = VocabParallelEmbedding(
        vocabulary, hidden, init_method=lambda _: None, reduce_scatter_embeddings=sequence_parallel, config=config
    )
    with torch.no_grad():
        embedding.weight.copy_(table(vocabulary, hidden)[embedding.vocab_start_index : embedding.vocab_end_index])
    return embedding


def table(vocabulary: int, hidden: int) -> Tensor:
    return torch.randn(vocabulary, hidden, generator=torch.Generator().manual_seed(1))


def upstream() -> Tensor:
    return torch.randn(len(TOKENS), 1, HIDDEN, generator=torch.Generator().manual_seed(2))


def on_one_shard(sequence_parallel: bool, dtype: torch.dtype, has_main_grad: bool) -> tuple[Tensor, Tensor]:
    """(this rank's embedded tokens, the gradient of its rows)"""
    embedding = build(VOCABULARY, HIDDEN, sequence_parallel=sequence_parallel, dtype=dtype)
    weight = embedding.weight
    if has_main_grad:
        weight.main_grad = torch.ones_like(weight, dtype=torch.float32)  # of an earlier micro-batch
        weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, True
    embedded = embedding(torch.tensor(TOKENS)[None])
    share = upstream().to(dtype)
    if sequence_parallel:
        share = share.chunk(dist.get_world_size())[dist.get_rank()]
    else:
        embedded = embedded.transpose(0, 1)
    embedded.backward(share)
    assert weight.grad is not None and weight.grad.shape == weight.shape
    if not has_main_grad:
        return embedded.detach(), weight.grad
    assert weight.grad_added_to_main_grad and not weight.zero_out_wgrad  # nothing is to be added but this
    return embedded.detach(), weight.main_grad - 1


@pytest.mark.parametrize("has_main_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
def test_rows_and_their_gradient(
    ranks: int, sequence_parallel: bool, dtype: torch.dtype, has_main_grad: bool, world: World
) -> None:
    """Of words that occur three times, once and never, on all ranks or on one."""
    whole = table(VOCABULARY, HIDDEN).to(dtype).requires_grad_()
    expected = F.embedding(torch.tensor(TOKENS)[:, None], whole)
    gradient = torch.zeros(VOCABULARY, HIDDEN)
    for token, row in zip(TOKENS, upstream().to(dtype)):
        gradient[token] += row[0].float()
    answers = world.run(ranks, on_one_shard, sequence_parallel, dtype, has_main_grad)
    embedded = [answer[0] for answer in answers]
    assert torch.equal(torch.cat(embedded) if sequence_parallel else embedded[-1], expected.detach())
    exact = dtype == torch.float32 or has_main_grad
    torch.testing.assert_close(
        torch.cat([answer[1] for answer in answers]).float(), gradient, rtol=0, atol=1e-6 if exact else 0.02
    )


def peak_of_a_pass(vocabulary: int, hidden: int, tokens: int) -> int:
    """Bytes beyond the weight and its gradient."""
    embedding = build(vocabulary, hidden, sequence_parallel=False, dtype=torch.float32)
    embedding.weight.main_grad = torch.zeros_like(embedding.weight)
    ids = torch.arange(tokens)[None]

    def run() -> None:
        embedding(ids).sum().backward()

    run()
    with counted():
        before = peak(lambda: None)
        return peak(run) - before


def test_memory_is_that_of_the_micro_batch(world: World) -> None:
    """Rows there and back, and few times over; a gradient of the vocabulary would take 100 times a micro-batch."""
    vocabulary, hidden, tokens = 10_000, 32, 100
    (found,) = world.run(1, peak_of_a_pass, vocabulary, hidden, tokens)
    rows = tokens * hidden * 4
    assert rows < found < 6 * rows
