"""Choosing the next tokens of a step: on the host from logits, or as the device chose already."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ...compiler.dtypes import DTYPES
from ..driver import Array
from .abi import SEEN_BITS, sampling_inputs
from .sampling import Sampling, broken_logits, most_likely, sample, uniform
from .sequence import Sequence as Request

# Numbers that a device computes with lie in here: nothing beyond them changes a choice.
_LEAST, _MOST = np.float32(1e-30), np.float32(1e30)


@dataclass(frozen=True)
class Choice:
    """A token, its log-probability, and the most likely (token, log-probability) pairs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def choose(sequence: Request, logits: NDArray[np.float32]) -> Choice:
    """The next token of `sequence` from logits f32[V]; ValueError as `sampling.sample`."""
    sampling = sequence.sampling
    draw = uniform(sequence.seed, sequence.generated) if sampling.temperature > 0 else 0.0
    token, logprob = sample(logits, sampling, sequence.history, draw)
    return Choice(token, logprob, most_likely(logits, sequence.top_count))


def chosen(sequence: Request, found: Mapping[str, Array], row: int) -> Choice:
    """What a device chose for `sequence` in a row of its outputs; ValueError as `choose`."""
    token, logprob = int(found["token"][row]), float(found["logprob"][row])
    if token < 0 or not isfinite(logprob):
        raise broken_logits(logprob)
    if not sequence.top_count:
        return Choice(token, logprob, ())
    tokens = found["top_tokens"][row, : sequence.top_count].tolist()
    logprobs = found["top_logprobs"][row, : sequence.top_count].tolist()
    return Choice(token, logprob, tuple(zip(tokens, logprobs, strict=True)))


@dataclass
class _Seen:
    """The bits of the first `count` tokens of a history."""

    bits: NDArray[np.uint32]
    count: int = 0


@dataclass
class _Settings:
    """The settings of rows as they were last given, and what they were made of."""

    key: tuple[tuple[Sampling, int] | None, ...]
    arrays: Mapping[str, Array]


@dataclass
class DeviceSampling:
    """Makes the inputs by which a device samples, for a vocabulary and up to `candidates` tops.

    What does not change from step to step is given as the same read-only arrays again.
    """

    vocab: int
    candidates: int
    _idle: dict[int, dict[str, Array]] = field(default_factory=dict[int, dict[str, Array]])
    _last: dict[int, _Settings] = field(default_factory=dict[int, _Settings])
    _histories: WeakKeyDictionary[Request, _Seen] = field(
        default_factory=WeakKeyDictionary[Request, _Seen]
    )

    def takes(self, sequence: Request) -> bool:
        """Whether the device can choose for `sequence`."""
        return sequence.top_count <= self.candidates

    def outputs(self, sequences: Collection[Request]) -> list[str]:
        """The names of the outputs that hold the choices for `sequences`."""
        tops = ["top_tokens", "top_logprobs"] if any(s.top_count for s in sequences) else []
        return ["token", "logprob", *tops]

    def inputs(self, rows: int, sequences: Sequence[Request | None]) -> dict[str, Array]:
        """The inputs of an entry of `rows` rows; those without a sequence are greedy."""
        idle = self._idle_inputs(rows)
        key = tuple(s and (s.sampling, s.top_count) for s in sequences)
        last = self._last.get(rows)
        if last is None or last.key != key:
            last = self._last[rows] = _Settings(key, self._settings(idle, key))
        made = {**idle, **last.arrays}
        drawing = [(i, s) for i, s in enumerate(sequences) if s and s.sampling.temperature > 0]
        if drawing:
            made["draw"] = np.zeros(rows, np.float32)
            for i, s in drawing:
                made["draw"][i] = _below(uniform(s.seed, s.generated))
        penalized = [
            (i, s) for i, s in enumerate(sequences) if s and s.sampling.repetition_penalty != 1
        ]
        if penalized:
            seen = np.zeros(idle["seen"].shape, np.uint32)
            for i, s in penalized:
                seen[i] = self._seen(s)
            made["seen"] = seen.view(np.int32)
        return made

    def _idle_inputs(self, rows: int) -> dict[str, Array]:
        """Every row greedy, nothing seen, nothing asked for."""
        if rows not in self._idle:
            made: dict[str, Array] = {}
            for name, (dtype, shape) in sampling_inputs(rows, self.vocab).items():
                value = 1 if name in ("top_p", "penalty") else 0
                made[name] = _constant(np.full(shape, value, DTYPES[dtype].numpy))
            self._idle[rows] = made
        return self._idle[rows]

    def _settings(
        self, idle: Mapping[str, Array], key: tuple[tuple[Sampling, int] | None, ...]
    ) -> Mapping[str, Array]:
        names = ("temperature", "top_k", "top_p", "min_p", "penalty", "top")
        arrays = {name: idle[name].copy() for name in names}
        for i, given in enumerate(key):
            if given is None:
                continue
            sampling, top = given
            if sampling.temperature > 0:
                arrays["temperature"][i] = np.clip(sampling.temperature, _LEAST, _MOST)
            arrays["top_k"][i] = min(sampling.top_k, self.vocab)
            arrays["top_p"][i] = sampling.top_p
            arrays["min_p"][i] = sampling.min_p
            arrays["penalty"][i] = np.clip(sampling.repetition_penalty, _LEAST, _MOST)
            arrays["top"][i] = top if top <= self.candidates else 0
        return {
            name: idle[name] if np.array_equal(array, idle[name]) else _constant(array)
            for name, array in arrays.items()
        }

    def _seen(self, sequence: Request) -> NDArray[np.uint32]:
        """A bit for every token of the history, brought up to date."""
        words = -(-self.vocab // SEEN_BITS)
        seen = self._histories.setdefault(sequence, _Seen(np.zeros(words, np.uint32)))
        new = np.array(sequence.history[seen.count :], np.uint32)
        np.bitwise_or.at(seen.bits, new // SEEN_BITS, np.uint32(1) << new % SEEN_BITS)
        seen.count = len(sequence.history)
        return seen.bits


def _below(draw: float) -> np.float32:
    """`draw` in f32, not rounded up: what is below 1 stays there."""
    near = np.float32(draw)
    return near if near <= draw else np.nextafter(near, np.float32(0))


def _constant(array: Array) -> Array:
    array.flags.writeable = False
    return array


__all__ = ["Choice", "DeviceSampling", "choose", "chosen"]
