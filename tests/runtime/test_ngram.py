"""Prompt lookup: drafts are what a search of the whole history finds, at microseconds a step."""

from __future__ import annotations

from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.runtime.serving.ngram import NGramDrafter
from ingot.runtime.serving.sequence import Request, Sequence


def sequence_of(tokens: list[int]) -> Sequence:
    return Sequence(1, tuple(tokens), Request(10_000), seed=0)


def searched(history: list[int], k: int, min_match: int) -> list[int]:
    """The draft, by comparing every place of a history that is short enough for that."""
    end, best, longest = len(history) - 1, None, min_match - 1
    for place in range(end - 1, -1, -1):
        length = 0
        while length <= place and history[place - length] == history[end - length]:
            length += 1
        length = min(length, 32)
        if length > longest:
            best, longest = place, length
    if best is None:
        return []
    after = history[best + 1 :]
    return (after * k)[:k]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_drafts_are_those_of_a_search(
    tokens: list[int], k: int, min_match: int, stride: int
) -> None:
    """However many tokens come between two drafts."""
    drafter, sequence = NGramDrafter(k, min_match), sequence_of(tokens[:1])
    for start in range(1, len(tokens), stride):
        assert list(drafter.draft(sequence, k)) == searched(sequence.history, k, min_match)
        assert drafter.draft(sequence, 1) == searched(sequence.history, 1, min_match)
        sequence.history += tokens[start : start + stride]


@pytest.mark.parametrize(
    ("history", "draft"),
    [
        ([1, 2, 3], []),
        ([7, 1, 2, 3, 4, 5, 1, 2], [3, 4, 5, 1]),
        ([1, 2, 8, 8, 8, 9, 1, 2, 7, 9, 1, 2], [7, 9, 1, 2]),  # of equal matches the latest
        ([5, 1, 2, 8, 9, 4, 1, 2, 7, 5, 1, 2], [8, 9, 4, 1]),  # a longer one before a later one
        ([4, 6, 6, 6], [6, 6, 6, 6]),  # a period goes on
        ([1, 2, 1, 2, 1], [2, 1, 2, 1]),
    ],
)
def test_drafts(history: list[int], draft: list[int]) -> None:
    assert NGramDrafter(4, 2).draft(sequence_of(history), 8) == draft


def test_sequences_are_looked_up_apart() -> None:
    drafter = NGramDrafter(4, 2)
    first, second = sequence_of([1, 2, 3, 1, 2]), sequence_of([1, 2])
    assert drafter.draft(first, 1) == [3]
    assert drafter.draft(second, 1) == []


def test_a_step_costs_no_more_in_a_long_history() -> None:
    """The best of many steps at 100,000 tokens: far below what looking through them takes."""
    period = [(i * i) % 997 for i in range(1000)]
    drafter, sequence = NGramDrafter(4, 2), sequence_of(period * 100)
    drafter.draft(sequence, 4)
    best = 1.0
    for i in range(200):
        sequence.history.append(period[i])
        begin = perf_counter()
        drafted = drafter.draft(sequence, 4)
        best = min(best, perf_counter() - begin)
        assert len(drafted) == 4
    assert best < 1e-3
