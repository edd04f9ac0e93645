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


@dataclass(frozen=True)
class Choice:
    """A token, its log-probability, and the most likely (token, log-probability) pairs."""

    token: int
    logprob: float
    top: TopLogprobs


# What is asked of a row, and how many tops.
_Asked = tuple[Sampling, int]
# The bits of the first so many tokens of a history.
_Seen = tuple[NDArray[np.uint32], int]


@dataclass
class RowSampler:
    """Samples rows over a vocabulary, by the device where that gives up to `candidates` tops.

    With `candidates` None the device gives logits alone. What does not change from step to step
    goes to an entry as the same read-only arrays again.
    """

    vocab: int
    candidates: int | None
    _last: dict[int, dict[str, Array]] = field(default_factory=dict[int, dict[str, Array]])
    _asked: dict[int, list[_Asked]] = field(default_factory=dict[int, list[_Asked]])
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
        last = self._last.setdefault(count, {})
        asked = [(r.sequence.request.sampling, r.sequence.request.top_logprobs) for r in rows]
        made: dict[str, Array] = {}
        if not last or asked != self._asked[count]:
            made, self._asked[count] = self._settings(count, asked), asked
        if any(sampling.temperature > 0 for sampling, _ in asked):
            made["draw"] = np.zeros(count, np.float32)
            for i, row in enumerate(rows):
                if asked[i][0].temperature > 0:
                    made["draw"][i] = below(uniform(row.sequence.seed, row.step))
        for name, array in made.items():
            if name not in last or array.tobytes() != last[name].tobytes():
                last[name] = array
        penalized = [i for i, (sampling, _) in enumerate(asked) if sampling.repetition_penalty != 1]
        if penalized or "seen" not in last:
            words = np.zeros((count, -(-self.vocab // SEEN_BITS)), np.uint32)
            for i in penalized:
                words[i] = self._seen(rows[i])
            last["seen"] = words.view(np.int32)
        for array in last.values():
            array.flags.writeable = False
        return dict(last)

    def _settings(self, count: int, asked: Sequence[_Asked]) -> dict[str, Array]:
        """The inputs that are the same at every step; draws are 0."""
        assert self.candidates is not None
        made: dict[str, Array] = {}
        for name, spec in sampling_inputs(self.vocab).items():
            if name != "seen":
                value = 1 if name in ("top_p", "penalty") else 0
                made[name] = np.full(count, value, DTYPES[spec.dtype].numpy)
        for i, (sampling, top) in enumerate(asked):
            if sampling.temperature > 0:
                made["temperature"][i] = _within(sampling.temperature)
            made["top_k"][i] = min(sampling.top_k, self.vocab)
            made["top_p"][i] = sampling.top_p
            made["min_p"][i] = sampling.min_p
            made["top"][i] = top if top <= self.candidates else 0
            if sampling.repetition_penalty != 1:
                made["penalty"][i] = _within(sampling.repetition_penalty)
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
