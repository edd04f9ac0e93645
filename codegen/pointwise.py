"""Regions of element-wise ops as one generated Triton kernel each.

A region is a chain or DAG of steps over one shape: every operand is read once, every output written
once, and what lies between stays in registers. Each step rounds its result to its dtype, so that a
region computes what its ops one by one would. Equal regions give equal text: names count up in
order, and the outermost dim is a run-time number, which buckets may change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from ..compiler.dtypes import DTYPES
from ..compiler.ops.region import STEP_OPS, step_types
from ..compiler.target import Target
from ..compiler.types import TensorType
from .expressions import EXPRESSIONS, HELD, Typed, number, rounded, stored
from .kernel_query import (
    Arg,
    Call,
    Candidate,
    Declined,
    KernelQuery,
    Operand,
    Ref,
    Result,
)
from .prices import LAUNCH_SECONDS
from .templates.generated import from_text
from .templates.rowwise.copy import merged, unit_of

# Elements a program: enough programs to fill a device come before long vectors.
_SMALL_BLOCK, _BLOCK = 256, 1024
_MANY = 1 << 19
_CONSTANTS = "BLOCK: tl.constexpr, PROGRAMMATIC: tl.constexpr"


@dataclass(frozen=True)
class Step:
    """One op of a region. `inputs` counts the region's operands, then the steps before this one.

    `dtype` is the result's.
    """

    op: str
    attrs: Mapping[str, Any]
    inputs: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Region:
    """Steps over `shape`; `args` broadcast to it, `outputs` are the steps whose results are kept,
    each with its strides in elements."""

    shape: tuple[int, ...]
    args: tuple[Operand, ...]
    steps: tuple[Step, ...]
    outputs: tuple[tuple[int, tuple[int, ...]], ...]


def computed(region: Region, target: Target) -> Candidate | Declined:
    """One launch that computes a region: its arguments are Arg(i), its outputs Result(i)."""
    if unknown := _unknown(region):
        return Declined(unknown)
    count = prod(region.shape)
    if not count:
        return Candidate((), 0.0, "nothing to compute")
    memory = [i for i, a in enumerate(region.args) if a.value is None]
    reads = [_broadcast(region.args[i], region.shape) for i in memory]
    writes = [strides for _, strides in region.outputs]
    dims, steps = merged(region.shape, *reads, *writes)
    unit = unit_of(count)
    furthest = max(sum((n - 1) * s for n, s in zip(dims, step, strict=True)) for step in steps)
    far = max(count + _BLOCK, furthest + 1) >= 2**31
    offsets = [_offset(dims, step) for step in steps]
    text = _text(region, dims, unit, far, dict(zip(memory, offsets, strict=False)), offsets)
    block = _BLOCK if count >= _MANY else _SMALL_BLOCK
    args: dict[str, Ref | int | float] = {f"x{i}": Arg(i) for i in memory}
    args |= {f"y{i}": Result(i) for i in range(len(region.outputs))}
    call = Call(
        _function(text, _name(region)),
        {
            **args,
            "units": count // unit,
            "BLOCK": block,
        },
        (-(-count // block), 1, 1),
        tuple(Result(i) for i in range(len(region.outputs))),
        num_warps=max(1, block // (8 * target.warp)),
    )
    read = sum(region.args[i].nbytes for i in memory)
    written = sum(count * DTYPES[region.steps[i].dtype].bits // 8 for i, _ in region.outputs)
    seconds = (read + written) / target.bytes_per_second + LAUNCH_SECONDS
    return Candidate((call,), seconds, f"{len(region.steps)} element-wise ops")


@cache
def _function(text: str, name: str) -> Any:
    return from_text(text, name)


def _unknown(region: Region) -> str:
    """Why no kernel computes the region; empty where one does."""
    for step in region.steps:
        if step.op not in EXPRESSIONS:
            return f"{step.op} has no expression"
        if step.dtype not in HELD:
            return f"{step.op}: kernels know no {step.dtype}"
    for arg in region.args:
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


def _name(region: Region) -> str:
    names = [step.op for step in region.steps]
    return "_".join(["pointwise", *names[:3], *([f"and_{len(names) - 3}"] if names[3:] else [])])


def _text(
    region: Region,
    dims: Sequence[int],
    unit: int,
    far: bool,
    read_at: Mapping[int, str],
    offsets: Sequence[str],
) -> str:
    write_at = offsets[len(read_at) :]
    wide = ".to(tl.int64)" if far else ""
    names = [*(f"x{i}" for i in read_at), *(f"y{i}" for i in range(len(write_at))), "units"]
    lines = [
        "@triton.jit",
        f"def {_name(region)}({', '.join(names)}, {_CONSTANTS}):",
        "    pdl_wait(PROGRAMMATIC)",
        f"    index = tl.program_id(0){wide} * BLOCK + tl.arange(0, BLOCK)",
        f"    inside = index < units{wide} * {unit}",
    ]
    if any(at.startswith("d") for at in offsets):
        lines += _places(dims)
    values: list[Typed] = []
    for i, arg in enumerate(region.args):
        dtype = arg.type.dtype
        values.append(Typed(f"a{i}", dtype, arg.value))
        if arg.value is None:
            lines.append(f"    a{i} = tl.load(x{i} + {read_at[i]}, mask=inside).to({HELD[dtype]})")
    for i, step in enumerate(region.steps):
        operands = _operands(step, values)
        expression = EXPRESSIONS[step.op](operands, step.attrs)
        lines.append(f"    v{i} = {rounded(expression, step.dtype)}")
        values.append(Typed(f"v{i}", step.dtype))
    for i, (step, _) in enumerate(region.outputs):
        value = stored(f"v{step}", region.steps[step].dtype)
        lines.append(f"    tl.store(y{i} + {write_at[i]}, {value}, mask=inside)")
    return "\n".join(lines) + "\n"


def _places(dims: Sequence[int]) -> list[str]:
    """Lines that find the places d0, d1, … of `index`; the outermost dim's size is not said."""
    lines: list[str] = []
    left = "index"
    for i, size in enumerate(dims[:-1]):
        lines += [f"    d{i} = {left} % {size}", f"    r{i} = {left} // {size}"]
        left = f"r{i}"
    return [*lines, f"    d{len(dims) - 1} = {left}"]


def _operands(step: Step, values: Sequence[Typed]) -> list[Typed]:
    """The operands of a step; a literal has the dtype of those beside it."""
    given = [values[i] for i in step.inputs]
    beside = given[1:] if step.op == "where" else given
    dtype = next((o.dtype for o in beside if o.value is None), step.dtype)
    return [o if o.value is None else Typed(number(o.value, dtype), dtype, o.value) for o in given]


def region(query: KernelQuery) -> Candidate | Declined:
    """A region: literals in its body are operands behind its own."""
    first, steps = len(query.args), query.attrs["steps"]
    literals = [i for _, inputs, *_ in steps for i in inputs if isinstance(i, tuple)]
    places = iter(range(first, first + len(literals)))

    def place(number: int | tuple[str, Any]) -> int:
        if isinstance(number, tuple):
            return next(places)
        return number + (len(literals) if number >= first else 0)

    args = (*query.args, *(Operand(TensorType(dtype, ()), (), n) for dtype, n in literals))
    types = step_types([a.type for a in query.args], steps)
    body = tuple(
        Step(name, dict(named), tuple(map(place, inputs)), type_.dtype)
        for (name, inputs, *named), type_ in zip(steps, types, strict=True)
    )
    kept = zip(query.attrs["outputs"], query.results, strict=True)
    outputs = tuple((number - first, result.strides) for number, result in kept)
    return computed(Region(query.results[0].shape, args, body, outputs), query.target)


def pointwise(query: KernelQuery) -> Candidate | Declined:
    """Any one element-wise op, and tensors out of nothing."""
    (result,) = query.results
    places = tuple(range(len(query.args)))
    step = Step(query.op.name, query.attrs, places, result.type.dtype)
    region = Region(result.shape, query.args, (step,), ((0, result.strides),))
    return computed(region, query.target)


TEMPLATES = {**dict.fromkeys(sorted(STEP_OPS), (pointwise,)), "region": (region,)}
