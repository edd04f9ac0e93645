"""transformers' weight conversions at load: renaming, stacking and concatenating stored tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ...compiler.torch_types import torch_dtype
from ...compiler.types import TensorType
from ...compiler.weights import Bounds, Entry
from ..checkpoints.dequantize import Dequantized
from ..checkpoints.quantized import Packed, Source
from ..checkpoints.safetensors_files import Stored
from ..importers.meta_model import MetaModel
from ..importers.source_error import SourceError


@dataclass(frozen=True)
class Destination:
    """The parameter that a stored tensor is loaded into: `name`, by way of `converter` if any.

    With a converter, `name` is its first target and `pattern` its source pattern that matched.
    """

    name: str
    converter: WeightConverter | None = None
    pattern: str = ""


def destinations(
    stored: Iterable[str], meta: MetaModel
) -> Iterator[tuple[str, Destination | None]]:
    """Each stored name, in natural order, and its destination; None if the model has none."""
    parameters = {n: t for n, t in meta.types().items() if n not in meta.buffers}
    transforms = meta.transforms()
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = meta.model.base_model_prefix
    for source in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, prefix, parameters)
        if name not in parameters and source in parameters:
            name, pattern = source, None
        if name not in parameters:
            yield source, None
        elif pattern is None:
            yield source, Destination(name)
        else:
            yield source, Destination(name, converter_of[pattern], pattern)


@dataclass(frozen=True, eq=False)
class Conversion:
    """One converter of transformers applied to the stored tensors of one target parameter.

    `name` is the first target. `sources` maps each source pattern to its tensors in index order.
    """

    converter: WeightConverter
    model: PreTrainedModel
    name: str
    sources: dict[str, list[tuple[str, Source]]]

    def apply(self, tensors: Mapping[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Convert `tensors`, given by source pattern, to the targets by full name."""
        converter = deepcopy(self.converter)  # stateful: a fresh copy per use
        for pattern, parts in tensors.items():
            for part in parts:
                future: Any = part  # a loaded tensor serves as a future
                converter.add_tensor(self.name, pattern, pattern, future)
        results = converter.convert(self.name, model=self.model, config=self.model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in results.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each target, from converting meta tensors; SourceError when that fails."""
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
        """The dim along which element i of a stack concatenates the i-th source of each pattern.

        None for conversions that are no such stack.
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

    @property
    def packed(self) -> bool | None:
        """Whether its sources are in MXFP4; None where some are and some are not."""
        kinds = {isinstance(s, Packed) for parts in self.sources.values() for _, s in parts}
        return kinds.pop() if len(kinds) == 1 else None

    def of(self, part: Callable[[Packed], Stored]) -> Conversion:
        """This conversion applied to the codes, or to the scales, of sources in MXFP4."""
        sources: dict[str, list[tuple[str, Source]]] = {
            pattern: [(name, part(s)) for name, s in parts if isinstance(s, Packed)]
            for pattern, parts in self.sources.items()
        }
        return replace(self, sources=sources)

    @property
    def keeps_rows(self) -> bool:
        """Whether it moves whole rows only: the last dim of every source is unchanged."""
        dense = not any(
            isinstance(s, Packed) and s.transposed for p in self.sources.values() for _, s in p
        )
        rank = 2
        for operation in self.converter.operations:
            match operation:
                case MergeModulelist(dim=0):
                    rank += 1
                case Concatenate(dim=dim) | Chunk(dim=dim) if 0 <= dim < rank - 1:
                    pass
                case _:
                    return False
        return dense

    def load(self, target: str, type_: TensorType) -> torch.Tensor:
        """Build the target called `target`."""
        if self.stack_dim is not None:
            shape: Any = type_.shape
            return self.load_part(type_, tuple((0, size) for size in shape))
        dtype = torch_dtype(type_.dtype)
        tensors = {
            pattern: [dense(stored).read_as(dtype) for _, stored in parts]
            for pattern, parts in self.sources.items()
        }
        return self.apply(tensors)[target]

    def load_part(self, type_: TensorType, bounds: Bounds) -> torch.Tensor:
        """Build what is within `bounds` of a stack, reading each source into its place."""
        dim = self.stack_dim
        assert dim is not None
        (first, last), *inner = bounds
        out = torch.empty([stop - start for start, stop in bounds], dtype=torch_dtype(type_.dtype))
        start = 0  # of a source within its element, along `dim`
        for pattern in self.converter.source_patterns:
            parts = [dense(stored) for _, stored in self.sources[pattern]]
            low, high = max(inner[dim][0], start), min(inner[dim][1], start + parts[0].shape[dim])
            there = (*inner[:dim], (low - start, high - start), *inner[dim + 1 :])
            start += parts[0].shape[dim]
            if low >= high:
                continue
            for element, stored in zip(out, parts[first:last], strict=True):
                stored.read_into(element.narrow(dim, low - inner[dim][0], high - low), there)
        return out

    def entry(self, target: str, type_: TensorType) -> Entry:
        """The target called `target` as an entry, of which a stack is loaded in parts too."""
        part = None if self.stack_dim is None else partial(self.load_part, type_)
        return Entry(type_, partial(self.load, target, type_), self.origin, part)


def dense(source: Source) -> Stored | Dequantized:
    assert not isinstance(source, Packed)
    return source
