"""Bounds on what a config.json may ask for, checked before transformers builds anything of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .side_files import read_json_object
from .source_error import SourceError

# Words in keys whose number counts modules, or entries of a list that the config makes of it, and
# the largest number: some times that of the largest models.
_COUNTS = {"layer": 2048, "block": 2048, "depth": 2048, "expert": 1 << 16, "label": 1 << 20}
_NOT_COUNTED = ("size", "interval", "freq", "dim", "_id", "factor", "loss", "coef", "dropout")
_MOST_MODULES = 1 << 20  # of experts, over all layers
_MOST = 2**63 - 1


def check_config_file(path: Path) -> None:
    """SourceError unless `path` is JSON of bounded size whose numbers a model can be built of."""
    config = read_json_object(path)
    most = {"layer": 1, "expert": 1}
    for key, value in _integers(config):
        word = next((w for w in _COUNTS if w in key.lower()), None)
        counts = word is not None and not any(w in key.lower() for w in _NOT_COUNTED)
        limit = _COUNTS[word] if word is not None and counts else _MOST
        if abs(value) > limit:
            raise SourceError(
                f"{path}: {key[:80]}: expected at most {limit}, found {_shown(value)}"
            )
        if word in most and counts:
            most[word] = max(most[word], value)
    if (modules := most["layer"] * most["expert"]) > _MOST_MODULES:
        raise SourceError(
            f"{path}: expected at most {_MOST_MODULES} experts in all layers, found {modules}"
        )


def _shown(value: int) -> str:
    return str(value) if value.bit_length() < 100 else f"a number of {value.bit_length()} bits"


def _integers(config: Any) -> Iterator[tuple[str, int]]:
    """Every integer by its key."""
    level: list[tuple[str, Any]] = [("", config)]
    while level:
        below: list[tuple[str, Any]] = []
        for key, value in level:
            if isinstance(value, int) and not isinstance(value, bool):
                yield key, value
            elif isinstance(value, dict):
                below += value.items()
            elif isinstance(value, list):
                below += [("", item) for item in value]
        level = below
