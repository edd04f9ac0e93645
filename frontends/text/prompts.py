"""What a caller gives as prompts, as texts and lists of token ids; other kinds are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index
from typing import Any

_EXPECTED = "expected text or token ids, or a list of such prompts"
# Iterable, but no sequences of ids: without an order, or of something else.
_NO_IDS = (Mapping, set, frozenset, bytes, bytearray, memoryview)


def prompts_of(given: Any) -> tuple[list[str | list[int]], bool]:
    """The prompts in `given`, and whether it is one prompt and no list.

    One prompt is a text, or ids in an iterable, an array or tensor of one dim. Several are an
    iterable of prompts, or an array or tensor of two dims. What a tokenizer of transformers returns
    (`input_ids`, with `attention_mask` over padding) is either. TypeError names `prompts`.
    """
    if isinstance(given, str):
        return [given], True
    if isinstance(given, Mapping) and "input_ids" in given:
        return _encoded(given)
    items = _items(given)
    if not items or not _is_number(items[0]):
        return [_prompt(item) for item in items], False
    return [token_ids_of(items, "prompts")], True


def token_ids_of(given: Any, name: str) -> list[int]:
    """The token ids of one sequence; TypeError names `name`."""
    if isinstance(given, (str, *_NO_IDS)) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: expected token ids, found a {type(given).__name__}")
    return [_id(item, name) for item in _listed(given)]


def _encoded(given: Mapping[str, Any]) -> tuple[list[str | list[int]], bool]:
    ids, mask = _listed(given["input_ids"]), given.get("attention_mask")
    single = not ids or _is_number(ids[0])
    rows = [ids] if single else ids
    masks: list[Any] = [None] * len(rows)
    if mask is not None:
        masks = [_listed(mask)] if single else _listed(mask)
    kept: list[str | list[int]] = []
    for row, of_row in zip(rows, masks, strict=True):
        tokens = token_ids_of(row, "prompts")
        marks = [1] * len(tokens) if of_row is None else _listed(of_row)
        kept.append([token for token, mark in zip(tokens, marks, strict=True) if mark])
    return kept, single


def _prompt(item: Any) -> str | list[int]:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping) and "input_ids" in item:
        (ids, *more), _ = _encoded(item)
        if more:
            raise TypeError("prompts: expected one prompt in each item of a list, found rows")
        return ids
    return token_ids_of(_items(item), "prompts")


def _items(given: Any) -> list[Any]:
    if isinstance(given, Mapping) and {"role", "content"} & given.keys():
        raise TypeError(
            f"prompts: {_EXPECTED}, found a message of a chat: render messages with "
            "model.tokenizer.chat_template first"
        )
    if isinstance(given, _NO_IDS) or not isinstance(given, Iterable):
        raise TypeError(f"prompts: {_EXPECTED}, found a {type(given).__name__}")
    return _listed(given)


def _listed(given: Iterable[Any]) -> list[Any]:
    """A list of `given`, in plain numbers where it is an array or tensor."""
    tolist: Any = getattr(given, "tolist", None)
    listed = given if tolist is None else tolist()
    return list(listed) if isinstance(listed, Iterable) else [listed]


def _is_number(item: Any) -> bool:
    return not isinstance(item, str | Iterable) or getattr(item, "ndim", None) == 0


def _id(item: Any, name: str) -> int:
    plain = item.item() if getattr(item, "ndim", None) == 0 and hasattr(item, "item") else item
    try:
        if isinstance(plain, bool):
            raise TypeError
        return index(plain)
    except TypeError:
        raise TypeError(f"{name}: expected token ids, found {item!r:.80}") from None
