"""`CompileOptions` and `GenerateOptions`: defaults, documentation and validation of each option.

`compile`, `compile_to`, `plan` and `generate` take the fields as keywords; the command line makes
its flags of them. Needs neither torch nor triton, so that `ingot --help` is quick.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from inspect import Parameter, signature
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from ..compiler.target import target_of
from ..runtime.serving.sampling import Sampling
from .speculate import MTP, NONE, Draft, Eagle3, NGram, Speculation, parsed, rows

if TYPE_CHECKING:
    import torch

    from ..compiler.pipeline import Pass
    from ..passes.transforms.mxfp4_policy import MXFP4

F = TypeVar("F", bound=Callable[..., Any])

AUTO = "auto"
Stop = str | int | Sequence[str | int] | None
# Both names of the dtypes in which a model can compute.
_FLOATS = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}
_SHORT = {**{n: n for n in _FLOATS}, **{long: short for short, long in _FLOATS.items()}}


class NotYetError(NotImplementedError):
    """Something that this version does not do; says what does."""


def _flag(help: str, *, name: str = "", type: Any = None) -> dict[str, Any]:
    """Metadata of a field that is a flag of the command line too: `--name`, by default its own.

    `type` is that of the flag where it is not that of the default.
    """
    return {"help": help, "flag": name, "type": type}


class CompileKeywords(TypedDict, total=False):
    """The fields of CompileOptions as keywords."""

    target: str
    quantize: str | MXFP4 | None
    speculate: str | NGram | MTP | Eagle3 | Draft | None
    tensor_parallel: int
    max_sequences: int
    max_tokens_per_sequence: int
    dtype: str | torch.dtype | None
    passes: Sequence[Pass] | None
    verify: bool
    unused: str
    check_import: bool
    tune: bool
    progress: bool


@dataclass(frozen=True)
class CompileOptions:
    """How a model is compiled.

    A language model serves up to `max_sequences` sequences at once, each of up to
    `max_tokens_per_sequence` tokens (less where the model was made for less). `target` "auto" is
    the first GPU of this machine, or the cpu. `dtype` None keeps the checkpoint's; weights are
    converted as they are loaded. `quantize` "mxfp4", or an MXFP4 with options, packs the weights of
    products; those options that need a text (GPTQ) run the model over it. `speculate` NGram(), or
    "ngram:4:2", MTP(), or "mtp:1", Eagle3(DIR), or "eagle3:4:DIR", or Draft(DIR), or
    "draft:4:DIR", drafts tokens and verifies several in a step: sequences get the tokens that they
    get without, sooner (see NGram, MTP, Eagle3 and Draft); an ingot records it, and "none" is off.
    `tensor_parallel` N splits a language model
    over N ranks, threads of one process on the cpu target. `passes` replaces the pipeline. `verify`
    runs every rewritten region, before and after, on sampled inputs. `unused` "allow" leaves out
    tensors of a checkpoint that the model does not read, which are refused where no reason for them
    is known. `check_import` compares the imported graph with the model itself where that is cheap:
    the first layer of each structure, embedding and head. `tune` first times, on the GPU that must
    be here then, each kernel that could compute a product and that this user's table of prices
    lacks (as `ingot tune` does), and adds it to the table.
    `progress` shows a bar on stderr.

    ValueError, or TypeError for another kind of value, names the option, what was expected and what
    came; NotYetError what this version lacks. Equal options are normalized to the same values:
    "mxfp4" to MXFP4(), "ngram" to NGram(), dtypes to "bf16" …
    """

    target: str = field(default=AUTO, metadata=_flag("Target, or auto; see `ingot doctor`."))
    quantize: str | MXFP4 | None = field(
        default=None,
        metadata=_flag("mxfp4 packs the weights of products (4.25 bits each).", type=str | None),
    )
    speculate: str | NGram | MTP | Eagle3 | Draft | None = field(
        default=None,
        metadata=_flag(
            "Draft tokens by ngram[:k[:min_match]], mtp[:k], eagle3:k:DIR or draft:k:DIR; none.",
            type=str | None,
        ),
    )
    tensor_parallel: int = 1
    max_sequences: int = field(default=8, metadata=_flag("Sequences that are served at once."))
    max_tokens_per_sequence: int = field(
        default=4096, metadata=_flag("Longest sequence, in tokens.", name="max-tokens")
    )
    dtype: str | torch.dtype | None = field(
        default=None,
        metadata=_flag("bf16, f16, f32 or f64 instead of the checkpoint's own.", type=str | None),
    )
    passes: Sequence[Pass] | None = None
    verify: bool = field(
        default=False,
        metadata=_flag(
            "Run every rewritten region, before and after, on samples.", name="validate"
        ),
    )
    unused: str = field(
        default="refuse",
        metadata=_flag("allow: leave out stored tensors that the model does not read."),
    )
    check_import: bool = field(
        default=True,
        metadata=_flag(
            "Compare the imported graph with the model itself.",
            name="check-import/--no-check-import",
        ),
    )
    tune: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.target, str):
            raise TypeError(f"target: expected a name, found {self.target!r:.80}")
        if self.target != AUTO:
            target_of(self.target)
        if self.speculate != NONE:  # which is not the same as nothing where an ingot is loaded
            object.__setattr__(self, "speculate", speculation_of(self.speculate))
        for name in ("tensor_parallel", "max_sequences", "max_tokens_per_sequence"):
            _at_least(name, getattr(self, name), 1)
        for name in ("verify", "check_import", "tune", "progress"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, found {value!r}")
        if self.unused not in ("refuse", "allow"):
            raise ValueError(f"unused: expected 'refuse' or 'allow', found {self.unused!r}")
        if self.dtype is not None:
            short = _SHORT.get(str(self.dtype).removeprefix("torch."))
            if short is None:
                known = ", ".join(_SHORT)
                raise ValueError(f"dtype: expected one of {known}; found {self.dtype!r}")
            object.__setattr__(self, "dtype", short)
        if self.quantize is not None:
            object.__setattr__(self, "quantize", _mxfp4(self.quantize))
        if self.passes is not None:
            object.__setattr__(self, "passes", _passes(self.passes))
            if self.quantize is not None:
                raise ValueError("quantize: with passes=, put a QuantizeMxfp4 among them")
        if self.packing and self.packing.calibrated and self.tensor_parallel > 1:
            raise ValueError(
                "quantize: calibration runs the whole model, not one of "
                f"{self.tensor_parallel} ranks: quantize into a directory first, then compile that "
                f"with tensor_parallel={self.tensor_parallel}"
            )

    @property
    def packing(self) -> MXFP4 | None:
        """`quantize`, of which "mxfp4" became MXFP4()."""
        assert not isinstance(self.quantize, str)
        return self.quantize

    @property
    def speculation(self) -> Speculation | None:
        """The way to draft that `speculate` says."""
        return speculation_of(self.speculate)

    @property
    def inner_drafter(self) -> MTP | Eagle3 | None:
        """The way to draft where that is a part of the model's trace."""
        return self.speculation if isinstance(self.speculation, MTP | Eagle3) else None

    @property
    def predicted(self) -> int:
        """How many tokens a step drafts behind each."""
        found = self.speculation
        return found.k if isinstance(found, MTP | Eagle3 | Draft) else 0

    def rows(self, sequences: int) -> int:
        """How many results a step needs for so many sequences."""
        return rows(self.speculation, sequences)

    def keywords(self) -> CompileKeywords:
        """The options as keywords of `compile`."""
        found: Any = {f.name: getattr(self, f.name) for f in fields(self)}
        return found

    def data(self) -> dict[str, Any]:
        """Plain JSON values of all that a program depends on, for manifests and cache keys.

        Passes stand as their text, calibration texts as their SHA-256.
        """
        found: dict[str, Any] = {**self.keywords()}
        del found["progress"], found["unused"], found["check_import"], found["tune"]
        if self.packing:
            texts = hashlib.sha256(json.dumps(self.packing.calibrate).encode()).hexdigest()
            found["quantize"] = {**asdict(self.packing), "calibrate": texts}
        found["speculate"] = str(self.speculation) if self.speculation else None
        if self.passes is not None:
            found["passes"] = [str(step) for step in self.passes]
        return json.loads(json.dumps(found))


class GenerateKeywords(TypedDict, total=False):
    """The fields of GenerateOptions as keywords."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: Stop
    min_p: float
    repetition_penalty: float
    logprobs: int


@dataclass(frozen=True)
class GenerateOptions:
    """How tokens are generated.

    `temperature` 0 takes the most likely token. `stop` holds strings and token ids that end a
    completion, beside the model's own end-of-text tokens; neither is part of the text (the tokens
    that spelled a stop string stay in `tokens`). A string that is a special token stops as its id
    does; strings may contain special tokens. `logprobs` most likely tokens are reported beside
    each token. Of the others `Sampling` says the ranges. ValueError, or TypeError for another kind
    of value, names the option, what was expected and what came.
    """

    max_new_tokens: int = field(default=128, metadata=_flag("Tokens to generate at most."))
    temperature: float = field(default=0.0, metadata=_flag("0 takes the most likely token."))
    top_k: int = field(default=0, metadata=_flag("Choose among the k most likely; 0 is off."))
    top_p: float = field(default=1.0, metadata=_flag("Choose among the likeliest of this mass."))
    seed: int | None = field(
        default=None, metadata=_flag("Repeats the same draws.", type=int | None)
    )
    stop: Stop = field(
        default=(),
        metadata=_flag("Text that ends the output; may be repeated.", type=list[str] | None),
    )
    min_p: float = field(default=0.0, metadata=_flag("Least likelihood relative to the top's."))
    repetition_penalty: float = field(default=1.0, metadata=_flag("1 is off."))
    logprobs: int = 0

    def keywords(self) -> GenerateKeywords:
        """The options as keywords of `generate`."""
        found: Any = {f.name: getattr(self, f.name) for f in fields(self)}
        return found

    def __post_init__(self) -> None:
        _at_least("max_new_tokens", self.max_new_tokens, 1)
        _at_least("logprobs", self.logprobs, 0)
        object.__setattr__(self, "stop", _stops(self.stop))
        _ = self.sampling  # checks its part

    @property
    def sampling(self) -> Sampling:
        """The part that chooses tokens."""
        return Sampling(**{f.name: getattr(self, f.name) for f in fields(Sampling)})

    @property
    def _stops(self) -> tuple[str | int, ...]:
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def stop_strings(self) -> list[str]:
        """Those of `stop` that are text."""
        return [s for s in self._stops if isinstance(s, str)]

    @property
    def stop_tokens(self) -> list[int]:
        """Those of `stop` that are token ids."""
        return [int(s) for s in self._stops if not isinstance(s, str)]


def _stops(given: Any) -> tuple[str | int, ...]:
    """`stop` as strings and ids; TypeError and ValueError name it."""
    one = isinstance(given, str | Integral)
    if not one and not isinstance(given, list | tuple | None):
        raise TypeError(
            f"stop: expected strings and token ids, one or a list, found a {type(given).__name__}"
        )
    stops: list[str | int] = []
    for stop in (given,) if one else given or ():
        if isinstance(stop, bool) or not isinstance(stop, str | Integral):
            raise TypeError(f"stop: expected strings and token ids, found {stop!r:.80}")
        if stop == "" or (not isinstance(stop, str) and stop < 0):
            raise ValueError(
                "stop: expected strings that are not empty and token ids from 0, "
                f"found {stop!r:.80}"
            )
        stops.append(stop if isinstance(stop, str) else int(stop))
    return tuple(stops)


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: expected at least {least}, found {value!r}")


def speculation_of(given: Any) -> Speculation | None:
    """The way to draft that a value of `speculate` says; TypeError and ValueError."""
    if given is None or isinstance(given, NGram | MTP | Eagle3 | Draft):
        return given
    if not isinstance(given, str):
        raise TypeError(
            "speculate: expected an NGram, an MTP, an Eagle3, a Draft, text or None, found "
            f"{given!r:.80}"
        )
    return parsed(given)


def _passes(given: Any) -> tuple[Pass, ...]:
    if not isinstance(given, list | tuple):
        raise TypeError(f"passes: expected a list of passes, found a {type(given).__name__}")
    for step in given:
        if not callable(step) or not isinstance(getattr(step, "name", None), str):
            raise TypeError(f"passes: expected passes, found {step!r:.80}")
    return tuple(given)


def _mxfp4(given: str | MXFP4) -> MXFP4:
    from ..passes.transforms.mxfp4_policy import MXFP4  # brings torch

    if isinstance(given, MXFP4):
        return given
    if given != "mxfp4":
        raise ValueError(f"quantize: expected 'mxfp4', an MXFP4 or None, found {given!r}")
    return MXFP4()


def keywords_of(options: type) -> Callable[[F], F]:
    """Show the fields of `options` in the signature of a function that takes them as keywords."""

    def decorate(function: F) -> F:
        own = signature(function)
        kept = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        shown = [
            Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(options)
        ]
        function.__dict__["__signature__"] = own.replace(parameters=[*kept, *shown])
        return function

    return decorate
