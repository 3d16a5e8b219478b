"""What crosses from one file to the next: a prompt, a sample of its response, a micro-batch, a step's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the rollout client and `--help` never pay for torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question, rendered and tokenized: what the sampler is given."""

    index: int
    """Line of the question in the prompt file, from 0."""
    text: str
    """The rendered prompt, chat template included."""
    token_ids: tuple[int, ...]
    """[prompt] the ids of `text`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One response y ~ p_old(. | x). Siblings (same `group`) answer the same prompt."""

    group: int
    """Position of the prompt among the step's prompts; siblings share it."""
    sample: int
    """Position among the siblings, 0 .. samples_per_prompt - 1."""
    prompt_index: int
    """`Prompt.index`."""
    prompt_token_ids: tuple[int, ...]
    """[prompt]"""
    response_token_ids: tuple[int, ...]
    """[response] up to and including the first stop token; without one where the response was cut."""
    rollout_logprobs: tuple[float, ...]
    """[response] the sampler's log-probability of each token, in nats, at the sampling temperature."""
    finish_reason: Literal["stop", "length"]
    """`stop`: ends in a stop token. `length`: cut at the response limit."""
    seed: int
    """The seed of the request that made it."""
    version: str
    """Of the weights that made it, from first token to last: `<run id>:<push>:<step>`."""

    @property
    def made_after(self) -> int | None:
        """The step after which those weights were pushed; None of a version that does not say."""
        parts = self.version.split(":")
        return int(parts[2]) if len(parts) == 3 and parts[2].isdigit() else None

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_token_ids) + len(self.response_token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataShare:
    """Which part of every global batch a rank computes, and what its layout asks of it."""

    dp_rank: int = 0
    """Which replica: it has micro-batches of its own."""
    dp_size: int = 1
    """Replicas."""
    cp_rank: int = 0
    """Which two chunks of each of the replica's documents."""
    cp_size: int = 1
    """Ranks that share a document."""
    sp_size: int = 1
    """Ranks that share a micro-batch's activations along its tokens: TP's under sequence parallelism."""
    micro_batch_multiple: int = 1
    """What the number of micro-batches must be a multiple of: PP's stages, when they are interleaved."""

    @property
    def document_multiple(self) -> int:
        """What each document is padded to a multiple of: two chunks a context-parallel rank."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def pack_multiple(self) -> int:
        """What a whole pack is padded to a multiple of: equal parts for every CP and SP rank."""
        return math.lcm(self.document_multiple, self.cp_size * self.sp_size)

    def padded(self, tokens: int) -> int:
        """What a document of so many tokens takes up in a pack."""
        return -(-tokens // self.document_multiple) * self.document_multiple

    def capacity(self, max_tokens: int) -> int:
        """What of a pack's budget can be filled, so that the padding behind its last document fits as well."""
        return max_tokens // self.pack_multiple * self.pack_multiple


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrompts:
    """How documents read a prompt that stands in the pack once, in front of the first of its responses.

    Prompt `ab` with two responses, `xy` and `z`; z too is predicted where the prompt ends:

        tokens         a b x y z
        cu_seqlens     0       4 5
        positions        1 2 1
        targets          x y z
        position_ids   0 1 2 3 2
        kv_index       0 1 2 3 0 1 4
        cu_seqlens_kv  0       4     7
    """

    position_ids: Tensor
    """[t] int64, each token's place in its own sequence: a response's go on where its prompt ends."""
    kv_index: Tensor
    """[k] int64, into `tokens`: the documents' keys end to end, the prompts of siblings before their own tokens."""
    cu_seqlens_kv: Tensor
    """[d + 1] int32, where each document's keys begin among the k."""
    max_seqlen_q: int
    """Tokens of the longest document, without a prompt that stands elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Whole samples laid end to end (`thd`): one forward pass. d documents, t tokens, n response tokens.

    The model predicts token i + 1 at position i, so a response of r tokens behind a prompt of p is read off positions
    p - 1 .. p + r - 2. Two documents, prompts `ab` and `c`, responses `xy` and `z`:

        tokens       a b x y c z
        cu_seqlens   0       4   6
        positions      1 2   4        where the response's tokens are predicted
        targets        x y   z
        segments       0 0   1

    Under context parallelism a document is cut into 2 cp chunks, and rank r has chunks r and 2 cp - 1 - r of each, end
    to end: t and n are what this rank has, and `positions` count there. Padding stands at the end of documents, where
    nothing attends to it.
    """

    tokens: Tensor
    """[t] int64"""
    cu_seqlens: Tensor
    """[d + 1] int32, where each document begins in the whole pack, all CP ranks' parts together, and its length."""
    max_seqlen: int
    """Tokens of the longest document, its prompt and padding included."""
    positions: Tensor
    """[n] int64, into `tokens`: where each response token is predicted."""
    targets: Tensor
    """[n] int64, the response tokens."""
    segments: Tensor
    """[n] int64, the document that each response token belongs to."""
    responses: tuple[int, ...]
    """[d] tokens of each response, all CP ranks' parts together."""
    rollout_logprobs: Tensor
    """[n] float32, the sampler's."""
    sample_ids: Tensor
    """[d] int64, each document's row in the global batch; -1 for a filler, which counts for nothing."""
    shared: SharedPrompts | None = None
    """Where documents have their prompt from siblings; None where each has its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseScores:
    """What the policy says of every response of the global batch: B rows, the same on every rank."""

    logprobs: Tensor
    """[B] float64, log p_theta(y|x) at the sampling temperature, summed over the response."""
    entropy: Tensor
    """[B] float64, the token entropy summed over the response, in nats."""
    lengths: Tensor
    """[B] int64, response tokens, the stop token included."""
    rollout_difference: Tensor
    """[B] float64, the largest |log p of the policy - log p of the sampler| of a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is: what a checkpoint says beside the weights and the optimizer."""

    step: int = 0
    """The last one that is done."""
    prompts: int = 0
    """Asked so far: the next step's are the next ones of the endless row of shuffled epochs."""
    pushes: int = 0
    """Weight updates that samplers have had."""
    version: str = ""
    """Of the last of them."""


def _tag(tag: str) -> Any:
    """A figure, under its name in TensorBoard and metrics.jsonl."""
    return field(metadata={"tag": tag})


def _rare(tag: str) -> Any:
    """A figure that not every step has: None in the others, which then write nothing under its name."""
    return field(default=None, metadata={"tag": tag})


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What can be said of a step without a label. B responses; p is p_old(y|x), a whole response's probability: the
    policy's, and with --rollout-lead, where that has moved on, the sampler's."""

    loss: float = _tag("loss")
    """Mean over responses of -w log p_theta, theta being the policy that learns, w their weights: for RLSC p + alpha,
    after the shift of batch-max."""
    confidence: float = _tag("confidence/mean")
    """Mean p: the estimate of F = E_{y~p}[p(y|x)], which RLSC raises."""
    log_confidence: float = _tag("confidence/log_mean")
    """log of the same, exact where exp underflows; nats."""
    identical_share: float = _tag("confidence/identical_share")
    """Share of equal pairs among the siblings of a group: F again, by counting."""
    identical_error: float = _tag("confidence/identical_error")
    """Its standard error, from how groups differ in it; 0 of a single group."""
    token_probability: float = _tag("confidence/token_probability")
    """exp(mean token log p)."""
    negligible_share: float = _tag("weights/negligible_share")
    """Of RLSC: share of responses with p below alpha / 100, which alpha alone weighs."""
    effective_samples: float = _tag("weights/effective_samples")
    """(sum |w|)^2 / sum w^2: B when all weigh alike, 1 when one response is everything, 0 when none weighs anything."""
    weightless: bool = _tag("weights/weightless")
    """Every weight is 0 in float32: the step learns nothing."""
    token_entropy: float = _tag("policy/token_entropy")
    """Mean over response tokens, at the sampling temperature, of the policy that learns; nats."""
    response_length: float = _tag("rollout/response_length")
    """Mean tokens."""
    truncated_share: float = _tag("rollout/truncated_share")
    """Share of responses cut at the limit."""
    repeated_share: float = _tag("rollout/repeated_share")
    """Share of the runs of 8 tokens in a response that it has had before: near 1 in a loop."""
    distinct_share: float = _tag("rollout/distinct_share")
    """Mean over groups of different responses / siblings: RLSC lowers it."""
    distinct_answers: float = _tag("rollout/distinct_answers")
    """Different answers / prompts, a prompt's answer being how most of its responses end (16 tokens): what RLSC leaves
    alone, and what falls when the policy says one thing whatever it is asked."""
    logprob_difference: float = _tag("rollout/logprob_difference")
    """Largest |log p of the sampler - log p of the trainer| of a token. With --rollout-lead the trainer is an update
    ahead of the weights that sampled."""
    log_ratio: float | None = _tag("rollout/log_ratio")
    """With --rollout-lead: mean over responses of log p_theta - log p, theta being the policy that learns: minus the KL
    of theta from the weights that sampled, nats a response. None without."""
    reward: float | None = _tag("reward/mean")
    """Mean over responses; None where the method takes none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How much of what the ranks compute is a step's own tokens, and how evenly replicas share it."""

    padding_share: float = _tag("packing/padding_share")
    """Of all tokens that are computed, those of no sample: behind documents, and fillers."""
    imbalance: float = _tag("packing/imbalance")
    """The heaviest replica's work over the mean of all, less 1; by attention, layers and output head."""
    reused_share: float = _tag("packing/reused_share")
    """Of the samples' tokens, those of prompts that a sibling in the same pack has computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A step's responses, as a rank computes them."""

    micro_batches: list[MicroBatch]
    """As many on every rank."""
    load: Load
    """Of all ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """One step, as it is logged."""

    step: int
    """Counted from 1."""
    health: Health
    gradient_norm: float = _tag("optimizer/gradient_norm")
    """Of the step's last update, before clipping."""
    learning_rate: float = _tag("optimizer/learning_rate")
    load: Load
    """Of the step's packs."""
    weight_shift: float = _tag("weights/shift")
    """Of batch-max: the largest log(p + alpha); 0 without."""
    pushes: int = _tag("sync/pushes")
    """Weight updates that samplers have had since the run began."""
    probe_difference: float = _tag("sync/probe_difference")
    """After the last of them: the largest |log p| difference of a token of a fixed prompt, of any replica; T=1."""
    tokens_per_second: float = _tag("speed/tokens_per_second")
    """Response tokens over the whole step's seconds."""
    kl_response: float | None = _rare("kl/response")
    """E_{y~p_old}[log p_old(y) - log p_base(y)] of a response, nats; None in a step that does not ask the base."""
    kl_token: float | None = _rare("kl/token")
    """The same of a token: over all responses' tokens."""
    seconds: Mapping[str, float]
    """Of each phase, under `time/`."""
