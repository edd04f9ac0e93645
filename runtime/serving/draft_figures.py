"""What drafting brought: the figures of speculation, of each sequence and of a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

from .adaptive import StepTimes
from .batch import Chunk
from .sequence import SessionStats
from .steps import Step


@dataclass
class DraftFigures:
    """Counts steps of a session with a drafter, and their times for who chooses by them.

    `entry(tokens, rows)` is how many tokens the entry has that takes a step.
    """

    times: StepTimes
    entry: Callable[[int, int], int]
    _counted: float = 0.0  # of the seconds of drafting

    def count(
        self,
        total: SessionStats,
        step: Step,
        seconds: float,
        draft_seconds: float,
        given: list[tuple[Chunk, int, list[int]]],
        decoding: list[bool],
    ) -> None:
        """Count a step of `seconds`, after `draft_seconds` of drafting in all so far.

        `given` has its chunks, how many tokens of each were drafted, and the tokens that each got;
        `decoding` says which of them had their first token already.
        """
        drafting, self._counted = draft_seconds - self._counted, draft_seconds
        self.times.add(step.symbols["T"], seconds + drafting, fed=step.fed)
        count = len(given)
        plain: float | None = None  # what one token of each would have taken instead
        any_draft = any(drafted for _, drafted, _ in given)
        if any_draft and all(decoding):
            plain = self.times.plain(self.entry(count, count))
        for (chunk, drafted, tokens), decode in zip(given, decoding, strict=True):
            stats = chunk.sequence.stats
            if drafted:
                pairs = zip(tokens, chunk.tokens[-drafted:], strict=False)
                accepted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                for counted in (stats, total):
                    counted.count_draft(drafted, accepted, len(tokens))
                stats.verify_seconds += seconds
            if decode:
                stats.draft_seconds += drafting
                stats.plain_seconds += seconds if plain is None else len(tokens) * plain
        total.draft_seconds += drafting
        if any_draft:
            total.verify_seconds += seconds
        if all(decoding):
            made = sum(len(tokens) for *_, tokens in given) / max(count, 1)
            total.plain_seconds += seconds if plain is None else made * plain
