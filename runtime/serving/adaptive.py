"""How many drafted tokens pay: from the times of steps, and from what came of earlier drafts.

A step of more tokens takes longer (of a mixture of experts it reads more experts), and gives more
only where drafts are right. So before each step the likeliest drafted tokens are counted in as long
as tokens a second grow, and none where plain steps give more. A sequence gets the same tokens, in
more steps or in fewer: but for rounding, where entries of other sizes sum in another order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace
from statistics import median
from weakref import WeakKeyDictionary

from .sequence import Sequence

# How many times of one entry are kept, the last ones, and how many it takes until they count.
_TIMES, _ENOUGH = 5, 3
# The least that a step takes, in seconds: a coarse clock says 0.
_SHORTEST = 1e-9
# What is known of a place in a draft fades by this with each draft: some 32 count.
_FADING = 1 - 1 / 32
# How much what is known of all sequences counts in what is expected of one, in drafts.
_PRIOR = 4.0
# After so many steps without the drafts that there were, those of _ENOUGH steps are verified all
# the same: more and more rarely, as long as they do not pay.
_FIRST_PROBE, _LAST_PROBE = 32, 1024
# After so many steps of drafts that pay, _ENOUGH plain ones are taken, to measure those anew.
_PLAIN = 256


class StepTimes:
    """The times of steps by the tokens T of their entry, in seconds: medians of the last ones.

    Steps that the host gives their inputs and steps that are fed by the one before count apart.
    """

    def __init__(self) -> None:
        self._samples: dict[tuple[bool, int], deque[float]] = {}
        self._medians: dict[bool, dict[int, float]] = {False: {}, True: {}}
        self._added: set[tuple[bool, int]] = set()  # since the medians were taken

    def add(self, tokens: int, seconds: float, *, fed: bool = False) -> None:
        """A step of an entry of `tokens` took `seconds`."""
        key = fed, tokens
        if key not in self._samples:
            self._samples[key] = deque(maxlen=_TIMES)
        self._samples[key].append(max(seconds, _SHORTEST))
        self._added.add(key)

    def of(self, tokens: int, *, fed: bool = False) -> float | None:
        """What a step of an entry of `tokens` takes; None as long as nothing is known.

        An entry that was not measured takes what lies between those beside it, or what the next
        smaller one takes: as little as it may, so that it is tried.
        """
        known = self._known(fed)
        if tokens in known or not known:
            return known.get(tokens)
        sizes = sorted(known)
        at = bisect_left(sizes, tokens)
        if at == len(sizes):
            return known[sizes[-1]]
        if at == 0:
            of_fed = None if fed else self.of(tokens, fed=True)
            return known[sizes[0]] if of_fed is None else min(of_fed, known[sizes[0]])
        low, high = sizes[at - 1], sizes[at]
        part = (tokens - low) / (high - low)
        return known[low] + part * (known[high] - known[low])

    def plain(self, tokens: int) -> float | None:
        """What a step of decoding without drafts takes, one that is fed where there are such; None
        where that was not measured."""
        return self._known(True).get(tokens) or self._known(False).get(tokens)

    def _known(self, fed: bool) -> dict[int, float]:
        for key in self._added:
            if len(samples := self._samples[key]) >= _ENOUGH:
                self._medians[key[0]][key[1]] = median(samples)
        self._added.clear()
        return self._medians[fed]


@dataclass
class Acceptance:
    """How often each place of a draft was right where all before it were."""

    seen: list[float] = field(default_factory=list[float])
    right: list[float] = field(default_factory=list[float])

    def add(self, place: int, right: bool) -> None:
        """A draft was right up to `place`, and right or wrong there."""
        while len(self.seen) <= place:
            self.seen.append(0.0)
            self.right.append(0.0)
        self.seen[place] = self.seen[place] * _FADING + 1
        self.right[place] = self.right[place] * _FADING + right

    def rate(self, place: int, prior: float) -> float:
        """The chance that `place` is right, where so far `prior` was the best guess."""
        if place >= len(self.seen):
            return prior
        return (self.right[place] + _PRIOR * prior) / (self.seen[place] + _PRIOR)


# What is expected of a place of which nothing is known.
_UNKNOWN = 0.8


@dataclass(frozen=True)
class Decision:
    """Of `drafted` tokens `verified` were worth it: of a step of `seconds`, `tokens` are expected,
    where a plain step of `plain_seconds` gives `plain_tokens`. With `probe` against the odds."""

    drafted: int
    verified: int
    tokens: float
    seconds: float
    plain_tokens: int
    plain_seconds: float
    probe: bool = False

    @property
    def gain(self) -> float:
        """Tokens a second over those of plain steps."""
        return self.tokens / self.seconds / (self.plain_tokens / self.plain_seconds)

    def __str__(self) -> str:
        per = self.tokens / self.plain_tokens
        longer = self.seconds / self.plain_seconds
        return (
            f"{'on' if self.gain > 1 else 'off'}: {self.verified} of {self.drafted} drafted tokens "
            f"would give {per:.2f} tokens a sequence in {longer:.2f} times a plain step"
        )


@dataclass
class Adaptive:
    """Decides how many drafted tokens each sequence has verified.

    `entry(tokens, rows)` is how many tokens the entry has that takes a step. Drafts are compared
    with the tokens that come, verified or not: acceptance is known also while none pay. A draft
    that does not pay is verified now and then all the same, to measure its step anew, and plain
    steps are taken now and then where drafts pay.
    """

    times: StepTimes
    entry: Callable[[int, int], int]
    # How often drafts were verified, how often of these against the odds, and how often they were
    # left out; and the last decision, None before there was one.
    verified: int = 0
    probes: int = 0
    declined: int = 0
    last: Decision | None = None
    _all: Acceptance = field(default_factory=Acceptance)
    _each: WeakKeyDictionary[Sequence, Acceptance] = field(
        default_factory=WeakKeyDictionary[Sequence, Acceptance]
    )
    _open: WeakKeyDictionary[Sequence, tuple[int, List[int]]] = field(
        default_factory=WeakKeyDictionary[Sequence, tuple[int, List[int]]]
    )
    _waited: int = 0
    _probed: int = 0
    _steady: int = 0
    _patience: int = _FIRST_PROBE

    def choose(
        self, drafts: Mapping[Sequence, List[int]], tokens: int, room: int
    ) -> dict[Sequence, int]:
        """How many tokens to verify of the draft of each sequence, beside the `tokens` of the step,
        which give one to each of `drafts`; `room` in all.

        The likeliest come first, as long as the expected tokens a second grow with them.
        """
        self._look(drafts)
        likely = sorted(
            (
                (chance, sequence)
                for sequence in drafts
                for chance in self._chances(sequence, drafts)
            ),
            key=lambda pair: -pair[0],
        )
        if not likely:
            return {}
        count, decode = len(drafts), tokens == len(drafts)
        size = self.entry(tokens, count)
        plain = self.times.plain(size) if decode else self.times.of(size)
        if plain is None:
            return {}
        most: Decision | None = None
        gained, taken = float(count), 0
        while taken < min(len(likely), room):
            taken += 1
            gained += likely[taken - 1][0]
            size = self.entry(tokens + taken, count + taken)
            while tokens + taken < size and taken < min(len(likely), room):  # these cost nothing
                taken += 1
                gained += likely[taken - 1][0]
            size = self.entry(tokens + taken, count + taken)
            seconds = self.times.of(size) or plain
            made = Decision(len(likely), taken, gained, seconds, count, plain)
            if most is None or made.gain > most.gain:
                most = made
        if most is None:
            return {}
        self.last = most
        if self._steady >= _PLAIN:
            self._steady = self._steady + 1 if self._steady < _PLAIN + _ENOUGH else 0
            return {}
        if most.gain <= 1:
            self.declined += 1
            self._waited += 1
            if self._waited <= self._patience:
                return {}
            self.last = replace(most, probe=True)
        counts: dict[Sequence, int] = {}
        for _, sequence in likely[: most.verified]:
            counts[sequence] = counts.get(sequence, 0) + 1
        return counts

    def planned(self) -> None:
        """The drafts that were chosen last are verified."""
        assert self.last is not None
        self.verified += 1
        self.probes += self.last.probe
        self._probed = self._probed + 1 if self.last.probe else 0
        self._steady = 0 if self.last.probe else self._steady + 1
        if not self.last.probe:
            self._patience = _FIRST_PROBE
        elif self._probed == _ENOUGH:
            self._probed, self._patience = 0, min(2 * self._patience, _LAST_PROBE)
        if not self._probed:
            self._waited = 0

    def _chances(self, sequence: Sequence, drafts: Mapping[Sequence, List[int]]) -> Iterator[float]:
        """The chance of each drafted token to be accepted: never more than of the one before."""
        own, chance = self._each.get(sequence), 1.0
        for place in range(len(drafts[sequence])):
            rate = self._all.rate(place, _UNKNOWN)
            chance *= rate if own is None else own.rate(place, rate)
            yield chance

    def _look(self, drafts: Mapping[Sequence, List[int]]) -> None:
        """Compare open drafts with what came, and remember new ones."""
        for sequence, draft in drafts.items():
            if sequence in self._open:
                start, before = self._open[sequence]
                came = sequence.history[start : start + len(before)]
                right = [a == b for a, b in zip(came, before, strict=False)]
                if all(right) and len(came) < len(before):
                    continue
                del self._open[sequence]
                own = self._each.setdefault(sequence, Acceptance())
                first_wrong = right.index(False) if False in right else len(right)
                for place, kept in enumerate(right[: first_wrong + 1]):
                    self._all.add(place, kept)
                    own.add(place, kept)
            if draft:
                self._open[sequence] = sequence.length, draft
