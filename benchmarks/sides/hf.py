"""(a) The paper's algorithm as it reads, in transformers and torch: right-padded micro-batches, all logits."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from megatron_rlsc.types import Sample
from sides.work import BETAS, CLIP, EPS, WEIGHT_DECAY, Outcome, Setup


def build(setup: Setup) -> HFLoop:
    return HFLoop(setup)


class HFLoop:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = load(setup)
        self.optimizer = adamw(self.model, setup.lr)

    def step(self, samples: list[Sample], micro_batch: int) -> Outcome:
        self.optimizer.zero_grad()
        loss, logprobs = 0.0, []
        for first in range(0, len(samples), micro_batch):
            log_p = self.log_p(samples[first : first + micro_batch])
            p_old = log_p.detach().exp()
            part = -((p_old + self.setup.alpha) * log_p).sum() / len(samples)
            part.backward()
            loss += part.item()
            logprobs += log_p.tolist()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Outcome(loss=loss, gradient_norm=norm, logprobs=sorted(logprobs))

    def log_p(self, samples: list[Sample]) -> Tensor:
        """[micro_batch] log p(y|x) at the sampling temperature"""
        longest = max(sample.length for sample in samples)
        tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
        mask = torch.zeros(len(samples), longest, dtype=torch.int64)
        for row, sample in enumerate(samples):
            tokens[row, : sample.length] = torch.tensor(sample.prompt_token_ids + sample.response_token_ids)
            mask[row, : sample.length] = 1
        tokens, mask = tokens.to(self.setup.device), mask.to(self.setup.device)
        # From the first position on that predicts a response token of any of them
        first = min(len(sample.prompt_token_ids) for sample in samples)
        logits = self.model(tokens, attention_mask=mask).logits[:, first - 1 : -1] / self.setup.temperature
        per_token = logits.log_softmax(-1).gather(2, tokens[:, first:, None])[..., 0]
        prompts = torch.tensor([len(sample.prompt_token_ids) for sample in samples], device=self.setup.device)
        is_response = torch.arange(first, longest, device=self.setup.device) >= prompts[:, None]
        return (per_token * is_response * mask[:, first:]).sum(1)

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def load(setup: Setup) -> Qwen2ForCausalLM:
    model = Qwen2ForCausalLM.from_pretrained(setup.model, dtype=torch.float32, attn_implementation="sdpa")
    return model.to(setup.device).train()


def adamw(model: Qwen2ForCausalLM, lr: float) -> torch.optim.AdamW:
    """Decay on matrices alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS)
