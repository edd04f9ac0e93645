"""What a step leaves as the inputs of the next: each row's token goes back in behind itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..axes import rule
from ..dtypes import FLOATS
from ..ir import Cost, Op, Operands, Sample
from ..types import TensorType, Types, VerifyError
from .sampling import WORD

# ---- feed: tokens, positions i32 [T]; draw [L], a float; seen i32 [L, W]; slots i32 [T];
#      logit_rows, token i32 [L]; seed i64 [L]; prompt i32 [L]
#      -> the next tokens, positions, draw and seen
#
# A row goes on where its place logit_rows[row] has a slot (>= 0) and is not that of an earlier row,
# and its token is one of `seen`'s. For these rows, at their places:
#   tokens     the token
#   positions  one more
#   draw       the number in [0, 1) that belongs to the generated token behind it, the one with
#              number n = positions + 1 - prompt after that: the first 53 bits of Philox4x64-10
#              (Salmon et al. 2011) keyed by (seed, n), in f32 and rounded down
#   seen       and the bit of the token
# All else stays as it was.

_RESULTS = 4
_MASK = 2**64 - 1


def uniform(seed: int, number: int) -> float:
    """The draw in [0, 1), with 53 bits, of generated token `number` (from 0) of a sequence.

    Philox4x64 keyed by (seed, number): a draw depends on nothing else.
    """
    key = np.array([seed & _MASK, number & _MASK], np.uint64)
    return (int(np.random.Philox(key=key).random_raw()) >> 11) * 2.0**-53


def below(draw: float) -> float:
    """`draw` in f32, not rounded up: what is below 1 stays there."""
    near = np.float32(draw)
    return float(near if float(near) <= draw else np.nextafter(near, np.float32(0)))


def _feed_infer(
    tokens: TensorType,
    positions: TensorType,
    draw: TensorType,
    seen: TensorType,
    slots: TensorType,
    logit_rows: TensorType,
    token: TensorType,
    seed: TensorType,
    prompt: TensorType,
) -> Types:
    places, rows = tokens.shape[:1], token.shape[:1]
    words = seen.shape[1:]
    for name, found, expected in (
        ("tokens", tokens, TensorType("i32", places)),
        ("positions", positions, TensorType("i32", places)),
        ("draw", draw, TensorType(draw.dtype if draw.dtype in FLOATS else "f32", rows)),
        ("seen", seen, TensorType("i32", (*rows, *words[:1]))),
        ("slots", slots, TensorType("i32", places)),
        ("logit_rows", logit_rows, TensorType("i32", rows)),
        ("token", token, TensorType("i32", rows)),
        ("seed", seed, TensorType("i64", rows)),
        ("prompt", prompt, TensorType("i32", rows)),
    ):
        if found != expected or (name == "seen" and found.rank != 2):
            raise VerifyError(f"feed: expected {name} {expected}, found {found}")
    return tokens, positions, draw, seen


def _feed_inplace(*operands: torch.Tensor) -> None:
    tokens, positions, draw, seen, slots, logit_rows, token, seed, prompt = operands
    places = logit_rows.tolist()
    for row, (place, chosen) in enumerate(zip(places, token.tolist(), strict=True)):
        inside = 0 <= place < len(tokens) and 0 <= chosen < seen.shape[1] * WORD
        if not inside or place in places[:row] or int(slots[place]) < 0:
            continue
        tokens[place] = chosen
        positions[place] += 1
        number = int(positions[place]) + 1 - int(prompt[row])
        draw[row] = below(uniform(int(seed[row]), number))
        bit = 1 << chosen % WORD
        seen[row, chosen // WORD] |= bit - 2**WORD if bit >= 2 ** (WORD - 1) else bit


def _feed_reference(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    results = tuple(x.clone() for x in operands[:_RESULTS])
    _feed_inplace(*results, *operands[_RESULTS:])
    return results


def _feed_cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    """Two words of each row and of its place, read and written."""
    return Cost(0, operands["token"].nbytes * 8)


feed = Op(
    "feed",
    _feed_infer,
    _feed_reference,
    _feed_cost,
    (
        Sample(
            (
                *(TensorType("i32", (9,)),) * 2,
                TensorType("f32", (5,)),
                TensorType("i32", (5, 2)),
                TensorType("i32", (9,)),
                *(TensorType("i32", (5,)),) * 2,
                TensorType("i64", (5,)),
                TensorType("i32", (5,)),
            ),
            high=9,
        ),
    ),
    axes=rule(
        "tokens[t] positions[t] draw[l] seen[l,w] slots[t] logit_rows[l] token[l] seed[l] "
        "prompt[l] -> [t], [t], [l], [l,w]; t l w whole"
    ),
    inplace=_feed_inplace,
)
