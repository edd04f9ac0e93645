"""Safetensors files without torch: validated headers, arrays over mapped files, writing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from ...compiler.dtypes import DTYPES, dense_bytes
from ..program import Size, Strict, Text
from .strict_json import IngotError, read_json, typed

MAX_HEADER = 100_000_000  # as the format's own library
MAX_TENSORS = 1 << 18  # in one file; a model with more of them has shards
_MAX_KEYS = 1 << 21  # in one header: four for each tensor, and metadata
_METADATA = "__metadata__"
_ALIGNMENT = 64  # of the data in the files that are written
_NAMES = {dtype.safetensors: name for name, dtype in DTYPES.items() if dtype.safetensors}


class _Described(Strict, frozen=True):
    dtype: Text
    shape: Annotated[tuple[Size, ...], Meta(max_length=16)]
    data_offsets: tuple[Size, Size]


@dataclass(frozen=True)
class Span:
    """`dtype[shape]`, and its bytes from the start of the file.

    `dtype` is a name of DTYPES, or what the file says where that is none of theirs (`foreign`).
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_spans(
    read: Callable[[int, int], Any], size: int, where: str, *, foreign: bool = False
) -> dict[str, Span]:
    """Every tensor of a file of `size` bytes by name, in the order of their data.

    `read(start, stop)` gives bytes of it. IngotError unless the tensors fill the file exactly, end
    to end, and for a dtype that DTYPES lacks, unless `foreign` ones are wanted too.
    """
    if size < 8:
        raise IngotError(f"{where}: expected a safetensors file, found {size} bytes")
    length = int.from_bytes(read(0, 8), "little")
    if length > (most := min(MAX_HEADER, size - 8)):
        raise IngotError(f"{where}: expected a header of at most {most} bytes, found {length}")
    found: dict[str, Span] = {}
    for name, given in _described(bytes(read(8, 8 + length)), where).items():
        place = f"{where}: {name[:80]!r}"
        start, end = given.data_offsets
        if given.dtype not in _NAMES:
            if foreign and end >= start:
                found[name] = Span(given.dtype, given.shape, 8 + length + start, end - start)
                continue
            known = ", ".join(_NAMES)
            raise IngotError(f"{place}: expected a dtype of {known}; found {given.dtype[:60]!r}")
        dtype = _NAMES[given.dtype]
        if prod(given.shape) * DTYPES[dtype].bits % 8:
            raise IngotError(f"{place}: expected whole bytes, found {dtype}{list(given.shape)}")
        if end - start != (nbytes := dense_bytes(dtype, given.shape)):
            raise IngotError(
                f"{place}: expected {nbytes} bytes for {dtype}{list(given.shape)}, "
                f"found {end - start}"
            )
        found[name] = Span(dtype, given.shape, 8 + length + start, nbytes)
    found = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    at = 8 + length
    for name, span in found.items():
        if span.start != at:
            raise IngotError(
                f"{where}: {name[:80]!r}: expected it at byte {at - 8 - length} of the data, "
                f"found it at {span.start - 8 - length}"
            )
        at += span.nbytes
    if at != size:
        raise IngotError(
            f"{where}: expected {at - 8 - length} bytes of tensors, found {size - 8 - length}"
        )
    return found


def _described(header: bytes, where: str) -> dict[str, _Described]:
    """What `header` says of each tensor; its metadata must be strings. IngotError as read_spans.

    A header may have 100 MB: it is decoded straight into structs, a small part of whose time
    Python's own decoder would take for its objects.
    """
    counts = [header.count(f'"{field}"'.encode()) for field in _Described.__struct_fields__]
    if counts[0] > MAX_TENSORS:
        raise IngotError(f"{where}: expected at most {MAX_TENSORS} tensors, found more")
    if header.count(b":") > _MAX_KEYS:
        raise IngotError(f"{where}: expected at most {_MAX_KEYS} keys of JSON, found more")
    try:
        values = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError) as error:
        raise IngotError(f"{where}: expected an object of JSON, found none: {error}") from error
    metadata = values.pop(_METADATA, msgspec.Raw(b"{}"))
    decoder = msgspec.json.Decoder(_Described)
    found: dict[str, _Described] = {}
    for name, raw in values.items():
        try:
            found[name] = decoder.decode(raw)
        except (ValueError, RecursionError):  # again, for the words
            place = f"{where}: {name[:80]!r}"
            found[name] = typed(read_json(raw, place, len(header)), _Described, place)
    texts = _metadata(metadata, where)
    # In a text they would be escaped: each is a key, or as a whole a name or an item of metadata.
    for field, count in zip(_Described.__struct_fields__, counts, strict=True):
        others = (field in found) + texts.count(field)
        if count != len(found) + others:
            raise IngotError(f"{where}: expected every key once, found one of an object twice")
    return found


def _metadata(raw: msgspec.Raw, where: str) -> list[str]:
    """The texts of a file's metadata, keys and values."""
    place = f"{where}: {_METADATA}"
    try:
        items = msgspec.json.decode(raw, type=dict[str, str])
    except (ValueError, RecursionError):  # again, for the words
        items = typed(read_json(raw, place, len(raw)), dict[str, str], place)
    return [*items, *items.values()]


@dataclass(frozen=True)
class Tensor:
    """`dtype[shape]` and the bytes that hold it."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def array(self) -> NDArray[Any]:
        """A numpy array over the same memory, of a dtype of the same width if numpy lacks it.

        Pairs of four-bit numbers are one item of the last dim.
        """
        dtype = DTYPES[self.dtype]
        shape = self.shape
        if dtype.bits < 8:
            if not shape or shape[-1] % 2:
                raise IngotError(f"expected whole bytes of {self.dtype}, found {list(shape)}")
            shape = (*shape[:-1], shape[-1] // 2)
        if not len(self.data):
            return np.empty(shape, dtype.numpy)
        return np.frombuffer(self.data, np.uint8).view(dtype.numpy).reshape(shape)


def read_tensors(data: memoryview, where: str) -> Mapping[str, Tensor]:
    """Every tensor of the file in `data`; IngotError as `read_spans`."""
    spans = read_spans(lambda start, stop: data[start:stop], len(data), where)
    return {
        name: Tensor(span.dtype, span.shape, data[span.start : span.start + span.nbytes])
        for name, span in spans.items()
    }


# ---- writing


@dataclass(frozen=True)
class Item:
    """Tensors that are made together: dtypes and shapes by name, and a function that yields their
    bytes in that order.
    """

    types: Mapping[str, tuple[str, tuple[int, ...]]]
    load: Callable[[], Iterable[memoryview]]

    @property
    def nbytes(self) -> int:
        return sum(dense_bytes(*type_) for type_ in self.types.values())


def shards_of(items: Iterable[Item], shard_bytes: int) -> list[list[Item]]:
    """Split `items`, in order, into shards of at most `shard_bytes` where an item allows it."""
    shards: list[list[Item]] = []
    size = 0
    for item in items:
        if not shards or size + item.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


class ShardWriter:
    """Writes one file of `nbytes` bytes. Wide dtypes come first, so that tensors are aligned.

    ValueError for a dtype that the format does not have.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        def narrowest(item: Item) -> int:
            return min(DTYPES[dtype].bits for dtype, _ in item.types.values())

        self._items = sorted(items, key=narrowest, reverse=True)
        header: dict[str, Any] = {_METADATA: {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in (t for item in self._items for t in item.types.items()):
            if DTYPES[dtype].safetensors is None:
                raise ValueError(f"weight {name}: a safetensors file holds no {dtype}")
            start, end = end, end + dense_bytes(dtype, shape)
            stored = DTYPES[dtype].safetensors
            header[name] = {"dtype": stored, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        self._header = text + b" " * (-(8 + len(text)) % _ALIGNMENT)
        self.nbytes = 8 + len(self._header) + end

    def write(
        self, write: Callable[[bytes | memoryview], object], written: Callable[[int], None]
    ) -> None:
        """Pass the file to `write` in pieces, and the bytes of each item to `written`."""
        write(len(self._header).to_bytes(8, "little") + self._header)
        for item in self._items:
            for data in item.load():
                write(data)
            written(item.nbytes)
