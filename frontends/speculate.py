"""How tokens are drafted: the values of the option `speculate`, as dataclasses and as text."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from os import PathLike, fspath
from typing import Any

from ..runtime.driver import Executable
from ..runtime.program import Program
from ..runtime.serving.abi import MOST_DRAFTED, ServingAbi
from ..runtime.serving.device_drafts import DeviceDrafter
from ..runtime.serving.ngram import NGramDrafter
from ..runtime.serving.session import Session
from ..runtime.serving.speculation import Drafter

# In place of a way to draft: none, whatever an ingot was compiled with.
NONE = "none"
# The most rows that speculation adds to an entry: their logits and samples take memory, and a step
# of so many tokens is no longer bound by what it reads.
_ROWS = 256
_MOST = 64


@dataclass(frozen=True)
class NGram:
    """Drafts up to `k` tokens (1 to 64) a step by prompt lookup.

    Where the last tokens of a sequence, `min_match` (1 to 64) or more, occurred in it before, what
    followed there is drafted; of several places that one counts where most tokens agree. It costs
    microseconds a step, and pays where text repeats itself: code, quotes, answers about a document.

    ValueError says what was expected and what came.
    """

    k: int = 4
    min_match: int = 2

    def __post_init__(self) -> None:
        for name in ("k", "min_match"):
            value: Any = getattr(self, name)
            if not _is_whole(value) or not 1 <= value <= _MOST:
                raise ValueError(
                    f"speculate: {name}: expected an integer from 1 to {_MOST}, found {value!r:.80}"
                )
            object.__setattr__(self, name, int(value))

    def __str__(self) -> str:
        """As the option takes it, and as an ingot records it."""
        return f"ngram:{self.k}:{self.min_match}"

    def drafter(self) -> Drafter:
        """What drafts so for one session."""
        return NGramDrafter(self.k, self.min_match)


@dataclass(frozen=True)
class MTP:
    """Drafts `k` tokens (1 to 4) a step by the model's own layer of multi-token prediction.

    The checkpoint has one behind the layers of the model (DeepSeek-V3, GLM-4.5). It runs within
    each step, over the hidden states of the model, and for k > 1 again over its own; it is
    quantized, fused and cached like any other layer, and shares embedding and head with the model.

    ValueError says what was expected and what came.
    """

    k: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", _drafted(self.k))

    def __str__(self) -> str:
        """As the option takes it, and as an ingot records it."""
        return f"mtp:{self.k}"

    def drafter(self) -> Drafter:
        """What drafts so for one session."""
        return DeviceDrafter(self.k)


@dataclass(frozen=True)
class Eagle3:
    """Drafts `k` tokens (1 to 4) a step by an EAGLE-3 head for the model (arXiv:2503.01840).

    `directory` has its config.json and safetensors, in the layout of published heads. It runs
    within each step, over three hidden states of the model, and for k > 1 again over its own; it is
    quantized, fused and cached like a layer of the model, with which it shares what it lacks,
    embedding or head.

    ValueError, or TypeError for another kind of value, says what was expected and what came.
    """

    directory: str | PathLike[str]
    k: int = MOST_DRAFTED

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", _path(self.directory, "an EAGLE-3 head"))
        object.__setattr__(self, "k", _drafted(self.k))

    def __str__(self) -> str:
        """As the option takes it, and as an ingot records it."""
        return f"eagle3:{self.k}:{self.directory}"

    def drafter(self) -> Drafter:
        """What drafts so for one session."""
        return DeviceDrafter(self.k, "eagle3")


@dataclass(frozen=True)
class Draft:
    """Drafts `k` tokens (1 to 4) a step by a smaller model, the one at `directory`.

    It has to share the vocabulary of the model. It runs within each step, in the same program: over
    the tokens of the step and the sampled one, which gives the first drafted token, and for each
    further one over the one before. It is quantized, fused and cached like the model, and
    `dtype`, where one is asked for, is its dtype too. An ingot has it inside: where one is loaded
    `directory` is not read.

    ValueError, or TypeError for another kind of value, says what was expected and what came.
    """

    directory: str | PathLike[str]
    k: int = MOST_DRAFTED

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", _path(self.directory, "a model that drafts"))
        object.__setattr__(self, "k", _drafted(self.k))

    def __str__(self) -> str:
        """As the option takes it, and as an ingot records it."""
        return f"draft:{self.k}:{self.directory}"

    def drafter(self) -> Drafter:
        """What drafts so for one session."""
        return DeviceDrafter(self.k, "draft")


def _drafted(given: Any) -> int:
    """How many tokens a step drafts behind each; ValueError."""
    if not _is_whole(given) or not 1 <= given <= MOST_DRAFTED:
        raise ValueError(
            f"speculate: k: expected an integer from 1 to {MOST_DRAFTED}, found {given!r:.80}"
        )
    return int(given)


def _path(given: Any, of: str) -> str:
    """The path of a directory, which need not be there; TypeError and ValueError."""
    if not isinstance(given, str | PathLike) or not isinstance(path := fspath(given), str):
        found = type(given).__name__
        raise TypeError(f"speculate: directory: expected the path of {of}, found a {found}")
    if not path:
        raise ValueError(f"speculate: directory: expected the path of {of}")
    return path


# What is drafted with; more kinds will join.
Speculation = NGram | MTP | Eagle3 | Draft
# By what their text begins with: the kind, and how many numbers it takes; or that of a directory.
_KINDS: dict[str, tuple[type[NGram | MTP], int]] = {"ngram": (NGram, 2), "mtp": (MTP, 1)}
_OF_DIRECTORIES: dict[str, type[Eagle3 | Draft]] = {"eagle3": Eagle3, "draft": Draft}


def parsed(text: str) -> Speculation | None:
    """The way to draft that `text` says, ngram[:k[:min_match]], mtp[:k], eagle3:k:DIR or
    draft:k:DIR; None for "none". ValueError."""
    kind, *numbers = text.split(":")
    if text == NONE:
        return None
    if kind in _OF_DIRECTORIES and len(numbers) > 1 and _is_number(numbers[0]):
        return _OF_DIRECTORIES[kind](":".join(numbers[1:]), int(numbers[0]))
    made, most = _KINDS.get(kind, (NGram, -1))
    if len(numbers) > most or not all(map(_is_number, numbers)):
        raise ValueError(
            "speculate: expected an NGram, 'ngram[:k[:min_match]]', an MTP, 'mtp[:k]', an Eagle3, "
            f"'eagle3:k:DIR', a Draft, 'draft:k:DIR', 'none' or None, found {text!r:.80}"
        )
    return made(*map(int, numbers))


def kind_of(text: str) -> str:
    """What the text of a way to draft begins with."""
    return text.partition(":")[0]


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def rows(speculation: Speculation | None, sequences: int) -> int:
    """How many results a step needs for so many sequences: one each, and one a drafted token.

    More sequences than have all their drafts verified in _ROWS rows share those.
    """
    if speculation is None:
        return sequences
    return max(sequences, min(sequences * (speculation.k + 1), _ROWS))


def check_rows(speculation: Speculation | None, program: Program) -> None:
    """ValueError where a step has not the rows to verify a whole draft of one sequence."""
    if speculation is None:
        return
    abi = ServingAbi(program)
    if isinstance(speculation, MTP | Eagle3 | Draft):
        drafts = abi.drafts if abi.follows != isinstance(speculation, Draft) else 0
        if drafts < speculation.k:
            raise ValueError(
                f"speculate: {speculation} needs a program that drafts {speculation.k} tokens "
                f"behind each in that way, and this one drafts {drafts}: compile it with "
                f"speculate={str(speculation)!r}"
            )
    needed, found = speculation.k + 1, abi.rows
    if found < needed:
        raise ValueError(
            f"speculate: {speculation} needs {needed} results a step, and this program gives "
            f"{found}: compile it with speculate={str(speculation)!r}"
        )


def open_session(
    program: Program, executable: Executable, speculation: Speculation | None
) -> Session:
    """A session of a loaded program that drafts as `speculation` says, as far as it pays."""
    if speculation is None:
        return Session(program, executable)
    return Session(program, executable, drafter=speculation.drafter(), adapt=True)


@dataclass(frozen=True)
class SpeculationReport:
    """What speculation did in a session so far.

    `kind` is how it drafts, `decision` the last one: what of a draft was verified, or that it did
    not pay, and why. Drafts of so many steps were `verified`, `probes` of them against the odds,
    and `declined`. The other figures are those of `SequenceStats`, over all sequences.
    """

    kind: str
    decision: str
    verified: int
    probes: int
    declined: int
    acceptance_length: float | None
    acceptance_rates: tuple[float, ...]
    draft_seconds: float
    verify_seconds: float
    speedup: float | None

    @classmethod
    def of(cls, session: Session) -> SpeculationReport | None:
        """None for a session without a drafter."""
        if session.drafter is None or (adaptive := session.adaptive) is None:
            return None
        stats = session.stats
        return cls(
            kind=str(session.drafter),
            decision=str(adaptive.last or "nothing to decide yet"),
            verified=adaptive.verified,
            probes=adaptive.probes,
            declined=adaptive.declined,
            acceptance_length=stats.acceptance_length,
            acceptance_rates=stats.acceptance_rates,
            draft_seconds=stats.draft_seconds,
            verify_seconds=stats.verify_seconds,
            speedup=stats.speedup,
        )

    def lines(self) -> list[str]:
        """The report in a few lines."""
        found = [f"speculation {self.kind}: {self.decision}"]
        if self.acceptance_length is not None:
            rates = ", ".join(f"{rate:.0%}" for rate in self.acceptance_rates)
            found.append(
                f"{self.acceptance_length:.2f} tokens a verified step, drafted tokens accepted by "
                f"place: {rates}; drafting {self.draft_seconds:.3f} s, verifying "
                f"{self.verify_seconds:.3f} s"
            )
        steps = f"{self.verified} steps ({self.probes} of them to measure)"
        found.append(f"drafts verified in {steps}, left out in {self.declined}")
        if self.speedup is not None:
            found.append(f"decoding took 1/{self.speedup:.2f} of the time of steps without drafts")
        return found
