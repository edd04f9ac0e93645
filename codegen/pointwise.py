"""Regions of element-wise ops as one generated Triton kernel each.

A region is a chain or DAG of steps over one shape: every operand is read once, every output written
once, and what lies between stays in registers. Each step rounds its result to its dtype, so that a
region computes what its ops one by one would. Equal regions give equal text: names count up in
order, and the outermost dim is a run-time number, which buckets may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

from ..compiler.ops.region import STEP_OPS, Steps, step_types
from .expressions import EXPRESSIONS, HELD, Typed, number, rounded, stored
from .kernel_query import Arg, Call, Candidate, Declined, KernelQuery, Operand, Result
from .templates.generated import from_text
from .templates.rowwise.copy import merged, unit_of

# Elements a program: enough programs to fill a device come before long vectors.
_SMALL_BLOCK, _BLOCK = 256, 1024
_MANY = 1 << 19
_CONSTANTS = "BLOCK: tl.constexpr, PROGRAMMATIC: tl.constexpr"


def _computed(
    query: KernelQuery, steps: Steps, dtypes: Sequence[str], outputs: Sequence[int]
) -> Candidate | Declined:
    """One launch that computes `steps`, whose results have `dtypes`; `steps` and `outputs` are
    attributes of a region."""
    args, results, shape = query.args, query.results, query.results[0].shape
    if unknown := _unknown(args, steps, dtypes):
        return Declined(unknown)
    count = prod(shape)
    if not count:
        return Candidate((), 0.0, "nothing to compute")
    memory = [i for i, a in enumerate(args) if a.value is None]
    reads = [_broadcast(args[i], shape) for i in memory]
    dims, strides = merged(shape, *reads, *(result.strides for result in results))
    unit = unit_of(count)
    furthest = max(sum((n - 1) * s for n, s in zip(dims, step, strict=True)) for step in strides)
    wide = ".to(tl.int64)" if max(count + _BLOCK, furthest + 1) >= 2**31 else ""
    offsets = [_offset(dims, step) for step in strides]
    names = [name for name, *_ in steps]
    more = [f"and_{len(names) - 3}"] if names[3:] else []
    name = "_".join(["pointwise", *names[:3], *more])
    pointers = {f"x{i}": Arg(i) for i in memory} | {f"y{i}": Result(i) for i in range(len(results))}
    lines = [
        "@triton.jit",
        f"def {name}({', '.join(pointers)}, units, {_CONSTANTS}):",
        "    pdl_wait(PROGRAMMATIC)",
        f"    index = tl.program_id(0){wide} * BLOCK + tl.arange(0, BLOCK)",
        f"    inside = index < units{wide} * {unit}",
    ]
    if any(at.startswith("d") for at in offsets):
        lines += _places(dims)
    places = dict(zip(pointers, offsets, strict=True))
    values = [Typed(f"a{i}", arg.type.dtype, arg.value) for i, arg in enumerate(args)]
    for i in memory:
        held = HELD[values[i].dtype]
        lines.append(f"    a{i} = tl.load(x{i} + {places[f'x{i}']}, mask=inside).to({held})")
    for i, ((op, inputs, *named), dtype) in enumerate(zip(steps, dtypes, strict=True)):
        given = [Typed("", *n) if isinstance(n, tuple) else values[n] for n in inputs]
        expression = EXPRESSIONS[op](_operands(op, given, dtype), dict(named))
        lines.append(f"    v{i} = {rounded(expression, dtype)}")
        values.append(Typed(f"v{i}", dtype))
    for i, step in enumerate(outputs):
        value = stored(values[step].name, values[step].dtype)
        lines.append(f"    tl.store(y{i} + {places[f'y{i}']}, {value}, mask=inside)")
    block = _BLOCK if count >= _MANY else _SMALL_BLOCK
    call = Call(
        _function("\n".join(lines) + "\n", name),
        {**pointers, "units": count // unit, "BLOCK": block},
        (-(-count // block), 1, 1),
        tuple(Result(i) for i in range(len(results))),
        num_warps=max(1, block // (8 * query.target.warp)),
    )
    return Candidate((call,), query.seconds(1), f"{len(steps)} element-wise ops")


@cache
def _function(text: str, name: str) -> Any:
    return from_text(text, name)


def _unknown(args: Sequence[Operand], steps: Steps, dtypes: Sequence[str]) -> str:
    """Why no kernel computes the steps; empty where one does."""
    for (op, *_), dtype in zip(steps, dtypes, strict=True):
        if op not in EXPRESSIONS:
            return f"{op} has no expression"
        if dtype not in HELD:
            return f"{op}: kernels know no {dtype}"
    for arg in args:
        if arg.type.dtype not in HELD or arg.packed:
            return f"kernels read no {arg.type}{' in packed form' if arg.packed else ''}"
    return ""


def _broadcast(arg: Operand, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of an argument under the region's shape: 0 where it repeats."""
    lead = len(shape) - len(arg.shape)
    steps = (0 if n == 1 else s for n, s in zip(arg.shape, arg.strides, strict=True))
    return (*(0,) * lead, *steps)


def _offset(dims: Sequence[int], steps: Sequence[int]) -> str:
    """Where an element lies, from its places d0, d1, … in the dims, innermost first."""
    if len(dims) == 1 and steps[0] == 1:
        return "index"
    terms = [f"d{i}" if s == 1 else f"d{i} * {s}" for i, s in enumerate(steps) if s]
    return " + ".join(terms) or "index * 0"


def _places(dims: Sequence[int]) -> list[str]:
    """Lines that find the places d0, d1, … of `index`; the outermost dim's size is not said."""
    lines: list[str] = []
    left = "index"
    for i, size in enumerate(dims[:-1]):
        lines += [f"    d{i} = {left} % {size}", f"    r{i} = {left} // {size}"]
        left = f"r{i}"
    return [*lines, f"    d{len(dims) - 1} = {left}"]


def _operands(op: str, given: Sequence[Typed], result: str) -> list[Typed]:
    """The operands of a step; a literal has the dtype of those beside it."""
    beside = given[1:] if op == "where" else given
    dtype = next((o.dtype for o in beside if o.value is None), result)
    return [o if o.value is None else Typed(number(o.value, dtype), dtype, o.value) for o in given]


def region(query: KernelQuery) -> Candidate | Declined:
    """A region of steps."""
    steps, outputs = query.attrs["steps"], query.attrs["outputs"]
    types = step_types([a.type for a in query.args], steps)
    return _computed(query, steps, [t.dtype for t in types], outputs)


def pointwise(query: KernelQuery) -> Candidate | Declined:
    """Any one element-wise op, and tensors out of nothing."""
    count = len(query.args)
    step = (query.op.name, tuple(range(count)), *query.attrs.items())
    return _computed(query, (step,), [query.results[0].type.dtype], (count,))


TEMPLATES = {**dict.fromkeys(sorted(STEP_OPS), (pointwise,)), "region": (region,)}
