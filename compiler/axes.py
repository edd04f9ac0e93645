"""Axis rules: how the dims of an op's operands and results correspond, as an einsum says it.

    x[*,k] weight[n,k] +bias[n]? -> [*,n]; k sum

gives each operand and each result a label a dim. A label is *plain* unless a clause says otherwise:
index i of a result is computed from index i of operands, so that the dim may be sliced, gathered
and permuted. `*` is any number of dims, plain and *free*: the op takes any number of them, so that
unit dims among them may be left out. `(a b)` is a dim made of two, a major: rows of gates and then
of ups are `(g i)`, query heads that share key/value heads `(g r)`. `?` is an operand that may be
absent. Clauses:

    k sum        contracted: results of parts of k add up to the result, where an operand marked `+`
                 (a bias) takes part in one of them alone
    k dot        contracted, with something behind it that is not linear
    k whole      the op works along it: a norm, a softmax, a sort, positions that attend to others
    v by ids     indices of it stand in the operand `ids`
    k whole if norm    a clause for nodes that have this operand

The size of a label is that of its dims; in a dim made of several it follows from the others, or
from an integer attribute of that name. Where dims follow from attributes, a function is the rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from math import prod
from typing import Any

import sympy

from .types import Dim, Shape, TensorType, Types, dim

# The labels that a dim is made of, major first; none for a unit dim that corresponds to nothing.
# `~x` is a unit dim that is broadcast along x.
Factors = tuple[str, ...]
Dims = tuple[Factors, ...]
_TERM = re.compile(r"(\+?)(\w*)\[([^\]]*)\](\??)")


@dataclass(frozen=True)
class Axes:
    """How the dims of one node correspond.

    `along` is the label of the dim that the attribute `dim` counts to.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    sizes: Mapping[str, Dim]
    sums: frozenset[str] = frozenset()
    dots: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    free: frozenset[str] = frozenset()
    by: Mapping[str, int] = field(default_factory=dict[str, int])
    added: frozenset[int] = frozenset()
    along: str | None = None

    def is_plain(self, label: str) -> bool:
        """Whether each index of `label` is computed by itself."""
        special = label in self.sums or label in self.dots or label in self.whole
        return not special and label not in self.by and not label.startswith("~")

    def size(self, factors: Factors) -> Dim:
        return dim(prod(self.sizes[f] for f in factors))


# The types of a node's operands by name.
Operands = Mapping[str, TensorType]
# From the types of operands and results, and attributes.
AxisRule = Callable[[Operands, Types, Mapping[str, Any]], Axes]


def position(dims: Dims, label: str) -> int | None:
    """The dim that `label` is a factor of."""
    return next((i for i, factors in enumerate(dims) if label in factors), None)


@dataclass(frozen=True)
class _Term:
    name: str
    dims: tuple[str, ...]
    added: bool


def _terms(text: str) -> tuple[_Term, ...]:
    if _TERM.sub("", text).strip(" ,"):
        raise ValueError(f"axis rule: expected name[labels] …, found {text.strip()!r}")
    return tuple(
        _Term(name, tuple(d.strip() for d in dims.split(",") if d.strip()), bool(plus))
        for plus, name, dims, _ in _TERM.findall(text)
    )


def rule(text: str) -> AxisRule:
    """The rule that `text` says; ValueError where it is none."""
    head, *clauses = (part.strip() for part in text.split(";"))
    operands, results = map(_terms, head.split("->"))
    kinds: list[tuple[str, str, str]] = []
    for clause in clauses:
        found = re.fullmatch(r"([\w ]+?) (?:(sum|dot|whole)|by (\w+))(?: if ([\w ]+))?", clause)
        if not found:
            raise ValueError(
                f"axis rule: expected '<labels> sum | dot | whole | by <operand>', found {clause!r}"
            )
        labels, kind, table, condition = found.groups()
        kinds += [(n, kind or f"by {table}", condition or "") for n in labels.split()]

    named = {term.name: term for term in operands}

    def axes(types: Operands, given: Types, attrs: Mapping[str, Any]) -> Axes:
        present = [named[name] for name in types]
        stars = _stars(present, (*types.values(),))
        read = [_dims(t.dims, stars) for t in present]
        made = [_dims(t.dims, stars) for t in results[: len(given)]]
        names = [*types]
        by_kind: dict[str, set[str]] = {"sum": set(), "dot": set(), "whole": set()}
        by: dict[str, int] = {}
        for label, kind, condition in kinds:
            if condition and not any(n in names for n in condition.split()):
                continue
            for others in by_kind.values():
                others.discard(label)
            if kind in by_kind:
                by_kind[kind].add(label)
            else:
                by[label] = names.index(kind.removeprefix("by "))
        return Axes(
            tuple(read),
            tuple(made),
            _sizes(zip((*read, *made), (*types.values(), *given), strict=True), attrs),
            sums=frozenset(by_kind["sum"]),
            dots=frozenset(by_kind["dot"]),
            whole=frozenset(by_kind["whole"]),
            free=frozenset(map(_star, range(stars))),
            by=by,
            added=frozenset(i for i, t in enumerate(present) if t.added),
        )

    return axes


def _star(i: int) -> str:
    return f"*{i}"


def _stars(terms: Sequence[_Term], types: Types) -> int:
    counts = [x.rank - len(t.dims) + 1 for t, x in zip(terms, types, strict=True) if "*" in t.dims]
    return counts[0] if counts else 0


def _dims(labels: tuple[str, ...], stars: int) -> Dims:
    dims: list[Factors] = []
    for label in labels:
        if label == "*":
            dims += [(_star(i),) for i in range(stars)]
        else:
            dims.append(tuple(label.strip("()").split()))
    return tuple(dims)


def _sizes(pairs: Any, attrs: Mapping[str, Any]) -> dict[str, Dim]:
    """The size of every label, of dims in order; ValueError for dims that do not fit each other."""
    known = [(f, d) for dims, type_ in pairs for f, d in zip(dims, type_.shape, strict=True)]
    sizes: dict[str, Dim] = {f[0]: d for f, d in known if len(f) == 1}
    several = [(f, d) for f, d in known if len(f) > 1]
    for factors, _ in several:
        sizes.update({n: attrs[n] for n in factors if isinstance(attrs.get(n), int)})
    for factors, size in several:
        missing = [n for n in factors if n not in sizes]
        if len(missing) == 1:
            rest = _quotient(size, dim(prod(sizes[n] for n in factors if n in sizes)))
            if rest is None:
                raise ValueError(f"axis rule: {size} is not made of {factors}")
            sizes[missing[0]] = rest
    return sizes


@cache
def _quotient(a: Dim, b: Dim) -> Dim | None:
    """a / b where that is a polynomial of integers, None otherwise."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    found: Any = sympy.cancel(sympy.sympify(a) / b)
    numerator, denominator = sympy.fraction(sympy.together(found))
    return dim(numerator) if denominator == 1 else None


# ---- rules of ops whose dims follow from attributes or from broadcasting


def _labels(rank: int) -> tuple[str, ...]:
    return tuple(map(_star, range(rank)))


def _aligned(shape: Shape, result: Shape) -> Dims:
    """The dims of an operand that broadcasts against `result`, aligned at the right."""
    first = len(result) - len(shape)
    return tuple(
        (_star(first + i) if size == result[first + i] else f"~{_star(first + i)}",)
        for i, size in enumerate(shape)
    )


def elementwise(operands: Operands, results: Types, attrs: Mapping[str, Any]) -> Axes:
    """Operands broadcast against the result, at the same place or expanded."""
    shape, labels = results[0].shape, _labels(results[0].rank)
    sizes = dict(zip(labels, shape, strict=True))
    dims = tuple(_aligned(x.shape, shape) for x in operands.values())
    return Axes(dims, (tuple((n,) for n in labels),), sizes, free=frozenset(labels))


def along_dim(kind: str = "whole") -> AxisRule:
    """All operands and results have the same dims, and the op works along attrs["dim"].

    Results that lack that dim are reductions over it. `kind` "sum": partial results add up.
    """

    def axes(operands: Operands, results: Types, attrs: Mapping[str, Any]) -> Axes:
        first, *_ = operands.values()
        rank = first.rank
        at = attrs["dim"] % rank
        names = (*_labels(rank)[:at], "s", *_labels(rank)[at + 1 :])
        full: Dims = tuple((n,) for n in names)
        reduced = (*full[:at], *full[at + 1 :])
        made = tuple(full if t.rank == rank else reduced for t in results)
        own = frozenset("s")
        return Axes(
            (full,) * len(operands),
            made,
            dict(zip(names, first.shape, strict=True)),
            sums=own if kind == "sum" else frozenset(),
            whole=own if kind == "whole" else frozenset(),
            free=frozenset(names) - own,
            along="s",
        )

    return axes


def permuted(operands: Operands, results: Types, attrs: Mapping[str, Any]) -> Axes:
    (x,) = operands.values()
    labels = _labels(x.rank)
    made = tuple((labels[d],) for d in attrs["dims"])
    sizes = dict(zip(labels, x.shape, strict=True))
    return Axes((tuple((n,) for n in labels),), (made,), sizes, free=frozenset(labels))


def batched_matmul(operands: Operands, results: Types, attrs: Mapping[str, Any]) -> Axes:
    """x [..., m, k] · y [..., k, n], the dims before these broadcast."""
    (x, y), (result,) = operands.values(), results
    batch = result.shape[:-2]
    dims = [_aligned(t.shape[:-2], batch) for t in (x, y)]
    labels = _labels(len(batch))
    sizes = dict(zip(labels, batch, strict=True))
    sizes.update(m=x.shape[-2], k=x.shape[-1], n=y.shape[-1])
    return Axes(
        ((*dims[0], ("m",), ("k",)), (*dims[1], ("k",), ("n",))),
        ((*((n,) for n in labels), ("m",), ("n",)),),
        sizes,
        sums=frozenset("k"),
        free=frozenset(labels),
    )


def reshaped(operands: Operands, results: Types, attrs: Mapping[str, Any]) -> Axes:
    """Both shapes as products of common factors; what has none is whole."""
    (x,) = operands.values()
    shapes = (x.shape, results[0].shape)
    if 0 in (*x.shape, *results[0].shape):
        return _unrelated(*shapes)
    # Strides of dims and the size of the whole. Those that divide, or are divided by, all others
    # are the ends of common factors; between two of these some of both shapes may not fit each
    # other: of rows of 3 · 2 as rows of 2 · 3 nothing corresponds.
    ends = [[dim(prod(shape[i:])) for i in range(len(shape) + 1)] for shape in shapes]
    every = {*ends[0], *ends[1]}
    common = {a for a in every if all(_divides(a, b) or _divides(b, a) for b in every)}
    names: dict[Any, str] = {}
    sizes: dict[str, Dim] = {}
    whole: set[str] = set()
    made: list[Dims] = []
    for side, own in enumerate(ends):
        chain = sorted({*common, *own}, key=lambda a: -sum(_divides(b, a) for b in every))
        dims: list[Factors] = []
        for high, low in pairwise(map(chain.index, own)):
            factors: list[str] = []
            for a, b in pairwise(chain[high : low + 1]):
                shared = a in common and b in common
                label = names.setdefault(b if shared else (b, side), f"d{len(names)}")
                sizes[label] = _quotient(a, b) or 0
                whole |= set() if shared else {label}
                factors.append(label)
            dims.append(tuple(factors))
        made.append(tuple(dims))
    return Axes((made[0],), (made[1],), sizes, whole=frozenset(whole))


def _unrelated(old: Shape, new: Shape) -> Axes:
    names = [f"d{i}" for i in range(len(old) + len(new))]
    dims = tuple((n,) for n in names)
    sizes = dict(zip(names, (*old, *new), strict=True))
    return Axes((dims[: len(old)],), (dims[len(old) :],), sizes, whole=frozenset(names))


def _divides(a: Dim, b: Dim) -> bool:
    return _quotient(b, a) is not None
