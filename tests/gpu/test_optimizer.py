"""One AdamW, whoever computes it: Transformer Engine's kernel, ours, and the formula in float64.

Not covered: more than one rank, the learning rate's schedule (tests/policy).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hf import MODELS
from policies import OPTIMIZER, build_policy, read_all, set_gradient
from torch import Tensor

from megatron_rlsc.conversion.rules import Spec
from megatron_rlsc.policy import cpu
from megatron_rlsc.policy.parallel import Parallel
from megatron_rlsc.policy.policy import Policy

LR, BETAS, EPS, DECAY, STEPS = 1e-3, (0.9, 0.95), 1e-8, 0.1, 5
MODEL = MODELS["two-layers"]
State = dict[str, Tensor]


class Exact:
    """AdamW of one tensor (Loshchilov and Hutter, algorithm 2) in float64."""

    def __init__(self, weight: Tensor, *, decay: float) -> None:
        self.weight, self.decay, self.step = weight.double(), decay, 0
        self.first, self.second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)

    def update(self, gradient: Tensor, *, lr: float) -> None:
        self.step += 1
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * gradient.double()
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * gradient.double() ** 2
        first, second = self.first / (1 - BETAS[0] ** self.step), self.second / (1 - BETAS[1] ** self.step)
        self.weight = self.weight * (1 - lr * self.decay) - lr * first / (second.sqrt() + EPS)


@pytest.fixture(params=["ours", "transformer_engine"])
def fused_adam(request: pytest.FixtureRequest, parallel: Parallel) -> type[torch.optim.Optimizer]:
    if request.param == "ours":
        return cpu.FusedAdam
    request.getfixturevalue("transformer_engine")
    from transformer_engine.pytorch.optimizers import FusedAdam

    return FusedAdam


def test_five_steps(fused_adam: type[torch.optim.Optimizer], parallel: Parallel) -> None:
    """1e-5 of the change, and a float32 rounding of the weight a step; of one element, and of more than a block's."""
    generator = torch.Generator(parallel.device).manual_seed(0)
    sizes = [(1,), (257,), (64, 96), (1024, 1536)]
    weights = [torch.randn(size, generator=generator, device=parallel.device) for size in sizes]
    exact = [Exact(weight, decay=DECAY) for weight in weights]
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = fused_adam(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)  # type: ignore[call-arg]
    for _ in range(STEPS):
        for parameter, reference in zip(parameters, exact, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator, device=parallel.device)
            reference.update(parameter.grad, lr=LR)
        optimizer.step()
    for parameter, reference, before in zip(parameters, exact, weights, strict=True):
        change = (reference.weight - before.double()).norm()
        error = (parameter.detach().double() - reference.weight).norm()
        assert error < 1e-5 * change + STEPS * 2**-24 * before.double().norm()


def gradients(device: torch.device) -> list[State]:
    """Two, of every HF tensor."""
    generator = torch.Generator(device).manual_seed(1)
    shapes = MODEL.shape.hf_tensors()
    return [
        {name: torch.randn(size, generator=generator, device=device) for name, size in shapes.items()} for _ in range(2)
    ]


def test_a_bfloat16_policy_is_updated_in_float32(spec: Spec, parallel: Parallel) -> None:
    """Master weights are the formula's, from the bfloat16 ones; the model holds them rounded."""
    policy = build_policy(MODEL, spec, parallel)
    exact = {
        name: Exact(weight, decay=OPTIMIZER.weight_decay if weight.dim() > 1 else 0.0)
        for name, weight in MODEL.state(parallel.device).items()
    }
    for gradient in gradients(parallel.device):
        set_gradient(policy, gradient)
        policy.gradient_norm()
        lr = policy.step()
        for name, reference in exact.items():
            reference.update(gradient[name], lr=lr)
    main, held = read_all(policy, "main_param"), read_all(policy, "data")
    start = MODEL.state(parallel.device)
    for name, reference in exact.items():
        change = (reference.weight - start[name].double()).norm()
        assert (main[name].double() - reference.weight).norm() < 1e-4 * change, name
        assert held[name].equal(main[name].bfloat16()), name
        assert main[name].dtype == torch.float32 and not main[name].equal(held[name].float())


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        ({}, 1e-4),
        ({"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}, 2e-2),
        ({"main_grads_dtype": "bf16"}, 2e-2),
        ({"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16", "main_params_dtype": "fp16"}, 2e-1),
    ],
    ids=["fp32", "bf16-moments", "bf16-gradients", "fp8"],
)
def test_a_precision_aware_optimizer(
    dtypes: dict[str, str], tolerance: float, transformer_engine: None, parallel: Parallel
) -> None:
    """Master weights after two updates, against the plain distributed optimizer's: within what the dtypes round."""
    asked = replace(OPTIMIZER, use_precision_aware_optimizer=True, **dtypes)  # type: ignore[arg-type]
    plain = build_policy(MODEL, "transformer_engine", parallel, distributed=True)
    aware = build_policy(MODEL, "transformer_engine", parallel, distributed=True, optimizer=asked)
    start = masters(plain)
    for gradient in gradients(parallel.device):
        for policy in (plain, aware):
            set_gradient(policy, gradient)
            policy.gradient_norm()
            policy.step()
    expected, found = masters(plain), masters(aware)
    assert (found - expected).norm() < tolerance * (expected - start).norm()
    held = read_all(aware, "data")
    for name, weight in MODEL.state(parallel.device).items():
        assert held[name].dtype == torch.bfloat16
        assert weight.dim() == 1 or not held[name].equal(weight), "a norm's change may be less than bfloat16 holds"


def masters(policy: Policy) -> Tensor:
    """[all] every float32 weight of a distributed optimizer, end to end."""
    (wrapped,) = policy.optimizer.chained_optimizers
    inner, aware = wrapped.optimizer, wrapped.config.use_precision_aware_optimizer
    shards = [shard for group in inner.param_groups for shard in group["params"]]
    return torch.cat([inner.get_unscaled_state(shard, "master_param") if aware else shard.detach() for shard in shards])


def test_gradient_norm_and_clipping(spec: Spec, parallel: Parallel) -> None:
    """Transformer Engine brings kernels for both; the norm is that of the numbers, and clipping scales by it."""
    policy = build_policy(MODEL, spec, parallel, optimizer=replace(OPTIMIZER, clip_grad=1.0))
    gradient = gradients(parallel.device)[0]
    set_gradient(policy, gradient)
    norm = torch.stack([grad.double().norm() for grad in gradient.values()]).norm().item()
    assert policy.gradient_norm() == pytest.approx(norm, rel=1e-5)
    policy.step()
    moments = policy.optimizer.chained_optimizers[0].optimizer.state.values()
    first = torch.stack([state["exp_avg"].double().norm() for state in moments]).norm().item()
    assert first == pytest.approx(1 - BETAS[0], rel=1e-4)  # (1 - beta1) of a gradient of norm 1
