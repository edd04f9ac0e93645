"""Patterns of module names in configs: names, "re:" and a regular expression, and globs.

They may come from anywhere: what cannot be decided in bounded time is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import regex

from ..importers.source_error import SourceError

_SECONDS = 0.25  # for one name; usual patterns take microseconds
_LONGEST = 4096  # characters of a regular expression


def matches_regex(pattern: str, name: str) -> bool:
    """Whether the regular expression in `pattern`, "re:…", matches the beginning of `name`.

    SourceError for one that is none, or that takes too long.
    """
    text = pattern.removeprefix("re:")
    shown = pattern[:60]
    if len(text) > _LONGEST:
        raise SourceError(f"expected a pattern of at most {_LONGEST} characters, found {shown!r}…")
    try:
        return regex.match(text, name, timeout=_SECONDS) is not None
    except TimeoutError as error:
        raise SourceError(f"pattern {shown!r} takes too long on {name[:60]!r}") from error
    except (regex.error, RecursionError, MemoryError, OverflowError) as error:
        raise SourceError(f"expected a regular expression, found {shown!r}: {error}") from error


def matches_any(patterns: Iterable[str], name: str, classes: Iterable[str] = ()) -> bool:
    """Whether one of `patterns` is `name` or one of `classes`, or a "re:…" that matches it."""
    return any(
        matches_regex(p, name) if p.startswith("re:") else p == name or p in classes
        for p in patterns
    )
