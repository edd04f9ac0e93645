"""What every way in raises for a model that it cannot read."""

from __future__ import annotations


class SourceError(ValueError):
    """A model or checkpoint that cannot be imported: why, and what would mend it."""


__all__ = ["SourceError"]
