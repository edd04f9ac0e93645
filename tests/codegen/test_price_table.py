"""Tables of measured prices: between points and beyond, whose points count, what is no table."""

from __future__ import annotations

from math import hypot
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.codegen import price_table, prices
from ingot.codegen.kernel_query import Candidate, KernelQuery, Operand, dense_strides
from ingot.codegen.price_table import Launched, Point, Table, add_points, table_of, user_table
from ingot.codegen.select import select
from ingot.compiler.ops.linear import linear
from ingot.compiler.target import target_of
from ingot.compiler.types import TensorType

TARGET = "cuda:sm_90"


def table(*points: tuple[str, int, int, int, float]) -> Table:
    return Table(TARGET, "a device", tuple(Point(*p) for p in points))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(price_table, "user_table", user_table)
    table_of.cache_clear()
    yield tmp_path
    table_of.cache_clear()


def test_a_point_is_itself_and_other_shapes_have_the_rate_of_those_nearest() -> None:
    found = table(("gemv", 1, 64, 64, 2.0), ("gemv", 1, 4096, 64, 32.0))
    assert found.seconds(Launched("gemv", 1, 64, 64)) == pytest.approx(2e-6)
    assert found.seconds(Launched("gemv", 1, 4096, 64)) == pytest.approx(32e-6)
    # 2,048 and 8,192 elements a microsecond: nearly the one beside it, between both half way.
    near = found.seconds(Launched("gemv", 1, 4096, 128))
    assert near == pytest.approx(64e-6, rel=0.1)
    between = found.seconds(Launched("gemv", 1, 512, 64))
    assert between == pytest.approx(1e-6 * hypot(512 * 64 / 4096, 1))


def test_the_least_tokens_that_are_enough() -> None:
    found = table(("k", 1, 64, 64, 1.5), ("k", 8, 64, 64, 5.0))
    assert found.seconds(Launched("k", 1, 64, 64)) == pytest.approx(1.5e-6)
    assert found.seconds(Launched("k", 2, 64, 64)) == pytest.approx(5e-6)
    assert found.seconds(Launched("k", 9, 64, 64)) is None
    assert found.seconds(Launched("another", 1, 64, 64)) is None


_SIZES = st.integers(1, 10**6)


@given(
    st.lists(
        st.tuples(_SIZES, _SIZES, st.floats(1.0, 1e4)),
        min_size=1,
        unique_by=lambda point: point[:2],
    ),
    _SIZES,
    _SIZES,
)
def test_a_rate_is_within_those_of_the_points(
    points: list[tuple[int, int, float]], rows: int, columns: int
) -> None:
    found = table(*(("k", 1, *point) for point in points)).seconds(Launched("k", 1, rows, columns))
    rates = [n * k / time for n, k, time in points]
    low, high = (rows * columns / rate for rate in (max(rates), min(rates)))
    assert found is not None
    # A point is itself, however short; all else takes a microsecond at least.
    assert 0.99 * low <= 1e6 * found <= 1.01 * hypot(high, 1)


def test_of_two_short_launches_the_faster_one_stays_so() -> None:
    found = table(("slow", 1, 64, 64, 8.0), ("fast", 1, 64, 64, 4.0))
    slow, fast = (found.seconds(Launched(k, 1, 4, 4)) for k in ("slow", "fast"))
    assert slow is not None and fast is not None and 1e-6 < fast < slow


def test_points_of_the_user_come_before_those_of_the_version(own_cache: Path) -> None:
    before = table_of(TARGET)
    path = add_points(TARGET, "mine", [Point("k", 1, 16, 16, 3.0)])
    assert path.is_relative_to(own_cache)
    assert table_of(TARGET).seconds(Launched("k", 1, 16, 16)) == pytest.approx(3e-6)
    assert {*table_of(TARGET).points} >= {*before.points}
    add_points(TARGET, "mine", [Point("k", 1, 16, 16, 2.0)])
    assert table_of(TARGET).seconds(Launched("k", 1, 16, 16)) == pytest.approx(2e-6)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


NO_TABLES = {
    "kind": b'{"target": 1}',
    "json": b"{",
    "bytes": b'{"target": "\xff", "device": ""}',
    "time": b'{"target": "a", "device": "", "points": [{"kernel": "k", "tokens": 1, "rows": 1, '
    b'"columns": 1, "microseconds": 0}]}',
}


@pytest.mark.parametrize("case", NO_TABLES)
def test_a_file_that_is_no_table_is_named(case: str, own_cache: Path) -> None:
    path = add_points(TARGET, "mine", [])
    path.write_bytes(NO_TABLES[case])
    table_of.cache_clear()
    with pytest.raises(ValueError, match=rf"{path}: expected a table of prices: .*; delete it"):
        table_of(TARGET)


def test_measured_prices_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((8, 512), (256, 512), (8, 256))
    x, w, y = (Operand(TensorType("bf16", s), dense_strides(s)) for s in shapes)
    asked = KernelQuery(linear, {}, (x, w), (y,), target_of(TARGET))

    def chosen(narrow: float, square: float) -> str:
        shape = (8, 256, 512)
        made = table(("narrow bf16", *shape, narrow), ("square bf16", *shape, square))
        monkeypatch.setattr(prices, "table_of", lambda target: made)
        best = select(asked)
        assert isinstance(best, Candidate)
        (priced,) = best.priced
        return priced.kernel

    assert chosen(2.0, 3.0) == "narrow bf16"
    assert chosen(3.0, 2.0) == "square bf16"
    best = select(asked, prefer="narrow bf16")
    assert isinstance(best, Candidate) and best.priced[0].kernel == "narrow bf16"


def test_points_of_another_device_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(price_table, "user_table", lambda target: tmp_path / "table.json")
    first, second = Point("k bf16", 1, 8, 8, 2.0), Point("k bf16", 2, 8, 8, 3.0)
    try:
        price_table.add_points("hip:gfx942", "MI300X", [first])
        assert price_table.known_points("hip:gfx942", "MI300X") == {first.of}
        assert price_table.known_points("hip:gfx942", "MI325X") == set()
        price_table.add_points("hip:gfx942", "MI325X", [second])
        assert table_of("hip:gfx942").points == (second,)
    finally:
        table_of.cache_clear()


def test_tables_of_this_version_are_of_their_targets() -> None:
    files = [*Path(price_table.__file__).with_name("measured").glob("*.json")]
    assert files
    for path in files:
        target = path.stem.replace("-", ":", 1)
        found = table_of(target)
        assert target_of(target).is_gpu and found.target == target and found.device
        assert found.points


def test_a_norm_within_costs_more_unless_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    target, of = target_of(TARGET), Launched("k bf16 normed", 1, 4096, 4096)

    def price(*points: tuple[str, int, int, int, float]) -> float:
        monkeypatch.setattr(prices, "table_of", lambda _: table(*points))
        nbytes = 2 * of.rows * of.columns
        return prices.gemm_seconds(target, "gemv", of, nbytes, 0, packed=False)

    plain = ("k bf16", 1, 4096, 4096, 10.0)
    assert price(plain) == pytest.approx(14e-6)  # 32 MiB of weight, as much as two launches
    assert price(plain, ("k bf16 normed", 1, 4096, 4096, 10.5)) == pytest.approx(10.5e-6)
