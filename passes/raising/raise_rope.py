"""Rules of raise-ops for rotary embeddings: from the arithmetic of each form to `rope`.

The rules see token-major values: x [T, ..., R], tables [T, ..., R] or [T, ..., R/2] over T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...compiler.ir import Value
from ...compiler.ops import pointwise, shape
from ...compiler.ops.leaf import is_literal, literal
from ...compiler.ops.rope import rope, rope_tables
from ...compiler.rewrite import Decline, Match, Pat, Rule, maybe, pat
from ...compiler.types import Shape
from ..moves import sliced, viewed


@dataclass(frozen=True)
class Span:
    """Dims [start, stop) by step of the last dim of `base`."""

    base: Value
    start: int
    stop: int
    step: int


def span_of(value: Value) -> Span:
    last = value.type.rank - 1
    if value.op is shape.slice_ and value.attrs["dim"] % value.type.rank == last:
        attrs, base = value.attrs, value.node.args[0]
        return Span(base, attrs["start"], attrs["stop"], attrs.get("step", 1))
    return Span(value, 0, _size(value), 1)


def _size(value: Value) -> int:
    size = value.type.shape[-1]
    if not isinstance(size, int):
        raise Decline(f"the last dim of {value.type} is symbolic")
    return size


def _rotated(a: Value, b: Value) -> tuple[Value, str]:
    """The value whose two members of each pair are `a` and `b`, and how it holds them."""
    p, q = span_of(a), span_of(b)
    half = _size(a)
    if p.base != q.base:
        raise Decline("the two halves are not of one value")
    if p.step == q.step == 1 and p.stop == q.start == p.start + half:
        return sliced(p.base, p.base.type.rank - 1, p.start, q.stop), "half"
    if p.step == q.step == 2 and q.start == p.start + 1:
        return sliced(p.base, p.base.type.rank - 1, p.start, p.start + 2 * half), "interleaved"
    raise Decline("the two parts are neither halves nor even and odd dims")


# ---- tables


def _flat(table: Value, x: Value) -> Value:
    """A table [T, 1.., R] as [T, R]; Decline when its rows are not x's tokens."""
    sizes = table.type.shape
    if table.type.rank != 2 and any(d != 1 for d in sizes[1:-1]):
        raise Decline(f"a table {table.type} differs between heads")
    inner = table.node.args[0] if table.op is shape.view else table
    flat = (sizes[0], sizes[-1])
    if inner.type.shape == flat:
        table = inner
    elif table.type.shape != flat:
        table = shape.view(table, shape=flat)
    if table.type.shape[0] != x.type.shape[0]:
        raise Decline(f"a table {table.type} does not have the rows of {x.type}")
    return table


def _scales(table: Value) -> bool:
    return table.op is pointwise.mul and any(is_literal(a) for a in table.node.args)


def _mapped(once: Callable[[Value], Value], table: Value) -> Value | None:
    """f(table) as f(once(table)) for an f on each element; None when `table` is no such f."""
    if table.op not in (pointwise.cos, pointwise.sin, pointwise.cast) and not _scales(table):
        return None
    return table.op(*(a if is_literal(a) else once(a) for a in table.node.args), **table.attrs)


def _first_half(table: Value) -> Value:
    """What `table` [T, R] says twice, as [T, R/2]: cos(cat(f, f)) == cat(cos(f), cos(f))."""
    if (mapped := _mapped(_first_half, table)) is not None:
        return mapped
    if table.op is not shape.cat:
        raise Decline(f"a table from {table.op.name} is not known to repeat itself")
    parts = table.node.args
    if len(parts) != 2 or parts[0] != parts[1] or table.attrs["dim"] % 2 != 1:
        raise Decline("the halves of a table differ")
    return parts[0]


def _whole_half(table: Value) -> Value:
    """A table [T, R/2]; where it is cut out of one that repeats it, what that repeats."""
    if table.op is shape.slice_ and table.node.args[0].type.rank == 2:
        span = span_of(table)
        if (span.start, span.stop, span.step) == (0, _size(span.base) // 2, 1):
            return _first_half(span.base)
    return table


def _each_once(table: Value, dims: Shape) -> Value:
    """What `table` says twice in a row, [T, R/2]: elements counted through all its dims."""
    if (mapped := _mapped(lambda t: _each_once(t, dims), table)) is not None:
        return mapped
    first = table.node.args[0] if table.node.args else table
    if table.op is shape.view:
        return _each_once(first, dims)
    doubled = table.type.shape[-1:] == (2,) and first.type.shape == (*table.type.shape[:-1], 1)
    repeats = table.op is shape.expand or (
        table.op is shape.cat and table.node.args == (first, first)
    )
    if not (doubled and repeats):
        raise Decline("the table does not repeat each element")
    while first.op is shape.view and first.type.shape != dims:
        first = first.node.args[0]
    return _whole_half(first if first.type.shape == dims else shape.view(first, shape=dims))


def _source(table: Value) -> tuple[Value, Value, float, str, str] | None:
    """(positions, inv_freq, scale, function, dtype) of a table [T, R/2], if it is made of these."""
    dtype, scale = table.type.dtype, 1.0
    if table.op is pointwise.cast:
        table = table.node.args[0]
    if _scales(table):
        number, table = sorted(table.node.args, key=lambda a: a.op is not literal)
        scale = float(number.attrs["value"])
    if table.op not in (pointwise.cos, pointwise.sin):
        return None
    function, angles = table.op.name, table.node.args[0]
    if angles.op is not pointwise.mul:
        return None
    for column, row in (angles.node.args, angles.node.args[::-1]):
        cast = column.node.args[0] if column.op is shape.view else column
        integer = cast.op is pointwise.cast and cast.node.args[0].type.dtype in ("i32", "i64")
        if integer and cast.type.rank == 1 and column.type.shape[1:] == (1,) and row.type.rank == 1:
            return cast.node.args[0], row, scale, function, dtype
    return None


def _unwidened(x: Value) -> Value:
    """`x` before a cast to f32, which rope makes anyway."""
    widened = x.op is pointwise.cast and x.type.dtype == "f32"
    inner = x.node.args[0] if widened else x
    return inner if inner.type.dtype in ("f16", "bf16") else x


def _tables(cos: Value, sin: Value) -> tuple[Value, Value]:
    """`cos` and `sin` [T, R/2] as the results of one rope_tables, where they can be."""
    cos, sin = _unwidened(cos), _unwidened(sin)
    c, s = _source(cos), _source(sin)
    if c is None or s is None or c[:3] != s[:3] or (c[3], s[3], c[4]) != ("cos", "sin", s[4]):
        return cos, sin
    made = rope_tables.all(c[0], c[1], scale=c[2], dtype=c[4])
    return made[0], made[1]


# ---- x·cos + cat(-x_hi, x_lo)·sin, with tables that repeat their first half

X, C, S, LO, HI = Pat(), Pat(), Pat(), Pat(), Pat()
HALVES = pat(shape.cat, pat(pointwise.neg, HI), LO)
HALF = pat(
    pointwise.add,
    pat(pointwise.mul, X, C),
    pat(pointwise.mul, maybe(pointwise.cast, HALVES), S),
)


def _is_turned(x: Value, whole: Value) -> bool:
    """Whether `x` is `whole`, which its parts were cut out of before or after a cast of `x`."""
    return span_of(x) == span_of(whole) or span_of(_unwidened(x)) == span_of(whole)


def _half(m: Match) -> Value:
    x, form = _rotated(m[LO], m[HI])
    if form != "half" or not _is_turned(m[X], x):
        raise Decline("what is turned is not the value itself, half by half")
    cos, sin = (_first_half(_flat(m[t], m[X])) for t in (C, S))
    return rope(m[X], *_tables(cos, sin), form="half")


# ---- cat(a·cos - b·sin, b·cos + a·sin) for the members a, b of each pair

A, B = Pat(), Pat()
PAIRS = pat(
    shape.cat,
    pat(pointwise.sub, pat(pointwise.mul, A, C), pat(pointwise.mul, B, S)),
    pat(pointwise.add, pat(pointwise.mul, B, C), pat(pointwise.mul, A, S)),
)


def _pairs(m: Match) -> Value:
    if m[PAIRS].attrs["dim"] % m[PAIRS].type.rank != m[PAIRS].type.rank - 1:
        raise Decline("the parts are not joined along the last dim")
    x, form = _rotated(m[A], m[B])
    cos, sin = (_whole_half(_flat(m[t], x)) for t in (C, S))
    if _size(cos) != _size(m[A]):
        raise Decline(f"a table {cos.type} does not fit {m[A].type}")
    turned = {"half": "half", "interleaved": "deinterleaved"}[form]
    return rope(x, *_tables(cos, sin), form=turned)


# ---- x·cos + view(cat(-x_odd, x_even))·sin, with tables that repeat each element

ODD, EVEN = Pat(), Pat()
STACKED = pat(shape.cat, pat(shape.view, pat(pointwise.neg, ODD)), pat(shape.view, EVEN))
INTERLEAVED = pat(
    pointwise.add,
    pat(pointwise.mul, X, C),
    pat(pointwise.mul, maybe(pointwise.cast, pat(shape.view, STACKED)), S),
)


def _interleaved(m: Match) -> Value:
    x, form = _rotated(m[EVEN], m[ODD])
    pairs = m[STACKED]
    joined_last = pairs.attrs["dim"] % pairs.type.rank == pairs.type.rank - 1
    if form != "interleaved" or not _is_turned(m[X], x) or not joined_last:
        raise Decline("what is turned is not the value itself, pair by pair")
    dims = (x.type.shape[0], _size(x) // 2)
    cos, sin = (_each_once(_flat(m[t], m[X]), dims) for t in (C, S))
    return rope(m[X], *_tables(cos, sin), form="interleaved")


# ---- complex numbers: (a + ib)·(cos θ + i sin θ), pairs in the last dim

TURN = Pat()
PAIRED = pat(shape.view, maybe(pointwise.cast, X))
NUMBER = pat("aten.view_as_complex.default", maybe(pointwise.cast, PAIRED))
TURNED = pat("aten.view_as_real.default", pat(pointwise.mul, NUMBER, TURN))
COMPLEX = maybe(pointwise.cast, pat(shape.view, TURNED))


def _polar_tables(turn: Value, x: Value) -> tuple[Value, Value]:
    """cos and sin [T, R/2] of the complex numbers scale · polar(1, angles)."""
    turn = turn.node.args[0] if turn.op is shape.view else turn
    factor = None
    if _scales(turn):
        factor, turn = sorted(turn.node.args, key=lambda a: a.op is not literal)
    is_polar = turn.op.name == "aten.polar.default"
    if not is_polar or turn.node.args[0].op is not shape.full:
        raise Decline("the factor is not made by polar")
    ones, angles = turn.node.args
    if ones.attrs["value"] != 1:
        raise Decline("the absolute values are not 1")
    cos, sin = (f(_flat(angles, x)) for f in (pointwise.cos, pointwise.sin))
    if factor is None:
        return cos, sin
    scale = literal(value=complex(factor.attrs["value"]).real, dtype=angles.type.dtype)
    return pointwise.mul(cos, scale), pointwise.mul(sin, scale)


def _complex(m: Match) -> Value:
    x = m[X]
    pairs = (*x.type.shape[:-1], _size(x) // 2, 2)
    if m[COMPLEX].type.dtype != x.type.dtype or m[PAIRED].type.shape != pairs:
        raise Decline(f"{x.type} is not turned pair by pair")
    turned = rope(x, *_tables(*_polar_tables(m[TURN], x)), form="interleaved")
    return viewed(turned, m[COMPLEX].type.shape)


# ---- cast(rope(cast(x, f32)), x's dtype) == rope(x), which computes in f32 and rounds once

WIDENED = Pat(where=lambda v: v.op is pointwise.cast)
ROUNDED = pat(pointwise.cast, pat(rope, WIDENED, Pat(), Pat()))


def _rounded_once(m: Match) -> Value:
    x, turned = m[WIDENED].node.args[0], m[ROUNDED].node.args[0]
    if x.type != m[ROUNDED].type or turned.type.dtype != "f32" or x.type.dtype == "f64":
        raise Decline(f"{x.type} is turned as {turned.type} and becomes {m[ROUNDED].type}")
    return rope(x, *turned.node.args[1:], **turned.attrs)


# ---- rope of a value whose pairs were brought apart first: (x0, x1, x2, x3) as (x0, x2, x1, x3)

APART = pat(shape.view, pat(shape.permute, pat(shape.view, X)))
OF_APART = pat(rope, APART, Pat(), Pat(), form="half")


def _deinterleaved(m: Match) -> Value:
    x, cos, sin = m[X], *m[OF_APART].node.args[1:]
    turned = m[APART].node.args[0]
    rank, half = x.type.rank, _size(cos)
    pairs = turned.node.args[0].type.shape
    swapped = (*range(rank - 1), rank, rank - 1)
    if turned.attrs["dims"] != swapped or pairs != (*x.type.shape[:-1], half, 2):
        raise Decline("the dims are not pairs brought apart")
    return rope(x, cos, sin, form="deinterleaved")


# ---- rope of part of the dims: the rest is kept by rope itself


def _part_rule(before: bool, after: bool) -> Rule:
    low, high, part = Pat(), Pat(), Pat()
    turned = pat(rope, part, Pat(), Pat())
    parts = [p for p, there in ((low, before), (part, True), (high, after)) if there]
    root = pat(shape.cat, *(turned if p is part else p for p in parts))

    def build(m: Match) -> Value:
        if m[root].attrs["dim"] % m[root].type.rank != m[root].type.rank - 1:
            raise Decline("the parts are not joined along the last dim")
        spans = [span_of(m[p]) for p in parts]
        base, first = spans[0].base, spans[0].start
        ends = [first, *(s.stop for s in spans)]
        joined = all(
            s.base == base and s.step == 1 and s.start == e
            for s, e in zip(spans, ends, strict=False)
        )
        if not joined or "start" in m[turned].attrs:
            raise Decline("the parts are not one value in order")
        _, cos, sin = m[turned].node.args
        start = spans[1].start - first if before else 0
        extra: dict[str, Any] = {"start": start} if start else {}
        whole = sliced(base, base.type.rank - 1, first, ends[-1])
        return rope(whole, cos, sin, form=m[turned].attrs["form"], **extra)

    return Rule("rope-part", (root,), build)


FORM_RULES = (
    Rule("rope-half", (HALF,), _half),
    Rule("rope-pairs", (PAIRS,), _pairs),
    Rule("rope-interleaved", (INTERLEAVED,), _interleaved),
    Rule("rope-complex", (COMPLEX,), _complex),
)
PART_RULES = (
    Rule("rope-rounded-once", (ROUNDED,), _rounded_once),
    Rule("rope-deinterleaved", (OF_APART,), _deinterleaved),
    _part_rule(before=True, after=False),
    _part_rule(before=False, after=True),
    _part_rule(before=True, after=True),
)
