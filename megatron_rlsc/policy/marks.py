"""What a profiler is shown of megatron-core's part of a step: what its own timers would time, and attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from megatron_rlsc.policy.model import LogprobGPTModel
from megatron_rlsc.ranges import span


class _Timers:
    """Stands where megatron.core.timers.Timers stands, and answers with ranges of the same names (`forward-compute`,
    `forward-recv`, `all-grads-sync`, ...). It has no barrier and waits for no GPU: a step goes the way that it goes
    without."""

    def __init__(self) -> None:
        self._timers: dict[str, _Timer] = {}

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        return self._timers.setdefault(name, _Timer(name))


class _Timer:
    """One of them; it is never started twice before it is stopped."""

    def __init__(self, name: str) -> None:
        self._range = span(name)

    def start(self, barrier: bool = False) -> None:
        self._range.__enter__()

    def stop(self, barrier: bool = False) -> None:
        self._range.__exit__(None, None, None)


@contextmanager
def marked(chunks: Sequence[LogprobGPTModel], optimizer: MegatronOptimizer) -> Iterator[None]:
    """For the length of the block, ranges for a profiler; before it and after it, megatron-core as it is."""
    timers = _Timers()
    attention = timers("attention")

    def begin(*_: Any) -> None:
        attention.start()

    def end(*_: Any) -> None:
        attention.stop()

    configs = (chunks[0].config, optimizer.config)  # of all chunks, and of all parts of the optimizer
    with ExitStack() as hooks:
        for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
            core = layer.self_attention.core_attention
            hooks.enter_context(core.register_forward_pre_hook(begin))
            hooks.enter_context(core.register_forward_hook(end))
        for config in configs:
            config.timers = timers
        try:
            yield
        finally:
            for config in configs:
                config.timers = None
