"""What a template is asked and what it answers: a node with its operands in, launches out.

A template is a function of a KernelQuery that gives a Candidate for every way to compute the node,
and a Declined for those that do not fit. A candidate says in launches of Triton kernels how one
node is computed on one target for one bucket, and what that costs; where the bytes lie is not its
business: it names the node's arguments, its results and scratch of its own by references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

from ..compiler.ir import Op
from ..compiler.target import Target
from ..compiler.types import TensorType
from .price_table import Launched


@dataclass(frozen=True)
class Packed:
    """A weight in MXFP4: codes u8 [..., K/2] and scales u8 [..., K/group], both dense.

    With `fragments` both are in the order of compiler.ops.mxfp4_fragments, in tiles.
    """

    codes: TensorType
    scales: TensorType
    group: int
    fragments: bool = False

    @property
    def tiles(self) -> tuple[int, int]:
        """How many tiles of `fragments` lie down and across a matrix."""
        down, across = (int(d) for d in self.codes.shape[-3:-1])
        return down, across


@dataclass(frozen=True)
class Operand:
    """An argument or result of a node: its type with all dims bound, and how it lies in memory.

    `strides` are in elements. `value` is set for a literal: a number, no memory. `packed` is set
    for a weight that is held in MXFP4: then only its codes and scales are in memory. What no launch
    writes is `constant`; what no launch of the entry writes before the node's is `early`. `aligned`
    says that it begins at a multiple of 16 bytes.
    """

    type: TensorType
    strides: tuple[int, ...]
    value: bool | int | float | None = None
    packed: Packed | None = None
    constant: bool = False
    aligned: bool = True
    early: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.type.shape)

    @property
    def dense(self) -> bool:
        """Whether the elements lie row-major, one after the other."""
        return self.strides == dense_strides(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that one read of it moves."""
        if self.packed:
            return int(self.packed.codes.nbytes) + int(self.packed.scales.nbytes)
        return int(self.type.nbytes)


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass(frozen=True)
class Arg:
    """The node's argument at `index`."""

    index: int


@dataclass(frozen=True)
class Codes:
    """The MXFP4 codes of the packed argument at `index`."""

    index: int


@dataclass(frozen=True)
class Scales:
    """The MXFP4 scales of the packed argument at `index`."""

    index: int


@dataclass(frozen=True)
class Result:
    """The node's result at `index`."""

    index: int


@dataclass(frozen=True)
class Temp:
    """Scratch memory that the node's launches share, by its name in `Candidate.temps`."""

    name: str


@dataclass(frozen=True)
class Counter:
    """Counters (i32) of one launch, by their name in `Candidate.counters`.

    They are zero when a program is loaded, and whenever the launch begins: it leaves them so (see
    templates.arrival). No other launch of the entry has them, so they are no reason to wait.
    """

    name: str


Ref = Arg | Codes | Scales | Result | Temp | Counter


@dataclass(frozen=True)
class Runtime:
    """A number that a kernel is given with every launch, and not built for."""

    value: int | float


@dataclass(frozen=True)
class Call:
    """One launch of a Triton kernel.

    `args` are its parameters by name, all but PROGRAMMATIC (see templates.pdl): memory by
    reference, None for an operand that is not there, and numbers, which are run-time values (int is
    i32, float is f32) unless the parameter is a tl.constexpr. An argument may be a NamedTuple of
    these (a Weight, an Epilogue): its numbers are constants. `writes` are the references that it
    writes; it reads the others, but for Counters, which are its own. `overlaps` says whether the
    launches around it may overlap it where the target has that: tiles for many tokens keep the
    device to themselves. `priced` is under what the launch stands in a table of measured prices.
    `resident` is how many programs a multiprocessor of NVIDIA's holds at once, of launches that
    overlap too: each takes such a part of its registers and shared memory (see templates.pdl). None
    leaves it to what the kernel needs. Of a launch that `spreads` a multiprocessor holds only one
    program, beside others': it takes more than half of the shared memory.
    """

    function: Any
    args: Mapping[str, Any]
    grid: tuple[int, int, int]
    writes: tuple[Ref, ...]
    num_warps: int = 4
    num_stages: int = 2
    overlaps: bool = True
    priced: Launched | None = None
    resident: int | None = None
    spreads: bool = False

    def arguments(self) -> dict[str, Any]:
        """`args` in the order of the function's parameters, with run-time numbers marked."""
        marked = {**self.args}
        order = [p.name for p in self.function.params if p.name in marked]
        for p in self.function.params:
            value = marked.get(p.name)
            if isinstance(value, int | float) and not p.is_constexpr:
                marked[p.name] = Runtime(value)
        return {n: marked[n] for n in (*order, *(marked.keys() - {*order}))}


@dataclass(frozen=True)
class Candidate:
    """A way to compute a node: launches in order, its price in seconds, what it is, and scratch.

    `counters` says of each Counter how many it is. Of the candidate that was chosen `others` are
    the rest, the cheapest first.
    """

    calls: tuple[Call, ...]
    seconds: float
    reason: str
    temps: Mapping[str, TensorType] = field(default_factory=dict[str, TensorType])
    counters: Mapping[str, int] = field(default_factory=dict[str, int])
    others: tuple[Candidate, ...] = ()

    @property
    def runner_up(self) -> Candidate | None:
        return self.others[0] if self.others else None

    @property
    def priced(self) -> tuple[Launched, ...]:
        """Its launches that stand in tables of measured prices."""
        return tuple(call.priced for call in self.calls if call.priced)


@dataclass(frozen=True)
class Declined:
    """Why a template cannot compute a node."""

    reason: str


@dataclass(frozen=True)
class Append:
    """Results of a node, rows [T, ...], that its launches write into paged caches too.

    `caches` says which of the query's results, all behind the node's own, is the cache of a
    result; `slots`, `positions` and `page_table` are arguments, as kv_append has them. Results that
    are not `kept` nothing else reads: they have no memory of their own.
    """

    caches: Mapping[int, int]
    slots: Arg
    positions: Arg
    page_table: Arg
    kept: frozenset[int]


@dataclass(frozen=True)
class KernelQuery:
    """A node to be computed: `args` and `results` in the order of the op's, attributes bound.

    `given` names the optional operands that the node has, as in compiler.ir.Node. An op that is
    computed in place has results that are the memory of its first arguments. With an `append` there
    are more of both: what it names.
    """

    op: Op
    attrs: Mapping[str, Any]
    args: tuple[Operand, ...]
    results: tuple[Operand, ...]
    target: Target
    append: Append | None = None
    given: tuple[str, ...] = ()

    def ref(self, name: str) -> Arg | None:
        """The operand called `name`; None where the node has none."""
        names = (*self.op.required, *self.given)
        return Arg(names.index(name)) if name in names else None

    def operand(self, name: str) -> Operand | None:
        """How the operand called `name` lies; None where the node has none."""
        ref = self.ref(name)
        return None if ref is None else self.args[ref.index]

    def seconds(self, launches: int, extra_bytes: int = 0) -> float:
        """An estimate: every operand moved once at the target's bandwidth, and the launches."""
        moved = self.moved_bytes() + extra_bytes
        return moved / self.target.bytes_per_second + launches * self.target.launch_seconds

    def moved_bytes(self) -> int:
        """Bytes of all operands, each moved once."""
        # An appended row is moved as a result; the cache that it goes to is not.
        own = len(self.results) - (len(self.append.caches) if self.append else 0)
        return sum(o.nbytes for o in (*self.args, *self.results[:own]))


def not_floats(operands: Iterable[Operand]) -> Declined | None:
    """Why kernels that compute in f32 do not read some of the operands; None where they do."""
    known = ("f16", "bf16", "f32")
    odd = [o.type for o in operands if o.type.dtype not in known]
    return Declined(f"expected operands of {', '.join(known)}; found {odd[0]}") if odd else None


def even_step(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one step, in elements, that leads through dims of these sizes in row-major order; None
    where there is none, 0 where there is nothing to step through."""
    steps = [(n, s) for n, s in zip(sizes, strides, strict=True) if n != 1]
    if any(outer != n * inner for (_, outer), (n, inner) in pairwise(steps)):
        return None
    return steps[-1][1] if steps else 0


Template = Callable[[KernelQuery], Candidate | Declined | Iterable[Candidate | Declined]]
