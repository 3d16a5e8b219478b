"""HF model folders on disk: checked as a whole, then read tensor by tensor; written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlsc.conversion import tensor_file
from megatron_rlsc.conversion.atomic import whole_folder
from megatron_rlsc.conversion.rules import EMBEDDING, OUTPUT
from megatron_rlsc.conversion.shape import ModelShape, read_shape
from megatron_rlsc.conversion.tensor_file import TensorEntry
from megatron_rlsc.disk import REMEDY, DiskError, free_bytes, readable, write_whole

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
COMPANIONS = (  # what makes a folder of weights a model that loads and speaks
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",  # SentencePiece's
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
GB = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class HFWeights:
    """The weights of an HF folder; nothing is in memory until it is asked for."""

    shape: ModelShape
    entries: Mapping[str, TensorEntry]
    """By HF name, in HF's order: exactly the tensors of the table for this model."""

    def tensor(self, name: str) -> Tensor:
        """A tensor by its HF name, in the dtype that it has on disk."""
        return tensor_file.read_tensor(self.entries[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, ...] rows of a tensor."""
        return tensor_file.read_rows(self.entries[name], start, stop)


def open_weights(hf_dir: Path) -> HFWeights:
    """Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises ValueError where the config is refused (`read_shape`), there are no weights or pickled ones only, a shard is
    absent, truncated or damaged, or tensors are missing, unexpected or of another shape than config.json says (all of
    them are listed). `lm_head.weight` in a tied model is accepted where it equals the embedding.
    """
    hf_dir = Path(hf_dir)
    shape = read_shape(hf_dir)
    found = _find_tensors(hf_dir)
    expected = shape.hf_tensors()
    (lm_head,) = OUTPUT.hf
    copy_of_embedding = found.pop(lm_head, None) if shape.tie_word_embeddings else None
    check_tensors(hf_dir, {name: entry.shape for name, entry in found.items()}, expected)
    if copy_of_embedding is not None:
        _check_tied(copy_of_embedding, found[EMBEDDING.hf[0]])
    return HFWeights(shape=shape, entries={name: found[name] for name in expected})


def write_hf(
    hf_dir: Path,
    weights: Iterable[tuple[str, Tensor]],
    *,
    reference_dir: Path,
    max_shard_size: int = 5 * GB,
    overwrite: bool = False,
) -> None:
    """Writes a stream of (HF name, tensor), in any order, as an HF folder: weights, config, tokenizer, chat template.

    One tensor is in memory at a time. The folder appears when it is complete and on disk; an error leaves what was
    there before.

    Args:
        weights: every tensor of the model once, all of one dtype, which config.json then names. A tied model has no
            `lm_head.weight`.
        reference_dir: where config.json, the tokenizer's files and the chat template come from.
        max_shard_size: bytes of tensors in one file; a larger tensor has a file of its own.
        overwrite: replace a model that is in `hf_dir`.

    Raises ValueError where the stream does not hold exactly the model's tensors or `hf_dir` is in use, and DiskError
    where the disk is too small.
    """
    hf_dir, expected = Path(hf_dir), read_shape(reference_dir).hf_tensors()
    if overwrite and hf_dir.is_dir() and any(hf_dir.iterdir()) and not (hf_dir / CONFIG).exists():
        raise ValueError(f"{hf_dir} is not overwritten: it holds no {CONFIG}, so it is something other than a model")
    with whole_folder(hf_dir, overwrite=overwrite) as folder:
        dtype: torch.dtype | None = None
        written: dict[str, tuple[int, ...]] = {}
        for name, tensor in weights:
            if dtype is None:
                dtype = tensor.dtype
                entries = _create_files(folder, expected, dtype, max_shard_size)
            if name in written:
                raise ValueError(f"{name} comes twice in the stream of weights")
            if tensor.dtype != dtype:
                raise ValueError(f"{name} is {tensor.dtype}, the tensors before it {dtype}: cast them to one dtype")
            written[name] = tuple(tensor.shape)
            if written[name] == expected.get(name):  # what differs is in the report below
                tensor_file.write_tensor(entries[name], tensor)
            del tensor  # before the stream makes the next one
        check_tensors(hf_dir, written, expected)
        assert dtype is not None
        copy_config_files(reference_dir, folder)
        set_dtype(folder / CONFIG, dtype)


def copy_config_files(source: Path, target: Path) -> None:
    """Copies what an HF folder holds beside its weights: config, generation config, tokenizer files, chat template.
    Each is there as a whole, or as it was before."""
    target.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (Path(source) / name).exists():
            write_whole(target / name, (Path(source) / name).read_bytes())


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_size: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors of each weight file, by its name. A tensor larger than `max_shard_size` bytes has its own."""
    shards: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if not shards or nbytes > room:
            shards.append({})
            room = max_shard_size
        shards[-1][name] = shape
        room -= nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_index(folder: Path, shards: Mapping[str, Mapping[str, tuple[int, ...]]], total: int) -> None:
    """The index of several weight files with `total` bytes of tensors; nothing for one file."""
    if len(shards) > 1:
        weight_map = {name: file for file, shard in shards.items() for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _find_tensors(hf_dir: Path) -> dict[str, TensorEntry]:
    """Every tensor in the safetensors files of a folder, by name."""
    single, index = hf_dir / SINGLE, hf_dir / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{hf_dir} holds both {SINGLE} and {INDEX}: remove the one that is not the model")
    if single.exists():
        return tensor_file.read_header(single)
    if index.exists():
        return _find_in_shards(index)
    pickled = sorted(path.name for path in hf_dir.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise ValueError(
            f"{hf_dir} holds pickled weights only ({', '.join(pickled)}), which can run code when they are loaded. If "
            f"you trust them, save the model again as safetensors: "
            f"`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`."
        )
    raise ValueError(f"{hf_dir} holds no weights: neither {SINGLE} nor {INDEX}")


def _find_in_shards(index: Path) -> dict[str, TensorEntry]:
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
        shards = sorted(set(weight_map.values()))
        outside = [name for name in shards if Path(name).name != name]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of weights ({type(error).__name__}: {error})") from None
    if outside:
        raise ValueError(f"{index} names files outside its folder: {', '.join(outside)}")
    absent = [name for name in shards if not (index.parent / name).exists()]
    if absent:
        raise ValueError(
            f"{index.parent} lacks {len(absent)} of the {len(shards)} shards that {INDEX} names: {', '.join(absent)}. "
            f"Copy or download them."
        )
    entries = [entry for name in shards for entry in tensor_file.read_header(index.parent / name).values()]
    pairs = {(entry.name, entry.path.name) for entry in entries}
    wrong = sorted({name for name, _ in pairs ^ weight_map.items()})
    if wrong:
        raise ValueError(f"{index} and the shards disagree about where these tensors are: {', '.join(wrong)}")
    return {entry.name: entry for entry in entries}


def check_tensors(hf_dir: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError that lists every tensor that is missing, unexpected, or of another shape."""

    def problems() -> Iterator[str]:
        yield from (f"missing {name} {shape}" for name, shape in expected.items() if name not in found)
        yield from (f"unexpected {name} {shape}" for name, shape in found.items() if name not in expected)
        for name in expected.keys() & found.keys():
            if found[name] != expected[name]:
                yield f"{name} is {found[name]}, should be {expected[name]}"

    lines = sorted(problems())
    if lines:
        raise ValueError(f"{hf_dir}: the weights are not those that {CONFIG} describes:\n  " + "\n  ".join(lines))


def _check_tied(lm_head: TensorEntry, embedding: TensorEntry) -> None:
    same = (lm_head.shape, lm_head.dtype) == (embedding.shape, embedding.dtype)
    step = 4096  # rows in memory at a time
    if not same or not all(
        torch.equal(tensor_file.read_rows(lm_head, start, stop), tensor_file.read_rows(embedding, start, stop))
        for start in range(0, embedding.shape[0], step)
        for stop in [min(start + step, embedding.shape[0])]
    ):
        raise ValueError(
            f"{lm_head.path}: {lm_head.name} differs from {embedding.name}, but {CONFIG} says tie_word_embeddings. "
            f"Set it to false, or remove {lm_head.name}."
        )


def _create_files(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_size: int
) -> dict[str, TensorEntry]:
    """Makes the weight files of their final size, and the index where there is more than one; empty of data."""
    if dtype not in tensor_file.DTYPE_NAMES:
        raise ValueError(f"weights of {dtype}; write one of {', '.join(map(str, tensor_file.DTYPE_NAMES))}")
    shards = plan_shards(shapes, dtype, max_shard_size)
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape in shapes.values())
    free = free_bytes(folder)
    if total > free:
        raise DiskError(f"{folder.parent} has {readable(free)} free, the weights take {readable(total)}. {REMEDY}")
    write_index(folder, shards, total)
    return {e.name: e for file, shard in shards.items() for e in tensor_file.create(folder / file, shard, dtype)}


def set_dtype(path: Path, dtype: torch.dtype) -> None:
    """config.json names the dtype of the weights; transformers 5 calls it `dtype`, earlier ones `torch_dtype`."""
    config, name = json.loads(path.read_text()), str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    if any(config.get(key) != name for key in keys):
        path.write_text(json.dumps({**config, **dict.fromkeys(keys, name)}, indent=2) + "\n")
