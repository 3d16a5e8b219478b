"""The processes that all tests of the policy share, and the models that they are held against."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    torch.set_num_threads(1)  # the ranks have the cores
    world = World(4)
    yield world
    world.close()
