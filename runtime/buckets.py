"""The serving contract: what a program's entries take and give, and what goes into a replay.

Every entry is one bucket of T tokens and L = min(T, max_sequences) rows of logits:

    tokens i32[T]  positions i32[T]  slots i32[T]  logit_rows i32[L]
    page_table i32[max_sequences, pages_per_slot]               →  logits [L, vocab_size]

Token t of slot slots[t] (-1 is padding) sits at positions[t] and sees the cache of its slot up to
there, the tokens of this replay included. Row j of the logits is that of token logit_rows[j].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .program import Entry, Program


@dataclass(frozen=True)
class ServingMeta:
    """The facts in `Program.meta` that serving needs, each an int of at least 1."""

    vocab_size: int
    page_size: int
    max_sequences: int
    max_tokens_per_sequence: int
    pages: int

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> ServingMeta:
        """ValueError names the fact that is missing or wrong."""
        facts = {field.name: meta.get(field.name) for field in fields(cls)}
        for name, value in facts.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"program.meta[{name!r}]: expected an int ≥ 1, found {value!r}")
        return cls(**{name: int(value) for name, value in facts.items() if value is not None})

    @property
    def pages_per_slot(self) -> int:
        return -(-self.max_tokens_per_sequence // self.page_size)


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one slot, the first at position `start`."""

    slot: int
    start: int
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Buckets:
    """The entries of a serving program, by size."""

    def __init__(self, program: Program) -> None:
        """ValueError says which part of the contract `program` does not keep."""
        self.meta = ServingMeta.of(program.meta)
        if not program.entries:
            raise ValueError("program: expected at least one entry, found none")
        for entry in program.entries:
            _check_entry(entry, self.meta)
        self._entries = sorted(program.entries, key=lambda entry: entry.symbols["T"])

    @property
    def tokens(self) -> int:
        """The most tokens that one replay takes."""
        return self._entries[-1].symbols["T"]

    @property
    def rows(self) -> int:
        """The most rows of logits that one replay gives."""
        return self._entries[-1].symbols["L"]

    def smallest(self, tokens: int) -> Entry:
        """The smallest entry that takes `tokens` ≤ `self.tokens` tokens, of up to `rows` slots."""
        return next(entry for entry in self._entries if entry.symbols["T"] >= tokens)


def replay_inputs(
    entry: Entry, chunks: Sequence[Chunk], rows: Sequence[int], page_table: NDArray[np.int32]
) -> dict[str, NDArray[np.int32]]:
    """The inputs of `entry` for `chunks` one after the other, with the logits of tokens `rows`."""
    size = entry.symbols["T"]
    tokens = np.zeros(size, np.int32)
    positions = np.zeros(size, np.int32)
    slots = np.full(size, -1, np.int32)
    logit_rows = np.zeros(entry.symbols["L"], np.int32)
    at = 0
    for chunk in chunks:
        here = slice(at, at + len(chunk.tokens))
        tokens[here] = chunk.tokens
        positions[here] = np.arange(chunk.start, chunk.end)
        slots[here] = chunk.slot
        at = here.stop
    logit_rows[: len(rows)] = rows
    return {
        "tokens": tokens,
        "positions": positions,
        "slots": slots,
        "page_table": page_table,
        "logit_rows": logit_rows,
    }


def _check_entry(entry: Entry, meta: ServingMeta) -> None:
    size = entry.symbols.get("T", 0)
    rows = min(size, meta.max_sequences)
    if size < 1 or entry.symbols.get("L") != rows:
        raise ValueError(
            f"entry {entry.name}: expected symbols T ≥ 1 and L = min(T, {meta.max_sequences}), "
            f"found {dict(entry.symbols)}"
        )
    expected = {
        "tokens": ("i32", (size,)),
        "positions": ("i32", (size,)),
        "slots": ("i32", (size,)),
        "page_table": ("i32", (meta.max_sequences, meta.pages_per_slot)),
        "logit_rows": ("i32", (rows,)),
    }
    found = {b.name: (b.dtype, tuple(b.shape)) for b in entry.buffers if b.kind == "input"}
    if found != expected:
        raise ValueError(f"entry {entry.name}: expected inputs {expected}, found {found}")
    outputs = {b.name: tuple(b.shape) for b in entry.buffers if b.kind == "output"}
    if outputs != {"logits": (rows, meta.vocab_size)}:
        raise ValueError(
            f"entry {entry.name}: expected output logits {(rows, meta.vocab_size)}, found {outputs}"
        )


__all__ = ["Buckets", "Chunk", "ServingMeta", "replay_inputs"]
