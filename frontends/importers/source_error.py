"""The error of all importers for a model that cannot be read."""

from __future__ import annotations


class SourceError(ValueError):
    """A model or checkpoint that cannot be imported: the reason, and how to fix it."""


__all__ = ["SourceError"]
