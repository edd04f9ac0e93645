"""A Triton kernel with all that is fixed about it: what is built, cached and counted once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from ..compiler.ast_lock import AST_LOCK
from ..compiler.dtypes import DTYPES
from ..runtime.program import Argument

TRITON_TYPES = {name: dtype.triton for name, dtype in DTYPES.items() if dtype.triton}

# The constant of a function that waits for earlier launches itself: see templates.pdl.
PROGRAMMATIC = "PROGRAMMATIC"


class _TritonSource(ASTSource):
    """As Triton's; one thread at a time parses functions and walks their trees.

    Threads lose nothing by it: that is Python, which runs one thread at a time anyway.
    """

    def make_ir(self, *args: Any, **named: Any) -> Any:
        with AST_LOCK:
            return super().make_ir(*args, **named)


class _GluonSource(GluonASTSource):
    """As _TritonSource, of a Gluon function."""

    def make_ir(self, *args: Any, **named: Any) -> Any:
        with AST_LOCK:
            return super().make_ir(*args, **named)


def triton_type(kind: str) -> str:
    """Triton's name for the kind of an Argument, "*bf16" say."""
    return f"*{TRITON_TYPES[kind[1:]]}" if kind.startswith("*") else TRITON_TYPES[kind]


def is_aggregate(value: Any) -> bool:
    """Whether a kernel's argument is a NamedTuple, whose fields the kernel reads by name."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of an argument, or of every field of an aggregate."""
    if is_aggregate(value):
        return type(value)(*(map_leaves(v, function) for v in value))
    return function(value)


@dataclass(frozen=True)
class KernelSource:
    """A Triton function with its arguments, in the function's order: what is built once.

    An argument is an Argument (the kind of a run-time parameter and what is promised of it), a
    constant, or a NamedTuple of both. `programmatic` says that the kernel waits for the launches
    before it by itself, `resident` and `spreads` how many programs a multiprocessor holds
    (kernel_query.Call). Two sources are equal when they make equal code.
    """

    function: Any = field(compare=False)
    arguments: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    programmatic: bool
    key: str
    resident: int | None = None
    spreads: bool = False

    @classmethod
    def of(
        cls,
        function: Any,
        arguments: Mapping[str, Any],
        num_warps: int,
        num_stages: int,
        programmatic: bool,
        resident: int | None = None,
        spreads: bool = False,
    ) -> KernelSource:
        """ValueError where the parameters of `function` are not just those given.

        `programmatic` says whether launches on the target may overlap; a function that minds has
        a constant PROGRAMMATIC (see templates.pdl), which is set here and not given.
        """
        names = list(function.arg_names)
        if PROGRAMMATIC in names:
            arguments = {**arguments, PROGRAMMATIC: programmatic}
        if amiss := {*arguments} ^ {*names}:
            raise ValueError(
                f"kernel {function.__name__}: expected parameters {names}, found arguments "
                f"{[*arguments]} (amiss: {sorted(amiss)})"
            )
        with AST_LOCK:  # Triton parses the function, and what it calls, to hash it
            key = function.cache_key
        return cls(
            function,
            tuple((n, arguments[n]) for n in names),
            num_warps,
            num_stages,
            programmatic and PROGRAMMATIC in names,
            key,
            resident,
            spreads,
        )

    def _leaves(self) -> Iterator[tuple[tuple[int, ...], str, Any]]:
        """Place, dotted name and value of every argument and field."""

        def within(place: tuple[int, ...], name: str, value: Any) -> Iterator[Any]:
            if not is_aggregate(value):
                yield place, name, value
                return
            for i, (part, held) in enumerate(zip(value._fields, value, strict=True)):
                yield from within((*place, i), f"{name}.{part}", held)

        for i, (name, value) in enumerate(self.arguments):
            yield from within((i,), name, value)

    @property
    def parameters(self) -> tuple[tuple[str, Argument], ...]:
        """Run-time parameters by name, "x" or "weight.scales", in the order of a launch."""
        return tuple((n, v) for _, n, v in self._leaves() if isinstance(v, Argument))

    @property
    def constants(self) -> tuple[tuple[str, Any], ...]:
        """All others."""
        return tuple((n, v) for _, n, v in self._leaves() if not isinstance(v, Argument))

    def hash(self, target: str) -> str:
        """The content hash of what would be built for `target`."""
        facts = (triton.__version__, target, self.function.__name__, self.key, self.arguments)
        rest = (self.num_warps, self.num_stages, self.programmatic, self.resident, self.spreads)
        return hashlib.sha256(repr((*facts, *rest)).encode()).hexdigest()

    def ast_source(self) -> ASTSource:
        """What triton.compile takes."""

        def kind(leaf: Any) -> str:
            return triton_type(leaf.kind) if isinstance(leaf, Argument) else "constexpr"

        signature = {n: map_leaves(v, kind) for n, v in self.arguments}
        constants = {p: v for p, _, v in self._leaves() if not isinstance(v, Argument)}
        promises = {
            place: [["tt.divisibility", v.multiple]]
            for place, _, v in self._leaves()
            if isinstance(v, Argument) and v.multiple > 1
        }
        source = _GluonSource if self.function.is_gluon() else _TritonSource
        return source(self.function, signature, constants, promises)

    def bound(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """All arguments by name, for the run-time values `args`."""
        given = iter(args)

        def value(leaf: Any) -> Any:
            return next(given) if isinstance(leaf, Argument) else leaf

        return {n: map_leaves(v, value) for n, v in self.arguments}
