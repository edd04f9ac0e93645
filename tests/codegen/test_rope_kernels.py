"""Rotary embedding and its tables, at angles of any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.compiler.ops.rope import FORMS, rope, rope_tables
from kernel_checks import Strided, Weight, build_everywhere, check_node, run_node

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def tables(tokens: int, half: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(tokens, half) * 9
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", FORMS)
def test_rope(form: str, dtype: torch.dtype) -> None:
    for shape, half, start in (((5, 3, 8), 4, 0), ((3, 70, 24), 5, 7), ((4, 6), 3, 0)):
        x = torch.randn(shape).to(dtype)
        for table in (dtype, torch.float32):
            cos, sin = tables(shape[0], half, table)
            check_node(rope, (x, cos, sin), {"form": form, "start": start})


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_rope_of_any_shape(data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 5)) for _ in range(data.draw(st.integers(1, 3)))]
    half = data.draw(st.integers(1, 9))
    start, rest = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    x = torch.randn(*sizes, start + 2 * half + rest).bfloat16()
    form = data.draw(st.sampled_from(FORMS))
    held = Strided(x) if data.draw(st.booleans()) else x
    check_node(rope, (held, *tables(sizes[0], half, x.dtype)), {"form": form, "start": start})


def test_heads_that_lie_apart_are_read_where_they_are() -> None:
    x = Strided(torch.randn(3, 4, 16).bfloat16())
    lowered = check_node(rope, (x, *tables(3, 4, torch.float32)), {"form": "half", "start": 8})
    (entry,) = lowered.program.entries
    assert [launch.label.split()[0] for launch in entry.launches] == ["rope"]


@pytest.mark.parametrize("table", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_tables(kind: torch.dtype, table: str) -> None:
    positions = torch.tensor([0, 1, 2, 77, 100], dtype=kind)
    inv_freq = 10000.0 ** -(torch.arange(40) / 40)
    attrs = {"scale": 1.25, "dtype": table}
    check_node(rope_tables, (positions, Weight(inv_freq)), attrs)


def test_tables_are_right_at_large_positions() -> None:
    """Against f64 of the angle as it is rounded to f32: up to 200,000 turns are taken off."""
    positions = torch.cat([torch.randint(0, 200_000, (50,)), torch.arange(199_990, 200_001)])
    inv_freq = torch.cat([torch.ones(1), 1e6 ** -(torch.arange(1, 64) / 64)])
    attrs = {"scale": 1.0, "dtype": "f32"}
    found, _, _ = run_node(rope_tables, (positions.int(), Weight(inv_freq)), attrs)
    angles = (positions.float()[:, None] * inv_freq).double()
    for table, expected in zip(found, (angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(table.double(), expected, rtol=0, atol=3e-7)


def test_frequencies_in_f64_give_angles_in_f64() -> None:
    positions = torch.randint(0, 200_000, (9,))
    inv_freq = 1e4 ** -(torch.arange(8).double() / 8)
    attrs = {"scale": 1.0, "dtype": "f32"}
    check_node(rope_tables, (positions, Weight(inv_freq)), attrs, tolerance=3e-7)


def test_they_build_for_every_target() -> None:
    x = torch.randn(4, 32, 128).bfloat16()
    build_everywhere(rope, (x, *tables(4, 64, torch.float32)), {"form": "half"})
    x = torch.randn(4, 16, 192).bfloat16()
    attrs = {"form": "deinterleaved", "start": 128}
    build_everywhere(rope, (x, *tables(4, 32, torch.float32)), attrs)
    positions = torch.arange(4, dtype=torch.int32)
    facts = build_everywhere(
        rope_tables, (positions, Weight(torch.rand(64))), {"scale": 1.0, "dtype": "f32"}
    )
    # Nothing of the argument's reduction lies in local memory.
    assert all(f["spills"] == 0 for kernels in facts.values() for f in kernels)
