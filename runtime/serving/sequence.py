"""A request on its way through a session, what it reports, and its figures."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from operator import index
from typing import Literal, Required, TypedDict

from .sampling import GREEDY, Sampling

FinishReason = Literal["stop", "length", "cancelled", "error"]
# The most likely (token, log-probability) pairs, most likely first.
TopLogprobs = tuple[tuple[int, float], ...]


class RequestKeywords(TypedDict, total=False):
    """The fields of Request as keywords."""

    max_new_tokens: Required[int]
    sampling: Sampling
    stop_tokens: Collection[int]
    top_logprobs: int


@dataclass(frozen=True)
class Request:
    """What is asked of a sequence; ValueError where `max_new_tokens` < 1.

    A token of `stop_tokens` ends the sequence and is not part of it. With each token as many most
    likely ones are reported as `top_logprobs` says.
    """

    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_tokens: Collection[int] = frozenset()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if index(self.max_new_tokens) < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, found {self.max_new_tokens}")
        object.__setattr__(self, "stop_tokens", frozenset(self.stop_tokens))


@dataclass
class SequenceStats:
    """Figures of one sequence; times are wall-clock seconds.

    `steps` counts the replays it took part in, `prefill_seconds` and `decode_seconds` are their
    durations, for one that was launched ahead from the end of the one before: prefill while more
    than one of its tokens was missing from the cache (also when recomputed after preemption) or its
    first token was awaited, decode otherwise.
    `time_to_first_token` runs from submission; None before the first token.

    Of speculation: `verified_steps` counts the steps that verified drafted tokens,
    `verified_tokens` what came of them, `verify_seconds` their durations and `draft_seconds` that
    of drafting. `drafted` and `accepted` count drafted tokens by their place in a draft.
    `plain_seconds` is what the tokens of decoding steps would have taken in steps without drafts,
    as far as those have been measured, else what they took; 0 without a drafter.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    time_to_first_token: float | None = None
    verified_steps: int = 0
    verified_tokens: int = 0
    drafted: list[int] = field(default_factory=list[int])
    accepted: list[int] = field(default_factory=list[int])
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    plain_seconds: float = 0.0

    @property
    def acceptance_length(self) -> float | None:
        """Tokens a step that verified drafts: the accepted ones and one more. None without any."""
        return self.verified_tokens / self.verified_steps if self.verified_steps else None

    @property
    def acceptance_rates(self) -> tuple[float, ...]:
        """For each place in a draft, which share of the tokens drafted there was accepted."""
        pairs = zip(self.accepted, self.drafted, strict=True)
        return tuple(accepted / drafted for accepted, drafted in pairs)

    @property
    def speedup(self) -> float | None:
        """How much faster decoding was than in steps without drafts, drafting included.

        None without a drafter, and before decoding.
        """
        taken = self.decode_seconds + self.draft_seconds
        return self.plain_seconds / taken if self.plain_seconds and taken else None

    def count_draft(self, drafted: int, accepted: int, tokens: int) -> None:
        """Count what came of the draft of one step."""
        self.verified_steps += 1
        self.verified_tokens += tokens
        missing = [0] * (drafted - len(self.drafted))
        self.drafted += missing
        self.accepted += missing
        for place in range(drafted):
            self.drafted[place] += 1
            self.accepted[place] += place < accepted

    def count_step(self, decode: bool, seconds: float) -> None:
        """Count one replay."""
        self.steps += 1
        if decode:
            self.decode_seconds += seconds
        else:
            self.prefill_seconds += seconds


@dataclass
class SessionStats(SequenceStats):
    """Figures of a session.

    `prompt_tokens` counts the prompts that were computed to their end, `generated_tokens` every
    token handed out. A step (one replay) with any prefill in it counts to `prefill_seconds`,
    otherwise to `decode_seconds`. A step in which any draft is verified counts to
    `verify_seconds`, each draft in it to `verified_steps`. `time_to_first_token` is the mean over
    the sequences that got one; None before that. `Session.logits` counts nowhere.
    """

    sequences: int = 0


@dataclass(eq=False)
class Sequence:
    """One request. Its session writes it; everyone else reads it.

    `history` holds prompt and generated tokens, `logprobs` and `top_logprobs` one item a generated
    token. `seed` is the one in effect, also when `request.sampling.seed` is None. `finish_reason`
    is None while it waits or runs; `message` says what went wrong when it is "error". `slot` is its
    row of the page table while it runs; the cache holds the first `cached_length` tokens of
    `history`. `submitted` is the clock at its submission (`perf_counter` seconds).
    """

    id: int
    prompt: tuple[int, ...]
    request: Request
    seed: int
    history: list[int] = field(init=False)
    logprobs: list[float] = field(default_factory=list[float])
    top_logprobs: list[TopLogprobs] = field(default_factory=list[TopLogprobs])
    stats: SequenceStats = field(default_factory=SequenceStats)
    finish_reason: FinishReason | None = None
    message: str = ""
    slot: int | None = None
    cached_length: int = 0
    submitted: float = 0.0

    def __post_init__(self) -> None:
        self.history = list(self.prompt)
        self.stats.prompt_tokens = len(self.prompt)

    @property
    def length(self) -> int:
        """Tokens of prompt and output so far."""
        return len(self.history)

    @property
    def generated(self) -> int:
        """How many tokens were generated so far."""
        return len(self.history) - len(self.prompt)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The generated tokens so far, without a stop token."""
        return tuple(self.history[len(self.prompt) :])

    @property
    def pending(self) -> int:
        """Tokens of `history` that the cache does not hold yet; 1 while decoding."""
        return len(self.history) - self.cached_length


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
    top_logprobs: TopLogprobs = ()
    finish_reason: FinishReason | None = None
    message: str = ""
