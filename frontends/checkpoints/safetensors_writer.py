"""Writing safetensors files one tensor at a time, so that no more than that is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...compiler.dtypes import DTYPES
from ...compiler.torch_types import type_of
from ...compiler.types import TensorType
from .safetensors_files import INDEX, SINGLE


@dataclass(frozen=True)
class Item:
    """Tensors that are made together: their types by name, and what makes them, in that order."""

    types: Mapping[str, TensorType]
    load: Callable[[], Sequence[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(t) for t in self.types.values())


def _nbytes(type_: TensorType) -> int:
    nbytes = type_.nbytes
    assert isinstance(nbytes, int)
    return nbytes


def write_checkpoint(
    directory: Path, items: Sequence[Item], shard_bytes: int, written: Callable[[int], None]
) -> None:
    """model.safetensors, or shards of about `shard_bytes` and their index. ValueError for none.

    `written` is told the bytes of each item after it is written.
    """
    if not items:
        raise ValueError("expected tensors to write, found none")
    shards = _shards(items, shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        total = len(shards)
        names = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / name, shard, written)
    if len(shards) == 1:
        return
    files = {n: f for f, shard in zip(names, shards, strict=True) for i in shard for n in i.types}
    size = sum(item.nbytes for item in items)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
    """`items` in order, cut where a shard would grow over `shard_bytes`."""
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def _write_file(path: Path, items: Sequence[Item], written: Callable[[int], None]) -> None:
    """One file. Wide dtypes come first: then every tensor lies on a multiple of its element."""
    items = sorted(items, key=_narrowest, reverse=True)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in items:
        for name, type_ in item.types.items():
            end = offset + _nbytes(type_)
            header[name] = {
                "dtype": DTYPES[type_.dtype].safetensors,
                "shape": [*type_.shape],
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for item in items:
            tensors = item.load()
            for (name, type_), tensor in zip(item.types.items(), tensors, strict=True):
                if type_of(tensor) != type_:
                    raise TypeError(f"{name}: expected {type_}, found {type_of(tensor)}")
                flat = tensor.contiguous().view(-1)
                file.write(flat.view(torch.uint8).numpy().data)
            del tensors
            written(item.nbytes)


def _narrowest(item: Item) -> int:
    return min(_nbytes(t.with_shape((1,))) for t in item.types.values())
