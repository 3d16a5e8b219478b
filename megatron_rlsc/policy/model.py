"""An HF Qwen2.5 config as a stage of megatron-core's GPTModel, whose last stage answers with log-probabilities."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megatron_rlsc.config import ModelConfig, ParallelConfig
from megatron_rlsc.conversion.rules import Spec
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.policy.attention import PackedAttention, packed_params
from megatron_rlsc.policy.embedding import VocabParallelEmbedding
from megatron_rlsc.policy.kernels import Attention
from megatron_rlsc.policy.logprobs import Foresee, vocab_parallel_logprobs
from megatron_rlsc.policy.norm import RMSNorm
from megatron_rlsc.policy.parallel import Parallel
from megatron_rlsc.policy.yarn import YarnTransformerConfig, yarn_fields
from megatron_rlsc.types import MicroBatch


class LogprobGPTModel(GPTModel):
    """GPTModel that takes a packed micro-batch, and on the last stage returns log-probabilities instead of logits.

    Logits of a whole pack are never made: only response positions reach the output layer, and those in chunks. With
    `pads` the documents are padded to one length within the model, and nothing outside it knows.
    """

    def __init__(
        self,
        *args: Any,
        temperature: float,
        chunk_tokens: int,
        real_vocab_size: int,
        pads: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.pre_process:
            self.embedding.word_embeddings.__class__ = VocabParallelEmbedding
        self.pads = pads
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens
        self.real_vocab_size = real_vocab_size

    def _set_attention_backend(self) -> None:
        """Tells Transformer Engine, by environment variables, which kernel it has. A local model leaves them alone."""
        if self.config.attention_backend is not AttnBackend.local:
            super()._set_attention_backend()

    def forward(self, batch: MicroBatch, foresee: Foresee | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the response tokens, [n] float32 each, at `temperature`; on a stage
        before the last, the hidden states [t, 1, h], or [s, d, h] of padded documents.

        `foresee` is `vocab_parallel_logprobs`'s. Under context parallelism, where a response is spread over ranks, its
        log p is known too late for that.
        """
        self._batch, self._positions = batch, batch.positions
        self._foresee = foresee if self.config.context_parallel_size == 1 else None
        if self.pads:
            tokens, place = _pad(batch, self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1)
            self._positions = place[batch.positions]
            # Padding stands behind its document, where a causal mask hides it.
            return super().forward(tokens, torch.zeros_like(tokens), None)
        # Rotary positions come from cu_seqlens; GPTModel reads position_ids for learned embeddings alone.
        position_ids = torch.zeros_like(batch.tokens)[None]
        return super().forward(batch.tokens[None], position_ids, None, packed_seq_params=packed_params(batch))

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """gpt_model.py's own, its rotary embedding by position turned into one by token where prompts are shared: rows
        [t, 1, 1, head_dim], which rope_utils.py lays on one sequence of t tokens as they are."""
        embedded, rotary, *others = super()._preprocess(*args, **kwargs)
        if self._batch.shared is not None:
            rotary = rotary[self._batch.shared.position_ids]
        return embedded, rotary, *others

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Replaces gpt_model.py's own, which multiplies every position with the output layer."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # Each rank's head all-reduces the gradient of `hidden`, so every rank has the whole of it already.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())  # overlap_param_gather waits here; the layer's weight is read, not called
        tied = self.share_embeddings_and_output_weights
        return vocab_parallel_logprobs(
            hidden_states.flatten(0, 1)[self._positions],
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            self._batch.targets,
            temperature=self.temperature,
            vocab_size=self.real_vocab_size,
            group=self.pg_collection.tp,
            chunk_tokens=self.chunk_tokens,
            responses=self._batch.responses,
            foresee=self._foresee,
        )


def _pad(batch: MicroBatch, multiple: int) -> tuple[Tensor, Tensor]:
    """The d documents of a pack as [d, s], and where each of its t tokens then stands in [s * d], [t].

    s is the longest one's length, up to a multiple: sequence parallelism cuts it into equal parts.
    """
    lengths, count = batch.cu_seqlens.diff(), len(batch.tokens)
    device = batch.tokens.device
    documents = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=count)
    offsets = torch.arange(count, device=device) - batch.cu_seqlens[documents]
    tokens = batch.tokens.new_zeros(len(lengths), -(-batch.max_seqlen // multiple) * multiple)
    tokens[documents, offsets] = batch.tokens
    return tokens, offsets * len(lengths) + documents


def build_model(
    shape: ModelShape,
    *,
    model: ModelConfig,
    spec: Spec,
    layout: ParallelConfig,
    parallel: Parallel,
    temperature: float,
    attention: Attention = "local",
) -> list[LogprobGPTModel]:
    """This rank's shards of its runs of layers (one without interleaving), with Megatron's random initialisation.

    `spec` and `attention` go together: kernels.choose_kernels says which.
    """
    assert (spec == "local") == (attention == "local"), (spec, attention)
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    config = _transformer_config(shape, layout, parallel, dtype, attention)
    last = parallel.vpp_size - 1
    return [
        LogprobGPTModel(
            config=config,
            transformer_layer_spec=_block_spec(spec, config, chunk),
            vocab_size=shape.padded_vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=parallel.is_first_stage and chunk == 0,
            post_process=parallel.is_last_stage and chunk == last,
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="rope" if shape.yarn is None else "yarn",
            rotary_base=shape.rope_theta,
            vp_stage=chunk if parallel.vpp_size > 1 else None,
            temperature=temperature,
            chunk_tokens=model.logprob_chunk_tokens,
            real_vocab_size=shape.vocab_size,
            pads=model.sequence_layout == "padded",
        ).to(parallel.device)
        for chunk in range(parallel.vpp_size)
    ]


def _block_spec(spec: Spec, config: TransformerConfig, chunk: int) -> ModuleSpec | TransformerBlockSubmodules:
    if spec == "transformer_engine":
        from megatron_rlsc.policy.te_attention import SharedPromptTEAttention

        layer = get_gpt_layer_with_transformer_engine_spec()
        layer.submodules.self_attention.submodules.core_attention = SharedPromptTEAttention
        return layer
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage=chunk if config.virtual_pipeline_model_parallel_size else None)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


def _transformer_config(
    shape: ModelShape, layout: ParallelConfig, parallel: Parallel, dtype: torch.dtype, attention: Attention
) -> TransformerConfig:
    on_cpu = parallel.device.type != "cuda"
    interleaved = parallel.vpp_size > 1
    config = TransformerConfig if shape.yarn is None else partial(YarnTransformerConfig, **yarn_fields(shape.yarn))
    return config(
        # The architecture
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
        # The layout
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size if interleaved else None,
        context_parallel_size=layout.context_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        recompute_granularity=layout.recompute_granularity,
        recompute_method=layout.recompute_method,
        recompute_num_layers=layout.recompute_num_layers,
        # At PP 2 a stage's two neighbours are one peer, and batched messages of interleaved stages meet the wrong
        # receiver (p2p_communication.py): wrong gradients, in silence.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        # Packs differ in length, so a stage learns what it will receive. Megatron ties that to this MoE setting, which
        # a dense model never reads (transformer_config.py).
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_sync=not on_cpu,
        # gloo still reads an output after it was sent: freeing it gives wrong gradients, in silence.
        deallocate_pipeline_outputs=False,
        # Numerics
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The loss is a sum over responses, divided by their number in the global batch (finalize_model_grads.py).
        calculate_per_token_loss=True,
        # Initialisation also marks which parameters are sharded; without it the gradient norm is wrong under TP.
        perform_initialization=True,
        use_cpu_initialization=on_cpu,
        # Fused kernels that are CUDA extensions
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=not on_cpu,
        bias_dropout_fusion=not on_cpu,
        # Transformer Engine's; on packed sequences it leaves YaRN's attention factor out, in silence.
        apply_rope_fusion=attention != "local" and shape.yarn is None,
        persist_layer_norm=not on_cpu,
        # Never TE's choice at run time, which would fall back to whole matrices of scores in silence.
        attention_backend=AttnBackend[attention],
    )
