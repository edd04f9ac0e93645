"""Compares a compiled model with a reference: greedy tokens, logits, and layer outputs.

Our tokens are decoded by the serving session (chunked prefill, paged cache, all prompts batched).
The reference runs one forward pass without a cache over each prompt and our tokens: while both
agree, its largest logits are the tokens that it would choose. The top-n rule: where tokens first
differ, each must be among the other's n most likely; later tokens are not comparable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ...runtime.serving.sequence import Request
from ..model import Model
from ..text.tokenizer import Tokenizer

# Largest |difference| relative to the largest |logit|. Narrower dtypes round differently with every
# order of arithmetic, and a router may then choose another expert: there the tokens decide alone.
F32_TOLERANCE = 1e-4

_STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError('pop from an empty stack')
        return """
_TEXTS = (
    "a",
    "def __init__(self, ",
    "The quick brown fox jumps over the lazy dog, and then",
    "import os\n\n\ndef read_lines(path):\n    with open(path) as file:\n        return [",
    _STACK,
)
_RANDOM_LENGTHS = (1, 7, 40, 70)


@dataclass(frozen=True)
class Answer:
    """The reference's logits f32 [T, vocab], and the error of our layer outputs by layer path,
    relative to the largest of theirs."""

    logits: torch.Tensor
    layers: Mapping[str, float] = field(default_factory=dict[str, float])


class Reference(Protocol):
    """A reference implementation of a model; `name` is for display."""

    @property
    def name(self) -> str: ...

    def answer(self, ids: Sequence[int]) -> Answer: ...


@dataclass(frozen=True)
class Agreement:
    """Two greedy runs: `agreed` of `steps` tokens are equal before the first difference.

    `ours` and `theirs` are the tokens there; `ours_ranked`: ours is among their top n, and
    `theirs_ranked`: theirs is among ours.
    """

    steps: int
    agreed: int
    ours: int | None = None
    theirs: int | None = None
    ours_ranked: bool = True
    theirs_ranked: bool = True

    @property
    def near(self) -> bool:
        """Whether the top-n rule holds."""
        return self.ours_ranked and self.theirs_ranked


@dataclass(frozen=True, kw_only=True)
class PromptCheck(Agreement):
    """The agreement on one prompt of `length` tokens.

    `logits_error` is the largest difference over all positions. `logprob_error` is that of the
    log-probabilities of our generated tokens, from batched decoding with the paged cache. Both
    are relative to the largest of the reference's logits.
    """

    length: int
    logits_error: float
    logprob_error: float


@dataclass(frozen=True)
class LayerCheck:
    """The largest error of one layer's output, relative to the largest of the reference's."""

    path: str
    error: float


@dataclass(frozen=True)
class Check:
    """The comparison; `ok` if the top-n rule holds and errors are within the tolerance."""

    model_type: str
    target: str
    dtype: str
    reference: str
    top: int
    tolerance: float | None
    prompts: tuple[PromptCheck, ...]
    layers: tuple[LayerCheck, ...]

    @property
    def logits_error(self) -> float:
        return worst(p.logits_error for p in self.prompts)

    @property
    def logprob_error(self) -> float:
        return worst(p.logprob_error for p in self.prompts)

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for each failure."""
        if not self.prompts:
            return ("there was nothing to compare: no prompts",)
        found = [self._mismatch(i, p) for i, p in enumerate(self.prompts) if not p.near]
        if self.tolerance is None:
            return tuple(found)
        errors = {"logits": self.logits_error, "log-probabilities": self.logprob_error}
        found += [
            f"{what} differ by {error:.1e} of the largest logit, over {self.tolerance:.0e}"
            for what, error in errors.items()
            if not error <= self.tolerance  # NaN is not within any tolerance
        ]
        found += [
            f"{layer.path} differs by {layer.error:.1e}, over {self.tolerance:.0e}"
            for layer in self.layers
            if not layer.error <= self.tolerance
        ]
        return tuple(found)

    def _mismatch(self, i: int, p: PromptCheck) -> str:
        far = [] if p.ours_ranked else [f"{p.ours} is not among the top {self.top} there"]
        far += [] if p.theirs_ranked else [f"{p.theirs} is not among our top {self.top}"]
        tokens = f"token {p.agreed} is {p.ours}, in {self.reference} {p.theirs}"
        return f"prompt {i}: {tokens}; {', '.join(far)}"

    @property
    def ok(self) -> bool:
        return not self.failures


def worst(errors: Iterable[float]) -> float:
    """The largest error; NaN if any is."""
    values = list(errors)
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


def prompt_ids(
    tokenizer: Tokenizer | None, vocab_size: int, longest: int, texts: Sequence[str] = ()
) -> list[list[int]]:
    """`texts`, or built-in prompts of different lengths, each up to `longest` ids.

    Without a tokenizer they are random ids.
    """
    if tokenizer is None:
        drawn = torch.Generator().manual_seed(0)
        rows = [torch.randint(vocab_size, (n,), generator=drawn) for n in _RANDOM_LENGTHS]
        prompts: list[list[int]] = [row.tolist() for row in rows]
    else:
        prompts = [tokenizer.encode(text) for text in texts or _TEXTS]
    return [prompt[:longest] for prompt in prompts if prompt]


def check_model(
    model: Model,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    *,
    steps: int,
    top: int,
    tolerance: float | None,
) -> Check:
    """Compare greedy decoding of `prompts`, up to `steps` tokens each, with `reference`.

    RuntimeError if a sequence ends with an error.
    """
    request = Request(max_new_tokens=steps, top_logprobs=top)
    sequences = model.session.requests(prompts, request)
    for event in model.session.events(sequences):
        if event.finish_reason == "error":
            raise RuntimeError(f"generation failed: {event.message}")
    checked: list[PromptCheck] = []
    layers: dict[str, list[float]] = {}
    for sequence in sequences:
        ids = [*sequence.prompt, *sequence.tokens[:-1]]
        answer = reference.answer(ids)
        expected = answer.logits[len(sequence.prompt) - 1 :]
        found = [[token for token, _ in step] for step in sequence.top_logprobs]
        ranked = expected.topk(min(top, expected.shape[-1])).indices.tolist()
        chosen = expected.argmax(dim=-1).tolist()
        agreement = compare_tokens(sequence.tokens, found, chosen, ranked)
        scores = expected.log_softmax(-1).gather(1, torch.tensor(sequence.tokens)[:, None])[:, 0]
        scored = torch.tensor(sequence.logprobs)
        largest = float(answer.logits.abs().max())
        check = PromptCheck(
            **vars(agreement),
            length=len(sequence.prompt),
            logits_error=relative_error(torch.from_numpy(model.logits(ids)), answer.logits),
            logprob_error=float((scored - scores).abs().max()) / (largest or 1.0),
        )
        checked.append(check)
        for path, error in answer.layers.items():
            layers.setdefault(path, []).append(error)
    report = model.report
    return Check(
        report.model_type,
        report.target,
        report.dtype,
        reference.name,
        top,
        tolerance,
        tuple(checked),
        tuple(LayerCheck(path, worst(errors)) for path, errors in layers.items()),
    )


def compare_tokens(
    ours: Sequence[int],
    our_tops: Sequence[Sequence[int]],
    theirs: Sequence[int],
    their_tops: Sequence[Sequence[int]],
) -> Agreement:
    """Two greedy runs of equal length, each with its most likely tokens at every step."""
    pairs = zip(ours, theirs, strict=True)
    at = next((i for i, (mine, other) in enumerate(pairs) if mine != other), None)
    if at is None:
        return Agreement(len(ours), len(ours))
    mine, other = ours[at], theirs[at]
    return Agreement(len(ours), at, mine, other, mine in their_tops[at], other in our_tops[at])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |found - expected| / max |expected|, in f32."""
    wanted = expected.float().reshape(found.shape)
    largest = float(wanted.abs().max())
    difference = float((found.float() - wanted).abs().max())
    return difference / largest if largest else difference
