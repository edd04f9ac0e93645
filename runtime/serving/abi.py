"""The serving ABI: what a program's `step` takes and gives.

It has an entry for each bucket of T tokens and L result rows, two independent sizes; where it is
interpreted it takes any up to the largest:

    tokens i32[T]  positions i32[T]  slots i32[T]  logit_rows i32[L]
    page_table i32[max_sequences, pages_per_slot]               →  logits [L, vocab_size]

Token t of slot slots[t] (-1 is padding) sits at positions[t] and sees the cache of its slot up to
there, the tokens of this replay included. Row j of the logits is that of token logit_rows[j].

A program may sample the rows too. Then it has besides

    temperature f32[L]  top_k i32[L]  top_p f32[L]  min_p f32[L]  penalty f32[L]  draw f32[L]
    seen i32[L, ceil(vocab_size / 32)]  top i32[L]  seed i64[L]  prompt i32[L]
        →  token i32[L]  logprob f32[L]  top_tokens i32[L, C]  top_logprobs f32[L, C]

(without the last two where C is 0). Bit v % 32 of word v // 32 of `seen` says that token v occurs
before the result, which only rows with a `penalty` other than 1 need; `draw` is the randomness in
[0, 1). Temperature 0 is greedy, and `top` ≤ C is how many most likely tokens are asked for; the
other meanings are those of `sampling.Sampling`, and `sampling.sample` gives the same. The token of
a row whose logits are broken is -1, and its logprob their maximum.

Such a step feeds itself: it leaves `tokens`, `positions`, `draw` and `seen` as a step behind it
takes them that has the same rows, each with its own token in its place, one position on. Draws are
those of `sampling.uniform` for the row's `seed` and the number of the token that is drawn, which
its position and the tokens in its `prompt` say. Of several rows of one place the first is fed.
Rows of padding stay what they are, and so do broken ones.

A program that samples may draft too, k ≤ 4 tokens behind each row. Then it has besides

    following i32[T]  and, where k > 1, room i32[L]  →  draft i32[L, k]

The token behind each, -1 for one that this replay samples, and the positions behind a row that its
slot has pages for. draft[j, 0] is drafted behind the token of row j; the further ones are drafts
where the first tokens that are sampled otherwise than they were drafted end with row j.

Where a smaller model drafts, which sees tokens alone, there is

    room i32[L]  →  draft i32[L, k]

without `following`, and all of draft[j] are drafts only where those end with row j.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.structs import replace

from ...compiler.dtypes import DTYPES
from ..driver import Array, DeviceFailedError
from ..program import STEP, Function, Program, Spec, entry_name

# Tokens in a word of `seen`.
SEEN_BITS = 32
# What a step that samples leaves for the next.
FED = ("tokens", "positions", "draw", "seen")
# The most tokens that a step drafts behind a row.
MOST_DRAFTED = 4
# What outputs in narrower floats are when they reach the host.
_ON_HOST = {"bf16": "f32", "f16": "f32"}


class ServingMeta(Struct, frozen=True, forbid_unknown_fields=True):
    """The sizes in `Program.meta` and in an ingot's manifest from which a session allocates."""

    vocab_size: Annotated[int, Meta(ge=1, le=2**24)]
    page_size: Annotated[int, Meta(ge=1, le=2**16)]
    max_sequences: Annotated[int, Meta(ge=1, le=2**16)]
    max_tokens_per_sequence: Annotated[int, Meta(ge=1, le=2**28)]
    pages: Annotated[int, Meta(ge=1, le=2**24)]

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> ServingMeta:
        """ValueError names the size that is missing or not positive."""
        facts = {name: meta.get(name) for name in cls.__struct_fields__}
        for name, value in facts.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"program.meta[{name!r}]: expected an int ≥ 1, found {value!r}")
        return cls(**{name: int(value) for name, value in facts.items() if value is not None})

    @property
    def pages_per_slot(self) -> int:
        return -(-self.max_tokens_per_sequence // self.page_size)


class ServingAbi:
    """What a serving program can take at once."""

    def __init__(self, program: Program) -> None:
        """ValueError says which part of the ABI `program` does not keep."""
        self.meta = ServingMeta.of(program.meta)
        if STEP not in program.functions:
            raise ValueError(f"program: expected a {STEP}, found {sorted(program.functions)}")
        step = program.functions[STEP]
        # How many most likely tokens the device can give; None where it does not sample.
        self.candidates = _candidates_of(step)
        # How many tokens the device drafts behind each row, and by what: the tokens that follow,
        # or those of the step alone.
        self.drafts = _drafts_of(step)
        self.follows = self.drafts > 0 and "following" in step.inputs
        _check_signature(step, self.meta, self.candidates, self.drafts, self.follows)
        # How many positions behind its own a step drafts over, which `room` says are there.
        self.reach = max(self.drafts - self.follows, 0)
        self._entries = sorted((_checked(entry.symbols) for entry in step.entries), key=_size)
        # The most tokens and the most rows of one replay: the largest entry takes any batch.
        if self._entries:
            self.tokens, self.rows = _size(self._entries[-1])
        elif step.graph:
            if {name: first for name, (first, _) in step.symbols.items()} != {"T": 1, "L": 1}:
                raise ValueError(f"{STEP}: expected T and L from 1, found {dict(step.symbols)}")
            self.tokens, self.rows = (step.symbols[name][1] for name in ("T", "L"))
        else:
            raise ValueError(f"{STEP}: expected at least one entry, found none")
        if more := [entry_name(symbols) for symbols in self._entries if symbols["L"] > self.rows]:
            raise ValueError(
                f"{STEP}: expected {entry_name(self._entries[-1])}, the entry of the most tokens, "
                f"to have the most rows, found more in {more}"
            )

    def smallest(self, tokens: int, rows: int) -> Mapping[str, int]:
        """The symbols of the smallest entry for `tokens` ≤ `self.tokens` tokens and `rows` ≤
        `self.rows` rows; just these where there are no entries."""
        if not self._entries:
            return {"T": tokens, "L": max(rows, 1)}
        return next(s for s in self._entries if s["T"] >= tokens and s["L"] >= rows)

    def checked_prompt(self, tokens: Iterable[int], pages: int) -> tuple[int, ...]:
        """The ids of a prompt; ValueError for one that a cache of `pages` could never serve."""
        ids = tuple(index(token) for token in tokens)
        meta = self.meta
        if not ids:
            raise ValueError("prompt: expected at least 1 token, found none")
        for place, token in enumerate(ids):
            if not 0 <= token < meta.vocab_size:
                raise ValueError(
                    f"prompt: expected token ids from 0 to {meta.vocab_size - 1}, "
                    f"found {token} at position {place}"
                )
        if len(ids) > meta.max_tokens_per_sequence:
            raise ValueError(
                f"prompt: expected at most max_tokens_per_sequence = "
                f"{meta.max_tokens_per_sequence} tokens, found {len(ids)}"
            )
        if len(ids) > pages * meta.page_size:
            raise ValueError(
                f"prompt: expected at most {pages} pages of {meta.page_size} tokens, "
                f"found {len(ids)} tokens"
            )
        return ids

    def check_outputs(self, symbols: Mapping[str, int], found: Mapping[str, Array]) -> None:
        """DeviceFailedError for an output of a replay that is not as the program says."""
        expected = serving_outputs(self.meta, self.candidates, self.drafts)
        for name, array in found.items():
            dtype = DTYPES[expected[name].dtype].numpy
            shape = expected[name].bound(symbols)
            if array.shape != shape or array.dtype != dtype:
                raise DeviceFailedError(
                    f"entry {entry_name(symbols)}: expected {name} {dtype}{list(shape)}, "
                    f"found {array.dtype}{list(array.shape)}"
                )


def sampling_inputs(vocab: int) -> dict[str, Spec]:
    """The inputs by which a device samples, by name."""
    floats = ("temperature", "top_p", "min_p", "penalty", "draw")
    return {
        **{name: Spec("f32", ("L",)) for name in floats},
        **{name: Spec("i32", ("L",)) for name in ("top_k", "top", "prompt")},
        "seed": Spec("i64", ("L",)),
        "seen": Spec("i32", ("L", -(-vocab // SEEN_BITS))),
    }


def drafting_inputs(drafts: int, follows: bool) -> dict[str, Spec]:
    """The inputs by which a device drafts so many tokens, by name."""
    inputs = {"following": Spec("i32", ("T",))} if follows else {}
    return inputs | ({"room": Spec("i32", ("L",))} if drafts > follows else {})


def serving_outputs(meta: ServingMeta, candidates: int | None, drafts: int = 0) -> dict[str, Spec]:
    """Every output, by name, as it reaches the host."""
    expected = {"logits": Spec("f32", ("L", meta.vocab_size))}
    if candidates is not None:
        expected |= {"token": Spec("i32", ("L",)), "logprob": Spec("f32", ("L",))}
    if candidates:
        shape = ("L", candidates)
        expected |= {"top_tokens": Spec("i32", shape), "top_logprobs": Spec("f32", shape)}
    return expected | ({"draft": Spec("i32", ("L", drafts))} if drafts else {})


def _size(symbols: Mapping[str, int]) -> tuple[int, int]:
    return symbols["T"], symbols["L"]


def _candidates_of(step: Function) -> int | None:
    """How many most likely tokens `step` can give; None where it does not sample."""
    if "token" not in step.outputs:
        return None
    *_, count = step.outputs["top_tokens"].shape if "top_tokens" in step.outputs else (0,)
    return count if isinstance(count, int) else None


def _drafts_of(step: Function) -> int:
    """How many tokens `step` drafts behind each row."""
    *_, count = step.outputs["draft"].shape if "draft" in step.outputs else (0,)
    if not isinstance(count, int) or ("draft" in step.outputs and not 1 <= count <= MOST_DRAFTED):
        raise ValueError(f"{STEP}: expected draft i32[L, 1 to {MOST_DRAFTED}], found {count}")
    return count


def _check_signature(
    step: Function, meta: ServingMeta, candidates: int | None, drafts: int, follows: bool
) -> None:
    inputs = {name: Spec("i32", ("T",)) for name in ("tokens", "positions", "slots")}
    inputs["page_table"] = Spec("i32", (meta.max_sequences, meta.pages_per_slot))
    inputs["logit_rows"] = Spec("i32", ("L",))
    if candidates is not None:
        inputs |= sampling_inputs(meta.vocab_size) | drafting_inputs(drafts, follows)
    outputs = {n: replace(s, dtype=_ON_HOST.get(s.dtype, s.dtype)) for n, s in step.outputs.items()}
    for what, found, expected in (
        ("inputs", step.inputs, inputs),
        ("outputs", outputs, serving_outputs(meta, candidates, drafts)),
    ):
        if found != expected:
            raise ValueError(f"{STEP}: expected {what} {_shown(expected)}, found {_shown(found)}")
    fed = () if candidates is None else FED
    if set(step.fed) != set(fed):
        raise ValueError(f"{STEP}: expected to feed itself {fed}, found {step.fed}")


def _shown(specs: Mapping[str, Spec]) -> str:
    return ", ".join(f"{name} {spec}" for name, spec in specs.items())


def _checked(symbols: Mapping[str, int]) -> Mapping[str, int]:
    if min(symbols.get(name, 0) for name in ("T", "L")) < 1:
        raise ValueError(
            f"entry {entry_name(symbols)}: expected symbols T ≥ 1 and L ≥ 1, found {dict(symbols)}"
        )
    return symbols
