"""The errors of importers for a model that cannot be read or expressed."""

from __future__ import annotations


class SourceError(ValueError):
    """A model or checkpoint that cannot be imported: the reason, and how to fix it."""


class UnsupportedModel(Exception):
    """The model does something that this frontend cannot express; says what."""
