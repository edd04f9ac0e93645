"""What tests of sampling share: requests, the op's operands, and which tokens may be chosen."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from ingot.compiler.ops.sampling import SETTINGS
from ingot.runtime.serving.batch import Chunk, Row
from ingot.runtime.serving.row_sampling import RowSampler
from ingot.runtime.serving.sampling import Sampling, distribution, log_softmax, most_likely
from ingot.runtime.serving.sampling import sample as on_host
from ingot.runtime.serving.sequence import Request, Sequence

# A cumulative mass this close to an edge may fall on either side of it.
CLOSE = 1e-5
ORDER = (*(name for name, _ in SETTINGS), "seen", "top")

options = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.7]),
    top_k=st.sampled_from([0, 1, 5, 40, 10_000]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    # Such as f32 holds exactly: what they make equal is then equal on both sides.
    repetition_penalty=st.sampled_from([1.0, 1.25, 0.75]),
    seed=st.integers(0, 2**64 - 1),
)


def request(sampling: Sampling, history: list[int], top: int = 0) -> Sequence:
    asked = Request(max_new_tokens=9, sampling=sampling, top_logprobs=top)
    return Sequence(0, tuple(history), asked, sampling.seed or 0)


def row_of(sequence: Sequence) -> Row:
    """The row behind the last token of `sequence`."""
    return Row(Chunk(sequence, 0, tuple(sequence.history)), sequence.length - 1)


def requests_of(rows: Rows[Sampling], vocab: int, top: int, seed: int = 0) -> list[Sequence]:
    """A request with a history of its own for each of `rows`."""
    draw = np.random.default_rng(seed)
    return [
        request(s, draw.integers(0, vocab, 3 + 7 * i).tolist(), top) for i, s in enumerate(rows)
    ]


def operands(vocab: int, requests: list[Sequence], candidates: int) -> list[torch.Tensor]:
    """What `sample` takes behind the logits."""
    rows = [row_of(sequence) for sequence in requests]
    made = RowSampler(vocab, candidates).inputs(len(rows), rows)
    return [torch.tensor(made[name]) for name in ORDER]


def random_logits(rows: int, vocab: int, seed: int, ties: bool) -> torch.Tensor:
    drawn = 3 * np.random.default_rng(seed).standard_normal((rows, vocab))
    return torch.tensor(np.round(drawn) if ties else drawn, dtype=torch.float32)


def check_choices(
    logits: torch.Tensor,
    requests: list[Sequence],
    draws: torch.Tensor,
    found: Rows[torch.Tensor],
    tolerance: float = 1e-5,
) -> None:
    """`found` is what the host chooses, but where that hangs on a rounding."""
    token, logprob, tokens, logprobs = found
    for i, asked in enumerate(requests):
        row = logits[i].float().numpy()
        if not near_an_edge(row, asked):
            assert int(token[i]) in _allowed(row, asked, float(draws[i])), (
                i,
                asked.request.sampling,
            )
        raw = log_softmax(row)
        np.testing.assert_allclose(float(logprob[i]), raw[int(token[i])], atol=tolerance)
        best = most_likely(row, asked.request.top_logprobs)
        assert tokens[i, : asked.request.top_logprobs].tolist() == [t for t, _ in best]
        assert (tokens[i, asked.request.top_logprobs :] == -1).all()
        np.testing.assert_allclose(
            logprobs[i, : asked.request.top_logprobs].numpy(), [p for _, p in best], atol=tolerance
        )


def _allowed(logits: Any, asked: Sequence, draw: float) -> set[int]:
    """The tokens that may be chosen when sums are off by CLOSE."""
    shifted = (min(max(draw + shift, 0), 1 - 2**-53) for shift in (-CLOSE, 0, CLOSE))
    return {on_host(logits, asked.request.sampling, asked.history, d)[0] for d in shifted}


def near_an_edge(logits: Any, asked: Sequence) -> bool:
    """Whether what is kept hangs on a rounding."""
    sampling = asked.request.sampling
    if sampling.temperature == 0:
        return False
    kept = distribution(logits, replace(sampling, top_p=1.0, min_p=0.0), asked.history)
    cumulative = np.cumsum(np.sort(kept))[:-1]
    gaps = np.abs(cumulative - (1 - sampling.top_p))
    at_top_p = sampling.top_p < 1 and len(gaps) and gaps.min() < CLOSE
    ratios = np.abs(kept[kept > 0] / kept.max() - sampling.min_p)
    return bool(at_top_p or (0 < sampling.min_p < 1 and ratios.min() < CLOSE))
