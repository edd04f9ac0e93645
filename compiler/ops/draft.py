"""What drafting takes of a step that has sampled: the tokens that follow, where acceptance ends.

T tokens and L result rows of a serving step: row j is behind the token at place logit_rows[j].
"""

from __future__ import annotations

from typing import Any

import torch

from ..axes import rule
from ..dtypes import FLOATS
from ..ir import Op, Sample, per_element
from ..types import TensorType, Types, VerifyError

# ---- follow: following i32 [T]; logit_rows, token i32 [L] -> i32 [T]
#
# The token that follows each: as `following` says, and where that is negative the token of the
# first row of the place; 0 where it has no row or that is broken (token -1).


def _expect(op: str, **found: tuple[TensorType, TensorType]) -> None:
    for name, (given, expected) in found.items():
        if given.rank != 1:
            raise VerifyError(f"{op}: expected {name} with one axis, found {given}")
        if given != expected:
            raise VerifyError(f"{op}: expected {name} {expected}, found {given}")


def _i32(*shape: Any) -> TensorType:
    return TensorType("i32", shape)


def _follow_infer(following: TensorType, logit_rows: TensorType, token: TensorType) -> Types:
    _expect(
        "follow",
        following=(following, _i32(*following.shape[:1])),
        logit_rows=(logit_rows, _i32(*token.shape[:1])),
        token=(token, _i32(*token.shape[:1])),
    )
    return (following,)


def _follow_reference(
    following: torch.Tensor, logit_rows: torch.Tensor, token: torch.Tensor
) -> torch.Tensor:
    sampled = torch.zeros_like(following)
    for place, chosen in reversed([*zip(logit_rows.tolist(), token.tolist(), strict=True)]):
        sampled[place] = max(chosen, 0)
    return torch.where(following < 0, sampled, following)


follow = Op(
    "follow",
    _follow_infer,
    _follow_reference,
    samples=(Sample((_i32(9), _i32(5), _i32(5)), high=9),),
    axes=rule("following[t] logit_rows[l] token[l] -> [t]; t l whole"),
)


# ---- accept: tokens, positions, slots i32 [T]; logit_rows, token, room i32 [L]
#      -> slots, positions i32 [L] of step 1, 2, … `steps`
#
# A row continues the one before where its place is the next and of the same slot. It is accepted
# where it continues none, or continues an accepted one whose token is that of its place. The draft
# behind goes on at accepted rows that no accepted one continues: step i has their slots, for all
# other rows -1, and positions i behind theirs. `room` counts the positions behind a row that the
# cache has a place for: a step beyond has slot -1, and so has a row of a broken token (-1).

# The most tokens that are drafted behind a row; a prediction layer makes the first without a step.
MOST_DRAFTED = 4
_STEPS = MOST_DRAFTED - 1


def _expect_rows(op: str, *types: TensorType) -> tuple[TensorType, TensorType]:
    """The types of places and of rows; VerifyError where an operand has another."""
    places, rows = _i32(*types[0].shape[:1]), _i32(*types[4].shape[:1])
    names = ("tokens", "positions", "slots", "logit_rows", "token", "room")
    expected = (places, places, places, rows, rows, rows)
    _expect(op, **dict(zip(names, zip(types, expected, strict=True), strict=True)))
    return places, rows


def _accept_infer(
    tokens: TensorType,
    positions: TensorType,
    slots: TensorType,
    logit_rows: TensorType,
    token: TensorType,
    room: TensorType,
    *,
    steps: int,
) -> Types:
    _, rows = _expect_rows("accept", tokens, positions, slots, logit_rows, token, room)
    if not 1 <= steps <= _STEPS:
        raise VerifyError(f"accept: expected 1 to {_STEPS} steps, found {steps}")
    return (rows, rows) * steps


def _accept_reference(
    tokens: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    logit_rows: torch.Tensor,
    token: torch.Tensor,
    room: torch.Tensor,
    *,
    steps: int,
) -> tuple[torch.Tensor, ...]:
    _, ends = _accepted(tokens, slots, logit_rows, token)
    of = range(1, steps + 1)
    return _behind(positions, slots, logit_rows, room, ends, of)


def _accepted(
    tokens: torch.Tensor, slots: torch.Tensor, logit_rows: torch.Tensor, token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [L] twice: rows that are accepted, and those of them at which a draft goes on."""
    place = logit_rows.long()
    continues = torch.zeros_like(token, dtype=torch.bool)
    continues[1:] = (place[1:] == place[:-1] + 1) & (slots[place[1:]] == slots[place[:-1]])
    matched = continues.clone()
    matched[1:] &= token[:-1] == tokens[place[1:]]
    row = torch.arange(len(token), device=token.device)
    # The last row up to each that begins a run, and the last that was not drafted right.
    begun = torch.where(continues, -1, row).cummax(0).values
    missed = torch.where(continues & ~matched, row, -1).cummax(0).values
    goes_on = torch.cat([matched[1:], matched.new_zeros(1)])
    return missed < begun, (missed < begun) & ~goes_on & (token >= 0)


def _behind(
    positions: torch.Tensor,
    slots: torch.Tensor,
    logit_rows: torch.Tensor,
    room: torch.Tensor,
    ends: torch.Tensor,
    steps: range,
) -> tuple[torch.Tensor, ...]:
    """Slots and positions i32 [L] of each step behind the rows where it `ends`."""
    place = logit_rows.long()
    made: list[torch.Tensor] = []
    for step in steps:
        made += [torch.where(ends & (room >= step), slots[place], -1), positions[place] + step]
    return tuple(made)


_PLACES, _ROWS = _i32(9), _i32(5)
accept = Op(
    "accept",
    _accept_infer,
    _accept_reference,
    samples=(
        Sample((_PLACES, _PLACES, _PLACES, _ROWS, _ROWS, _ROWS), {"steps": 1}, high=3),
        Sample((_PLACES, _PLACES, _PLACES, _ROWS, _ROWS, _ROWS), {"steps": 3}, high=3),
    ),
    axes=rule(
        "tokens[t] positions[t] slots[t] logit_rows[l] token[l] room[l] -> [l], [l], [l], [l], "
        "[l], [l]; t l whole"
    ),
)


# ---- extend: tokens, positions, slots i32 [T]; logit_rows, token, room i32 [L]
#      -> tokens, positions, slots i32 [T + L], rows i32 [L]
#         and, as accept, slots, positions i32 [L] of step 2, 3, … `steps`
#
# What a smaller model has not seen of a step that has sampled, in one run: first the tokens of the
# step, those that were drafted wrong without a slot, as what follows is written where they would
# be; then `rows`, the token of each row in step 1 of accept (0 for a broken one).


def _extend_infer(
    tokens: TensorType,
    positions: TensorType,
    slots: TensorType,
    logit_rows: TensorType,
    token: TensorType,
    room: TensorType,
    *,
    steps: int,
) -> Types:
    places, rows = _expect_rows("extend", tokens, positions, slots, logit_rows, token, room)
    if not 1 <= steps <= MOST_DRAFTED:
        raise VerifyError(f"extend: expected 1 to {MOST_DRAFTED} steps, found {steps}")
    count: Any = places.shape[0] + rows.shape[0]
    both = _i32(count)
    return (both, both, both, rows) + (rows, rows) * (steps - 1)


def _extend_reference(
    tokens: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    logit_rows: torch.Tensor,
    token: torch.Tensor,
    room: torch.Tensor,
    *,
    steps: int,
) -> tuple[torch.Tensor, ...]:
    accepted, ends = _accepted(tokens, slots, logit_rows, token)
    of = range(1, steps + 1)
    first_slots, first_positions, *more = _behind(positions, slots, logit_rows, room, ends, of)
    kept = slots.clone()
    kept[logit_rows.long()[~accepted]] = -1
    rows = torch.arange(len(tokens), len(tokens) + len(token), device=token.device)
    return (
        torch.cat([tokens, token.clamp(min=0)]),
        torch.cat([positions, first_positions]),
        torch.cat([kept, first_slots]),
        rows.int(),
        *more,
    )


extend = Op(
    "extend",
    _extend_infer,
    _extend_reference,
    samples=(
        Sample((_PLACES, _PLACES, _PLACES, _ROWS, _ROWS, _ROWS), {"steps": 1}, high=3),
        Sample((_PLACES, _PLACES, _PLACES, _ROWS, _ROWS, _ROWS), {"steps": 4}, high=3),
    ),
    axes=rule(
        "tokens[t] positions[t] slots[t] logit_rows[l] token[l] room[l] -> [e], [e], [e], [l], "
        "[l], [l], [l], [l], [l], [l]; t l e whole"
    ),
)


# ---- likeliest: logits [L, V] -> i32 [L], the first of the largest, NaN as -inf


def _likeliest_infer(logits: TensorType) -> Types:
    if logits.rank != 2 or logits.dtype not in FLOATS or logits.shape[1] == 0:
        raise VerifyError(f"likeliest: expected float logits [L, V], found {logits}")
    return (_i32(logits.shape[0]),)


def _likeliest_reference(logits: torch.Tensor) -> torch.Tensor:
    numbers = torch.where(logits.isnan(), -torch.inf, logits)
    return (numbers >= numbers.amax(1, keepdim=True)).int().argmax(1).int()


likeliest = Op(
    "likeliest",
    _likeliest_infer,
    _likeliest_reference,
    per_element(1, "logits"),
    (
        Sample((TensorType("f32", (5, 100)),)),
        Sample((TensorType("bf16", (3, 7)),)),
    ),
    axes=rule("logits[l,v] -> [l]; v whole"),
)
