"""RLSC in plain transformers and torch, one response at a time: what every layout must agree with.

It shares no line with the package: no packing, no chunks, no log space, no ranks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_rlsc.types import Sample

VOCAB = 259  # no power of two divides it: padded at TP 1, 2 and 4 alike
LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-5, 0.1, 0.1


def tiny_qwen(*, tied: bool) -> Qwen2ForCausalLM:
    """4 layers, 4 heads on 2 KV heads; drawn wide, so that no bias, norm or logit is a small matter."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = Qwen2ForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    return model


@torch.no_grad()
def draw_samples(
    model: Qwen2ForCausalLM, lengths: list[int], *, temperature: float, groups: list[int] | None = None
) -> list[Sample]:
    """Responses of the given lengths from p_old, with the log-probabilities that `token_logprobs` gives them; each to a
    prompt of its own, or to its group's."""
    samples = []
    for row, (group, length) in enumerate(zip(groups or range(len(lengths)), lengths, strict=True)):
        torch.manual_seed(group)
        prompt = torch.randint(VOCAB, (1, 1 + group * 5 % 8))
        if groups is not None:
            torch.manual_seed(1000 + row)
        tokens = prompt
        for _ in range(length):
            p = (model(tokens).logits[:, -1] / temperature).softmax(-1)
            tokens = torch.cat([tokens, p.multinomial(1)], dim=1)
        sample = Sample(
            group=group,
            sample=0,
            prompt_index=group,
            prompt_token_ids=tuple(prompt[0].tolist()),
            response_token_ids=tuple(tokens[0, prompt.shape[1] :].tolist()),
            rollout_logprobs=(0.0,) * length,
            finish_reason="length",
            seed=row,
            version="test",
        )
        logprobs, _ = token_logprobs(model, sample, temperature=temperature)
        samples.append(replace(sample, rollout_logprobs=tuple(logprobs.tolist())))
    return samples


def token_logprobs(model: Qwen2ForCausalLM, sample: Sample, *, temperature: float) -> tuple[Tensor, Tensor]:
    """log p of each response token, and the entropy where it is predicted: [response] each."""
    tokens = torch.tensor([sample.prompt_token_ids + sample.response_token_ids])
    logprobs = (model(tokens).logits[0] / temperature).log_softmax(-1)
    logprobs = logprobs[len(sample.prompt_token_ids) - 1 : -1]  # position i predicts token i + 1
    targets = torch.tensor(sample.response_token_ids)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def response_logprobs(model: Qwen2ForCausalLM, samples: list[Sample], *, temperature: float) -> Tensor:
    """[B] log p(y|x)"""
    return torch.stack([token_logprobs(model, sample, temperature=temperature)[0].sum() for sample in samples])


def rlsc_loss(logprobs: Tensor, old_logprobs: Tensor, *, alpha: float) -> Tensor:
    """The paper's L2 (L1 for alpha 0), p_old taken as a constant: the mean of -(p_old + alpha) log p_theta."""
    p_old = old_logprobs.detach().exp()
    return -((p_old + alpha) * logprobs).mean()


def batch_max_loss(logprobs: Tensor, old_logprobs: Tensor, *, alpha: float) -> Tensor:
    """The same, over the batch's largest p_old + alpha."""
    p_old = old_logprobs.detach().exp()
    return rlsc_loss(logprobs, old_logprobs, alpha=alpha) / (p_old + alpha).max()


def gradients(model: Qwen2ForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    """By HF name."""
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


def norm(grads: dict[str, Tensor]) -> float:
    return torch.stack([grad.norm() for grad in grads.values()]).norm().item()


def adamw(model: Qwen2ForCausalLM, *, weight_decay: float = WEIGHT_DECAY) -> torch.optim.AdamW:
    """Decay on matrices alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)


def update(model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, loss: Tensor, *, clip: float = CLIP) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
