"""Inside vLLM's workers: weights from a file in the push directory, checked whole before the model is touched.

vLLM imports this module by the worker extension's name, which puts the backend into its table. No GPU has run it: it
uses nothing of the CPU but where it says so.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from megatron_rlsc.rollout.wire import PUSH_DIR_VARIABLE, TRANSFER_BACKEND, file_sha256

_NAMES_SHOWN = 5


@dataclass
class FileInit(WeightTransferInitInfo):
    """Nothing to agree on: the sidecar owns its push directory and tells it through `PushDirectory`."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    file: str
    """Name of a safetensors file in the push directory: HF names, whole tensors."""
    sha256: str
    """Hex digest of the file."""


class PushDirectory:
    """vLLM's worker extension; its methods answer `/collective_rpc`."""

    def push_directory(self) -> str:
        """Where the trainer must write what it pushes."""
        return str(private_directory())


class FileTransferEngine(WeightTransferEngine[FileInit, FileUpdate]):
    """Loads a whole model from one file. An update that is refused before `_load` leaves the old weights as they were;
    an exception inside `_load` leaves a worker that must be restarted."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate
    _loaded = False

    def init_transfer_engine(self, init_info: FileInit) -> None:
        private_directory()

    def start_weight_update(self) -> None:
        self._loaded = False

    def receive_weights(self, update_info: FileUpdate) -> None:
        directory = private_directory()
        if update_info.file not in os.listdir(directory):
            raise ValueError(f"{update_info.file!r} is no file of the push directory")
        path = directory / update_info.file
        if (found := file_sha256(path)) != update_info.sha256:
            raise ValueError(f"the file's sha256 is {found}, the trainer announced {update_info.sha256}")
        with safe_open(path, framework="pt", device="cpu") as file:
            found_specs = {name: _spec(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
            _compare(found_specs, self._expected_specs)
            self._load((name, file.get_tensor(name)) for name in found_specs)
        self._loaded = True

    def finish_weight_update(self) -> None:
        if not self._loaded:
            raise RuntimeError("no weights came between start and finish")

    def shutdown(self) -> None:
        """Nothing is held between updates."""

    @cached_property
    def _expected_specs(self) -> dict[str, str]:
        """What a whole model is, from its HF config: it owes nothing to the file. Tied copies count once."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.model_config.hf_config, dtype=self.model_config.dtype)
        return {name: f"{_dtype_name(value.dtype)} {list(value.shape)}" for name, value in model.named_parameters()}

    def _load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        # Layerwise, since what a layer holds may be a packed copy (oneDNN's linears): a plain load_weights misses it.
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(weights)
        finalize_layerwise_reload(self.model, self.model_config)
        if missed := {name for name, _ in self.model.named_parameters()} - loaded:
            raise RuntimeError(f"parameters that the push did not reach: {_some(missed)}")
        if current_platform.is_cpu() and self.model_config.hf_config.tie_word_embeddings:
            # A tied lm_head loads nothing of its own, so its packed copy is the embedding of the last push.
            head = self.model.lm_head
            head.quant_method.process_weights_after_loading(head)


def private_directory() -> Path:
    """The push directory. Raises ValueError where others could have put a file into it."""
    directory = Path(os.environ[PUSH_DIR_VARIABLE])
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ValueError(f"{directory} must be a directory of our own with mode 0700")
    return directory


def _compare(found: dict[str, str], expected: dict[str, str]) -> None:
    """Raises ValueError unless both list the same names, dtypes and shapes."""
    if missing := expected.keys() - found.keys():
        raise ValueError(f"{len(missing)} of {len(expected)} tensors are missing: {_some(missing)}")
    if extra := found.keys() - expected.keys():
        raise ValueError(f"{len(extra)} tensors are not in the model: {_some(extra)}")
    for name, spec in found.items():
        if spec != expected[name]:
            raise ValueError(f"{name} is {spec}, the model wants {expected[name]}")


def _spec(tensor: object) -> str:
    return f"{tensor.get_dtype()} {list(tensor.get_shape())}"  # type: ignore[attr-defined]


def _dtype_name(dtype: torch.dtype) -> str:
    """In safetensors' spelling."""
    return {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]


def _some(names: set[str]) -> str:
    shown = sorted(names)[:_NAMES_SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, FileTransferEngine)
