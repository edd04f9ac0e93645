"""One entry of a program: the graph at one binding of its symbols, as launches over buffers.

The walk over the graph, the buffers, their order and their places are the same for every target;
what a node becomes is the backend's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from msgspec.structs import replace

from ..compiler.interpret import in_place_nodes
from ..compiler.ir import Graph, Node, Value
from ..compiler.ops.leaf import literal, param
from ..compiler.ops.mxfp4_fragments import mxfp4_tiled
from ..compiler.types import TensorType, bind_attr
from ..runtime.program import Buffer, Entry, Function, Kernel, Launch, Slice, Spec
from .memory import Access, Block, Lifetime, aligned, dependencies, plan_blocks
from .price_table import Launched

# The buffer that has the counters of all launches. Entries share it: one runs at a time.
COUNTERS = "%counters"


def buffer_of(name: str, type_: TensorType, binding: Mapping[str, int], kind: Any) -> Buffer:
    """A buffer for a value of `type_`, its dims bound."""
    bound: Any = type_.bind(binding)
    return Buffer(name, bound.dtype, bound.shape, kind, bound.nbytes)


def signature(
    graph: Graph,
    symbols: Mapping[str, tuple[int, int]],
    outputs: Sequence[str],
    entries: Sequence[Entry] = (),
    text: str = "",
) -> Function:
    """The function that `graph` is: its entries, or its text where it is interpreted."""

    def spec(type_: TensorType) -> Spec:
        return Spec(type_.dtype, tuple(d if isinstance(d, int) else str(d) for d in type_.shape))

    params = {p.attrs["name"]: spec(p.type) for p in graph.params}
    return Function(
        symbols,
        {name: given for name, given in params.items() if name not in graph.state},
        {name: spec(v.type) for name, v in zip(outputs, graph.outputs, strict=True)},
        graph.state,
        tuple(entries),
        text,
        graph.fed,
    )


@dataclass(frozen=True)
class PackedSlice:
    """Where the codes and scales of a weight in MXFP4 are, the type that they stand for, how many
    numbers share a scale, and whether they are ordered as fragments (compiler.ops.mxfp4_fragments).
    """

    codes: Slice
    scales: Slice
    type: TensorType
    group: int
    fragments: bool


# An argument as a backend gets it: memory, a packed weight, or the number of a literal.
Place = Slice | PackedSlice | bool | int | float


@dataclass(frozen=True)
class Bound:
    """A node with everything bound: attributes, the types of its results, and where its args are.

    `in_place` says that results of an op with an in-place form are the memory of the first args.
    """

    node: Node
    attrs: Mapping[str, Any]
    args: tuple[Place, ...]
    types: tuple[TensorType, ...]
    in_place: bool


@dataclass(frozen=True)
class Choice:
    """How a node of one entry is computed: the names of its kernels, why, and an estimate.

    `runner_up` is what would have been second, with its price. `priced` says of each launch under
    what it stands in a table of measured prices, `offered` which kernels of those were candidates.
    """

    op: str
    entry: str
    kernels: tuple[str, ...]
    reason: str
    seconds: float
    runner_up: str = ""
    priced: tuple[Launched | None, ...] = ()
    offered: tuple[str, ...] = ()


class Backend(Protocol):
    """What turns nodes into launches for one target; `choices` tell how, node by node."""

    choices: list[Choice]

    def kernels(self) -> Mapping[str, Kernel]:
        """The kernels of all launches so far, by id."""
        ...

    def packed(self, node: Node, position: int) -> tuple[Value, Value] | None:
        """The codes and scales that `node` reads in place of its argument at `position`.

        None where it reads numbers. What they are made of depends on weights alone.
        """
        ...

    def view(self, bound: Bound) -> Slice | None:
        """The result of a node that only looks at its argument otherwise; None where it moves."""
        ...

    def emit(self, bound: Bound, builder: EntryBuilder, results: tuple[Slice | None, ...]) -> None:
        """Launch what computes the node into `results`: None for rows that only caches take."""
        ...

    def copy(self, source: Slice, target: Slice, builder: EntryBuilder) -> None:
        """Launch a copy."""
        ...


@dataclass
class EntryBuilder:
    """Builds one entry: walks the graph once, then places the buffers."""

    graph: Graph
    folded: Mapping[Value, str]
    outputs: Sequence[str]
    binding: dict[str, int]
    backend: Backend
    at: dict[Value, Slice] = field(default_factory=dict[Value, Slice])
    local: dict[str, Buffer] = field(default_factory=dict[str, Buffer])
    launches: list[Launch] = field(default_factory=list[Launch])
    reads: list[list[str]] = field(default_factory=list[list[str]])
    writes: list[list[str]] = field(default_factory=list[list[str]])
    scratch_count: int = 0
    counter_bytes: int = 0

    @cached_property
    def constants(self) -> frozenset[str]:
        """The buffers that no launch writes."""
        return frozenset(self.folded.values())

    @property
    def early(self) -> frozenset[str]:
        """The buffers that no launch so far writes: constants, state, and inputs, whose memory is
        nothing else's before they are read."""
        written = {name for names in self.writes for name in names}
        inputs = {name for name, b in self.local.items() if b.kind == "input"}
        return self.constants | ((inputs | {*self.graph.state}) - written)

    @cached_property
    def _output_names(self) -> Mapping[Value, str]:
        """The name of each value that is an output, its first where it has several."""
        named = zip(self.graph.outputs, self.outputs, strict=True)
        return dict(reversed([*named]))

    def build(self) -> tuple[Entry, int]:
        """The entry and the bytes of arena that it needs."""
        uses = self.graph.use_counts()
        for p in self.graph.params:
            name = p.attrs["name"]
            kind = "state" if name in self.graph.state else "input"
            buffer = buffer_of(name, p.type, self.binding, kind)
            if kind == "input":
                self.local[name] = buffer
            self.at[p] = Slice(name, buffer.dtype, buffer.shape)
        for value, name in self.folded.items():
            bound: Any = value.type.bind({})
            self.at[value] = Slice(name, bound.dtype, bound.shape)
        nodes = [n for n in self.graph.nodes() if n.op is not param and not n.is_constant]
        in_place = in_place_nodes(self.graph, nodes, frozenset(self.graph.params))
        for i, node in enumerate(nodes):
            self._add(node, uses, nodes[i + 1 :], in_place)
        self._copy_outputs()
        self._copy_updates()
        return self._place()

    def scratch(self, type_: TensorType) -> Slice:
        """New memory for a value, as long as launches use it."""
        name = f"%{self.scratch_count}"
        self.scratch_count += 1
        bound: Any = type_.bind(self.binding)
        self.local[name] = buffer_of(name, bound, {}, "scratch")
        return Slice(name, bound.dtype, bound.shape)

    def counters(self, count: int) -> Slice:
        """`count` counters (i32) for one launch, in memory that no other launch of the entry has.

        They lie apart, as buffers do: no two launches count in one line of a cache.
        """
        at = self.counter_bytes
        self.counter_bytes = at + aligned(4 * count)
        return Slice(COUNTERS, "i32", (count,), at)

    def launch(self, launch: Launch, reads: Sequence[Slice], writes: Sequence[Slice]) -> None:
        """The next launch, and what it reads and writes."""
        self.launches.append(launch)
        self.reads.append([s.buffer for s in reads])
        self.writes.append([s.buffer for s in writes])

    def _add(
        self,
        node: Node,
        uses: Mapping[Value, int],
        later: Sequence[Node],
        in_place: Set[Node],
    ) -> None:
        types = tuple(t.bind(self.binding) for t in node.types)
        attrs = {k: bind_attr(v, self.binding) for k, v in node.attrs.items()}
        args = tuple(self._place_of(node, i) for i in range(len(node.args)))
        taken = node in in_place
        written = node.op.inplace is not None and (taken or self._reads_last(node, later))
        bound = Bound(node, attrs, args, types, written)
        seen = self.backend.view(bound)
        if seen is not None:
            self.at[Value(node)] = seen
            return
        donated: dict[int, Any] = dict(enumerate(args[: len(types)] if written else ()))
        if taken:
            donated |= {a.updated: args[a.cache] for a in node.appends}
        appended = {a.row for a in node.appends}
        results = tuple(
            donated.get(i) or (None if i in appended and not uses[v] else self._memory_of(v))
            for i, v in enumerate(node.results)
        )
        self.backend.emit(bound, self, results)
        self.at.update((v, r) for v, r in zip(node.results, results, strict=True) if r)

    def _reads_last(self, node: Node, later: Sequence[Node]) -> bool:
        """Whether `node` has an in-place form and its results are what parameters hold next, the
        first arguments, which all others have read by then."""
        donors = dict(zip(node.args, node.results, strict=False))
        updates = {self.graph.param(name): value for name, value in self.graph.updates.items()}
        if any(updates.get(a) != v for a, v in donors.items()):
            return False
        buffers = {self.at[donor].buffer for donor in donors}
        read = [*(a for n in later for a in n.args), *self.graph.outputs]
        return not any(a in self.at and self.at[a].buffer in buffers for a in read)

    def _place_of(self, node: Node, position: int) -> Place:
        arg = node.args[position]
        if arg in self.at:
            return self.at[arg]
        if arg.op is literal:
            return arg.attrs["value"]
        parts = self.backend.packed(node, position)
        assert parts is not None, node
        codes, scales = (self.at[part] for part in parts)
        group = 2 * int(arg.node.args[0].type.shape[-1]) // int(arg.node.args[1].type.shape[-1])
        return PackedSlice(codes, scales, arg.type, group, arg.op is mxfp4_tiled)

    def _memory_of(self, value: Value) -> Slice:
        """New memory for a result: an output's buffer, if it is one, or scratch."""
        name = self._output_names.get(value)
        return self.scratch(value.type) if name is None else self._output(name, value)

    def _output(self, name: str, value: Value) -> Slice:
        buffer = self.local[name] = buffer_of(name, value.type, self.binding, "output")
        return Slice(name, buffer.dtype, buffer.shape)

    def _copy_outputs(self) -> None:
        """Outputs are buffers of their own, in arena memory; most were computed there."""
        for name, value in zip(self.outputs, self.graph.outputs, strict=True):
            if name not in self.local:
                self.backend.copy(self.at[value], self._output(name, value), self)

    def _copy_updates(self) -> None:
        """What is updated and was not computed in place is copied over at the end.

        What itself lies in what is updated is set aside first: another copy may overwrite it.
        """
        sources: dict[str, Slice] = {}
        for name, value in self.graph.updates.items():
            source = self.at[value]
            if source.buffer == name:
                continue
            if source.buffer in self.graph.updates:
                aside = self.scratch(value.type)
                self.backend.copy(source, aside, self)
                source = aside
            sources[name] = source
        for name, source in sources.items():
            self.backend.copy(source, Slice(name, source.dtype, source.shape), self)

    def _place(self) -> tuple[Entry, int]:
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for i, (ins, outs) in enumerate(zip(self.reads, self.writes, strict=True)):
            for name in (*ins, *outs):
                first.setdefault(name, i)
                last[name] = i
        end = len(self.launches)
        # Where a run leaves inputs for the next, all of them stay what they are.
        lasting = ("input", "output") if self.graph.fed else ("output",)
        lives = [
            Lifetime(
                b.name,
                b.nbytes,
                -1 if b.kind == "input" else first.get(b.name, end),
                end if b.kind in lasting else last.get(b.name, 0),
            )
            for b in self.local.values()
        ]
        offsets, size = plan_blocks(self._blocks(lives))
        outputs = set(self.outputs)
        names = [*(n for n in self.local if n not in outputs), *self.outputs]
        placed = {n: replace(self.local[n], offset=offsets[n]) for n in names}

        def access(name: str) -> Access:
            buffer = placed.get(name)
            if buffer is None:
                return Access(name, 0, 1)
            assert buffer.offset is not None
            return Access("arena", buffer.offset, buffer.offset + max(buffer.nbytes, 1))

        order = dependencies(
            [[access(n) for n in ins] for ins in self.reads],
            [[access(n) for n in outs] for outs in self.writes],
        )
        buffers, launches = tuple(placed.values()), tuple(self.launches)
        return Entry(self.binding, buffers, launches, order), size

    def _blocks(self, lives: Sequence[Lifetime]) -> list[Block]:
        """Inputs side by side, and outputs, so that one copy moves them.

        The largest output lies by itself: beside the others it would take up its memory for longer
        than it lives.
        """
        kinds = {name: buffer.kind for name, buffer in self.local.items()}
        outputs = sorted(
            (x for x in lives if kinds[x.name] == "output"), key=lambda x: (x.nbytes, x.name)
        )
        together = [x for x in lives if kinds[x.name] == "input"], outputs[:-1]
        alone = [x for x in lives if kinds[x.name] == "scratch"] + outputs[-1:]
        return [Block(tuple(group)) for group in together if group] + [Block((x,)) for x in alone]
