"""What makes megatron-core 0.16 train without CUDA, or without Transformer Engine: every patch of it, with its reason.

Where CUDA is, `install()` touches the optimizer alone, and that only where Transformer Engine has brought none. It
never touches torch itself: the modules listed below get a `torch` of their own, in which the accelerator is the CPU.
"""

from __future__ import annotations

import functools
import importlib
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.adam import adam

# In these modules `device="cuda"` and `torch.cuda.current_device()` mean "the accelerator".
ACCELERATOR_MODULES = (
    "timers",
    "utils",
    "distributed.param_and_grad_buffer",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.state_dict_saver",
    "models.common.embeddings.rope_utils",
    "models.common.embeddings.rotary_pos_embedding",
    "models.common.embeddings.yarn_rotary_pos_embedding",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.optimizer",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.random",
    "tensor_parallel.utils",
    "transformer.attention",
    "transformer.utils",
)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return factory(*args, device="cpu" if str(device).startswith("cuda") else device, **kwargs)

    return make


class _CpuCuda:
    """`torch.cuda` with the CPU as the current device; everything else is torch.cuda's own."""

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def synchronize(self, *_: Any) -> None:
        pass

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _CpuTorch(types.ModuleType):
    """`torch` with factories that make CPU tensors of what asks for CUDA ones."""

    cuda = _CpuCuda()
    empty = staticmethod(_on_cpu(torch.empty))
    ones = staticmethod(_on_cpu(torch.ones))
    tensor = staticmethod(_on_cpu(torch.tensor))
    zeros = staticmethod(_on_cpu(torch.zeros))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class FusedAdam(torch.optim.Optimizer):
    """AdamW behind the interface of apex and Transformer Engine: the step count in the group, not in the state.

    Megatron's distributed-optimizer checkpoints are written for that interface; with torch.optim.AdamW they do not
    load (distrib_optimizer.py:642 and :940). The arithmetic is torch's.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # Transformer Engine's reads it from the group at every step, and takes the groups of a checkpoint as they are.
        super().__init__(params, defaults | {"bias_correction": True})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
                    self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
            steps_done = float(group.get("step", 0))
            adam(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                [torch.tensor(steps_done, device=param.device) for param in params],
                fused=True,  # all of a tensor's numbers in one pass
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.adam_w_mode,
            )
            group["step"] = int(steps_done) + 1


def _scale(chunk_size: int, overflow: torch.Tensor, tensors: list[list[torch.Tensor]], scale: float) -> None:
    """As amp_C's; utils.local_multi_tensor_scale makes a second copy of every gradient on the way."""
    for source, target in zip(*tensors):
        torch.mul(source, scale, out=target)


def _name_cpu_types(function: Any) -> None:
    """Turns the constants 'torch.cuda.FloatTensor' and so on, which `param.type()` is compared with, into CPU ones."""

    def renamed(constant: Any) -> Any:
        if isinstance(constant, tuple):
            return tuple(renamed(item) for item in constant)
        return constant.replace("torch.cuda.", "torch.") if isinstance(constant, str) else constant

    function.__code__ = function.__code__.replace(co_consts=renamed(function.__code__.co_consts))


@contextmanager
def _cuda_is_identity() -> Iterator[None]:
    original = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = original  # type: ignore[method-assign]


def _without_cuda_moves(owner: Any, name: str) -> None:
    """Inside this one function, `tensor.cuda()` returns the tensor."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _cuda_is_identity():
            return function(*args, **kwargs)

    setattr(owner, name, call)


def _core(name: str) -> Any:
    return importlib.import_module(f"megatron.core.{name}")


@functools.cache
def install() -> None:
    """Patches megatron-core once: for gloo and CPU tensors where there is no CUDA, and for torch's own AdamW."""
    optimizer, distributed = _core("optimizer"), _core("optimizer.distrib_optimizer")
    if optimizer.USING_PYTORCH_OPTIMIZER or not torch.cuda.is_available():
        # Without apex and TE megatron takes torch's AdamW, whose checkpoints the distributed optimizer refuses; without
        # CUDA theirs has no kernel.
        optimizer.Adam = distributed.Adam = FusedAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
        _core("optimizer.clip_grads").multi_tensor_scale_impl = _scale
    if torch.cuda.is_available():
        return
    # Advice for CUDA streams, given on every rank.
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
    _core("models.gpt")  # so that every module that copies a patched name exists by now
    cpu_torch = _CpuTorch("torch")
    for name in ACCELERATOR_MODULES:
        _core(name).torch = cpu_torch

    # The RNG tracker and activation recompute save and restore the accelerator's generator: here, the CPU's.
    random = _core("tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    # Optimizers and clipping sort parameters by the name of their tensor type.
    _name_cpu_types(_core("optimizer.clip_grads").clip_grad_by_total_norm_fp32)
    _name_cpu_types(_core("optimizer.optimizer").Float16OptimizerWithFloat16Params.__init__)
    _name_cpu_types(distributed.DistributedOptimizer.__init__)
    _name_cpu_types(distributed.DistributedOptimizer._build_model_and_main_param_groups.__func__)

    # language_module.py:244 moves the tied embedding of the last stage to CUDA to all-reduce it.
    _without_cuda_moves(
        _core("models.common.language_module.language_module").LanguageModule, "setup_embeddings_and_output_layer"
    )
    # Under CP, YaRN's cache of positions (never read on packed sequences) is cut by an index on CUDA.
    _without_cuda_moves(_core("models.common.embeddings.yarn_rotary_pos_embedding"), "get_pos_emb_on_this_cp_rank")
    # distrib_optimizer.py gathers a checkpoint's shards through CUDA buffers.
    _without_cuda_moves(distributed.DistributedOptimizer, "get_parameter_state_dp_zero")
