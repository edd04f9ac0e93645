"""Drafters for tests: they know what comes, and propose it, something else, or some of both."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ingot.runtime.serving.sequence import Sequence as ServedSequence

MOST_DRAFTED = 8
KINDS = ("wrong", "right", "mixed")
# By prompt and seed, the tokens that follow when nothing ends them.
Coming = Mapping[tuple[tuple[int, ...], int], Sequence[int]]


@dataclass
class OracleDrafter:
    """Drafts 0 to MOST_DRAFTED tokens a sequence, of random length, as far as they are known.

    A "right" draft is what `coming` says, a "wrong" one misses each token, a "mixed" one is right
    up to a random place. Behind what is known tokens are random. `drafted` counts them all.
    """

    kind: str
    coming: Coming
    vocab: int
    seed: int = 0
    drafted: int = 0
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draft(self, sequence: ServedSequence, most: int) -> list[int]:
        assert most >= 1
        draw = self._random
        count = draw.randint(0, min(most, MOST_DRAFTED))
        known = list(self.coming.get((sequence.prompt, sequence.seed), ()))
        known = known[sequence.generated : sequence.generated + count]
        known += [draw.randrange(self.vocab) for _ in range(count - len(known))]
        good = {"wrong": 0, "right": count, "mixed": draw.randint(0, count)}[self.kind]
        bad = [(token + draw.randrange(1, self.vocab)) % self.vocab for token in known[good:]]
        self.drafted += count
        return known[:good] + bad
