"""The program: what codegen makes, the ingot stores and a driver brings to a device, as data.

Standard library only. Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# The function that serving replays: some tokens of some sequences in, logits out.
STEP = "step"

BufferKind = Literal["input", "output", "weight", "state", "scratch"]


@dataclass(frozen=True)
class Argument:
    """What a GPU kernel takes at one place.

    `kind` is "*" and the dtype it points to, or i32, i64, f32 for a number passed by value.
    `multiple` is a promise that the code relies on: the address (bytes), or the number, is a
    multiple of it.
    """

    kind: str
    multiple: int = 1


@dataclass(frozen=True)
class Kernel:
    """One piece of device code.

    `binary` is a cubin or hsaco, `symbol` the function in it, `num_warps` warps make a block,
    `shared` is bytes of shared memory (LDS), `args` what it takes (behind them come two pointers
    that are null: Triton's scratch), and `programmatic` says that it may start while the launches
    that it depends on still run: it waits for them itself. `facts` are figures of the build
    (registers, spills, ...) that nothing depends on.
    """

    id: str
    symbol: str
    binary: bytes
    num_warps: int = 1
    shared: int = 0
    args: tuple[Argument, ...] = ()
    programmatic: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Buffer:
    """A named region of device memory.

    `offset` (bytes) places inputs, outputs and scratch in the arena that all entries share;
    weights and state own their memory and have none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: BufferKind
    nbytes: int
    offset: int | None = None


@dataclass(frozen=True)
class Slice:
    """A view of a buffer: `offset` bytes in, seen as `dtype[shape]`.

    `strides` are in elements; None is dense (row-major).
    """

    buffer: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Launch:
    """One kernel over its arguments; `label` says which node of the graph it computes."""

    kernel: str
    args: tuple[Slice | int | float, ...]
    grid: tuple[int, int, int] = (1, 1, 1)
    label: str = ""


@dataclass(frozen=True)
class Entry:
    """The plan for one binding of the symbols (one bucket): buffers, launches, and their order.

    `buffers` are this entry's inputs, outputs and scratch. `dependencies` are pairs
    (earlier, later) of indices into `launches`, transitively reduced.
    """

    symbols: Mapping[str, int]
    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]
    dependencies: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """What it is called for people: "T=8,L=8"."""
        return entry_name(self.symbols)


def entry_name(symbols: Mapping[str, int]) -> str:
    """What the entry for these values of the symbols is called; without symbols there is one."""
    return ",".join(f"{name}={value}" for name, value in symbols.items()) or "only"


@dataclass(frozen=True)
class Spec:
    """The dtype and shape of an input or output; a dim is an int, a symbol's name, or arithmetic
    over symbols as text ("2*T"), whose value only codegen knows."""

    dtype: str
    shape: tuple[int | str, ...]

    def bound(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where symbols have these values; KeyError for a dim that is arithmetic."""
        return tuple(symbols[dim] if isinstance(dim, str) else dim for dim in self.shape)

    def fits(self, dtype: str, shape: Sequence[int], symbols: Mapping[str, int]) -> bool:
        """Whether a tensor of `dtype` and `shape` is of this spec where symbols have these values.

        Dims that are arithmetic fit any size.
        """
        return (dtype, len(shape)) == (self.dtype, len(self.shape)) and all(
            size == (symbols.get(dim, size) if isinstance(dim, str) else dim)
            for dim, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Function:
    """Something that a program computes: its signature, and one entry a bucket.

    `symbols` has the first and last value of each symbol. `state` names the state buffers that it
    reads or writes. What an input is called, an output or a buffer of the program is not.

    A function for the cpu target has no entries: it is `graph`, the text of its IR, and runs at any
    values of its symbols.
    """

    symbols: Mapping[str, tuple[int, int]]
    inputs: Mapping[str, Spec]
    outputs: Mapping[str, Spec]
    state: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = ()
    graph: str = ""

    def entry(self, symbols: Mapping[str, int]) -> Entry:
        """The entry for these values; ValueError lists those there are."""
        for entry in self.entries:
            if entry.symbols == symbols:
                return entry
        known = "; ".join(entry.name for entry in self.entries)
        raise ValueError(f"no entry {entry_name(symbols)!r}; there are {known}")


@dataclass(frozen=True)
class Program:
    """Everything that runs: functions by name, and the kernels, weights, state and arena that they
    share.

    `meta` holds JSON facts about the model that serving needs: `vocab_size`, `page_size`,
    `max_sequences`, `max_tokens_per_sequence`, `pages` (all ints).
    """

    target: str
    kernels: Mapping[str, Kernel]
    buffers: Mapping[str, Buffer]
    functions: Mapping[str, Function]
    arena_bytes: int
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Those of all functions."""
        return tuple(entry for f in self.functions.values() for entry in f.entries)
