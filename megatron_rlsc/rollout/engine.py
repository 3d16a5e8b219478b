"""Inside vLLM's workers: weights in buckets, from files or a process group, and answers about what is live.

vLLM imports this module by the worker extension's name, which puts the backend into its table. No GPU has run it: it
uses nothing of the CPU but where it says so.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
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

from megatron_rlsc.rollout.buckets import TensorSpec, bucket_nbytes, checksum, unpack
from megatron_rlsc.rollout.group import TransferGroup
from megatron_rlsc.rollout.wire import PUSH_DIR_VARIABLE, TRANSFER_BACKEND

_NAMES_SHOWN = 5


@dataclass
class TransferInit(WeightTransferInitInfo):
    """How buckets come: as files of the push directory, or from the sender of a group."""

    transport: str
    """"file", "nccl" or "gloo"."""
    address: str = ""
    """Of the group's rendezvous, with"""
    port: int = 0
    world_size: int = 0
    """The sender and all workers."""
    timeout: float = 0.0
    """Seconds of every wait for the sender."""


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    """One bucket; or, as the first of a push, the announcement of all that is to come."""

    announced: list[list[Any]] | None = None
    """Every tensor of the push (TensorSpec.to_json), and no bucket yet."""
    tensors: list[list[Any]] = field(default_factory=list)
    """Of the bucket."""
    checksum: str = ""
    file: str = ""
    """Name in the push directory, where files are the transport."""


class Inspection:
    """vLLM's worker extension; its methods answer `/collective_rpc`, one answer a worker."""

    def describe_transfer(self) -> dict[str, Any]:
        """What the trainer chooses the transport by."""
        directory = str(private_directory()) if PUSH_DIR_VARIABLE in os.environ else ""
        return {"directory": directory, "device": self.device.type, "host": socket.gethostname()}  # type: ignore[attr-defined]

    def abandon_update(self) -> None:
        """Forgets a push that broke off, so that another may start: vLLM ends one by an error or a finish alone."""
        if self._weight_update_active:  # type: ignore[has-type]
            self._weight_update_active = False
            self.weight_transfer_engine.reset_weight_update_target()  # type: ignore[attr-defined]

    def live_checksums(self) -> dict[str, str]:
        """Checksums of live parameters that vLLM keeps under HF's name and as HF has them, whatever the backend: the
        norms. Linears may be packed, fused or cut."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        return {
            name: "not loaded" if value.is_meta else checksum(value.detach().contiguous().view(torch.uint8))
            for name, value in model.named_parameters()
            if value.dim() == 1 and name.endswith("norm.weight")
        }


class BucketTransferEngine(WeightTransferEngine[TransferInit, BucketUpdate]):
    """Loads a whole model, bucket by bucket. What is announced is compared with the model before it is touched. A push
    that breaks off after that leaves a model that nobody may ask anything, until a whole push has mended it."""

    init_info_cls = TransferInit
    update_info_cls = BucketUpdate

    _init: TransferInit | None = None
    _group: TransferGroup | None = None
    _touched = False
    """Whether the model holds a part of a push."""
    _announced = False
    _loaded: set[str]
    """vLLM's parameters, and"""
    _received: set[str]
    """HF's tensors, of this push."""

    def init_transfer_engine(self, init_info: TransferInit) -> None:
        self.shutdown()
        if init_info.transport == "file":
            private_directory()
        else:
            parallel = self.parallel_config
            worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
            with _unpinned_nccl():
                self._group = TransferGroup(
                    init_info.transport,  # type: ignore[arg-type]
                    address=init_info.address,
                    port=init_info.port,
                    rank=1 + worker,
                    world_size=init_info.world_size,
                    timeout=init_info.timeout,
                    device=self.device,
                )
        self._init = init_info

    def start_weight_update(self) -> None:
        if self._touched:  # an earlier push broke off: its layers are closed as they are, to be opened anew
            finalize_layerwise_reload(self.model, self.model_config)
        self._announced, self._loaded, self._received = False, set(), set()

    def receive_weights(self, update_info: BucketUpdate) -> None:
        if update_info.announced is not None:
            _compare({spec.name: str(spec) for spec in _read_specs(update_info.announced)}, self._expected_specs)
            # Layerwise, since what a layer holds may be a packed copy (oneDNN's linears): load_weights alone misses it.
            self._announced = self._touched = True
            initialize_layerwise_reload(self.model)
            return
        if not self._announced:
            raise RuntimeError("a bucket came before the push was announced")
        specs = _read_specs(update_info.tensors)
        data = self._receive(update_info, bucket_nbytes(specs))
        if (found := checksum(data)) != update_info.checksum:
            raise ValueError(
                f"the checksum of a bucket is {found} here and {update_info.checksum} at the trainer: "
                f"{_some({spec.name for spec in specs})} were changed on their way"
            )
        for spec in specs:
            if spec.name in self._received or str(spec) != self._expected_specs.get(spec.name):
                raise ValueError(f"{spec.name} ({spec}) comes twice, or was not announced so")
            self._received.add(spec.name)
        self._loaded |= self.model.load_weights(unpack(specs, data))

    def finish_weight_update(self) -> None:
        if missing := self._expected_specs.keys() - self._received:
            raise RuntimeError(f"{len(missing)} tensors did not come: {_some(missing)}")
        finalize_layerwise_reload(self.model, self.model_config)
        if missed := {name for name, _ in self.model.named_parameters()} - self._loaded:
            raise RuntimeError(f"parameters that the push did not reach: {_some(missed)}")
        if current_platform.is_cpu() and self.model_config.hf_config.tie_word_embeddings:
            # A tied lm_head loads nothing of its own, so its packed copy is the embedding of the last push.
            head = self.model.lm_head
            head.quant_method.process_weights_after_loading(head)
        self._touched = False

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _receive(self, update: BucketUpdate, nbytes: int) -> Tensor:
        """[nbytes] uint8 of its own memory: layers keep parts of it until they are whole."""
        assert self._init is not None
        if self._group is not None:
            data = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            self._group.broadcast(data)
            return data
        directory = private_directory()
        if update.file not in os.listdir(directory):
            raise ValueError(f"{update.file!r} is no file of the push directory")
        data = torch.empty(nbytes, dtype=torch.uint8)
        with (directory / update.file).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != nbytes or file.readinto(data.numpy().data) != nbytes:
                raise ValueError(f"{update.file} has {size} bytes, its tensors take {nbytes}")
        return data.to(self.device)

    @cached_property
    def _expected_specs(self) -> dict[str, str]:
        """What a whole model is, from its HF config: it owes nothing to the push. Tied copies count once."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.model_config.hf_config, dtype=self.model_config.dtype)
        return {
            name: str(TensorSpec(name=name, dtype=value.dtype, shape=tuple(value.shape)))
            for name, value in model.named_parameters()
        }


def private_directory() -> Path:
    """The push directory. Raises ValueError where others could have put a file into it."""
    directory = Path(os.environ[PUSH_DIR_VARIABLE])
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ValueError(f"{directory} must be a directory of our own with mode 0700")
    return directory


def _unpinned_nccl() -> contextlib.AbstractContextManager[None]:
    """Without the NCCL settings that vLLM pins for its own groups: the trainer has not."""
    if not current_platform.is_cuda_alike():
        return contextlib.nullcontext()
    from vllm.utils.nccl import unpinned_nccl_env

    return unpinned_nccl_env()


def _read_specs(items: list[list[Any]]) -> list[TensorSpec]:
    return [TensorSpec.from_json(item) for item in items]


def _compare(found: dict[str, str], expected: dict[str, str]) -> None:
    """Raises ValueError unless both list the same names, dtypes and shapes."""
    if missing := expected.keys() - found.keys():
        raise ValueError(f"{len(missing)} of {len(expected)} tensors are missing: {_some(missing)}")
    if extra := found.keys() - expected.keys():
        raise ValueError(f"{len(extra)} tensors are not in the model: {_some(extra)}")
    for name, spec in found.items():
        if spec != expected[name]:
            raise ValueError(f"{name} is {spec}, the model wants {expected[name]}")


def _some(names: set[str]) -> str:
    shown = sorted(names)[:_NAMES_SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, BucketTransferEngine)
