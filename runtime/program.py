"""The program: what codegen makes, the ingot stores and a driver brings to a device, as data.

Nothing here computes. Types have the bounds within which an ingot may state them, which are checked
when one is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

# The function that serving replays: some tokens of some sequences in, logits out.
STEP = "step"

# The largest size, offset or count that a file may state: no sum of a few of them is near 2^64.
LARGEST = 2**48
Size = Annotated[int, Meta(ge=0, le=LARGEST)]
Text = Annotated[str, Meta(max_length=1024)]
LongText = Annotated[str, Meta(max_length=4096)]
BufferKind = Literal["input", "output", "weight", "state", "counter", "scratch"]
_Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_MOST_DIMS, _MOST_ARGS, _MOST = Meta(max_length=16), Meta(max_length=256), Meta(max_length=1 << 20)
_Shape = Annotated[tuple[Size, ...], _MOST_DIMS]
_Stride = Annotated[int, Meta(ge=-LARGEST, le=LARGEST)]


class Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """A struct whose JSON object has no fields but its own."""


class _Row(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A struct that JSON has as a list of its fields."""


class Argument(_Row, frozen=True):
    """What a GPU kernel takes at one place.

    `kind` is "*" and the dtype it points to, or i32, i64, f32 for a number passed by value.
    `multiple` is a promise that the code relies on: the address (bytes), or the number, is a
    multiple of it.
    """

    kind: Text
    multiple: Size = 1


class Kernel(Strict, frozen=True):
    """One piece of device code.

    `binary` is a cubin or hsaco, `symbol` the function in it, `num_warps` warps make a block,
    `shared` is bytes of shared memory (LDS), `args` what it takes (behind them come two pointers
    that are null: Triton's scratch), and `programmatic` says that it may start while the launches
    that it depends on still run: it waits for them itself. `facts` are figures of the build
    (registers, spills, ...) that nothing depends on.
    """

    id: Text
    symbol: LongText
    binary: bytes
    num_warps: Size = 1
    shared: Size = 0
    args: Annotated[tuple[Argument, ...], _MOST_ARGS] = ()
    programmatic: bool = False
    facts: Annotated[Mapping[Text, Any], _MOST_ARGS] = field(default_factory=dict[str, Any])


class Buffer(_Row, frozen=True):
    """A named region of device memory.

    `offset` (bytes) places inputs, outputs and scratch in the arena that all entries share;
    weights, state and counters own their memory and have none. Counters are zero when a program is
    loaded, and each launch that counts leaves its own zero again: what it has of them no launch
    has that may run at the same time.
    """

    name: Text
    dtype: Text
    shape: _Shape
    kind: BufferKind
    nbytes: Size
    offset: Size | None = None


class Slice(_Row, frozen=True):
    """A view of a buffer: `offset` bytes in, seen as `dtype[shape]`.

    `strides` are in elements; None is dense (row-major).
    """

    buffer: Text
    dtype: Text
    shape: _Shape
    offset: Size = 0
    strides: Annotated[tuple[_Stride, ...], _MOST_DIMS] | None = None


class Launch(Strict, frozen=True):
    """One kernel over its arguments; `label` says which node of the graph it computes."""

    kernel: Text
    args: Annotated[tuple[Slice | _Integer | float, ...], _MOST_ARGS]
    grid: tuple[Size, Size, Size] = (1, 1, 1)
    label: LongText = ""


class Entry(Strict, frozen=True):
    """The plan for one binding of the symbols (one bucket): buffers, launches, and their order.

    `buffers` are this entry's inputs, outputs and scratch. `dependencies` are pairs
    (earlier, later) of indices into `launches`, transitively reduced.
    """

    symbols: Annotated[Mapping[Text, Size], _MOST_DIMS]
    buffers: Annotated[tuple[Buffer, ...], _MOST]
    launches: Annotated[tuple[Launch, ...], _MOST]
    dependencies: Annotated[tuple[tuple[Size, Size], ...], _MOST]

    @property
    def name(self) -> str:
        """What it is called for people: "T=8,L=8"."""
        return entry_name(self.symbols)


def entry_name(symbols: Mapping[str, int]) -> str:
    """What the entry for these values of the symbols is called; without symbols there is one."""
    return ",".join(f"{name}={value}" for name, value in symbols.items()) or "only"


class Spec(_Row, frozen=True):
    """The dtype and shape of an input or output; a dim is an int, a symbol's name, or arithmetic
    over symbols as text ("2*T"), whose value only codegen knows."""

    dtype: Text
    shape: Annotated[tuple[Size | Text, ...], _MOST_DIMS]

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


class Function(Strict, frozen=True):
    """Something that a program computes: its signature, and one entry a bucket.

    `symbols` has the first and last value of each symbol. `state` names the state buffers that it
    reads or writes. What an input is called, an output or a buffer of the program is not.

    `fed` names inputs that it updates: a run leaves them for the next one of the same entry, and
    the other inputs as they were. Without any, inputs do not outlive a run.

    A function for the cpu target has no entries: it is `graph`, the text of its IR, and runs at any
    values of its symbols.
    """

    symbols: Annotated[Mapping[Text, tuple[Size, Size]], _MOST_DIMS]
    inputs: Annotated[Mapping[Text, Spec], _MOST_ARGS]
    outputs: Annotated[Mapping[Text, Spec], _MOST_ARGS]
    state: Annotated[tuple[Text, ...], _MOST] = ()
    entries: Annotated[tuple[Entry, ...], Meta(max_length=4096)] = ()
    graph: str = ""
    fed: Annotated[tuple[Text, ...], _MOST_ARGS] = ()

    def entry(self, symbols: Mapping[str, int]) -> Entry:
        """The entry for these values; ValueError lists those there are."""
        for entry in self.entries:
            if entry.symbols == symbols:
                return entry
        known = "; ".join(entry.name for entry in self.entries)
        raise ValueError(f"no entry {entry_name(symbols)!r}; there are {known}")


class Program(Strict, frozen=True):
    """Everything that runs: functions by name, and the kernels, weights, state and arena that they
    share.

    `meta` holds JSON facts about the model that serving needs: `vocab_size`, `page_size`,
    `max_sequences`, `max_tokens_per_sequence`, `pages` (all ints).
    """

    target: Text
    kernels: Annotated[Mapping[Text, Kernel], _MOST]
    buffers: Annotated[Mapping[Text, Buffer], _MOST]
    functions: Annotated[Mapping[Text, Function], Meta(max_length=64)]
    arena_bytes: Size
    meta: Annotated[Mapping[Text, Any], _MOST_ARGS] = field(default_factory=dict[str, Any])

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Those of all functions."""
        return tuple(entry for f in self.functions.values() for entry in f.entries)
