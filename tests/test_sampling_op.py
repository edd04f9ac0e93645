"""sample: the device's choice is the host's, row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ingot.compiler.ops.sampling import SETTINGS, sample
from ingot.compiler.types import TensorType, VerifyError
from ingot.runtime.choosing import DeviceSampling
from ingot.runtime.sampling import Sampling, distribution, log_softmax, most_likely
from ingot.runtime.sampling import sample as on_host
from ingot.runtime.sequence import Sequence, SequenceStats

# A cumulative mass this close to an edge may fall on either side of it.
CLOSE = 1e-5
ORDER = (*(name for name, _ in SETTINGS), "seen", "top")

options = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.7]),
    top_k=st.sampled_from([0, 1, 5, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    # Such as f32 holds exactly: what they make equal is then equal on both sides.
    repetition_penalty=st.sampled_from([1.0, 1.25, 0.75]),
    seed=st.integers(0, 2**64 - 1),
)


def request(sampling: Sampling, history: list[int], top: int = 0) -> Sequence:
    stats = SequenceStats(prompt_tokens=len(history))
    seed = sampling.seed or 0
    return Sequence(0, tuple(history), 9, sampling, seed, frozenset(), top, stats, list(history))


def device_inputs(vocab: int, requests: list[Sequence], candidates: int) -> dict[str, Any]:
    made = DeviceSampling(vocab, candidates).inputs(len(requests), requests)
    return {name: torch.tensor(array) for name, array in made.items()}


def allowed(logits: Any, sampling: Sampling, history: list[int], draw: float) -> set[int]:
    """The tokens that may be chosen when sums are off by CLOSE."""
    return {
        on_host(logits, sampling, history, min(max(draw + shift, 0), 1 - 2**-53))[0]
        for shift in (-CLOSE, 0, CLOSE)
    }


def near_an_edge(logits: Any, sampling: Sampling, history: list[int]) -> bool:
    """Whether what is kept hangs on a rounding."""
    if sampling.temperature == 0:
        return False
    edges = [Sampling(**{**vars(sampling), "top_p": 1.0, "min_p": 0.0})]
    kept = distribution(logits, edges[0], history)
    cumulative = np.cumsum(np.sort(kept))
    top_p = np.abs(cumulative - (1 - sampling.top_p)).min() < CLOSE and sampling.top_p < 1
    ratios = kept[kept > 0] / kept.max()
    min_p = sampling.min_p > 0 and np.abs(ratios - sampling.min_p).min() < CLOSE
    return bool(top_p or (min_p and sampling.min_p < 1))


@hypothesis_settings(max_examples=300)
@given(st.lists(options, min_size=1, max_size=9), st.integers(0, 2**32), st.booleans(), st.data())
def test_reference_is_the_host_s_sampling(
    rows: list[Sampling], seed: int, ties: bool, data: st.DataObject
) -> None:
    vocab = data.draw(st.sampled_from([1, 31, 97]))
    generator = np.random.default_rng(seed)
    logits = (3 * generator.standard_normal((len(rows), vocab))).astype(np.float32)
    if ties:
        logits = np.round(logits)
    histories = [generator.integers(0, vocab, n % 40).tolist() for n in range(3, 3 + len(rows))]
    top = min(4, vocab)
    requests = [request(s, h, top) for s, h in zip(rows, histories, strict=True)]
    given_ = device_inputs(vocab, requests, top)
    token, logprob, tokens, logprobs = sample.reference(
        torch.from_numpy(logits), *(given_[name] for name in ORDER), candidates=top
    )
    for i, (sampling, history) in enumerate(zip(rows, histories, strict=True)):
        if not near_an_edge(logits[i], sampling, history):
            may = allowed(logits[i], sampling, history, float(given_["draw"][i]))
            assert int(token[i]) in may
        assert logprob[i].item() == pytest.approx(log_softmax(logits[i])[token[i]], abs=1e-6)
        best = most_likely(logits[i], top)
        assert tokens[i].tolist() == [t for t, _ in best]
        assert logprobs[i].tolist() == pytest.approx([p for _, p in best], abs=1e-6)


def plain(logits: Any, candidates: int = 0, **numbers: Any) -> tuple[torch.Tensor, ...]:
    """The op over logits [L, V], greedy but for `numbers`."""
    x = torch.as_tensor(logits, dtype=torch.float32)
    rows, vocab = x.shape
    idle = device_inputs(vocab, [request(Sampling(), [])] * rows, vocab)
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
        (types()[:-1], 0, "expected 9 operands, found 8"),
        (types(), 41, "expected candidates of 0 to 40, found 41"),
        (types(), -1, "expected candidates of 0 to 40, found -1"),
    ],
)
def test_refusals(given_: tuple[TensorType, ...], candidates: int, message: str) -> None:
    with pytest.raises(VerifyError, match=f"sample: {message}"):
        sample.types(given_, {"candidates": candidates})
