"""Results of generation, and detection of stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime.serving.sequence import FinishReason, SequenceStats
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One finished prompt.

    `text` is the decoded text up to a stop string (empty when the model has no tokenizer);
    `tokens` are without a stop token. `logprobs` has one natural log-probability a token, under the
    model's own distribution; `top_logprobs` the most likely (token, logprob) pairs beside each, if
    they were asked for. `message` says what went wrong when `finish_reason` is "error".
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...]
    stats: SequenceStats
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    message: str = ""


@dataclass(frozen=True)
class TextEvent:
    """One streaming event of prompt number `index`.

    `text` is new text (maybe none yet), `token` the new token (None when the prompt ended without
    one), `finish_reason` not None at its last event, which alone has the prompt's `stats`.
    """

    index: int
    text: str
    token: int | None = None
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    message: str = ""
    stats: SequenceStats | None = None


class StopStringChecker:
    """Detokenizes one sequence and stops it at the first stop string.

    Text that could be the beginning of a stop string is held back. Stop strings may contain special
    tokens, which the text itself leaves out: they are matched where they stand, and not shown.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stream = tokenizer.decoder() if tokenizer else None
        self._stops = stops
        self._held: list[tuple[str, bool]] = []  # characters, and whether each is shown

    def push(self, token: int) -> str:
        """The text that `token` makes certain; sets `stopped` when a stop string is complete."""
        if self._tokenizer is None or self._stream is None:
            return ""
        return self._add(self._stream.push(token), self._tokenizer.hidden_text(token))

    def finish(self) -> str:
        """The text held back, after the last token."""
        rest = self._add(self._stream.flush()) if self._stream else ""
        return rest + self._give(len(self._held))

    def _add(self, new: str, hidden: str = "") -> str:
        if self.stopped:
            return ""
        self._held += [(c, True) for c in new] + [(c, False) for c in hidden]
        pending = "".join(c for c, _ in self._held)
        ends = [at for stop in self._stops if (at := pending.find(stop)) >= 0]
        if ends:
            self.stopped = True
            ready = self._give(min(ends))
            self._held = []
            return ready
        keep = max((_overlap(pending, stop) for stop in self._stops), default=0)
        return self._give(len(pending) - keep)

    def _give(self, count: int) -> str:
        """What is shown of the first `count` characters held."""
        ready = "".join(c for c, shown in self._held[:count] if shown)
        self._held = self._held[count:]
        self.text += ready
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
