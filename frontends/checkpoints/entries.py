"""Stored tensors as the entries of the parameters that they are loaded into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch

from ...compiler.dtypes import FLOATS
from ...compiler.torch_types import torch_dtype
from ...compiler.types import TensorType
from ...compiler.weights import Bounds, Entry, within
from ..importers.meta_model import MetaModel
from ..importers.source_error import SourceError
from .conversions import Conversion, Destination, dense
from .dequantize import Dequantized
from .quantized import Packed, Source
from .safetensors_files import Stored, listed


def entries_of(
    stored: Mapping[str, Source], targets: Mapping[str, Destination | None], meta: MetaModel
) -> tuple[dict[str, Entry], dict[str, tuple[int, ...]]]:
    """Entries by the model's names, and the permutations of packed ones."""
    types = meta.types()
    entries: dict[str, Entry] = {}
    packed: dict[str, tuple[int, ...]] = {}
    conversions: dict[str, Conversion] = {}
    for source, target in targets.items():
        if target is None:
            continue
        name, tensor = target.name, stored[source]
        if target.converter is not None:
            new = Conversion(target.converter, meta.model, name, {})
            conversion = conversions.setdefault(name, new)
            conversion.sources.setdefault(target.pattern, []).append((source, tensor))
        elif name in entries or name in packed:
            raise SourceError(f"two stored tensors for {name}: {source!r} and another")
        elif isinstance(tensor, Packed):
            packed[name] = _order(tensor)
            entries |= _packed(name, types[name], source, tensor)
        else:
            entries[name] = _direct(name, types[name], source, tensor)
    for conversion in conversions.values():
        for name, made in _converted(conversion, types):
            if name in entries or name in packed:
                raise SourceError(f"two stored tensors for {name}: {conversion.origin} and another")
            if name not in made:
                packed[name] = tuple(range(len(types[name].shape)))
            entries |= made
    return entries, packed


def _direct(name: str, type_: TensorType, source: str, stored: Stored | Dequantized) -> Entry:
    check_type(name, type_, stored.type, f"{stored.file.path.name} stores as {source!r}")
    dtype = torch_dtype(type_.dtype)

    def load_part(bounds: Bounds) -> torch.Tensor:
        whole = stored.read() if isinstance(stored, Stored) else stored.read_as(dtype)
        return within(whole, bounds).to(dtype)

    return Entry(type_, partial(stored.read_as, dtype), f"{stored.file.path}: {source}", load_part)


def _order(packed: Packed) -> tuple[int, ...]:
    """The permutation of the dims of `packed` that gives the parameter."""
    *lead, row, column = range(len(packed.shape))
    return (*lead, column, row) if packed.transposed else (*lead, row, column)


def _packed(name: str, type_: TensorType, source: str, packed: Packed) -> dict[str, Entry]:
    """The entries of the codes and the scales of a weight in MXFP4."""
    shape = tuple(packed.shape[i] for i in _order(packed))
    found = TensorType(type_.dtype, shape)
    check_type(name, type_, found, f"{packed.file.path.name} stores as {source!r}, in MXFP4,")
    parts = (_direct(name, part.type, source, part) for part in (packed.codes, packed.scales))
    return _codes_and_scales(name, *parts)


def _codes_and_scales(name: str, codes: Entry, scales: Entry) -> dict[str, Entry]:
    """Both by their names; loading raises SourceError where an E8M0 byte stands for NaN."""

    def load() -> torch.Tensor:
        loaded = scales.load()
        if count := int((loaded == 255).sum()):
            raise SourceError(f"{name}: {count} of {loaded.numel()} scales are NaN (byte 255)")
        return loaded

    return {f"{name}.codes": codes, f"{name}.scales": Entry(scales.type, load, scales.origin)}


def _converted(
    conversion: Conversion, types: Mapping[str, TensorType]
) -> Iterable[tuple[str, dict[str, Entry]]]:
    """The entry of each target that the model has, or the entries of its codes and scales.

    Of sources in MXFP4 codes and scales are converted alike: their rows are those of the weight.
    """
    for parts in conversion.sources.values():
        _check_indices(conversion.name, [name for name, _ in parts])
    if conversion.packed is None:
        raise SourceError(
            f"{conversion.name}: {conversion.origin} are partly stored in MXFP4 and partly not"
        )
    if conversion.packed:
        if not conversion.keeps_rows:
            raise SourceError(
                f"{conversion.name}: {conversion.origin} are stored in MXFP4, and transformers "
                f"loads them by {conversion.converter.operations}, which splits the groups of a "
                "scale"
            )
        codes, scales = conversion.of(lambda p: p.codes), conversion.of(lambda p: p.scales)
        of_scales = scales.shapes()
        for name, shape in codes.shapes().items():
            if name in types:
                found = TensorType(types[name].dtype, (*shape[:-1], 2 * shape[-1]))
                check_type(name, types[name], found, f"{conversion.origin}, in MXFP4, give")
                of_codes = codes.entry(name, TensorType("u8", shape))
                blocks = scales.entry(name, TensorType("u8", of_scales[name]))
                yield name, _codes_and_scales(name, of_codes, blocks)
        return
    dtypes = {dense(s).dtype for parts in conversion.sources.values() for _, s in parts}
    for name, shape in conversion.shapes().items():
        if name in types:
            for dtype in dtypes:
                check_type(name, types[name], TensorType(dtype, shape), f"{conversion.origin} give")
            yield name, {name: conversion.entry(name, types[name])}


def check_type(name: str, expected: TensorType, found: TensorType, verb: str) -> None:
    """SourceError unless `found` has the expected shape and a dtype that can be cast."""
    if found.shape != expected.shape:
        raise SourceError(f"{name}: the model expects {expected}, {verb} {found}")
    castable = found.dtype in FLOATS and expected.dtype in FLOATS
    if found.dtype != expected.dtype and not castable:
        raise SourceError(
            f"{name}: the model expects {expected}, {verb} {found}, which is neither a plain float "
            "tensor nor known as a quantized one"
        )


def _check_indices(name: str, sources: list[str]) -> None:
    """SourceError for a missing index among stacked tensors (experts.0, experts.1, ...)."""
    if len(sources) < 2:
        return
    columns = zip(*(source.split(".") for source in sources), strict=True)
    varying = [column for column in columns if len(set(column)) > 1]
    if len(varying) != 1 or not all(part.isdigit() for part in varying[0]):
        return
    present = {int(part) for part in varying[0]}
    if absent := [str(i) for i in range(max(present) + 1) if i not in present]:
        raise SourceError(
            f"{name}: no stored tensor for index {listed(absent)} beside {sources[0]!r}"
        )
