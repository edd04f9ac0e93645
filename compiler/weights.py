"""The weights of a graph: names to tensors that are read only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from .torch_types import type_of
from .types import TensorType

# Of each dim of a tensor the indices [start, stop).
Bounds = tuple[tuple[int, int], ...]


def within(tensor: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """A view of the part of `tensor` within `bounds`."""
    return tensor[tuple(slice(*b) for b in bounds)]


@dataclass(frozen=True)
class Entry:
    """One tensor: its type, how to load it, and where it comes from (for reports and errors).

    `load_part`, where given, loads the part within some bounds and reads little else.
    """

    type: TensorType
    load: Callable[[], torch.Tensor]
    origin: str
    load_part: Callable[[Bounds], torch.Tensor] | None = None


class Weights(Mapping[str, Entry]):
    """Entries by name. Holding a store costs no tensor memory; `load` reads one tensor."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], origin: str = "memory") -> Weights:
        """A store over tensors that are in memory already; they are not copied."""

        def entry(tensor: torch.Tensor) -> Entry:
            part = partial(within, tensor)
            return Entry(type_of(tensor), lambda: tensor, origin, part)

        return cls({name: entry(tensor) for name, tensor in tensors.items()})

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise KeyError(f"no weight {name!r} among the {len(self._entries)} of this store")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, name: str) -> torch.Tensor:
        """The tensor called `name`; TypeError when it is not what its entry promises."""
        entry = self[name]
        return _checked(name, entry, entry.load(), entry.type)

    def load_part(self, name: str, bounds: Bounds) -> torch.Tensor:
        """The part of a tensor within `bounds`; where its store can, nothing else is read.

        TypeError when it is not what the entry promises.
        """
        entry = self[name]
        if bounds == tuple((0, size) for size in entry.type.shape):
            return self.load(name)
        expected = entry.type.with_shape(tuple(stop - start for start, stop in bounds))
        if entry.load_part is None:  # a copy, so that the rest goes
            part = within(self.load(name), bounds).clone()
        else:
            part = entry.load_part(bounds)
        return _checked(name, entry, part, expected)

    def merged(self, other: Mapping[str, Entry]) -> Weights:
        """This store with the entries of `other` added; ValueError when a name is in both."""
        if clash := self._entries.keys() & other.keys():
            raise ValueError(f"weights defined twice: {', '.join(sorted(clash)[:5])}")
        return Weights({**self._entries, **dict(other)})


def _checked(name: str, entry: Entry, tensor: torch.Tensor, expected: TensorType) -> torch.Tensor:
    if type_of(tensor) != expected:
        raise TypeError(
            f"weight {name!r} from {entry.origin}: expected {expected}, loaded {type_of(tensor)}"
        )
    return tensor
