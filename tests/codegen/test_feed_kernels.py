"""The kernel that makes the inputs of the next step, against its reference and numpy's draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ingot.codegen.kernel_query import Declined, KernelQuery, Operand, dense_strides
from ingot.codegen.templates.sampling import feed as template
from ingot.compiler.ops.feed import feed
from ingot.compiler.target import target_of
from ingot.compiler.torch_types import type_of
from ingot.compiler.types import TensorType, VerifyError
from ingot.runtime.serving.row_sampling import below
from ingot.runtime.serving.sampling import uniform
from kernel_checks import build_everywhere, run_node

WORDS = 3


@st.composite
def operands(draw: Any) -> list[torch.Tensor]:
    """Tokens of slots and padding; rows in any order, repeated or outside; broken tokens."""
    places, rows = draw(st.integers(1, 9)), draw(st.integers(1, 6))

    def ints(count: int, low: int, high: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor([draw(st.integers(low, high)) for _ in range(count)], dtype=dtype)

    return [
        ints(places, 0, 99),
        ints(places, 0, 2**28),
        torch.tensor([draw(st.floats(0, 0.5)) for _ in range(rows)], dtype=torch.float32),
        ints(rows * WORDS, -(2**31), 2**31 - 1).view(rows, WORDS),
        ints(places, -1, 3),
        ints(rows, -1, places),
        ints(rows, -1, 32 * WORDS),
        ints(rows, -(2**63), 2**63 - 1, torch.int64),
        ints(rows, 0, 9),
    ]


@hypothesis_settings(max_examples=60)
@given(operands())
def test_as_the_reference(given_: list[torch.Tensor]) -> None:
    found, plain, _ = run_node(feed, given_, {})
    for a, b in zip(plain.reference(), found, strict=True):
        assert torch.equal(a, b)


@hypothesis_settings(max_examples=40)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20))
def test_draws_are_the_host_s(seed: int, number: int) -> None:
    """A row at position p with a prompt of n tokens gives token p + 1 - n, and then the next."""
    prompt = 5
    position = number - 1 + prompt - 1
    tokens, slots = torch.tensor([7], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    given_ = (
        tokens,
        torch.tensor([position], dtype=torch.int32),
        torch.zeros(1),
        torch.zeros((1, WORDS), dtype=torch.int32),
        slots,
        slots,
        tokens,
        torch.from_numpy(np.array([seed], np.uint64).view(np.int64)),
        torch.tensor([prompt], dtype=torch.int32),
    )
    (_, _, draw, _), plain, _ = run_node(feed, given_, {})
    expected = below(uniform(seed, number))
    assert draw.numpy().tobytes() == np.array([expected], np.float32).tobytes()
    assert torch.equal(plain.reference()[2], draw)


def example() -> list[torch.Tensor]:
    one = torch.zeros(2, dtype=torch.int32)
    seen = torch.zeros((2, WORDS), dtype=torch.int32)
    return [one, one, torch.zeros(2), seen, one, one, one, one.long(), one]


@pytest.mark.parametrize("i", range(9))
def test_refusals(i: int) -> None:
    types = [type_of(x) for x in example()]
    types[i] = TensorType("bool", types[i].shape)
    with pytest.raises(VerifyError, match=rf"feed: expected {feed.required[i]} .*, found bool"):
        feed.types(tuple(types), {})


def test_it_declines_what_does_not_lie_dense() -> None:
    args = [Operand(type_of(t), dense_strides(t.shape)) for t in example()]
    args[0] = Operand(args[0].type, (2,))
    target = target_of("cuda:sm_90")
    found = template.feed(KernelQuery(feed, {}, tuple(args), tuple(args[:4]), target))
    assert isinstance(found, Declined) and found.reason == "expected dense operands"


def test_it_is_built_for_every_target() -> None:
    for built in build_everywhere(feed, example()).values():
        assert "feed_kernel" in {found["name"] for found in built}
