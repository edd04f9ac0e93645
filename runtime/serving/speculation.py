"""Speculative decoding: who drafts tokens, and how many of them a step confirms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from .batch import Row
from .row_sampling import Choice
from .sequence import Sequence


class Drafter(Protocol):
    """Proposes the next tokens of sequences, to be verified in the step that comes."""

    def draft(self, sequence: Sequence, most: int) -> Iterable[int]:
        """Up to `most` ≥ 1 token ids that may follow `sequence.history`, or none.

        Whatever they are, a sequence gets the tokens that it gets without them; good ones only
        come several a step.
        """
        ...


def verify(rows: Iterable[Row], choices: Iterable[Choice]) -> Iterator[Choice]:
    """The choices of consecutive rows, as far as what was drafted for each row was chosen there.

    The row behind the longest matching prefix gives a token too. A row is sampled by its own draw,
    whatever its token was drafted by, hence exactly as without a drafter; choices behind the
    prefix are not asked for.
    """
    for row, choice in zip(rows, choices, strict=False):
        yield choice
        if choice.token != row.drafted:
            return


__all__ = ["Drafter", "verify"]
