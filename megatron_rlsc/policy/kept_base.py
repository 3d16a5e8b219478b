"""The base's weights in host memory, which take the policy's place for a forward pass and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class KeptBase:
    """A copy of this rank's parameters, made when they are the base's: each rank's own shards, so that any layout has a
    whole base, and a swap is no collective.

    There is one host tensor a parameter, pinned where the parameter is on a GPU. A swap exchanges the two, so while the
    base is in the model the policy is on the host: no second copy, and on the device room for the largest parameter.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        """
        Args:
            chunks: this rank's stages, with the base's weights in them.
        """
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._host = [_to_host(parameter) for parameter in self._parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the base for the length of the block; afterwards it is the policy again, to the last bit. No
        update may be made inside."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, host in zip(self._parameters, self._host, strict=True):
            held = parameter.clone()
            parameter.copy_(host)
            host.copy_(held)


def _to_host(parameter: Tensor) -> Tensor:
    host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
    return host.copy_(parameter.detach())
