"""A Triton kernel with all that is fixed about it: what is built, cached and counted once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from ..compiler.dtypes import DTYPES
from ..runtime.program import Argument

TRITON_TYPES = {name: dtype.triton for name, dtype in DTYPES.items() if dtype.triton}

# The constant of a function that waits for earlier launches itself: see templates.pdl.
PROGRAMMATIC = "PROGRAMMATIC"


def triton_type(kind: str) -> str:
    """Triton's name for the kind of an Argument, "*bf16" say."""
    return f"*{TRITON_TYPES[kind[1:]]}" if kind.startswith("*") else TRITON_TYPES[kind]


@dataclass(frozen=True)
class KernelSource:
    """A Triton function, the kinds and promises of its run-time parameters, and its constants.

    `parameters` are the run-time parameters by name, in the function's order; `constants` all its
    others. `programmatic` says that the kernel waits for the launches before it by itself. Two
    sources are equal when they make equal code.
    """

    function: Any = field(compare=False)
    parameters: tuple[tuple[str, Argument], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    programmatic: bool
    key: str

    @classmethod
    def of(
        cls,
        function: Any,
        kinds: Mapping[str, Argument],
        constants: Mapping[str, Any],
        num_warps: int,
        num_stages: int,
        programmatic: bool,
    ) -> KernelSource:
        """ValueError where the parameters of `function` are not just those given.

        `programmatic` says whether launches on the target may overlap; a function that minds has
        a constant PROGRAMMATIC (see templates.pdl), which is set here and not given.
        """
        names = list(function.arg_names)
        if PROGRAMMATIC in names:
            constants = {**constants, PROGRAMMATIC: programmatic}
        if given := {*kinds} ^ ({*names} - {*constants}) or {*kinds} & {*constants}:
            raise ValueError(
                f"kernel {function.__name__}: expected parameters {names}, found arguments "
                f"{[*kinds]} and constants {[*constants]} (amiss: {sorted(given)})"
            )
        return cls(
            function,
            tuple((n, kinds[n]) for n in names if n in kinds),
            tuple((n, constants[n]) for n in names if n in constants),
            num_warps,
            num_stages,
            programmatic and PROGRAMMATIC in names,
            function.cache_key,
        )

    def hash(self, target: str) -> str:
        """The content hash of what would be built for `target`."""
        facts = (triton.__version__, target, self.function.__name__, self.key, self.parameters)
        rest = (self.constants, self.num_warps, self.num_stages, self.programmatic)
        return hashlib.sha256(repr((*facts, *rest)).encode()).hexdigest()

    def ast_source(self) -> ASTSource:
        """What triton.compile takes."""
        names = list(self.function.arg_names)
        kinds = dict(self.parameters)
        signature = {n: triton_type(kinds[n].kind) if n in kinds else "constexpr" for n in names}
        constants = {(names.index(n),): v for n, v in self.constants}
        promises = {
            (names.index(n),): [["tt.divisibility", a.multiple]]
            for n, a in self.parameters
            if a.multiple > 1
        }
        kind = GluonASTSource if self.function.is_gluon() else ASTSource
        return kind(self.function, signature, constants, promises)

    def bound(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """All parameters by name, for the run-time values `args`."""
        given = {n: a for (n, _), a in zip(self.parameters, args, strict=True)}
        return {**given, **dict(self.constants)}
