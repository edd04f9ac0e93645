"""What one step computes: chunks of tokens, and the rows of them whose results are wanted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .sequence import Sequence

# The token of a step that is fed by the one before, which has not ended.
UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive tokens of a running sequence, the first at position `start`.

    Behind the end of its history they are drafted: proposals that no result has confirmed yet; or
    one that is UNKNOWN.
    """

    sequence: Sequence
    start: int
    tokens: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, eq=False)
class Row:
    """The result behind token `offset` of a chunk: the distribution of the token that follows."""

    chunk: Chunk
    offset: int

    @property
    def sequence(self) -> Sequence:
        return self.chunk.sequence

    @property
    def history(self) -> list[int]:
        """The tokens that the result depends on, drafted ones among them."""
        chunk = self.chunk
        return [*chunk.sequence.history[: chunk.start], *chunk.tokens[: self.offset + 1]]

    @property
    def step(self) -> int:
        """Which generated token of its sequence the result gives, from 0."""
        return self.chunk.start + self.offset + 1 - len(self.sequence.prompt)

    @property
    def drafted(self) -> int | None:
        """The token that was drafted for the result; None behind the last token of the chunk."""
        tokens = self.chunk.tokens
        return tokens[self.offset + 1] if self.offset + 1 < len(tokens) else None


@dataclass(frozen=True)
class Batch:
    """The chunks of one replay, one after the other, and rows of them in the same order."""

    chunks: tuple[Chunk, ...]
    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    def next(self) -> Batch:
        """The step behind one token of each sequence, whose results are not known."""
        chunks = [Chunk(chunk.sequence, chunk.end, (UNKNOWN,)) for chunk in self.chunks]
        return Batch(tuple(chunks), tuple(Row(chunk, 0) for chunk in chunks))

    def parts(self) -> list[Batch]:
        """One batch a chunk."""
        return [
            Batch((chunk,), tuple(row for row in self.rows if row.chunk is chunk))
            for chunk in self.chunks
        ]

    def inputs(
        self, tokens: int, rows: int, page_table: NDArray[np.int32]
    ) -> dict[str, NDArray[np.int32]]:
        """The inputs by which an entry of so many tokens and rows computes this batch (see `abi`).

        What is left of the entry is padding: tokens without a slot, rows that repeat the first.
        """
        made = {name: np.zeros(tokens, np.int32) for name in ("tokens", "positions", "slots")}
        made["slots"][:] = -1
        first: dict[Chunk, int] = {}
        at = 0
        for chunk in self.chunks:
            assert chunk.sequence.slot is not None, chunk.sequence.id
            first[chunk] = at
            here = slice(at, at + len(chunk.tokens))
            made["tokens"][here] = chunk.tokens
            made["positions"][here] = np.arange(chunk.start, chunk.end)
            made["slots"][here] = chunk.sequence.slot
            at = here.stop
        logit_rows = np.zeros(rows, np.int32)
        logit_rows[: len(self.rows)] = [first[row.chunk] + row.offset for row in self.rows]
        return {**made, "logit_rows": logit_rows, "page_table": page_table}
