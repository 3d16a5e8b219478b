"""Whether an HF folder and a Megatron checkpoint are one model: every tensor bit for bit, then log-probabilities."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlsc.conversion.atomic import access_explained
from megatron_rlsc.conversion.blocks import Block, BlockReader, NotFinite
from megatron_rlsc.conversion.folders import hf_config_dir, is_megatron_checkpoint, latest_checkpoint
from megatron_rlsc.conversion.hf import HFWeights, open_weights
from megatron_rlsc.conversion.manifest import check_sizes, check_sums
from megatron_rlsc.conversion.megatron_forward import MegatronForward
from megatron_rlsc.conversion.plan import check_checkpoint, hf_blocks
from megatron_rlsc.conversion.rules import EMBEDDING
from megatron_rlsc.conversion.shape import read_shape
from megatron_rlsc.conversion.tensor_file import read_rows
from megatron_rlsc.conversion.torch_dist import TorchDist, open_torch_dist

TOLERANCE = 1e-3
"""Of a token's log-probability: float32 in another order is a hundredth of it, one exchanged head a thousandfold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Both models, open; nothing but headers has been read."""

    hf_dir: Path
    weights: HFWeights
    checkpoint: TorchDist
    dtype: torch.dtype
    """The checkpoint's; the HF tensors are compared after a cast to it."""

    @property
    def nbytes(self) -> int:
        """That the comparison reads, of the HF folder."""
        return sum(entry.nbytes for entry in self.weights.entries.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Of one HF tensor."""

    name: str
    numbers: int
    """That differ, of"""
    of: int
    reason: str = ""
    """Why they could not be compared, where they could not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerDifference:
    """Of the residual stream behind a layer."""

    layer: int
    worst: float
    """Largest |HF - Megatron|, over the largest |HF|."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextResult:
    """One text's log-probability by either model."""

    tokens: int
    hf: float
    megatron: float
    worst: float
    """The largest difference of a token's."""


def open_pair(hf_dir: Path, megatron_dir: Path) -> Pair:
    """Raises ValueError where either is no sound model, or they are not of one shape and rotary settings."""
    if not is_megatron_checkpoint(megatron_dir):
        raise ValueError(f"{megatron_dir} is no Megatron checkpoint: it names no newest step")
    with access_explained(hf_dir):
        weights = open_weights(hf_dir)
        path = latest_checkpoint(megatron_dir)
        checkpoint, carried = open_torch_dist(path), read_shape(hf_config_dir(megatron_dir))
    check_checkpoint(checkpoint, weights.shape)
    if carried != weights.shape:
        names = [
            name for name in carried.__dataclass_fields__ if getattr(carried, name) != getattr(weights.shape, name)
        ]
        raise ValueError(f"config.json of {hf_dir} and of {megatron_dir} differ in {', '.join(names)}")
    return Pair(
        hf_dir=hf_dir,
        weights=weights,
        checkpoint=checkpoint,
        dtype=checkpoint.tensors[EMBEDDING.megatron].dtype,
    )


def check_manifests(pair: Pair) -> int:
    """Reads every file that a manifest names, and counts them. Raises ValueError where one has changed."""
    count = 0
    for folder in (pair.hf_dir, pair.checkpoint.path):
        files = check_sizes(folder)
        check_sums(folder, files)
        count += len(files)
    return count


def check_model(hf_dir: Path, megatron_dir: Path) -> None:
    """At a glance: sizes, headers, and the attention of the last layer, which no training leaves as it was.

    Raises ValueError where either is no sound model, or they are not one.
    """
    pair = open_pair(hf_dir, megatron_dir)
    check_sizes(pair.checkpoint.path)
    looked_at = f"model.layers.{pair.weights.shape.num_hidden_layers - 1}.self_attn."
    differences = compare_tensors(pair, workers=1, progress=lambda nbytes: None, prefix=looked_at)
    if differences:
        raise ValueError(
            f"{megatron_dir} is of another model than {hf_dir}, by {differences[0].name}: convert it into a folder "
            f"of another name, or overwrite this one"
        )


def compare_tensors(pair: Pair, *, workers: int, progress: Callable[[int], None], prefix: str = "") -> list[Difference]:
    """Every tensor that is not the same bits in both, in HF's order. `progress` hears of HF's bytes.

    Args:
        prefix: compares only the tensors whose names begin so.
    """
    readers = threading.local()

    def compare(item: tuple[str, Iterator[Block]]) -> Difference | None:
        if not hasattr(readers, "one"):
            readers.one = BlockReader(pair.dtype)
        name, blocks = item
        entry, row, different = pair.weights.entries[name], 0, 0
        for block in blocks:
            source = read_rows(entry, row, row + block.rows).to(pair.dtype)
            try:
                found = readers.one.read(block)
            except NotFinite as error:
                return Difference(name=name, numbers=0, of=0, reason=str(error))
            different += int((_bits(source).view(-1) != _bits(found).view(-1)).sum())
            row += block.rows
            progress(source.numel() * entry.dtype.itemsize)
        return Difference(name=name, numbers=different, of=entry.nbytes // entry.dtype.itemsize) if different else None

    blocks = hf_blocks(pair.checkpoint, pair.weights.shape, pair.dtype)
    items = (item for item in blocks if item[0].startswith(prefix))
    with ThreadPoolExecutor(workers) as pool:
        return [difference for difference in pool.map(compare, items) if difference is not None]


def compare_logprobs(
    pair: Pair, texts: Sequence[Tensor], progress: Callable[[int], None]
) -> tuple[list[LayerDifference], list[TextResult]]:
    """Both models side by side, one layer of one of them in memory at a time.

    Args:
        texts: token ids, [tokens] each, at least two.
        progress: hears of layers.
    """
    from megatron_rlsc.conversion.hf_forward import open_forward  # transformers, for those who ask for it

    hf, megatron = (
        open_forward(pair.hf_dir, pair.weights, pair.dtype),
        MegatronForward(checkpoint=pair.checkpoint, shape=pair.weights.shape),
    )
    theirs, ours = hf.embed(texts), megatron.embed(texts)
    layers = []
    for index in range(pair.weights.shape.num_hidden_layers):
        theirs, ours = hf.layer(index, theirs), megatron.layer(index, ours)
        a, b = torch.cat(theirs), torch.cat(ours)
        layers.append(LayerDifference(layer=index, worst=((a - b).abs().max() / a.abs().max()).item()))
        progress(1)
    results = [
        TextResult(tokens=len(text), hf=a.sum().item(), megatron=b.sum().item(), worst=(a - b).abs().max().item())
        for text, a, b in zip(texts, hf.logprobs(theirs, texts), megatron.logprobs(ours, texts))
    ]
    return layers, results


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def report(
    pair: Pair, differences: Sequence[Difference], layers: Sequence[LayerDifference], results: Sequence[TextResult]
) -> tuple[bool, str]:
    """Whether they are one model, and why, for people."""
    count = len(pair.weights.entries)
    same_dtype = all(entry.dtype == pair.dtype for entry in pair.weights.entries.values())
    how = "bit for bit" if same_dtype else f"bit for bit after the cast to {str(pair.dtype).removeprefix('torch.')}"
    lines = [f"tensors: {count - len(differences)} of {count} equal, {how}"]
    lines += [f"  {each.name}: {each.reason or f'{each.numbers} of {each.of} numbers differ'}" for each in differences]
    wrong = [each for each in results if not each.worst <= TOLERANCE]
    if results:
        lines.append("log-probabilities of sample texts, HF (transformers) and Megatron's layout side by side:")
        lines += [
            f"  text {i}: {each.tokens} tokens, log p {each.hf:.4f} and {each.megatron:.4f}, "
            f"worst token {each.worst:.1e}"
            for i, each in enumerate(results, 1)
        ]
        worst = max(layers, key=lambda each: each.worst)
        lines.append(
            f"  {len(layers)} layers; largest relative difference {worst.worst:.1e}, behind layer {worst.layer}"
        )
        if wrong:
            first = next((each.layer for each in layers if not each.worst <= TOLERANCE), len(layers) - 1)
            lines.append(f"  above the tolerance of {TOLERANCE}; it begins in layer {first}")
    same = not differences and not wrong
    lines.append("the same model" if same else "NOT the same model: convert it again from a sound source")
    return same, "\n".join(lines)
