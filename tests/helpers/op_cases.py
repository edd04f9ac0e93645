"""The samples of ops with all operands in one row, which tests draw, change and name again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ingot.compiler.ir import Cost, Node, Op, Sample, Value
from ingot.compiler.types import TensorType, Types, VerifyError


@dataclass(frozen=True)
class Case:
    """Operands of `op`, the optional ones last, which `given` names; and attributes."""

    op: Op
    args: tuple[TensorType, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    high: int = 2

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """A line for Hypothesis, which would print every field of the op."""
        required, named = self.taken(tuple(map(str, self.args)))
        words = (*required, *(f"{name}={value}" for name, value in named.items()))
        printer.text(f"{self.op.name}({', '.join(words)})")

    @classmethod
    def of(cls, op: Op, sample: Sample) -> Case:
        given = tuple(name for name in op.optional if name in sample.named)
        args = (*sample.args, *(sample.named[name] for name in given))
        attrs = {name: value for name, value in sample.named.items() if name not in given}
        return cls(op, args, attrs, given, sample.high)

    def taken(self, items: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """`items`, one for each operand, as the functions of the op take them; with attributes."""
        first = len(items) - len(self.given)
        optional = dict(zip(self.given, items[max(first, 0) :], strict=False))
        return items[: max(first, 0)], {**optional, **self.attrs}

    def types(self, args: Sequence[TensorType]) -> Types:
        required, named = self.taken(args)
        return self.op.types(tuple(required), named)

    def node(self, args: Sequence[Value]) -> Node:
        required, named = self.taken(args)
        return self.op.node(required, named)

    def reference(self, args: Sequence[Any]) -> tuple[Any, ...]:
        required, named = self.taken(args)
        return self.op.reference(*required, **named)

    def cost(self, args: Sequence[TensorType], results: Types) -> Cost:
        return self.op.cost(self.op.by_name(args, self.given), results, **self.attrs)

    def refuses(self, args: Sequence[TensorType]) -> str | None:
        """Why the op does not take these types; None if it does."""
        try:
            self.types(args)
        except VerifyError as error:
            return str(error)
        return None

    def changed(self, **attrs: Any) -> Case:
        return replace(self, attrs={**self.attrs, **attrs})


def sampled_ops() -> list[tuple[Op, Case]]:
    """Every op with each of its samples; aten ops have none."""
    return [(op, Case.of(op, s)) for op in list(Op.registry.values()) for s in op.samples]


def cost_of(op: Op, args: Sequence[TensorType], results: Types, **attrs: Any) -> Cost:
    """The cost of a node of required operands alone."""
    return op.cost(op.by_name(args), results, **attrs)
