"""Untrusted JSON: read within bounds, and decoded by msgspec into structs with constraints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
from msgspec import Meta

_MAX_DEPTH = 32
_MAX_VALUES = 1 << 23  # each takes up to a hundred bytes of memory
_MAX_SHOWN = 60
_MAX_WORDS = 200

T = TypeVar("T")
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class IngotError(ValueError):
    """An invalid ingot: which file, what was expected, what was found."""


def shown(value: Any) -> str:
    """`value` on one line, truncated."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return _cut(repr(value[: _MAX_SHOWN + 1] if isinstance(value, str) else value), _MAX_SHOWN)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def decode(data: bytes | memoryview, kind: type[T], where: str, most: int) -> T:
    """Decode `data`, at most `most` bytes of JSON, as a `kind`; IngotError says where not.

    As `read_json` and `typed`; text must also be printable.
    """
    value = read_json(data, where, most)
    level = [value]
    while level:
        for item in level:
            if isinstance(item, str) and not item.isprintable():
                raise IngotError(f"{where}: expected printable text, found {shown(item)}")
        level = [inner for item in level for inner in _inside(item)]
    return typed(value, kind, where)


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else ()


def bounded_json(data: bytes | memoryview, where: str, most: int, **hooks: Any) -> Any:
    """The value in `data`, of at most `most` bytes, 8,388,608 values and 32 levels.

    `hooks` go to json.loads. IngotError where it is more, or no JSON.
    """
    if len(data) > most:
        raise IngotError(f"{where}: expected at most {most} bytes of JSON, found {len(data)}")
    data = bytes(data)
    if sum(map(data.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise IngotError(f"{where}: expected at most {_MAX_VALUES} values of JSON, found more")
    try:
        value = json.loads(data.decode("utf-8"), **hooks)
    except IngotError:
        raise
    except (ValueError, RecursionError) as error:
        raise IngotError(f"{where}: expected JSON, found none: {error}") from error
    level = [value]
    for _ in range(_MAX_DEPTH):
        inside = (inner for item in level for inner in _inside(item))
        level = [inner for inner in inside if isinstance(inner, dict | list)]
    if level:
        raise IngotError(f"{where}: expected at most {_MAX_DEPTH} levels of JSON, found more")
    return value


def read_json(data: bytes | memoryview, where: str, most: int) -> Any:
    """As `bounded_json`, of JSON that Ingot wrote, or the header of a safetensors file.

    Refuses repeated keys and infinite numbers, which msgspec's decoder accepts.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise IngotError(f"{where}: expected every key once, found one of an object twice")
        return found

    def constant(text: str) -> NoReturn:
        raise IngotError(f"{where}: expected finite numbers, found {text}")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else constant(shown(text))

    hooks = {"object_pairs_hook": pairs, "parse_constant": constant, "parse_float": number}
    return bounded_json(data, where, most, **hooks)


def typed(value: Any, kind: type[T], where: str) -> T:
    """Convert a JSON value to a `kind`; IngotError has the path of the part that does not fit."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise IngotError(f"{where}: {_refusal(str(error), value)}") from error


def _refusal(said: str, value: Any) -> str:
    """msgspec's "Expected `int` >= 0 - at `$.size`" as "size: expected int >= 0, found -1"."""
    parts = re.fullmatch(r"(.*?)(?: - at (?:`key` in )?`\$\.?([^`]*)`)?", said, re.DOTALL)
    assert parts is not None
    words, path = parts[1].replace("`", "").replace(", got ", ", found "), parts[2] or ""
    if words.startswith("Expected") and ", found " not in words:
        with suppress(KeyError, IndexError, TypeError, ValueError):  # the keys of a dict stay "..."
            for key in re.findall(r"[^.\[\]]+", path.replace("...", "\0")):
                value = value[int(key) if isinstance(value, list) else key]
            words += f", found {shown(value)}"
    words = words[0].lower() + words[1:]
    words = _cut(f"{path}: {words}" if path else words, _MAX_WORDS)
    return words if words.isprintable() else ascii(words)[1:-1]


def write_json(value: Any) -> bytes:
    """`value` as compact JSON that `read_json` takes; ValueError for what is not finite."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n"
