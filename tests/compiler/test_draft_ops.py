"""follow, accept, extend and likeliest: what samples cannot say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ingot.compiler.ops.draft import accept, extend, follow, likeliest
from ingot.compiler.types import TensorType, VerifyError


def i32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_follow_takes_the_first_row_of_a_place_where_nothing_is_known() -> None:
    known = i32(-1, 4, -1, -1, -1)
    (found,) = follow.reference(known, i32(2, 1, 3, 0, 0), i32(7, 8, -1, 5, 9))
    assert found.tolist() == [5, 4, 7, 0, 0]


@given(st.data())
def test_accept_is_where_the_host_ends(data: st.DataObject) -> None:
    """Sequences of a history's end and drafted tokens, beside chunks without rows and padding."""
    tokens: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    sampled: list[int] = []
    ends: dict[int, tuple[int, int]] = {}
    for slot in data.draw(st.permutations(range(4))):
        before = data.draw(st.integers(0, 2))
        drafted = data.draw(st.lists(st.integers(0, 1), max_size=3))
        start = data.draw(st.integers(0, 5))
        first = len(tokens) + before
        tokens += [0] * (before + 1) + drafted
        slots += [slot] * (before + 1 + len(drafted))
        positions += range(start, start + before + 1 + len(drafted))
        if data.draw(st.booleans()):
            continue
        given_ = data.draw(
            st.lists(st.integers(0, 1), min_size=len(drafted) + 1, max_size=len(drafted) + 1)
        )
        right = next((i for i, d in enumerate(drafted) if given_[i] != d), len(drafted))
        ends[len(rows) + right] = slot, positions[first + right]
        rows += range(first, first + len(drafted) + 1)
        sampled += given_
    padding = data.draw(st.integers(0, 2))
    room = [data.draw(st.integers(0, 3)) for _ in rows] + [0] * padding
    rows, sampled = rows + [0] * padding, sampled + [0] * padding
    found = accept.reference(
        i32(*tokens), i32(*positions), i32(*slots), i32(*rows), i32(*sampled), i32(*room), steps=3
    )
    for step in (1, 2, 3):
        of, at = found[2 * step - 2 : 2 * step]
        for row, (slot, position) in enumerate(zip(of.tolist(), at.tolist(), strict=True)):
            live = row in ends and room[row] >= step
            assert slot == (ends[row][0] if live else -1)
            if live:
                assert position == ends[row][1] + step


def test_a_broken_row_ends_in_no_draft() -> None:
    one = (i32(3), i32(5), i32(0), i32(0))
    assert accept.reference(*one, i32(4), i32(9), steps=1)[0].tolist() == [0]
    assert accept.reference(*one, i32(-1), i32(9), steps=1)[0].tolist() == [-1]


def test_likeliest_is_the_first_of_the_largest() -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[1.0, 3.0, 3.0], [nan, -2.0, -1.0], [nan, nan, nan], [-inf, -inf, 0.0]])
    (found,) = likeliest.reference(logits)
    assert found.dtype == torch.int32
    assert found[[0, 1, 3]].tolist() == [1, 2, 2]
    assert 0 <= int(found[2]) < 3


def test_extend_is_what_a_model_has_not_seen() -> None:
    """Of one slot two tokens were drafted, the second wrongly; of another nothing was."""
    tokens, positions, slots = i32(3, 4, 5, 7, 0), i32(8, 9, 10, 2, 0), i32(1, 1, 1, 0, -1)
    rows, token, room = i32(0, 1, 2, 3, 0), i32(4, 6, 9, -1, 4), i32(3, 1, 0, 5, 0)
    found = extend.reference(tokens, positions, slots, rows, token, room, steps=2)
    made, at, of, behind, *more = (x.tolist() for x in found)
    assert made == [3, 4, 5, 7, 0, 4, 6, 9, 0, 4]
    assert of == [1, 1, -1, 0, -1, -1, 1, -1, -1, -1]
    assert behind == [5, 6, 7, 8, 9]
    assert (made[6], at[6]) == (6, 10)
    assert more[0] == [-1] * 5  # no room for a second
    last = accept.reference(tokens, positions, slots, rows, token, room, steps=2)[2:]
    assert more == [x.tolist() for x in last]


@given(st.data())
def test_extend_writes_no_place_twice(data: st.DataObject) -> None:
    """Whatever is drafted and given: each position of a slot once, without a gap."""
    drafted = data.draw(st.lists(st.integers(0, 1), max_size=4))
    given_ = data.draw(st.lists(st.integers(0, 1), min_size=len(drafted) + 1, max_size=5))
    count = len(drafted) + 1
    places, token = i32(0, *drafted), i32(*given_[:count])
    index = i32(*range(count))
    room = i32(*(9 for _ in range(count)))
    slots = torch.zeros_like(index)
    found = extend.reference(places, index, slots, index, token, room, steps=1)
    made, at, of, _ = (x.tolist() for x in found)
    seen = {p: t for t, p, slot in zip(made, at, of, strict=True) if slot == 0}
    right = next((i for i, d in enumerate(drafted) if given_[i] != d), len(drafted))
    assert [*seen.values()] == [0, *given_[: right + 1]]
    assert [*seen] == [*range(right + 2)] and of.count(0) == len(seen)


ROWS, PLACES = TensorType("i32", (3,)), TensorType("i32", (5,))


@pytest.mark.parametrize("i", range(6))
def test_accept_refuses(i: int) -> None:
    types = [PLACES, PLACES, PLACES, ROWS, ROWS, ROWS]
    assert accept.types(tuple(types), {"steps": 2}) == (ROWS,) * 4
    types[i] = TensorType("i64", types[i].shape)
    with pytest.raises(VerifyError, match="accept: expected .* i32"):
        accept.types(tuple(types), {"steps": 2})


@pytest.mark.parametrize("steps", [0, 4])
def test_accept_refuses_steps(steps: int) -> None:
    with pytest.raises(VerifyError, match=f"expected 1 to 3 steps, found {steps}"):
        accept.types((PLACES, PLACES, PLACES, ROWS, ROWS, ROWS), {"steps": steps})


@pytest.mark.parametrize("steps", [0, 5])
def test_extend_refuses_steps(steps: int) -> None:
    with pytest.raises(VerifyError, match=f"expected 1 to 4 steps, found {steps}"):
        extend.types((PLACES, PLACES, PLACES, ROWS, ROWS, ROWS), {"steps": steps})


def test_the_others_refuse() -> None:
    with pytest.raises(VerifyError, match="follow: expected logit_rows"):
        follow.types((PLACES, TensorType("i32", (2,)), ROWS), {})
    with pytest.raises(VerifyError, match="extend: expected room"):
        extend.types((PLACES, PLACES, PLACES, ROWS, ROWS, PLACES), {"steps": 1})
    with pytest.raises(VerifyError, match="likeliest: expected float logits"):
        likeliest.types((ROWS,), {})
