"""Safetensors files of a checkpoint: finding them, tensors over mapped files, sharded writing."""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from ...compiler.dtypes import DTYPES
from ...compiler.torch_types import torch_dtype, type_of
from ...compiler.types import TensorType
from ...compiler.weights import Bounds, within
from ...runtime.artifact.safetensors_file import Item, ShardWriter, read_spans, shards_of
from ...runtime.artifact.strict_json import IngotError
from ..importers.side_files import read_json_object
from ..importers.source_error import SourceError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = (".safetensors", *_PICKLES)
_LFS = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer begins
_MAX_NAMES = 5  # names that an error lists before it only counts


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor of a file; `dtype` is the IR's name. A 4-bit dtype is read by `as_bytes` only."""

    file: File
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int

    @property
    def type(self) -> TensorType:
        return TensorType(self.dtype, self.shape)

    def read(self) -> torch.Tensor:
        """A view into the mapped file, whose pages are released when the view is dropped."""
        dtype = torch_dtype(self.dtype)
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=dtype)
        mapped = self.file.mapping
        data = torch.frombuffer(mapped, dtype=torch.uint8, count=self.nbytes, offset=self.offset)
        if self.offset % dtype.itemsize:  # allowed by the format, not by vector loads
            return data.clone().view(dtype).reshape(self.shape)
        tensor = data.view(dtype).reshape(self.shape)
        if hasattr(mmap, "MADV_DONTNEED"):
            # Views that outlive `tensor` only fault the pages in again.
            start = self.offset - self.offset % mmap.PAGESIZE
            length = self.offset + self.nbytes - start
            release = weakref.finalize(tensor, mapped.madvise, mmap.MADV_DONTNEED, start, length)
            release.atexit = False
        return tensor

    def read_as(self, dtype: torch.dtype) -> torch.Tensor:
        """`read`, cast to `dtype` where it differs."""
        return self.read().to(dtype)

    def as_bytes(self) -> Stored:
        """The same data as u8; of a packed 4-bit dtype the last dim counts pairs."""
        if DTYPES[self.dtype].bits == 8:
            return replace(self, dtype="u8")
        return replace(self, dtype="u8", shape=(*self.shape[:-1], self.shape[-1] // 2))

    def read_into(self, out: torch.Tensor, bounds: Bounds) -> None:
        """Read what is within `bounds` into `out`, casting where its dtype differs.

        Whole rows without a cast go straight into `out`, about three times as fast as through the
        mapping, whose pages would be faulted in one by one to be used once.
        """
        (_, stop), *inner = bounds
        whole_rows = all(b == (0, size) for b, size in zip(inner, self.shape[1:], strict=True))
        if type_of(out).dtype != self.dtype or not out.is_contiguous() or not whole_rows:
            out.copy_(within(self.read(), bounds))
            return
        rest = out.view(-1).view(torch.uint8).numpy().data
        end = self.offset + self.nbytes * stop // self.shape[0]
        while rest:
            at = end - len(rest)
            count = os.preadv(self.file.descriptor, [rest], at)
            if count == 0:
                raise SourceError(f"{self.file.path}: cut short since it was opened")
            rest = rest[count:]


class File:
    """One safetensors file: the header is read at once, the data mapped on first use.

    `foreign` has the names and dtypes of tensors whose dtype Ingot does not know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Stored] = {}
        self.foreign: dict[str, str] = {}
        size = 0
        try:
            with path.open("rb") as raw:
                size = os.fstat(raw.fileno()).st_size
                if raw.read(len(_LFS)) == _LFS:
                    raise SourceError(
                        f"{path}: a Git LFS pointer of {size} bytes instead of weights; fetch them "
                        "with `git lfs pull`"
                    )

                def read(start: int, stop: int) -> bytes:
                    raw.seek(start)
                    return raw.read(stop - start)

                for name, span in read_spans(read, size, path.name, foreign=True).items():
                    if span.dtype not in DTYPES:
                        self.foreign[name] = span.dtype
                        continue
                    self.tensors[name] = Stored(
                        self, span.dtype, span.shape, span.start, span.nbytes
                    )
        except (IngotError, OSError) as error:
            raise SourceError(
                f"{path}: not a complete safetensors file ({size} bytes): {error}"
            ) from error

    @cached_property
    def descriptor(self) -> int:
        """The open file, for as long as this object lives."""
        descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    @cached_property
    def mapping(self) -> mmap.mmap:
        """The whole file, private to this process: writing into a tensor never reaches the disk."""
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        return mmap.mmap(self.descriptor, 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)


def holds_weights(directory: Path) -> bool:
    """Whether `directory` has a file of weights or an index of shards."""
    return any(p.name == INDEX or p.suffix in _WEIGHTS for p in directory.iterdir())


def safetensors_files(directory: Path) -> dict[Path, frozenset[str] | None]:
    """The safetensors files of `directory`, and the names that the index puts into each.

    They are model.safetensors, or the shards that the index names; without an index the names are
    None. SourceError for none, for pickles only (never loaded), and for a file that is missing or
    outside the directory.
    """
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory")
    if (directory / SINGLE).exists():
        return {_inside(directory, SINGLE): None}
    if (directory / INDEX).exists():
        shards = sorted(_shards(directory).items())
        return {_inside(directory, name): frozenset(names) for name, names in shards}
    names = sorted(path.name for path in directory.iterdir())
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise SourceError(
            f"{directory}: found {listed(pickles)}, which are pickles and are never loaded; save "
            "the model as safetensors (save_pretrained does)"
        )
    raise SourceError(
        f"{directory}: expected {SINGLE} or {INDEX}, found {listed(names) if names else 'none'}"
        + ("" if holds_weights(directory) else "; a model without weights can only be inspected")
    )


def _shards(directory: Path) -> dict[str, list[str]]:
    """The names of tensors in the index by the name of their file."""
    files = read_json_object(directory / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise SourceError(f"{directory / INDEX}: expected a weight_map of names to file names")
    shards: dict[str, list[str]] = {}
    for name, file in files.items():
        shards.setdefault(file, []).append(name)
    return shards


def _inside(directory: Path, name: str) -> Path:
    """The file `name` of `directory`; SourceError when it is missing or lies anywhere else.

    Of a snapshot of a Hugging Face cache, or a folder in one, blobs/ is inside too: the files of a
    snapshot link to it, and it may itself be a link.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise SourceError(f"{directory / INDEX}: expected plain file names, found {name!r}")
    if not name.endswith(".safetensors"):
        raise SourceError(f"{directory / INDEX}: expected .safetensors files, found {name!r}")
    path = directory / name
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    real = path.resolve()
    if not any(real.is_relative_to(home) for home in _homes(directory)):
        raise SourceError(f"{path}: links to {real}, outside the checkpoint directory")
    return path


def _homes(directory: Path) -> Iterator[Path]:
    """The real folders in which files of `directory` may lie."""
    yield directory.resolve()
    for path in (directory.resolve(), directory.absolute()):
        for snapshot in (path, *path.parents):
            if snapshot.parent.name == "snapshots":
                yield (snapshot.parent.parent / "blobs").resolve()


# ---- writing


def torch_item(types: Mapping[str, TensorType], load: Callable[[], Sequence[torch.Tensor]]) -> Item:
    """An item to write: tensors of `types`, which `load` makes together.

    Writing it raises TypeError for a tensor of another type.
    """

    def contents() -> Iterator[memoryview]:
        for (name, type_), tensor in zip(types.items(), load(), strict=True):
            if type_of(tensor) != type_:
                raise TypeError(f"weight {name}: expected {type_}, found {type_of(tensor)}")
            yield tensor.contiguous().view(-1).view(torch.uint8).numpy().data

    return Item({n: (t.dtype, tuple(map(int, t.shape))) for n, t in types.items()}, contents)


def write_checkpoint(
    directory: Path, items: Sequence[Item], shard_bytes: int, written: Callable[[int], None]
) -> None:
    """model.safetensors, or shards of about `shard_bytes` and their index. ValueError for none.

    `written` is told the bytes of each item after it is written.
    """
    if not items:
        raise ValueError("expected tensors to write, found none")
    shards = shards_of(items, shard_bytes)
    names = [SINGLE]
    if (total := len(shards)) > 1:
        names = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    for name, shard in zip(names, shards, strict=True):
        with (directory / name).open("xb") as file:
            ShardWriter(shard).write(file.write, written)
    if len(shards) == 1:
        return
    files = {n: f for f, shard in zip(names, shards, strict=True) for i in shard for n in i.types}
    size = sum(item.nbytes for item in items)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def listed(names: list[str]) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
