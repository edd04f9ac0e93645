"""A section of a JSON config that records what was read of it, and refuses the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..importers.source_error import SourceError


class Section:
    """A JSON object at `path` of a config, whose keys are read once each by the methods below.

    `refuse_unread` then raises SourceError for every key, of this object and of those in it, that
    was not read and that says something: null, "", [] and {} switch nothing on. Each method raises
    it for a value of another kind than it returns.
    """

    def __init__(self, data: object, path: str) -> None:
        if not isinstance(data, Mapping):
            raise SourceError(f"{path}: expected an object, found {str(data)[:60]!r}")
        self.path = path
        self._data: Mapping[str, Any] = data
        self._read: set[str] = set()
        self._inner: list[Section] = []

    def get(self, key: str) -> Any:
        """The value of `key` as it is, None where it is absent."""
        self._read.add(key)
        return self._data.get(key)

    def object(self, key: str) -> Section:
        """The object that `key` holds; an empty one where it is absent or null."""
        found = self.get(key)
        return self._enter({} if found is None else found, key)

    def objects(self, key: str) -> dict[str, Section]:
        """The objects in the object or list that `key` holds, by their key or index."""
        found = self.get(key) or {}
        if isinstance(found, list):
            found = dict(enumerate(found))
        if not isinstance(found, Mapping):
            raise SourceError(f"{self.path}.{key}: expected objects, found {str(found)[:60]!r}")
        return {str(name): self._enter(inner, f"{key}.{name}") for name, inner in found.items()}

    def names(self, *keys: str) -> tuple[str, ...]:
        """The strings of the first of these keys that says any: a list, or a single one."""
        values = [self.get(key) for key in keys]
        found = next(filter(None, values), [])
        if not isinstance(found, list | tuple) or not all(isinstance(n, str) for n in found):
            raise SourceError(
                f"{self.path}: expected {keys[0]} to be a list of names: {str(found)[:60]!r}"
            )
        return tuple(found)

    def known(self, *keys: str) -> None:
        """These keys are known not to change what the model computes."""
        self._read.update(keys)

    def refuse_unread(self) -> None:
        """SourceError for keys that nobody read."""
        if unread := self._unread():
            raise SourceError(
                f"{', '.join(unread[:5])}: not known, and may change what the model computes; "
                "expected the keys of a known format"
            )

    def _enter(self, data: object, key: str) -> Section:
        inner = Section(data, f"{self.path}.{_shown(key)}")
        self._inner.append(inner)
        return inner

    def _unread(self) -> list[str]:
        own = [
            f"{self.path}.{_shown(key)} {str(value)[:60]!r}"
            for key, value in self._data.items()
            if key not in self._read and value not in (None, "", [], {})
        ]
        return own + [line for inner in self._inner for line in inner._unread()]


def _shown(key: str) -> str:
    """A key as errors show it, of any text."""
    return key if key.isprintable() and len(key) <= 60 else repr(key[:60])
