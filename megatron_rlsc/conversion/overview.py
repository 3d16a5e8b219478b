"""What a model folder of either format holds, for people: read from headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rlsc.conversion.atomic import access_explained, unfinished
from megatron_rlsc.conversion.folders import hf_config_dir, is_megatron_checkpoint, latest_checkpoint
from megatron_rlsc.conversion.hf import open_weights
from megatron_rlsc.conversion.manifest import FileSum, check_sizes, read_manifest
from megatron_rlsc.conversion.plan import MODEL_KEYS, check_checkpoint
from megatron_rlsc.conversion.shape import ModelShape, read_shape
from megatron_rlsc.conversion.torch_dist import open_torch_dist
from megatron_rlsc.disk import readable


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """A sound model folder."""

    folder: Path
    weights_dir: Path
    """Where the weights and their manifest are: the step's folder of a Megatron checkpoint."""
    kind: str
    step: str
    shape: ModelShape
    dtypes: Mapping[str, int]
    """Tensors of each."""
    nbytes: int
    """Of the model's tensors."""
    others: int
    """Tensors besides the model's: an optimizer's."""
    manifest: tuple[FileSum, ...]
    """All of the size that it says; empty where there is none."""
    has_manifest: bool

    def lines(self) -> Iterator[str]:
        shape = self.shape
        yield f"{self.folder}: {self.kind}" + (f", {self.step}" if self.step else "")
        numbers = sum(math.prod(size) for size in shape.hf_tensors().values())
        tied = "tied to the embedding" if shape.tie_word_embeddings else "of its own"
        yield f"  {numbers / 1e9:.2f} G parameters, {readable(self.nbytes)}, output layer {tied}"
        yield f"  {shape.num_hidden_layers} layers, hidden {shape.hidden_size}, MLP {shape.intermediate_size}, " + (
            f"{shape.num_attention_heads} heads on {shape.num_key_value_heads} KV heads of {shape.head_dim}, "
            f"vocabulary {shape.vocab_size}"
        )
        rotary = f"YaRN x {shape.yarn.factor}" if shape.yarn else "plain"
        yield f"  positions: {shape.max_position_embeddings}, rotary base {shape.rope_theta:g}, {rotary}"
        yield "  dtypes: " + ", ".join(f"{count} tensors {name}" for name, count in self.dtypes.items())
        if self.others:
            yield f"  and {self.others} tensors besides the weights (an optimizer's), which no export reads"
        if self.has_manifest:
            total = readable(sum(file.size for file in self.manifest))
            yield f"  manifest: {len(self.manifest)} files, {total}, all of the right size"
        else:
            yield "  manifest: none (it was not written by tools/convert_hf.py)"
        if left := unfinished(self.folder):
            yield f"  beside it, {left.name}: an interrupted conversion, which the next one removes"


def look_at(folder: Path) -> Overview:
    """Raises ValueError where the folder is no sound model of either format."""
    if not folder.is_dir():
        left = unfinished(folder)
        what = f"; {left} is an interrupted conversion, to be started again" if left else ""
        raise ValueError(f"there is no folder {folder}{what}")
    with access_explained(folder):
        return _megatron(folder) if is_megatron_checkpoint(folder) else _hf(folder)


def _hf(folder: Path) -> Overview:
    weights = open_weights(folder)
    return Overview(
        folder=folder,
        weights_dir=folder,
        kind="HF model",
        step="",
        shape=weights.shape,
        dtypes=Counter(_name(entry.dtype) for entry in weights.entries.values()),
        nbytes=sum(entry.nbytes for entry in weights.entries.values()),
        others=0,
        manifest=tuple(check_sizes(folder)),
        has_manifest=read_manifest(folder) is not None,
    )


def _megatron(folder: Path) -> Overview:
    path, shape = latest_checkpoint(folder), read_shape(hf_config_dir(folder))
    checkpoint = open_torch_dist(path)
    check_checkpoint(checkpoint, shape)
    model = {key: tensor for key, tensor in checkpoint.tensors.items() if key.startswith(MODEL_KEYS)}
    return Overview(
        folder=folder,
        weights_dir=path,
        kind="Megatron distributed checkpoint (torch_dist)",
        step="converted" if path.name == "release" else f"step {int(path.name.removeprefix('iter_'))}",
        shape=shape,
        dtypes=Counter(_name(tensor.dtype) for tensor in model.values()),
        nbytes=sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in model.values()),
        others=len(checkpoint.tensors) - len(model),
        manifest=tuple(check_sizes(path)),
        has_manifest=read_manifest(path) is not None,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
