"""Transformer Engine on a CPU, as far as its Python goes: the wheel's own modules over an extension that has no kernel.

Models are built, named, filled, saved and loaded; nothing is computed. Once per process, before megatron is imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

FOLDER = Path(sys.prefix) / "te-python"
"""Beside site-packages, not in it: there megatron-core would find half a Transformer Engine."""
EXTENSION = "transformer_engine_torch"
COMPILED = (EXTENSION, "triton", "onnx", "onnxscript", "einops")
"""What the wheel imports and a CPU environment may lack."""


class _Hollow(types.ModuleType):
    """A module that has every name, and nothing behind it."""

    __path__: Sequence[str] = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = mock.MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _HollowFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last: what is installed is found before."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        is_ours = name.partition(".")[0] in COMPILED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Hollow(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@functools.cache
def install() -> None:
    assert "megatron" not in sys.modules, "megatron-core decides at its import whether there is a Transformer Engine"
    sys.path.append(str(FOLDER))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # common/__init__.py then loads no library
    finder = _HollowFinder()
    sys.meta_path.append(finder)
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None and spec.loader is not None
    # Its __init__ imports all of it, so `common`, which would load the extension, comes before.
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    extension: Any = importlib.import_module(EXTENSION)
    extension.get_cudnn_version = lambda: 91900
    importlib.import_module("transformer_engine.pytorch")  # where __init__ would hide an ImportError
    spec.loader.exec_module(package)
    sys.meta_path.remove(finder)
    # torch asks for triton too, and must not find this one.
    for name, module in list(sys.modules.items()):
        if isinstance(module, _Hollow) and name != EXTENSION:
            del sys.modules[name]


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """TE's modules ask for an H100 when they are made; tensors stay on the CPU."""
    with mock.patch.multiple(
        "torch.cuda",
        is_available=lambda: True,
        get_device_capability=lambda *_: (9, 0),
        get_device_properties=lambda *_: types.SimpleNamespace(major=9, minor=0),
    ):
        yield


def call(module: str, function: str, *args: Any) -> Any:
    """`module.function(*args)` where Transformer Engine was there first."""
    install()
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found(*args)
