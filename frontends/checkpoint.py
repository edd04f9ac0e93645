"""A directory of safetensors files as a lazy `Weights` store under a model's own names.

Opening reads headers only. A tensor that is stored as the model wants it is a view into a mapping
of its file; one that must be cast, transposed or stacked from several (per-expert tensors) is built
when it is asked for, in its own memory plus that of one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..compiler.torch_types import torch_dtype, type_of
from ..compiler.types import FLOATS, TensorType
from ..compiler.weights import Bounds, Entry, Weights, within
from .meta_model import MetaModel, named_tensors, refuse_quantized
from .safetensors_files import File, SourceError, Stored, listed, safetensors_files


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    `weights` has an entry for every parameter and buffer name of the model: stored ones, tied ones
    (the same entry under each name) and the non-persistent buffers. `unused` are the stored names
    that the model has no place for, `files` the safetensors files, `total_bytes` their tensor data.
    """

    weights: Weights
    unused: tuple[str, ...]
    files: tuple[Path, ...]
    total_bytes: int


def open_checkpoint(directory: str | Path, meta: MetaModel) -> Checkpoint:
    """The weights of `meta` from model.safetensors or its shards; no tensor is read.

    Names and layouts are converted as transformers does when it loads; a tensor stored in another
    float dtype than the model's is cast when it is loaded. SourceError names what is missing, of
    another shape, truncated, quantized, stored as a pickle or outside the directory.
    """
    refuse_quantized(meta.model.config)
    files = [File(path) for path in safetensors_files(Path(directory))]
    stored: dict[str, Stored] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in stored:
                raise SourceError(
                    f"tensor {name!r} is stored twice: in {stored[name].file.path.name} "
                    f"and in {file.path.name}"
                )
            stored[name] = tensor
    entries, unused = _entries(stored, meta)
    _resolve_ties(entries, meta)
    if missing := [name for name in meta.stored_names() if name not in entries]:
        raise SourceError(f"{directory}: no tensor for {listed(missing)}")
    return Checkpoint(
        weights=Weights(entries).merged(
            Weights.of(meta.buffers, origin="computed from the config")
        ),
        unused=tuple(unused),
        files=tuple(file.path for file in files),
        total_bytes=sum(tensor.nbytes for tensor in stored.values()),
    )


def weights_of(model: PreTrainedModel, meta: MetaModel) -> Weights:
    """The weights of `model`, which is in memory, under the names and types of `meta`.

    Tensors on the CPU in the wanted dtype are not copied; others are when they are loaded. Buffers
    are the model's own. SourceError for a quantized model, meta tensors, missing names and shapes.
    """
    refuse_quantized(model.config)
    tensors = dict(named_tensors(model))
    types = meta.types()
    if missing := [name for name in types if name not in tensors]:
        raise SourceError(f"{type(model).__name__}: no tensor for {listed(missing)}")
    if unloaded := [name for name in types if tensors[name].is_meta]:
        raise SourceError(f"{type(model).__name__}: on the meta device: {listed(unloaded)}")
    entries: dict[str, Entry] = {}
    for name, type_ in types.items():
        tensor = tensors[name].detach()
        _check(name, type_, type_of(tensor), f"{type(model).__name__} holds")
        dtype = torch_dtype(type_.dtype)
        load, part = partial(tensor.to, "cpu", dtype), partial(_cast_part, tensor, dtype)
        entries[name] = Entry(type_, load, f"{type(model).__name__} in memory", part)
    return Weights(entries)


def _cast_part(tensor: torch.Tensor, dtype: torch.dtype, bounds: Bounds) -> torch.Tensor:
    return within(tensor, bounds).to("cpu", dtype)


@dataclass(frozen=True, eq=False)
class _Conversion:
    """One converter of transformers and the stored tensors of one place in the model.

    `name` is the first target. `sources` maps each source pattern to its tensors in index order.
    """

    converter: WeightConverter
    model: PreTrainedModel
    name: str
    sources: dict[str, list[tuple[str, Stored]]]

    def apply(self, tensors: Mapping[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The targets by full name, from tensors by source pattern."""
        converter = deepcopy(self.converter)  # it collects tensors: one for each use
        for pattern, parts in tensors.items():
            for part in parts:
                future: Any = part  # a tensor that is there already serves as a future
                converter.add_tensor(self.name, pattern, pattern, future)
        results = converter.convert(self.name, model=self.model, config=self.model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in results.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each target, by converting meta tensors; SourceError when they do not fit."""
        tensors = {
            pattern: [torch.empty(stored.shape, device="meta") for _, stored in parts]
            for pattern, parts in self.sources.items()
        }
        try:
            return {name: tuple(tensor.shape) for name, tensor in self.apply(tensors).items()}
        except (RuntimeError, ValueError, IndexError) as error:
            raise SourceError(
                f"{self.name}: cannot be built from {self.origin}: {error}"
            ) from error

    @property
    def origin(self) -> str:
        parts = [part for parts in self.sources.values() for part in parts]
        (first, stored), (last, _) = parts[0], parts[-1]
        if len(parts) == 1:
            return f"{stored.file.path}: {first}"
        return f"{stored.file.path.parent}: {len(parts)} tensors, {first} to {last}"

    @property
    def stack_dim(self) -> int | None:
        """For a stack whose elements are sources side by side: along which dim of an element.

        None for other conversions. Element i comes from the i-th source of every pattern.
        """
        if self.sources.keys() != set(self.converter.source_patterns):
            return None
        match self.converter.operations:
            case [MergeModulelist(dim=0)] if len(self.sources) == 1:
                return 0
            case [MergeModulelist(dim=0), Concatenate(dim=dim)] if dim > 0:
                return dim - 1
            case _:
                return None

    def load(self, target: str, type_: TensorType) -> torch.Tensor:
        """The target called `target`."""
        if self.stack_dim is not None:
            shape: Any = type_.shape
            return self.load_part(type_, tuple((0, size) for size in shape))
        dtype = torch_dtype(type_.dtype)
        tensors = {
            pattern: [stored.read().to(dtype) for _, stored in parts]
            for pattern, parts in self.sources.items()
        }
        return self.apply(tensors)[target]

    def load_part(self, type_: TensorType, bounds: Bounds) -> torch.Tensor:
        """Of a stack, what is within `bounds`: filled in place, nothing is held beside it."""
        dim = self.stack_dim
        assert dim is not None
        (first, last), *inner = bounds
        out = torch.empty([stop - start for start, stop in bounds], dtype=torch_dtype(type_.dtype))
        start = 0  # of a source within its element, along `dim`
        for pattern in self.converter.source_patterns:
            parts = [stored for _, stored in self.sources[pattern]]
            low, high = max(inner[dim][0], start), min(inner[dim][1], start + parts[0].shape[dim])
            there = (*inner[:dim], (low - start, high - start), *inner[dim + 1 :])
            start += parts[0].shape[dim]
            if low >= high:
                continue
            for element, stored in zip(out, parts[first:last], strict=True):
                stored.read_into(element.narrow(dim, low - inner[dim][0], high - low), there)
        return out


def _entries(stored: Mapping[str, Stored], meta: MetaModel) -> tuple[dict[str, Entry], list[str]]:
    """Entries by the model's names, and the stored names that it has no place for."""
    types = meta.types()
    places = meta.model.state_dict()
    transforms = get_model_conversion_mapping(meta.model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = meta.model.base_model_prefix

    entries: dict[str, Entry] = {}
    conversions: dict[str, _Conversion] = {}
    unused: list[str] = []
    for source in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, prefix, places)
        if name not in places and source in places:
            name, pattern = source, None
        if name not in places:
            unused.append(source)
        elif pattern is not None:
            conversion = conversions.setdefault(
                name, _Conversion(converter_of[pattern], meta.model, name, {})
            )
            conversion.sources.setdefault(pattern, []).append((source, stored[source]))
        elif name in entries:
            raise SourceError(
                f"two stored tensors for {name}: {source!r} and {entries[name].origin}"
            )
        else:
            entries[name] = _direct(name, types[name], source, stored[source])
    for conversion in conversions.values():
        for name, entry in _converted(conversion, types):
            if name in entries:
                raise SourceError(f"two stored tensors for {name}: {entry.origin} and another")
            entries[name] = entry
    return entries, unused


def _direct(name: str, type_: TensorType, source: str, stored: Stored) -> Entry:
    _check(name, type_, stored.type, f"{stored.file.path.name} stores as {source!r}")
    dtype = torch_dtype(type_.dtype)

    def load() -> torch.Tensor:
        return stored.read().to(dtype)

    def load_part(bounds: Bounds) -> torch.Tensor:
        return within(stored.read(), bounds).to(dtype)

    return Entry(type_, load, f"{stored.file.path}: {source}", load_part)


def _converted(
    conversion: _Conversion, types: Mapping[str, TensorType]
) -> Iterable[tuple[str, Entry]]:
    for parts in conversion.sources.values():
        _check_indices(conversion.name, [name for name, _ in parts])
    dtypes = {stored.dtype for parts in conversion.sources.values() for _, stored in parts}
    for name, shape in conversion.shapes().items():
        if name not in types:
            continue
        for dtype in dtypes:
            _check(name, types[name], TensorType(dtype, shape), f"{conversion.origin} give")
        load: Callable[[], torch.Tensor] = partial(conversion.load, name, types[name])
        part = None if conversion.stack_dim is None else partial(conversion.load_part, types[name])
        yield name, Entry(types[name], load, conversion.origin, part)


def _check(name: str, expected: TensorType, found: TensorType, verb: str) -> None:
    """SourceError unless `found` has the expected shape and a dtype that a cast can bring over."""
    if found.shape != expected.shape:
        raise SourceError(f"{name}: the model expects {expected}, {verb} {found}")
    castable = found.dtype in FLOATS and expected.dtype in FLOATS
    if found.dtype != expected.dtype and not castable:
        raise SourceError(
            f"{name}: the model expects {expected}, {verb} {found}, which is not a plain float "
            "tensor (quantized weights are not supported yet)"
        )


def _check_indices(name: str, sources: list[str]) -> None:
    """SourceError when stacked tensors (experts.0, experts.1, ...) leave an index out."""
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


def _resolve_ties(entries: dict[str, Entry], meta: MetaModel) -> None:
    """Give every tied name the one entry that is stored, under whichever of the names it is.

    SourceError when both are stored and differ: the model would be traced as if they were one.
    """
    for alias, original in meta.tied.items():
        if alias in entries and original in entries:
            if not torch.equal(entries[alias].load(), entries[original].load()):
                raise SourceError(
                    f"{alias} and {original} are tied in the config but stored with different "
                    "values; set tie_word_embeddings to false in config.json"
                )
        elif alias in entries:
            entries[original] = entries[alias]
        if original in entries:
            entries[alias] = entries[original]
