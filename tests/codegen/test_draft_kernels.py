"""The kernels of drafting against their references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ingot.compiler.ir import Op
from ingot.compiler.ops.draft import accept, extend, follow, likeliest
from kernel_checks import build_everywhere, run_node


@st.composite
def steps(draw: Any) -> list[torch.Tensor]:
    """Tokens, positions, slots; rows in runs, repeated and broken; their tokens, and room."""
    places, rows = draw(st.integers(1, 12)), draw(st.integers(1, 9))

    def ints(count: int, low: int, high: int) -> torch.Tensor:
        return torch.tensor([draw(st.integers(low, high)) for _ in range(count)], dtype=torch.int32)

    start = draw(st.integers(0, places - 1))
    of = [(start + i) % places for i in range(rows)]
    of = of if draw(st.booleans()) else [draw(st.integers(0, places - 1)) for _ in range(rows)]
    return [
        ints(places, 0, 1),
        ints(places, 0, 99),
        ints(places, -1, 1),
        torch.tensor(of, dtype=torch.int32),
        ints(rows, -1, 1),
        ints(rows, 0, 4),
    ]


@hypothesis_settings(max_examples=60)
@given(steps(), st.integers(1, 3))
def test_accept(given_: list[torch.Tensor], count: int) -> None:
    found, plain, _ = run_node(accept, given_, {"steps": count})
    for a, b in zip(plain.reference(), found, strict=True):
        assert torch.equal(a, b)


@hypothesis_settings(max_examples=60)
@given(steps(), st.integers(1, 4))
def test_extend(given_: list[torch.Tensor], count: int) -> None:
    found, plain, _ = run_node(extend, given_, {"steps": count})
    for a, b in zip(plain.reference(), found, strict=True):
        assert torch.equal(a, b)


@hypothesis_settings(max_examples=40)
@given(steps(), st.data())
def test_follow(given_: list[torch.Tensor], data: st.DataObject) -> None:
    tokens, _, slots, rows, token, _ = given_
    known = torch.where(slots < 0, slots, tokens + 5)
    found, plain, _ = run_node(follow, [known, rows, token], {})
    assert torch.equal(plain.reference()[0], found[0])


@pytest.mark.parametrize("vocab", [1, 100, 4096, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_likeliest(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(4, vocab, generator=generator).to(dtype)
    logits[1] = logits[1].round()  # ties
    logits[2, ::2] = math.nan
    logits[3] = -math.inf
    found, plain, _ = run_node(likeliest, [logits], {})
    assert torch.equal(plain.reference()[0], found[0])
    assert found[0][3] == 0


ONE = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("op", "args", "attrs"),
    [
        (follow, [ONE] * 3, {}),
        (accept, [ONE] * 6, {"steps": 3}),
        (extend, [ONE] * 6, {"steps": 4}),
        (likeliest, [torch.zeros(2, 9000)], {}),
    ],
)
def test_they_are_built_for_every_target(
    op: Op, args: list[torch.Tensor], attrs: dict[str, Any]
) -> None:
    for built in build_everywhere(op, args, attrs).values():
        assert f"{op.name}_kernel" in {found["name"] for found in built}
