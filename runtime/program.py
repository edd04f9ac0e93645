"""The program: the static plan that codegen makes, the ingot stores and the session replays.

Standard library only. Nothing here computes; a driver turns it into device memory and launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
    """One piece of device code, or for the cpu target one Python callable.

    `binary` is a cubin or hsaco, or the callable, called as `binary(*args)` with one tensor view
    per argument, outputs last. For a GPU: `symbol` is the function in the binary, `num_warps` warps
    make a block, `shared` is bytes of shared memory (LDS), `args` what it takes (behind them come
    two pointers that are null: Triton's scratch), and `programmatic` says that it may start while
    the launches that it depends on still run: it waits for them itself. `facts` are figures of the
    build (registers, spills, ...) that nothing depends on.
    """

    id: str
    symbol: str
    binary: bytes | Callable[..., None]
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

    `strides` are in elements; None is dense (row-major). The cpu target has only dense ones.
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

    name: str
    symbols: Mapping[str, int]
    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]
    dependencies: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Program:
    """Everything that runs: kernels by id, weights and state, one entry a bucket, arena size.

    `meta` holds JSON facts about the model that serving needs: `vocab_size`, `page_size`,
    `max_sequences`, `max_tokens_per_sequence`, `pages` (all ints).
    """

    target: str
    kernels: Mapping[str, Kernel]
    buffers: Mapping[str, Buffer]
    entries: tuple[Entry, ...]
    arena_bytes: int
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])
