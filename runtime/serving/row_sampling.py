"""The next tokens of result rows: sampled on the host from logits, or by the device already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ...compiler.dtypes import DTYPES
from ..driver import Array
from .abi import SEEN_BITS, sampling_inputs
from .batch import Row
from .sampling import Sampling, broken_logits, most_likely, sample, uniform
from .sequence import Sequence as ServedSequence
from .sequence import TopLogprobs

# Numbers that a device computes with lie in here: nothing beyond them changes a choice.
_LEAST, _MOST = np.float32(1e-30), np.float32(1e30)


@dataclass(frozen=True)
class Choice:
    """A token, its log-probability, and the most likely (token, log-probability) pairs."""

    token: int
    logprob: float
    top: TopLogprobs


@dataclass
class _Seen:
    """The bits of the first `count` tokens of a history."""

    bits: NDArray[np.uint32]
    count: int = 0


@dataclass
class _Settings:
    """The settings of rows as they were last given, and what they were made of."""

    key: tuple[tuple[Sampling, int], ...]
    arrays: Mapping[str, Array]


@dataclass
class RowSampler:
    """Samples rows over a vocabulary, by the device where that gives up to `candidates` tops.

    With `candidates` None the device gives logits alone. What does not change from step to step
    goes to the device as the same read-only arrays again.
    """

    vocab: int
    candidates: int | None
    _idle: dict[int, dict[str, Array]] = field(default_factory=dict[int, dict[str, Array]])
    _last: dict[int, _Settings] = field(default_factory=dict[int, _Settings])
    _histories: WeakKeyDictionary[ServedSequence, _Seen] = field(
        default_factory=WeakKeyDictionary[ServedSequence, _Seen]
    )

    def outputs(self, rows: Sequence[Row]) -> list[str]:
        """The outputs of the device that `choose` needs for `rows`."""
        on_device = [row.sequence.request.top_logprobs for row in rows if self._on_device(row)]
        names = ["token", "logprob"] if on_device else []
        names += ["top_tokens", "top_logprobs"] if any(on_device) else []
        return [*names, "logits"] if len(on_device) < len(rows) else names

    def choose(self, row: Row, found: Mapping[str, Array], at: int) -> Choice:
        """The token behind `row`, row `at` of what the device gave; ValueError as `sample`."""
        sequence, request = row.sequence, row.sequence.request
        count = request.top_logprobs
        if not self._on_device(row):
            sampling, logits = request.sampling, found["logits"][at]
            draw = uniform(sequence.seed, row.step) if sampling.temperature > 0 else 0.0
            token, logprob = sample(logits, sampling, row.history, draw)
            return Choice(token, logprob, most_likely(logits, count))
        token, logprob = int(found["token"][at]), float(found["logprob"][at])
        if token < 0 or not isfinite(logprob):
            raise broken_logits(logprob)
        if not count:
            return Choice(token, logprob, ())
        tokens = found["top_tokens"][at, :count].tolist()
        logprobs = found["top_logprobs"][at, :count].tolist()
        return Choice(token, logprob, tuple(zip(tokens, logprobs, strict=True)))

    def inputs(self, count: int, rows: Sequence[Row]) -> dict[str, Array]:
        """The inputs by which the device samples `rows` in an entry of `count` rows.

        What is left of the entry is greedy.
        """
        if self.candidates is None:
            return {}
        idle = self._idle_inputs(count)
        key = tuple((r.sequence.request.sampling, r.sequence.request.top_logprobs) for r in rows)
        last = self._last.get(count)
        if last is None or last.key != key:
            last = self._last[count] = _Settings(key, self._settings(idle, key))
        made = {**idle, **last.arrays}
        drawing = [(i, row) for i, row in enumerate(rows) if key[i][0].temperature > 0]
        if drawing:
            made["draw"] = np.zeros(count, np.float32)
            for i, row in drawing:
                made["draw"][i] = _below(uniform(row.sequence.seed, row.step))
        penalized = [(i, row) for i, row in enumerate(rows) if key[i][0].repetition_penalty != 1]
        if penalized:
            seen = np.zeros(idle["seen"].shape, np.uint32)
            for i, row in penalized:
                seen[i] = self._seen(row)
            made["seen"] = seen.view(np.int32)
        return made

    def _on_device(self, row: Row) -> bool:
        return self.candidates is not None and row.sequence.request.top_logprobs <= self.candidates

    def _idle_inputs(self, rows: int) -> dict[str, Array]:
        """Every row greedy, nothing seen, nothing asked for."""
        if rows not in self._idle:
            made: dict[str, Array] = {}
            for name, spec in sampling_inputs(self.vocab).items():
                value = 1 if name in ("top_p", "penalty") else 0
                dtype, shape = DTYPES[spec.dtype].numpy, spec.bound({"L": rows})
                made[name] = _constant(np.full(shape, value, dtype))
            self._idle[rows] = made
        return self._idle[rows]

    def _settings(
        self, idle: Mapping[str, Array], key: tuple[tuple[Sampling, int], ...]
    ) -> Mapping[str, Array]:
        names = ("temperature", "top_k", "top_p", "min_p", "penalty", "top")
        arrays = {name: idle[name].copy() for name in names}
        for i, (sampling, top) in enumerate(key):
            if sampling.temperature > 0:
                arrays["temperature"][i] = np.clip(sampling.temperature, _LEAST, _MOST)
            arrays["top_k"][i] = min(sampling.top_k, self.vocab)
            arrays["top_p"][i] = sampling.top_p
            arrays["min_p"][i] = sampling.min_p
            arrays["penalty"][i] = np.clip(sampling.repetition_penalty, _LEAST, _MOST)
            arrays["top"][i] = top if top <= (self.candidates or 0) else 0
        return {
            name: idle[name] if np.array_equal(array, idle[name]) else _constant(array)
            for name, array in arrays.items()
        }

    def _seen(self, row: Row) -> NDArray[np.uint32]:
        """A bit for every token before the result of `row`."""
        sequence, chunk = row.sequence, row.chunk
        words = -(-self.vocab // SEEN_BITS)
        seen = self._histories.setdefault(sequence, _Seen(np.zeros(words, np.uint32)))
        _mark(seen.bits, sequence.history[seen.count :])
        seen.count = sequence.length
        drafted = chunk.tokens[sequence.length - chunk.start : row.offset + 1]
        if not drafted:
            return seen.bits
        bits = seen.bits.copy()
        _mark(bits, drafted)
        return bits


def _mark(bits: NDArray[np.uint32], tokens: Sequence[int]) -> None:
    ids = np.array(tokens, np.uint32)
    np.bitwise_or.at(bits, ids // SEEN_BITS, np.uint32(1) << ids % SEEN_BITS)


def _below(draw: float) -> np.float32:
    """`draw` in f32, not rounded up: what is below 1 stays there."""
    near = np.float32(draw)
    return near if near <= draw else np.nextafter(near, np.float32(0))


def _constant(array: Array) -> Array:
    array.flags.writeable = False
    return array


__all__ = ["Choice", "RowSampler"]
