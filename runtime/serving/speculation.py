"""Speculative decoding: who drafts tokens, and what a step accepts of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from .batch import Row
from .kv_cache import KVCache
from .row_sampling import Choice
from .sequence import FinishReason, Sequence


class Drafter(Protocol):
    """Proposes the next tokens of sequences, to be verified in the step that comes."""

    def draft(self, sequence: Sequence, most: int) -> Iterable[int]:
        """Up to `most` ≥ 1 token ids that may follow `sequence.history`, or none.

        Whatever they are, a sequence gets the tokens that it gets without them; good ones only
        come several a step.
        """
        ...


@dataclass
class Outcome:
    """What a step gave to a sequence: tokens, and its end where it came to it."""

    choices: list[Choice] = field(default_factory=list[Choice])
    end: FinishReason | None = None
    message: str = ""


def accept(rows: Iterable[Row], choices: Iterable[Choice], cache: KVCache) -> Outcome:
    """What the rows of one chunk give to its sequence.

    A row's token counts as long as those of the rows before were the drafted ones: the longest
    matching prefix of the draft, and one token more. Each is sampled by its own draw whatever was
    drafted, hence exactly as without a drafter; choices behind the prefix are not asked for. A
    ValueError of a choice ends the sequence.

    This is the rejection sampling of Leviathan et al. (2023), "Fast Inference from Transformers via
    Speculative Decoding", and Chen et al. (2023), "Accelerating Large Language Model Decoding with
    Speculative Sampling", for drafts that are single tokens: a drafted x is all of the draft's
    distribution q, so it is accepted with min(1, p(x) / q(x)) = p(x), and else a token is drawn
    from max(p - q, 0), which is p without x, normalized. One draw from p that is compared with x
    does both; and, being the draw that the token has without a draft, it gives the same token.
    """
    outcome = Outcome()
    try:
        for row, choice in zip(rows, choices, strict=False):
            request = row.sequence.request
            if choice.token in request.stop_tokens:
                outcome.end = "stop"
                break
            outcome.choices.append(choice)
            length = len(row.sequence.prompt) + row.step + 1
            pages = cache.pages_for(length)
            if row.step + 1 == request.max_new_tokens or length > cache.tokens_per_slot:
                outcome.end = "length"
            elif pages > cache.pages:
                outcome.end = "error"
                outcome.message = (
                    f"out of pages: {length} tokens need {pages} pages of {cache.page_size} "
                    f"tokens, the cache has {cache.pages} in all"
                )
            if outcome.end or choice.token != row.drafted:
                break
    except ValueError as error:
        outcome.end, outcome.message = "error", str(error)
    return outcome
