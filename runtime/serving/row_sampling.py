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
from .sampling import broken_logits, most_likely, sample, uniform
from .sequence import Sequence as ServedSequence
from .sequence import TopLogprobs


@dataclass(frozen=True)
class Choice:
    """A token, its log-probability, and the most likely (token, log-probability) pairs."""

    token: int
    logprob: float
    top: TopLogprobs


# The bits of the first so many tokens of a history.
_Seen = tuple[NDArray[np.uint32], int]


@dataclass
class RowSampler:
    """Samples rows over a vocabulary, by the device where that gives up to `candidates` tops.

    With `candidates` None the device gives logits alone.
    """

    vocab: int
    candidates: int | None
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

        What is left of the entry is greedy, with nothing seen and nothing asked for.
        """
        if self.candidates is None:
            return {}
        made: dict[str, Array] = {}
        for name, spec in sampling_inputs(self.vocab).items():
            made[name] = np.zeros(spec.bound({"L": count}), DTYPES[spec.dtype].numpy)
        made["top_p"][:] = made["penalty"][:] = 1
        seeds, seen = made["seed"].view(np.uint64), made["seen"].view(np.uint32)
        for i, row in enumerate(rows):
            sequence, request = row.sequence, row.sequence.request
            sampling = request.sampling
            made["top"][i] = request.top_logprobs if self._on_device(row) else 0
            seeds[i], made["prompt"][i] = sequence.seed, len(sequence.prompt)
            if sampling.temperature > 0:
                made["temperature"][i] = _within(sampling.temperature)
                made["draw"][i] = below(uniform(sequence.seed, row.step))
            made["top_k"][i] = min(sampling.top_k, self.vocab)
            made["top_p"][i] = sampling.top_p
            made["min_p"][i] = sampling.min_p
            if sampling.repetition_penalty != 1:
                made["penalty"][i] = _within(sampling.repetition_penalty)
                seen[i] = self._seen(row)
        return made

    def _on_device(self, row: Row) -> bool:
        return self.candidates is not None and row.sequence.request.top_logprobs <= self.candidates

    def _seen(self, row: Row) -> NDArray[np.uint32]:
        """A bit for every token before the result of `row`."""
        sequence, chunk = row.sequence, row.chunk
        if sequence not in self._histories:
            self._histories[sequence] = np.zeros(-(-self.vocab // SEEN_BITS), np.uint32), 0
        bits, marked = self._histories[sequence]
        _mark(bits, sequence.history[marked:])
        self._histories[sequence] = bits, sequence.length
        drafted = chunk.tokens[sequence.length - chunk.start : row.offset + 1]
        if drafted:
            bits = bits.copy()
            _mark(bits, drafted)
        return bits


def _mark(bits: NDArray[np.uint32], tokens: Sequence[int]) -> None:
    ids = np.array(tokens, np.uint32)
    np.bitwise_or.at(bits, ids // SEEN_BITS, np.uint32(1) << ids % SEEN_BITS)


def _within(number: float) -> float:
    """`number` where a device can compute with it: nothing beyond changes a choice."""
    return min(max(number, 1e-30), 1e30)


def below(draw: float) -> np.float32:
    """`draw` in f32, not rounded up: what is below 1 stays there."""
    near = np.float32(draw)
    return near if float(near) <= draw else np.nextafter(near, np.float32(0))
