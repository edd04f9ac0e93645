"""The serving ABI: what a program's entries take and give.

Every entry is one bucket of T tokens and L result rows, two independent sizes:

    tokens i32[T]  positions i32[T]  slots i32[T]  logit_rows i32[L]
    page_table i32[max_sequences, pages_per_slot]               →  logits [L, vocab_size]

Token t of slot slots[t] (-1 is padding) sits at positions[t] and sees the cache of its slot up to
there, the tokens of this replay included. Row j of the logits is that of token logit_rows[j].

A program may sample the rows too. Then every entry has besides

    temperature f32[L]  top_k i32[L]  top_p f32[L]  min_p f32[L]  penalty f32[L]  draw f32[L]
    seen i32[L, ceil(vocab_size / 32)]  top i32[L]
        →  token i32[L]  logprob f32[L]  top_tokens i32[L, C]  top_logprobs f32[L, C]

(without the last two where C is 0). Bit v % 32 of word v // 32 of `seen` says that token v occurs
before the result, which only rows with a `penalty` other than 1 need; `draw` is the randomness in
[0, 1). Temperature 0 is greedy, and `top` ≤ C is how many most likely tokens are asked for; the
other meanings are those of `sampling.Sampling`, and `sampling.sample` gives the same. The token of
a row whose logits are broken is -1, and its logprob their maximum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..program import Entry, Program

# Tokens in a word of `seen`.
SEEN_BITS = 32


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


class ServingAbi:
    """The entries of a serving program, by size."""

    def __init__(self, program: Program) -> None:
        """ValueError says which part of the ABI `program` does not keep."""
        self.meta = ServingMeta.of(program.meta)
        if not program.entries:
            raise ValueError("program: expected at least one entry, found none")
        for entry in program.entries:
            _check_entry(entry, self.meta)
        counts = {candidates_of(entry) for entry in program.entries}
        if len(counts) != 1:
            raise ValueError(f"program: expected entries that sample alike, found {counts}")
        # How many most likely tokens the device can give; None where it does not sample.
        (self.candidates,) = counts
        self._entries = sorted(program.entries, key=_size)
        # The most tokens and the most rows of one replay: the largest entry takes any batch.
        self.tokens, self.rows = _size(self._entries[-1])
        if more := [e.name for e in self._entries if e.symbols["L"] > self.rows]:
            raise ValueError(
                f"program: expected {self._entries[-1].name}, the entry of the most tokens, to "
                f"have the most rows, found more in {more}"
            )

    def smallest(self, tokens: int, rows: int) -> Entry:
        """The smallest entry for `tokens` ≤ `self.tokens` tokens and `rows` ≤ `self.rows` rows."""
        fits = (e for e in self._entries if e.symbols["T"] >= tokens and e.symbols["L"] >= rows)
        return next(fits)


def sampling_inputs(rows: int, vocab: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes of the inputs by which a device samples, by name."""
    settings = {
        "temperature": "f32",
        "top_k": "i32",
        "top_p": "f32",
        "min_p": "f32",
        "penalty": "f32",
        "draw": "f32",
        "top": "i32",
    }
    words = -(-vocab // SEEN_BITS)
    return {**{n: (d, (rows,)) for n, d in settings.items()}, "seen": ("i32", (rows, words))}


def candidates_of(entry: Entry) -> int | None:
    """How many most likely tokens `entry` can give; None where it does not sample."""
    outputs = {b.name: b for b in entry.buffers if b.kind == "output"}
    if "token" not in outputs:
        return None
    return outputs["top_tokens"].shape[1] if "top_tokens" in outputs else 0


def serving_outputs(entry: Entry, meta: ServingMeta) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype in which every output of `entry` reaches the host, and its shape, by name."""
    rows = entry.symbols["L"]
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "logits": ("float32", (rows, meta.vocab_size))
    }
    candidates = candidates_of(entry)
    if candidates is not None:
        expected |= {"token": ("int32", (rows,)), "logprob": ("float32", (rows,))}
    if candidates:
        shape = (rows, candidates)
        expected |= {"top_tokens": ("int32", shape), "top_logprobs": ("float32", shape)}
    return expected


def _size(entry: Entry) -> tuple[int, int]:
    return entry.symbols["T"], entry.symbols["L"]


def _check_entry(entry: Entry, meta: ServingMeta) -> None:
    if min(entry.symbols.get(name, 0) for name in ("T", "L")) < 1:
        raise ValueError(
            f"entry {entry.name}: expected symbols T ≥ 1 and L ≥ 1, found {dict(entry.symbols)}"
        )
    size, rows = _size(entry)
    expected = {
        "tokens": ("i32", (size,)),
        "positions": ("i32", (size,)),
        "slots": ("i32", (size,)),
        "page_table": ("i32", (meta.max_sequences, meta.pages_per_slot)),
        "logit_rows": ("i32", (rows,)),
    }
    if candidates_of(entry) is not None:
        expected |= sampling_inputs(rows, meta.vocab_size)
    found = {b.name: (b.dtype, tuple(b.shape)) for b in entry.buffers if b.kind == "input"}
    if found != expected:
        raise ValueError(f"entry {entry.name}: expected inputs {expected}, found {found}")
    outputs = {b.name: tuple(b.shape) for b in entry.buffers if b.kind == "output"}
    wanted = {name: shape for name, (_, shape) in serving_outputs(entry, meta).items()}
    if outputs != wanted:
        raise ValueError(f"entry {entry.name}: expected outputs {wanted}, found {outputs}")


__all__ = [
    "SEEN_BITS",
    "ServingAbi",
    "ServingMeta",
    "sampling_inputs",
    "serving_outputs",
]
