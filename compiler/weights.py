"""The weights of a graph: names to tensors that are read only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from .torch_types import type_of
from .types import TensorType


@dataclass(frozen=True)
class Entry:
    """One tensor: its type, how to load it, and where it comes from (for reports and errors)."""

    type: TensorType
    load: Callable[[], torch.Tensor]
    origin: str


class Weights(Mapping[str, Entry]):
    """Entries by name. Holding a store costs no tensor memory; `load` reads one tensor."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], origin: str = "memory") -> Weights:
        """A store over tensors that are in memory already; they are not copied."""

        def entry(tensor: torch.Tensor) -> Entry:
            return Entry(type_of(tensor), lambda: tensor, origin)

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
        tensor = entry.load()
        if type_of(tensor) != entry.type:
            raise TypeError(
                f"weight {name!r} from {entry.origin}: expected {entry.type}, "
                f"loaded {type_of(tensor)}"
            )
        return tensor

    def merged(self, other: Mapping[str, Entry]) -> Weights:
        """This store with the entries of `other` added; ValueError when a name is in both."""
        if clash := self._entries.keys() & other.keys():
            raise ValueError(f"weights defined twice: {', '.join(sorted(clash)[:5])}")
        return Weights({**self._entries, **dict(other)})
