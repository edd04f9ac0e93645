"""The memory plan: nothing that lives at the same time overlaps, nothing waits without need."""

from __future__ import annotations

from time import process_time

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st
from ingot.codegen.memory import (
    ALIGNMENT,
    Access,
    Block,
    Lifetime,
    aligned,
    dependencies,
    plan_arena,
    plan_blocks,
)


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    spans = draw(
        st.lists(
            st.tuples(st.integers(0, 3000), st.integers(-1, 12), st.integers(0, 8)), max_size=24
        )
    )
    return [Lifetime(f"b{i}", size, start, start + n) for i, (size, start, n) in enumerate(spans)]


def live_bytes(buffers: list[Lifetime], at: int) -> int:
    return sum(aligned(max(b.nbytes, 1)) for b in buffers if b.start <= at <= b.end)


@given(lifetimes())
def test_what_lives_at_the_same_time_does_not_overlap(buffers: list[Lifetime]) -> None:
    offsets, size = plan_arena(buffers)
    assert offsets.keys() == {b.name for b in buffers}
    for i, a in enumerate(buffers):
        assert offsets[a.name] % ALIGNMENT == 0
        assert 0 <= offsets[a.name] <= size - max(a.nbytes, 1)
        for b in buffers[:i]:
            if a.start <= b.end and b.start <= a.end:
                ends = [offsets[x.name] + max(x.nbytes, 1) for x in (a, b)]
                assert ends[0] <= offsets[b.name] or ends[1] <= offsets[a.name]


@given(lifetimes())
def test_the_arena_is_between_the_largest_live_set_and_the_sum(buffers: list[Lifetime]) -> None:
    _, size = plan_arena(buffers)
    assert size <= sum(aligned(max(b.nbytes, 1)) for b in buffers)
    assert size >= max((live_bytes(buffers, at) for at in range(-1, 21)), default=0)


@given(lifetimes(), st.lists(st.integers(1, 4), min_size=24, max_size=24))
def test_blocks_lie_side_by_side_and_apart_from_others(
    buffers: list[Lifetime], counts: list[int]
) -> None:
    blocks: list[Block] = []
    rest = buffers
    while rest:
        count = counts[len(blocks)]
        blocks.append(Block(tuple(rest[:count])))
        rest = rest[count:]
    offsets, size = plan_blocks(blocks)
    assert offsets.keys() == {b.name for b in buffers}
    spans: list[tuple[int, int, int, int]] = []
    for block in blocks:
        first = at = offsets[block.buffers[0].name]
        for buffer in block.buffers:
            assert offsets[buffer.name] == at
            at += aligned(max(buffer.nbytes, 1))
        lives = [(b.start, b.end) for b in block.buffers]
        born, dead = min(s for s, _ in lives), max(e for _, e in lives)
        assert first % ALIGNMENT == 0 and at <= size
        for low, high, start, end in spans:
            assert at <= low or high <= first or dead < start or end < born
        spans.append((first, at, born, dead))


def test_buffers_of_their_own_are_placed_as_ever() -> None:
    chain = [Lifetime(f"b{i}", 100 * i, i, i + 1) for i in range(10)]
    assert plan_blocks([Block((b,)) for b in chain]) == plan_arena(chain)


def test_memory_is_used_again() -> None:
    chain = [Lifetime(f"b{i}", 1024, i, i + 1) for i in range(10)]
    assert plan_arena(chain)[1] == 2048


@given(lifetimes())
def test_the_largest_come_first_each_as_low_as_it_fits(buffers: list[Lifetime]) -> None:
    offsets, _ = plan_arena(buffers)
    taken: list[tuple[int, int, Lifetime]] = []
    for buffer in sorted(buffers, key=lambda b: (-b.nbytes, b.start, b.name)):
        size, at = aligned(max(buffer.nbytes, 1)), 0
        for low, high, other in sorted(taken, key=lambda t: t[0]):
            beside = other.start <= buffer.end and buffer.start <= other.end
            if beside and low < at + size and at < high:
                at = high
        assert offsets[buffer.name] == at
        taken.append((at, at + size, buffer))


def test_many_launches_take_little_time() -> None:
    count = 4000  # half a second; one buffer after the other compared in Python, four
    start = process_time()
    chain = [Lifetime(f"b{i}", 1024 + i, i, i + 1) for i in range(count)]
    kept = [Lifetime(f"c{i}", 1024 + i, i, 2 * count) for i in range(count // 2)]
    plan_arena(chain + kept)
    outs = [[Access("arena", i * 256, i * 256 + 256)] for i in range(count)]
    assert len(dependencies([[], *outs[:-1]], outs)) == count - 1
    assert process_time() - start < 2


@st.composite
def launches(draw: st.DrawFn) -> tuple[list[list[Access]], list[list[Access]]]:
    """Accesses of some launches to two memories, in pieces that overlap in part."""
    access = st.builds(
        lambda memory, low, size: Access(memory, low, low + size),
        st.sampled_from(("arena", "cache")),
        st.integers(0, 6),
        st.integers(1, 4),
    )
    rows = draw(
        st.lists(st.tuples(st.lists(access, max_size=3), st.lists(access, max_size=2)), max_size=14)
    )
    return [ins for ins, _ in rows], [outs for _, outs in rows]


def conflict(a: Access, b: Access) -> bool:
    return a.memory == b.memory and a.low < b.high and b.low < a.high


@given(launches())
def test_dependencies_are_the_reduction_of_all_conflicts(
    accesses: tuple[list[list[Access]], list[list[Access]]],
) -> None:
    reads, writes = accesses
    ordered = nx.DiGraph()
    ordered.add_nodes_from(range(len(reads)))
    for later in range(len(reads)):
        for earlier in range(later):
            touched = [(r, w) for r in reads[earlier] for w in writes[later]]
            touched += [(w, a) for w in writes[earlier] for a in (*reads[later], *writes[later])]
            if any(conflict(a, b) for a, b in touched):
                ordered.add_edge(earlier, later)
    found = dependencies(reads, writes)
    assert len(set(found)) == len(found)
    assert set(found) == set(nx.transitive_reduction(ordered).edges)


def test_a_launch_that_reads_what_it_writes_does_not_wait_for_itself() -> None:
    cache = [Access("cache", 0, 1)]
    assert dependencies([cache] * 3, [cache, cache, []]) == ((0, 1), (1, 2))
