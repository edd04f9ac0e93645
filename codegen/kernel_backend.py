"""GPU targets: every node is what a template chose for it, launches of Triton kernels.

Views move nothing: a slice, a permutation or an expansion is the same bytes under other strides,
and only what a template cannot read so is copied first.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from msgspec import structs

from ..compiler.dtypes import DTYPES
from ..compiler.ir import Node, Value
from ..compiler.ops.mxfp4 import mxfp4
from ..compiler.ops.mxfp4_fragments import mxfp4_tiled
from ..compiler.ops.region import region
from ..compiler.ops.shape import expand, permute, slice_, view
from ..compiler.target import Target
from ..compiler.types import TensorType
from ..runtime.program import Argument, Kernel, Launch, Slice, entry_name
from .build import build
from .entries import COUNTERS, Bound, Choice, EntryBuilder, PackedSlice, Place
from .kernel_query import (
    Append,
    Arg,
    Call,
    Candidate,
    Codes,
    Counter,
    Declined,
    KernelQuery,
    Operand,
    Packed,
    Ref,
    Result,
    Runtime,
    Scales,
    Temp,
    dense_strides,
)
from .kernel_source import KernelSource, map_leaves
from .select import PACKED_WEIGHTS, select
from .templates.rowwise.copy import copy

# Vector loads want addresses that are multiples of this many bytes.
_VECTOR = 16


class NoKernelError(Exception):
    """No template computes a node on a target; lists every reason."""


class KernelBackend:
    """Launches of Triton kernels for one GPU target."""

    def __init__(
        self,
        target: Target,
        progress: Callable[[int, int], None] | None = None,
        only: str | None = None,
        prefer: str = "",
    ) -> None:
        """`progress` hears how many of how many kernels are there. `only` names an entry: just its
        kernels are built, for a program that is looked at and not run. `prefer` is as `select` has
        it."""
        self.target = target
        self.sources: dict[str, KernelSource] = {}
        self.choices: list[Choice] = []
        self.from_cache = 0  # of `kernels`
        self._progress = progress
        self._only = only
        self._prefer = prefer
        self._wanted: dict[str, None] = {}

    def kernels(self) -> Mapping[str, Kernel]:
        """See Backend.kernels; builds those that the cache does not hold. BuildError."""
        told: list[int] = []

        def progress(done: int, of: int) -> None:
            told.append(done)
            if self._progress:
                self._progress(done, of)

        sources = {id_: self.sources[id_] for id_ in self._wanted}
        built = build(list(sources.values()), self.target, progress)
        self.from_cache = told[0]
        return {id_: built[source] for id_, source in sources.items()}

    def packed(self, node: Node, position: int) -> tuple[Value, Value] | None:
        """See Backend.packed."""
        weight = node.args[position]
        if weight.op not in (mxfp4, mxfp4_tiled):
            return None
        if [*node.operands][position] not in PACKED_WEIGHTS.get(node.op.name, ()):
            return None
        codes, scales = weight.node.args
        return codes, scales

    def view(self, bound: Bound) -> Slice | None:
        """See Backend.view: what torch makes of strides says where the result lies."""
        node, source = bound.node, bound.args[0] if bound.args else None
        if node.op not in (view, permute, expand, slice_) or not isinstance(source, Slice):
            return None
        strides = source.strides or dense_strides(source.shape)
        meta = torch.empty(0, device="meta").as_strided(source.shape, strides)
        if node.op is view:
            shape: Any = bound.types[0].shape
            try:
                seen = meta.view(shape)
            except RuntimeError:  # the bytes lie too far apart
                return None
        else:
            (seen,) = node.op.reference(meta, **bound.attrs)
        shape, strides = tuple(seen.shape), seen.stride()
        offset = source.offset + int(seen.storage_offset()) * DTYPES[source.dtype].bits // 8
        dense = strides == dense_strides(shape)
        return Slice(source.buffer, source.dtype, shape, offset, None if dense else strides)

    def emit(self, bound: Bound, builder: EntryBuilder, results: tuple[Slice | None, ...]) -> None:
        """See Backend.emit. NoKernelError where no template computes the node."""
        node, args, given, append = bound.node, bound.args, bound.node.given, None
        label, copying = launch_label(node), f"copy {node.source}".strip()
        if node.op is view:
            (source,), (target,) = args, results
            assert isinstance(source, Slice) and target
            self.copy(source, structs.replace(target, shape=source.shape), builder, copying)
            return
        updated = {row.cache: row.updated for row in node.appends}
        if node.op.inplace and not bound.in_place:
            updated = {i: i for i in range(len(results))}
        for i, result in updated.items():
            source, target = args[i], results[result]
            if source != target:
                assert isinstance(source, Slice) and target
                self.copy(source, target, builder, copying)
        if node.appends:
            args = tuple(a for i, a in enumerate(args) if i not in updated)
            given = tuple(name for name in given if name not in node.op.caches)
            names = [*node.op.required, *given]
            slots, positions, page_table = (
                Arg(names.index(name)) for name in ("slots", "positions", "page_table")
            )
            kept = frozenset(i for i, result in enumerate(results) if result)
            append = Append(
                {row.row: row.updated for row in node.appends}, slots, positions, page_table, kept
            )
        elif updated:
            held = tuple(result for result in results if result)
            args = (*held, *args[len(held) :])
        types: list[Any] = list(bound.types)
        early = builder.early
        query = KernelQuery(
            node.op,
            dict(bound.attrs),
            tuple(operand(arg, builder.constants, early) for arg in args),
            tuple(
                operand(result, early=early)
                if result
                else Operand(type_, dense_strides(type_.shape))
                for result, type_ in zip(results, types, strict=True)
            ),
            self.target,
            append,
            given,
        )
        chosen = select(query, self._prefer)
        if isinstance(chosen, Declined) and not all(a.dense for a in query.args):
            args = tuple(self._dense(a, builder, copying) for a in args)
            operands = (operand(arg, builder.constants, early) for arg in args)
            query = replace(query, args=tuple(operands))
            chosen = select(query, self._prefer)
        if isinstance(chosen, Declined):
            raise NoKernelError(f"{label}: {chosen.reason}")
        self._launch(chosen, args, results, label, builder)

    def _dense(self, place: Place, builder: EntryBuilder, label: str) -> Place:
        """`place`, or a dense copy of it."""
        if not isinstance(place, Slice) or place.strides is None:
            return place
        target = builder.scratch(TensorType(place.dtype, place.shape))
        self.copy(place, target, builder, label)
        return target

    def copy(
        self, source: Slice, target: Slice, builder: EntryBuilder, label: str | None = None
    ) -> None:
        """See Backend.copy."""
        query = KernelQuery(view, {}, (operand(source),), (operand(target),), self.target)
        label = label or f"copy {target.buffer}"
        self._launch(copy(query), (source,), (target,), label, builder)

    def _launch(
        self,
        chosen: Candidate,
        args: Sequence[Place],
        results: Sequence[Slice | None],
        label: str,
        builder: EntryBuilder,
    ) -> None:
        temps = {name: builder.scratch(type_) for name, type_ in chosen.temps.items()}
        counters = {name: builder.counters(count) for name, count in chosen.counters.items()}

        def place(ref: Ref) -> Slice:
            match ref:
                case Temp(name):
                    return temps[name]
                case Counter(name):
                    return counters[name]
                case Result(index):
                    found = results[index]
                case Arg(index):
                    found = args[index]
                case Codes(index):
                    packed = args[index]
                    found = packed.codes if isinstance(packed, PackedSlice) else None
                case Scales(index):
                    packed = args[index]
                    found = packed.scales if isinstance(packed, PackedSlice) else None
            if not isinstance(found, Slice):
                raise TypeError(f"{label}: {ref} names no memory")
            return found

        entry = entry_name(builder.binding)
        ids: list[str] = []
        for call in chosen.calls:
            values: list[Slice | int | float] = []
            source = self._source(call, place, values)
            id_ = source.hash(self.target.name)
            self.sources.setdefault(id_, source)
            if self._only in (None, entry):
                self._wanted[id_] = None
            ids.append(call.function.__name__)
            writes = [place(ref) for ref in call.writes]
            reads = [s for s in values if isinstance(s, Slice) and s.buffer != COUNTERS]
            launch = Launch(id_, tuple(values), call.grid, label)
            builder.launch(launch, reads, writes)
        op = label.split(" ")[0]
        second = chosen.runner_up
        over = f"{second.reason} ({second.seconds * 1e6:.1f} µs)" if second else ""
        priced = tuple(call.priced for call in chosen.calls)
        offered = {p.kernel: None for each in (chosen, *chosen.others) for p in each.priced}
        self.choices.append(
            Choice(op, entry, tuple(ids), chosen.reason, chosen.seconds, over, priced, (*offered,))
        )

    def _source(
        self, call: Call, place: Callable[[Ref], Slice], values: list[Slice | int | float]
    ) -> KernelSource:
        """What is built for a call; the run-time values of its launch are added to `values`."""

        def described(leaf: Any) -> Any:
            if not isinstance(leaf, Runtime | Ref):
                return leaf
            values.append(leaf.value if isinstance(leaf, Runtime) else place(leaf))
            return _argument(values[-1])

        return KernelSource.of(
            call.function,
            {n: map_leaves(v, described) for n, v in call.arguments().items()},
            call.num_warps,
            call.num_stages,
            call.overlaps and self.target.name.startswith("cuda"),
            call.resident,
            call.spreads,
        )


def launch_label(node: Node) -> str:
    """What its launches are called: the ops that it stands for, and where it is from."""
    name = node.op.name
    if node.op is region:
        name = "+".join(step for step, *_ in node.attrs["steps"])
    return f"{name}{'+kv_append' if node.appends else ''} {node.source}".strip()


def operand(place: Place, constants: Container[str] = (), early: Container[str] = ()) -> Operand:
    """How a template sees an argument or result; `constants` are buffers that no launch writes,
    `early` those that none has written yet."""
    match place:
        case Slice():
            strides = place.strides or dense_strides(place.shape)
            type_ = TensorType(place.dtype, place.shape)
            return Operand(
                type_,
                strides,
                constant=place.buffer in constants,
                aligned=place.offset % _VECTOR == 0,
                early=place.buffer in early,
            )
        case PackedSlice():
            codes, scales = (TensorType(s.dtype, s.shape) for s in (place.codes, place.scales))
            packed = Packed(codes, scales, place.group, place.fragments)
            shape: Any = place.type.shape
            return Operand(
                place.type, dense_strides(shape), None, packed, constant=True, early=True
            )
        case bool():
            return Operand(TensorType("bool", ()), (), place)
        case int():
            return Operand(TensorType("i64", ()), (), place)
        case float():
            return Operand(TensorType("f64", ()), (), place)


def _argument(given: Slice | int | float) -> Argument:
    if isinstance(given, Slice):
        return Argument(f"*{given.dtype}", _VECTOR if given.offset % _VECTOR == 0 else 1)
    if isinstance(given, float):
        return Argument("f32")
    return Argument("i32" if -(2**31) <= given < 2**31 else "i64")
