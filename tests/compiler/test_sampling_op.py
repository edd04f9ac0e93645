"""sample: the device's choice is the host's, row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ingot.compiler.ops.sampling import SETTINGS, sample
from ingot.compiler.types import TensorType, VerifyError
from ingot.runtime.serving.sampling import Sampling
from sampling_checks import (
    ORDER,
    check_choices,
    operands,
    options,
    random_logits,
    request,
    requests_of,
)


@hypothesis_settings(max_examples=300)
@given(
    st.lists(options, min_size=1, max_size=9),
    st.integers(0, 2**32),
    st.booleans(),
    st.sampled_from([1, 31, 97]),
)
def test_reference_is_the_host_s_sampling(
    rows: list[Sampling], seed: int, ties: bool, vocab: int
) -> None:
    logits = random_logits(len(rows), vocab, seed, ties)
    top = min(4, vocab)
    requests = requests_of(rows, vocab, top, seed)
    given_ = operands(vocab, requests, top)
    found = sample.reference(logits, *given_, candidates=top)
    check_choices(logits, requests, given_[5], found, tolerance=1e-6)


def plain(logits: Any, candidates: int = 0, **numbers: Any) -> tuple[torch.Tensor, ...]:
    """The op over logits [L, V], greedy but for `numbers`."""
    x = torch.as_tensor(logits, dtype=torch.float32)
    rows, vocab = x.shape
    idle = dict(zip(ORDER, operands(vocab, [request(Sampling(), [])] * rows, vocab), strict=True))
    idle |= {
        name: torch.as_tensor(value, dtype=idle[name].dtype).expand(idle[name].shape)
        for name, value in numbers.items()
    }
    return sample.reference(x, *(idle[name] for name in ORDER), candidates=candidates)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_row_is_marked(bad: float, temperature: float) -> None:
    rows = torch.zeros(2, 40)
    rows[1, :] = bad if bad == -math.inf else rows[1]
    rows[1, 17] = bad
    token, logprob, tokens, _ = plain(rows, 3, temperature=temperature, draw=0.5, top=2)
    assert token.tolist()[1] == -1
    assert token.tolist()[0] >= 0
    assert str(logprob[1].item()) == str(bad)
    assert tokens.tolist() == [[0, 1, -1], [-1, -1, -1]]


def test_every_bit_of_seen_counts() -> None:
    """Token v is divided alone: of equal logits it is then the only one that is not drawn first."""
    for vocab in (1, 32, 33, 64):
        logits = torch.ones(vocab, vocab) + torch.eye(vocab)
        seen = torch.zeros(vocab, -(-vocab // 32), dtype=torch.int64)
        for v in range(vocab):
            seen[v, v // 32] = 1 << v % 32
        words = torch.where(seen >= 2**31, seen - 2**32, seen).int()
        token = plain(logits, penalty=4.0, seen=words)[0]
        assert token.tolist() == [0 if v or vocab == 1 else 1 for v in range(vocab)]
        assert plain(logits, seen=words)[0].tolist() == list(range(vocab))


def types(**changes: str) -> tuple[TensorType, ...]:
    dtypes = {"logits": "f32", **dict(SETTINGS), "seen": "i32", "top": "i32", **changes}
    shapes = {"logits": (4, 40), "seen": (4, 2)}
    return tuple(
        TensorType("f32" if d == "float" else d, shapes.get(n, (4,))) for n, d in dtypes.items()
    )


@pytest.mark.parametrize(
    ("given_", "candidates", "message"),
    [
        (types(logits="i32"), 0, r"expected float logits \[L, V\], V a number, found i32\[4, 40\]"),
        (types(top_k="f32"), 0, r"expected top_k i32\[4\], found f32\[4\]"),
        (types(draw="i32"), 0, r"expected draw float\[4\], found i32\[4\]"),
        (types(top="i64"), 0, r"expected top i32\[4\], found i64\[4\]"),
        (types(seen="i64"), 0, r"expected seen i32\[4, 2\], found i64\[4, 2\]"),
        (types()[:-1], 0, "expected logits, temperature, top_k, .*, top; found"),
        (types(), 41, "expected candidates of 0 to 40, found 41"),
        (types(), -1, "expected candidates of 0 to 40, found -1"),
    ],
)
def test_refusals(given_: tuple[TensorType, ...], candidates: int, message: str) -> None:
    with pytest.raises(VerifyError, match=f"sample: {message}"):
        sample.types(given_, {"candidates": candidates})
