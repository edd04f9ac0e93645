"""Choosing the next token on the host: processed distributions, seeded draws, log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What each setting must be: a kind of number, in words, and the range.
_CHECKS: tuple[tuple[str, type, str, Callable[[Any], bool]], ...] = (
    ("temperature", Real, "a finite number ≥ 0", lambda v: 0 <= v < math.inf),
    ("top_k", Integral, "an integer ≥ 0", lambda v: v >= 0),
    ("top_p", Real, "a number in (0, 1]", lambda v: 0 < v <= 1),
    ("min_p", Real, "a number in [0, 1]", lambda v: 0 <= v <= 1),
    ("repetition_penalty", Real, "a finite number > 0", lambda v: 0 < v < math.inf),
    ("seed", Integral, "None or an integer in [0, 2^64)", lambda v: 0 <= v < 2**64),
)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults are greedy. Meanings and order as in Hugging Face.

    `repetition_penalty` > 0 divides positive and multiplies negative logits of the tokens seen in
    prompt and output (1 is off); `temperature` ≥ 0 divides the logits (0 is greedy: the first of
    the largest); `top_k` keeps the k largest (0 is off); `top_p` in (0, 1] keeps the fewest most
    likely tokens that reach this mass (1 is off); `min_p` in [0, 1] keeps tokens at least this
    likely relative to the most likely (0 is off). `seed` in [0, 2^64) fixes the draws; None draws
    a seed from the operating system. ValueError says what was expected and what came.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind, expected, holds in _CHECKS:
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
                raise ValueError(f"{name}: expected {expected}, found {value!r}")


GREEDY = Sampling()


def sample(
    logits: NDArray[np.float32], sampling: Sampling, history: Collection[int], draw: float
) -> tuple[int, float]:
    """One token from logits f32[V], and its log-probability under the model's own distribution.

    `history` holds the token ids of prompt and output so far; `draw` in [0, 1) is the randomness
    (see `uniform`), unused when greedy. The log-probability is the log-softmax of the raw logits.
    ValueError when the logits hold NaN or have no finite maximum.
    """
    raw = log_softmax(logits)
    if sampling.temperature == 0:
        token = int(np.argmax(_penalized(logits, sampling, history)))
        return token, float(raw[token])
    probabilities = distribution(logits, sampling, history)
    kept = np.flatnonzero(probabilities)
    cumulative = np.cumsum(probabilities[kept])
    index = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    token = int(kept[min(index, len(kept) - 1)])
    return token, float(raw[token])


def distribution(
    logits: NDArray[np.float32], sampling: Sampling, history: Collection[int]
) -> NDArray[np.float64]:
    """The probabilities f64[V] that `sample` draws from; 0 for every token that was sorted out.

    Of equally likely tokens at the edge of `top_p` those with the smallest ids are kept; at the
    edge of `top_k` all of them.
    """
    scores = _penalized(logits, sampling, history)
    if sampling.temperature == 0:
        chosen = np.zeros_like(scores)
        chosen[np.argmax(scores)] = 1
        return chosen

    # Shifted first: the maximum stays 0 under any temperature, and no exponential overflows.
    with np.errstate(over="ignore"):
        scores = (scores - scores.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1:
        # Values are sorted, not tokens: several times as fast, and only ties need to be told apart.
        ascending = np.sort(scores[scores > -np.inf])
        outside = np.cumsum(_softmax(ascending)) <= 1 - sampling.top_p
        kept = len(ascending) - min(int(outside.sum()), len(ascending) - 1)
        edge = ascending[-kept]
        ties = np.flatnonzero(scores == edge)
        scores[ties[kept - int((scores > edge).sum()) :]] = -np.inf
        scores[scores < edge] = -np.inf
    if sampling.min_p > 0:
        # p_i < min_p · p_max  ==  exp(s_i - 0) < min_p
        scores[scores < math.log(sampling.min_p)] = -np.inf
    return _softmax(scores)


def uniform(seed: int, step: int) -> float:
    """The draw in [0, 1) that belongs to the `step`-th token (from 0) of a sequence with `seed`.

    The first 53 bits of Philox4x64 keyed by (seed, step): a draw depends on nothing else, so
    neither batching nor recomputation changes a sequence.
    """
    key = np.array([seed, step], np.uint64)
    return (int(np.random.Philox(key=key).random_raw()) >> 11) * 2.0**-53


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """log softmax f64[V] of logits f32[V]; ValueError as in `sample`."""
    shifted = _checked(logits)
    shifted -= shifted.max()
    return shifted - math.log(float(np.exp(shifted).sum()))


def most_likely(logits: NDArray[np.float32], count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely (token, log-probability) pairs of the raw logits f32[V], descending.

    Equally likely tokens stand in the order of their ids.
    """
    if count == 0:
        return ()
    raw = log_softmax(logits)
    least = np.partition(raw, -count)[-count]
    candidates = np.flatnonzero(raw >= least)
    best = candidates[np.argsort(-raw[candidates], kind="stable")][:count]
    return tuple((int(token), float(raw[token])) for token in best)


def broken_logits(largest: float) -> ValueError:
    """What is wrong with logits whose maximum is `largest`."""
    return ValueError(f"logits: expected a finite maximum and no NaN, found {largest}")


def _penalized(
    logits: NDArray[np.float32], sampling: Sampling, history: Collection[int]
) -> NDArray[np.float64]:
    """A float64 copy of logits f32[V] after the repetition penalty; ValueError as in `sample`."""
    scores = _checked(logits)
    if sampling.repetition_penalty != 1 and history:
        seen = np.unique(np.fromiter(history, np.int64, len(history)))
        penalty = sampling.repetition_penalty
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return scores


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def _checked(logits: NDArray[Any]) -> NDArray[np.float64]:
    """A float64 copy of logits [V] that have a finite maximum and no NaN."""
    if logits.ndim != 1 or not logits.size:
        raise ValueError(f"logits: expected shape [V] with V ≥ 1, found {list(logits.shape)}")
    largest = float(logits.max())
    if not math.isfinite(largest):
        raise broken_logits(largest)
    return logits.astype(np.float64)
