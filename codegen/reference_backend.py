"""The cpu target: every node is its reference, a callable over tensor views."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..compiler.ir import Node, Value, show_attr
from ..compiler.ops.collective import Communicator
from ..compiler.ops.shape import view
from ..compiler.types import TensorType
from ..runtime.program import Kernel, Launch, Slice
from .entries import Bound, BoundGroup, Choice, EntryBuilder


class ReferenceBackend:
    """Launches of references: one a node."""

    def __init__(self, communicator: Communicator | None = None) -> None:
        self.choices: list[Choice] = []
        self._kernels: dict[str, Kernel] = {}
        self._communicator = communicator

    def kernels(self) -> Mapping[str, Kernel]:
        """See Backend.kernels."""
        return self._kernels

    def groups(self, nodes: Sequence[Node]) -> Sequence[tuple[Node, ...]]:
        """See Backend.groups: references compute one node at a time."""
        return [(node,) for node in nodes]

    def packed(self, node: Node, position: int) -> tuple[Value, Value] | None:
        """References compute with numbers: no packed weight is read as it is."""
        return None

    def view(self, bound: Bound) -> Slice | None:
        """See Backend.view."""
        source = bound.args[0] if bound.node.op is view else None
        shape: Any = bound.types[0].shape
        return replace(source, shape=shape) if isinstance(source, Slice) else None

    def emit(self, bound: Bound, builder: EntryBuilder, results: tuple[Slice, ...]) -> None:
        """See Backend.emit."""
        node, args = bound.node, bound.args
        types: list[Any] = [a.type.bind(builder.binding) for a in node.args]
        id_ = kernel_id(node, types, bound.attrs, bound.in_place)
        if id_ not in self._kernels:
            run = reference_kernel(node, bound.attrs, bound.in_place, self._communicator)
            self._kernels[id_] = Kernel(id_, node.op.name, run)
        given: tuple[Any, ...] = args if bound.in_place else (*args, *results)
        label = f"{node.op.name} {node.source}".strip()
        reads = [a for a in args if isinstance(a, Slice)]
        builder.launch(Launch(id_, given, label=label), reads, results)

    def emit_group(
        self, group: BoundGroup, builder: EntryBuilder, results: tuple[Slice, ...]
    ) -> None:
        """See Backend.emit_group; ValueError: there are no groups of several."""
        raise ValueError(f"expected one node at a time, found {list(group.nodes)}")

    def copy(self, source: Slice, target: Slice, builder: EntryBuilder) -> None:
        """See Backend.copy."""
        kernel = self._kernels.setdefault("copy", Kernel("copy", "copy", _copy))
        launch = Launch(kernel.id, (source, target), label=f"copy {target.buffer}")
        builder.launch(launch, [source], [target])


def kernel_id(
    node: Node, types: Sequence[TensorType], attrs: Mapping[str, Any], in_place: bool
) -> str:
    """The content hash of what a node computes and where to: equal kernels are one kernel."""
    shown = ", ".join(f"{k}={show_attr(v)}" for k, v in sorted(attrs.items()))
    required, optional = node.taken([str(t) for t in types])
    operands = ", ".join([*required, *(f"{name}={type_}" for name, type_ in optional.items())])
    text = f"{node.op.name}({operands}; {shown}) in place: {in_place}"
    return hashlib.sha256(text.encode()).hexdigest()


def reference_kernel(
    node: Node, attrs: Mapping[str, Any], in_place: bool, communicator: Communicator | None
) -> Callable[..., None]:
    """A callable over tensor views, outputs last, that computes a node by its reference."""
    op, count = node.op, len(node.args)
    line = {"communicator": communicator} if op.collective else {}

    def run(*args: Any) -> None:
        required, optional = node.taken(args[:count])
        results = op.reference(*required, **optional, **attrs, **line)
        for out, result in zip(args[count:], results, strict=True):
            out.copy_(result)

    def run_in_place(*args: Any) -> None:
        assert op.inplace
        op.inplace(*args, **attrs)

    return run_in_place if in_place else run


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)
