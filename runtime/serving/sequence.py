"""A request on its way through a session, what it reports, and its figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SequenceStats:
    """Figures of one sequence; times are wall-clock seconds.

    `steps` counts the replays it took part in, `prefill_seconds` and `decode_seconds` are their
    durations: prefill while more than one of its tokens was missing from the cache (also when
    recomputed after preemption) or its first token was awaited, decode otherwise.
    `time_to_first_token` runs from submission; None before the first token.
    """

    prompt_tokens: int
    generated_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    time_to_first_token: float | None = None


@dataclass(frozen=True)
class SessionStats:
    """Figures of a session; times are wall-clock seconds.

    `prompt_tokens` counts the prompts that were computed to their end, `generated_tokens` every
    token handed out. A step (one replay) with any prefill in it counts to `prefill_seconds`,
    otherwise to `decode_seconds`. `time_to_first_token` is the mean over the sequences that got
    one; None before that. `Session.logits` counts nowhere.
    """

    sequences: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    time_to_first_token: float | None = None


@dataclass(eq=False)
class Sequence:
    """One request. Its session writes it; everyone else reads it.

    `history` holds prompt and generated tokens, `logprobs` and `top_logprobs` one item a generated
    token. `seed` is the one in effect, also when `sampling.seed` is None. `finish_reason` is None
    while it waits or runs; `message` says what went wrong when it is "error". `slot` is its row of
    the page table while it runs, `cached` how many tokens of `history` the cache holds,
    `submitted` the clock at its submission (`perf_counter` seconds).
    """

    id: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop_tokens: frozenset[int]
    top_count: int
    stats: SequenceStats
    history: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(
        default_factory=list[tuple[tuple[int, float], ...]]
    )
    finish_reason: FinishReason | None = None
    message: str = ""
    slot: int | None = None
    cached: int = 0
    submitted: float = 0.0

    @property
    def tokens(self) -> tuple[int, ...]:
        """The generated tokens so far, without a stop token."""
        return tuple(self.history[len(self.prompt) :])

    @property
    def generated(self) -> int:
        """How many tokens were generated so far."""
        return len(self.history) - len(self.prompt)

    @property
    def pending(self) -> int:
        """Tokens of `history` that the cache does not hold yet; 1 while decoding."""
        return len(self.history) - self.cached


@dataclass(frozen=True)
class Event:
    """A sequence got a token, or ended, or both.

    `token` and `logprob` are None when it ended without one (stop token, cancellation, error).
    `top_logprobs` are the most likely (token, log-probability) pairs, as many as were asked for.
    Every sequence has exactly one event with a `finish_reason`, its last.
    """

    sequence: Sequence
    token: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    message: str = ""


__all__ = ["Event", "FinishReason", "Sequence", "SequenceStats", "SessionStats"]
