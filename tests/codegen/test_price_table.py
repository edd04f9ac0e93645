"""Tables of measured prices: between points and beyond, whose points count, what is no table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.codegen import price_table, prices
from ingot.codegen.kernel_query import Candidate, KernelQuery, Operand, dense_strides
from ingot.codegen.price_table import Launched, Point, Table, add_points, table_of
from ingot.codegen.select import select
from ingot.compiler.ops.linear import linear
from ingot.compiler.target import target_of
from ingot.compiler.types import TensorType

TARGET = "cuda:sm_90"


def table(*points: tuple[str, int, int, float]) -> Table:
    return Table(TARGET, "a device", tuple(Point(*p) for p in points))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table_of.cache_clear()
    yield tmp_path
    table_of.cache_clear()


def test_between_two_sizes_and_beyond() -> None:
    found = table(("gemv", 1, 10, 2.0), ("gemv", 1, 30, 4.0))
    for nbytes, microseconds in ((10, 2.0), (20, 3.0), (30, 4.0), (50, 6.0), (5, 1.5)):
        assert found.seconds(Launched("gemv", 1, nbytes)) == pytest.approx(1e-6 * microseconds)


def test_the_least_tokens_that_are_enough() -> None:
    found = table(("k", 1, 10, 1.0), ("k", 1, 20, 2.0), ("k", 8, 10, 5.0), ("k", 8, 20, 7.0))
    assert found.seconds(Launched("k", 1, 10)) == pytest.approx(1e-6)
    assert found.seconds(Launched("k", 2, 10)) == pytest.approx(5e-6)
    assert found.seconds(Launched("k", 9, 10)) is None
    assert found.seconds(Launched("another", 1, 10)) is None


def test_one_size_says_nothing_of_another() -> None:
    assert table(("k", 1, 10, 1.0)).seconds(Launched("k", 1, 10)) is None


@given(
    st.lists(
        st.tuples(st.integers(1, 10**9), st.floats(0.5, 1e4)),
        min_size=2,
        unique_by=lambda point: point[0],
    ),
    st.integers(1, 10**9),
)
def test_a_price_is_positive_and_a_point_is_itself(
    points: list[tuple[int, float]], nbytes: int
) -> None:
    found = table(*(("k", 1, size, time) for size, time in points))
    price = found.seconds(Launched("k", 1, nbytes))
    assert price is not None and price >= 0.5e-6
    low, *_ = sorted(points)
    assert found.seconds(Launched("k", 1, low[0])) == pytest.approx(1e-6 * low[1])


def test_points_of_the_user_come_before_those_of_the_version(own_cache: Path) -> None:
    before = table_of(TARGET)
    path = add_points(TARGET, "mine", [Point("k", 1, 10, 3.0), Point("k", 1, 20, 4.0)])
    assert path.is_relative_to(own_cache)
    assert table_of(TARGET).seconds(Launched("k", 1, 10)) == pytest.approx(3e-6)
    assert {*table_of(TARGET).points} >= {*before.points}
    add_points(TARGET, "mine", [Point("k", 1, 10, 2.0)])
    assert table_of(TARGET).seconds(Launched("k", 1, 10)) == pytest.approx(2e-6)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_no_table_is_named(own_cache: Path) -> None:
    path = add_points(TARGET, "mine", [])
    path.write_text('{"target": 1}', encoding="utf-8")
    table_of.cache_clear()
    with pytest.raises(ValueError, match=rf"{path}: expected a table of prices: .*; delete it"):
        table_of(TARGET)


def test_measured_prices_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((8, 512), (256, 512), (8, 256))
    x, w, y = (Operand(TensorType("bf16", s), dense_strides(s)) for s in shapes)
    asked = KernelQuery(linear, {}, (x, w), (y,), target_of(TARGET))

    def chosen(narrow: float, square: float) -> str:
        points = [("narrow bf16", 8, size, narrow) for size in (1, 1 << 30)]
        points += [("square bf16", 8, size, square) for size in (1, 1 << 30)]
        monkeypatch.setattr(prices, "table_of", lambda target: table(*points))
        best = select(asked)
        assert isinstance(best, Candidate)
        (priced,) = best.priced
        return priced.kernel

    assert chosen(1.0, 2.0) == "narrow bf16"
    assert chosen(2.0, 1.0) == "square bf16"
    best = select(asked, prefer="narrow bf16")
    assert isinstance(best, Candidate) and best.priced[0].kernel == "narrow bf16"


def test_tables_of_this_version_are_of_their_targets() -> None:
    folder = Path(price_table.__file__).with_name("measured")
    for path in folder.glob("*.json"):
        target = path.stem.replace("-", ":", 1)
        assert target_of(target).is_gpu and table_of(target).device
