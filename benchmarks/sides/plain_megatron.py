"""(c) megatron-core as it comes: its own attention on padded rows, logits of every position, its own cross entropy.

DDP, optimizer, schedule and weights are those of our side.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_rlsc.config import ParallelConfig
from megatron_rlsc.conversion.hf import open_weights
from megatron_rlsc.conversion.shape import ModelShape, read_shape
from megatron_rlsc.policy.optimizer import build_optimizer, gradient_norm, wrap_model
from megatron_rlsc.policy.parallel import init_parallel
from megatron_rlsc.policy.weights import iter_hf_weights, load_hf_weights
from megatron_rlsc.types import Sample
from sides.ours import optimizer_config
from sides.work import Outcome, Setup


def build(setup: Setup) -> PlainMegatron:
    return PlainMegatron(setup)


class PlainMegatron:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        layout = ParallelConfig()
        self.parallel = init_parallel(layout, seed=1)
        self.shape = read_shape(setup.model)
        config = transformer_config(self.shape, on_cpu=self.parallel.device.type == "cpu")
        self.model = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=self.shape.vocab_size,
            max_sequence_length=self.shape.max_position_embeddings,
            share_embeddings_and_output_weights=self.shape.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=int(self.shape.rope_theta),
        ).to(self.parallel.device)
        self.chunks: Any = [self.model]
        self.ddp = wrap_model(self.chunks, layout)
        self.optimizer, self.schedule = build_optimizer(
            self.ddp, optimizer_config(setup.lr), updates=1000, use_distributed_optimizer=False
        )
        config.grad_scale_func = self.optimizer.scale_loss
        load_hf_weights(
            self.chunks,
            open_weights(setup.model).tensor,
            shape=self.shape,
            spec="local",
            parallel=self.parallel,
            source=str(setup.model),
        )
        self.optimizer.reload_model_params()

    def step(self, samples: list[Sample], micro_batch: int) -> Outcome:
        self.ddp[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = [samples[first : first + micro_batch] for first in range(0, len(samples), micro_batch)]
        results = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(batches),
            model=self.ddp[0],
            num_microbatches=len(batches),
            seq_length=1,  # of pipeline messages, of which there are none
            micro_batch_size=micro_batch,
            forward_only=False,
        )
        norm = gradient_norm(self.optimizer)
        self.optimizer.step()
        self.schedule.step(increment=1)
        # Megatron's attention keeps its matrix of scores for the next time.
        parallel_state.get_global_memory_buffer().buffer.clear()
        log_p = torch.cat([result["log_p"] for result in results])
        loss = -((log_p.exp() + self.setup.alpha) * log_p).mean().item()
        return Outcome(loss=loss, gradient_norm=norm, logprobs=sorted(log_p.tolist()))

    def _forward_step(self, batches: Iterator[list[Sample]], model: Any) -> tuple[Tensor, Any]:
        samples = next(batches)
        longest = max(sample.length for sample in samples)
        tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
        mask = torch.zeros(len(samples), longest)
        for row, sample in enumerate(samples):
            tokens[row, : sample.length] = torch.tensor(sample.prompt_token_ids + sample.response_token_ids)
            mask[row, len(sample.prompt_token_ids) : sample.length] = 1
        tokens, mask = tokens.to(self.parallel.device), mask.to(self.parallel.device)
        # Padding stands behind its row, where the causal mask hides it.
        logits = model(tokens, torch.arange(longest, device=tokens.device).expand_as(tokens), None)
        return logits, partial(self._loss, tokens=tokens, mask=mask)

    def _loss(self, logits: Tensor, *, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As calculate_per_token_loss has it: Megatron divides by the responses of all micro-batches."""
        scaled = logits.div_(self.setup.temperature)  # [b, s, v]
        per_token = -vocab_parallel_cross_entropy(scaled, F.pad(tokens[:, 1:], (0, 1)))
        log_p = (per_token * F.pad(mask[:, 1:], (0, 1))).sum(1)
        weights = log_p.detach().exp() + self.setup.alpha
        count = torch.tensor(len(tokens), dtype=torch.int32, device=tokens.device)
        return -(weights * log_p).sum(), count, {"log_p": log_p.detach()}

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    def weights(self) -> dict[str, Tensor]:
        whole = iter_hf_weights(self.chunks, shape=self.shape, spec="local", parallel=self.parallel)
        return {name: tensor.clone() for name, tensor in whole}


def transformer_config(shape: ModelShape, *, on_cpu: bool) -> TransformerConfig:
    return TransformerConfig(
        num_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        perform_initialization=True,
        use_cpu_initialization=on_cpu,
        # CUDA extensions that neither side has here
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=not on_cpu,
        bias_dropout_fusion=not on_cpu,
        persist_layer_norm=not on_cpu,
    )
