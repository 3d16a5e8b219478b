"""The self-confidence loss of RLSC (arXiv 2506.06395, equations 2 to 5). Pure tensors: no rank, no model.

Derivation. A policy is confident when two draws agree:

    F(theta) = E_{y ~ p_theta}[p_theta(y|x)] = sum_y p_theta(y|x)^2

    grad F   = 2 sum_y p_theta grad p_theta = 2 sum_y p_theta^2 grad log p_theta
             = 2 E_{y ~ p_theta}[p_theta(y|x) grad log p_theta(y|x)]                       (*)

The last line is an expectation over the policy's own samples. Freeze the sampler, p_old = p_theta at the time of
sampling, and (*) is -2 times the gradient of the mean over samples y_1 .. y_B ~ p_old of

    L1 = -  p_old(y_i|x)          log p_theta(y_i|x)
    L2 = - (p_old(y_i|x) + alpha) log p_theta(y_i|x)

so that E[grad L1] = -1/2 grad F at theta = old: the factor 2 goes into the learning rate. The paper's sum_y runs over
the *sampled* responses. Enumerating all y without the probabilities gives another gradient: that of L1 would be
-sum_y p grad log p = -grad sum_y p = 0.

alpha adds -alpha E_{p_old}[grad log p_theta], which is zero in expectation at theta = old (the score function has mean
zero): it is no smoothing of the direction but self-imitation noise of the drawn samples, which keeps a step from
vanishing when p_old underflows, and beyond the first update on a batch it holds p_theta near p_old.

log p(y|x) is the sum over response tokens, the first stop token included, at the sampling temperature, since that is
the distribution that the responses come from.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

WeightScale = Literal["none", "batch-max"]


def log_weights(old_logprobs: Tensor, alpha: float) -> Tensor:
    """log(p_old + alpha) of each response, in float64: exact where exp(log p_old) underflows and alpha is 0.

    Args:
        old_logprobs: [B] log p_old(y|x), nats.
        alpha: the smoothing constant of L2; 0 gives L1.
    """
    old_logprobs = old_logprobs.detach().double()
    if alpha == 0:
        return old_logprobs
    return torch.logaddexp(old_logprobs, torch.full_like(old_logprobs, math.log(alpha)))


def weight_shift(old_logprobs: Tensor, alpha: float, weight_scale: WeightScale) -> float:
    """The shift s, one for the global batch, in the weights exp(log(p_old + alpha) - s).

    `none` is the paper: s = 0. `batch-max` takes the largest log(p_old + alpha), so that the largest weight is 1: the
    loss is divided by one constant, its direction is exact at any response length.
    """
    return 0.0 if weight_scale == "none" else log_weights(old_logprobs, alpha).max().item()


def response_losses(logprobs: Tensor, old_logprobs: Tensor, *, alpha: float, shift: float = 0.0) -> Tensor:
    """-(p_old + alpha) exp(-shift) log p_theta of each response (L1 for alpha = 0, else L2). Their mean is the loss.

    Args:
        logprobs: [B] log p_theta(y|x), summed over the response at the sampling temperature; carries the gradient.
        old_logprobs: [B] log p_old(y|x); taken as a constant, so `logprobs` itself will do on the first update.
        alpha: the constant of L2.
        shift: from `weight_shift`, over the global batch.
    """
    if logprobs.shape != old_logprobs.shape:
        raise ValueError(f"logprobs {tuple(logprobs.shape)} and old_logprobs {tuple(old_logprobs.shape)} must match")
    weights = (log_weights(old_logprobs, alpha) - shift).exp()
    return -weights.to(logprobs.dtype) * logprobs
