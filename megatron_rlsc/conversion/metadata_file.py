"""`.metadata` of a torch.distributed.checkpoint: a pickle, read without running what it names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

NAME = ".metadata"
EXTRA_STATE = "._extra_state/"
"""In the key of an object of Transformer Engine's: FP8 scales, or nothing. Never read here."""

# All that torch.distributed.checkpoint and Megatron pickle into `.metadata`, and dtypes. Whole names, never modules: a
# pickle reaches `os.system` through any module that imports os.
METADATA_GLOBALS = {
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.planner.SavePlan",
    "torch.distributed.checkpoint.planner.TensorWriteData",
    "torch.distributed.checkpoint.planner.WriteItem",
    "torch.distributed.checkpoint.planner.WriteItemType",
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}

# What unpickling torn or altered bytes raises; a ValueError of find_class or of the bytes passes as it is.
DAMAGE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
)


def read_metadata(path: Path) -> Metadata:
    """What a `.metadata` file says. Raises ValueError unless it needs nothing but torch's classes, and has tensors to
    load alone.

    torch.distributed.checkpoint unpickles that file, and each entry that it does not call a tensor; a pickle may run
    anything. So it is read with an unpickler that knows the allow-list alone.
    """

    class AllowListed(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" in METADATA_GLOBALS:
                return super().find_class(module, name)
            raise ValueError(
                f"{path} would run {module}.{name}: it is no checkpoint that Megatron wrote; do not load it"
            )

    try:
        with path.open("rb") as file:
            metadata = AllowListed(file).load()
        pickled = [
            name
            for name, entry in metadata.state_dict_metadata.items()
            if type(entry) is not TensorStorageMetadata and EXTRA_STATE not in name
        ]
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is no torch_dist checkpoint: it has no {path.name}") from None
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if pickled:
        raise ValueError(f"{path} has pickles in the place of tensors ({', '.join(pickled[:3])}); do not load it")
    return metadata
