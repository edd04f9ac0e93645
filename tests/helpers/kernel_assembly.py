"""What a node becomes for a GPU target, down to the assembly, at sizes of real models.

Only types are given, so that no weight is made; nothing runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ingot.codegen.build import compiled
from ingot.codegen.kernel_source import KernelSource
from ingot.codegen.lower import lower
from ingot.compiler.ir import Graph, Op, Value
from ingot.compiler.ops.leaf import constant, param
from ingot.compiler.ops.mxfp4 import mxfp4
from ingot.compiler.target import Target, target_of
from ingot.compiler.types import TensorType
from ingot.compiler.weights import Entry, Weights
from interpreted import InterpretedBackend
from pass_checks import for_target


@dataclass(frozen=True)
class Held:
    """A dense weight."""

    type: TensorType


@dataclass(frozen=True)
class HeldPacked:
    """A weight in MXFP4."""

    type: TensorType
    group: int = 32


def sources(
    op: Op,
    args: Sequence[TensorType | Held | HeldPacked],
    attrs: Mapping[str, Any],
    target: str,
    prefer: str = "",
) -> list[KernelSource]:
    """The kernels that compute the node, in the order of their first launches; `prefer` is as
    `select` has it. Optional operands are Held among `attrs`."""
    held: dict[str, TensorType] = {}
    params: list[Value] = []

    def weight(name: str, type_: TensorType) -> Value:
        held[name] = type_
        return constant(name=name, type=type_)

    def value(i: int, arg: TensorType | Held | HeldPacked) -> Value:
        match arg:
            case Held(type_):
                return weight(f"w{i}", type_)
            case HeldPacked(type_, group):
                *lead, k = (int(d) for d in type_.shape)
                codes = weight(f"w{i}.codes", TensorType("u8", (*lead, k // 2)))
                scales = weight(f"w{i}.scales", TensorType("u8", (*lead, k // group)))
                return mxfp4(codes, scales, dtype=type_.dtype)
            case TensorType():
                params.append(param(name=f"x{i}", type=arg))
                return params[-1]

    values = tuple(value(i, arg) for i, arg in enumerate(args))
    named = {n: weight(n, v.type) if isinstance(v, Held) else v for n, v in attrs.items()}
    graph = Graph("node", tuple(params), op.node(values, named).results, {})

    def no_data() -> Any:
        raise AssertionError("a weight was asked for where nothing runs")

    weights = Weights({n: Entry(t, no_data, "the test") for n, t in held.items()})
    backend = InterpretedBackend(target_of(target), prefer=prefer)
    names = [f"out{i}" for i in range(len(graph.outputs))]
    graph = for_target(graph, target_of(target))
    lower(graph, weights, target_of(target), [{}], names, backend=backend)
    return list(backend.sources.values())


@dataclass(frozen=True)
class Assembly:
    """AMD's assembly of one kernel."""

    text: str

    @classmethod
    def of(cls, source: KernelSource, target: Target) -> Assembly:
        return cls(compiled(source, target).asm["amdgcn"])

    @property
    def instructions(self) -> Counter[str]:
        """How often each instruction stands in the text."""
        return Counter(re.findall(r"^\s+((?:v|s|ds|global|buffer)_\w+)", self.text, re.MULTILINE))

    @property
    def loop(self) -> Counter[str]:
        """Of the longest loop alone: from a label to the last branch back to it."""
        lines = self.text.splitlines()
        labels: dict[str, int] = {}
        longest: list[str] = []
        for i, line in enumerate(lines):
            if label := re.match(r"(\.LBB\w+):", line):
                labels[label[1]] = i
            branch = re.search(r"\bs_c?branch\w*\s+(\.LBB\w+)", line)
            if branch and branch[1] in labels:
                longest = max(longest, lines[labels[branch[1]] : i + 1], key=len)
        return Assembly("\n".join(longest)).instructions
