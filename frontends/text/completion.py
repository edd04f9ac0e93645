"""Results of generation, and detection of stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime.serving.sequence import FinishReason, SequenceStats
from .tokenizer import IncrementalDetokenizer


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
    one), `finish_reason` not None at its last event.
    """

    index: int
    text: str
    token: int | None = None
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    message: str = ""


@dataclass
class StopStringChecker:
    """Detokenizes one sequence and stops it at the first stop string.

    Text that could be the beginning of a stop string is held back.
    """

    stream: IncrementalDetokenizer | None
    stops: Sequence[str] = ()
    text: str = ""
    held: str = ""
    stopped: bool = False

    def push(self, token: int) -> str:
        """The text that `token` makes certain; sets `stopped` when a stop string is complete."""
        return self._add(self.stream.push(token) if self.stream else "")

    def finish(self) -> str:
        """The text held back, after the last token."""
        rest = self._add(self.stream.flush() if self.stream else "")
        held, self.held = self.held, ""
        self.text += held
        return rest + held

    def _add(self, new: str) -> str:
        if self.stopped:
            return ""
        pending = self.held + new
        ends = [at for stop in self.stops if (at := pending.find(stop)) >= 0]
        if ends:
            self.stopped = True
            ready, self.held = pending[: min(ends)], ""
        else:
            keep = max((_overlap(pending, stop) for stop in self.stops), default=0)
            ready, self.held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += ready
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
