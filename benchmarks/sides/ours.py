"""This package, by the calls that train.py makes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_rlsc.config import Config, ObjectiveConfig, OptimizerConfig, RolloutConfig
from megatron_rlsc.conversion.shape import read_shape
from megatron_rlsc.learning import Weights
from megatron_rlsc.policy.parallel import init_parallel
from megatron_rlsc.policy.policy import Policy
from megatron_rlsc.types import Sample
from sides.work import BETAS, CLIP, EPS, WEIGHT_DECAY, Outcome, Setup


def build(setup: Setup) -> Ours:
    return Ours(setup)


def optimizer_config(lr: float) -> OptimizerConfig:
    return OptimizerConfig(
        lr=lr,
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        clip_grad=CLIP,
    )


class Ours:
    def __init__(self, setup: Setup) -> None:
        config = Config(
            rollout=RolloutConfig(temperature=setup.temperature),
            objective=ObjectiveConfig(alpha=setup.alpha),
            optimizer=optimizer_config(setup.lr),
        )
        sections = {name: replace(getattr(config, name), **fields) for name, fields in setup.settings.items()}
        self.config = replace(config, **sections)
        self.policy = Policy(self.config, read_shape(setup.model), init_parallel(self.config.parallel, seed=1))
        self.policy.load(setup.model)

    def step(self, samples: list[Sample], micro_batch: int) -> Outcome:
        batch = self.policy.pack(samples)
        weights = Weights(self.config.objective, samples, None)
        scores = self.policy.forward_backward(batch.micro_batches, len(samples), weights)
        norm = self.policy.gradient_norm()
        self.policy.step()
        weighed = weights(scores.logprobs, scores.lengths, torch.arange(len(samples))) * scores.logprobs
        return Outcome(loss=-weighed.mean().item(), gradient_norm=norm, logprobs=sorted(scores.logprobs.tolist()))

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for chunk in self.policy.chunks for parameter in chunk.parameters()]

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.policy.iter_hf_weights()}
