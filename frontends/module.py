"""A compiled module that is no language model: called with tensors, it gives tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten

from ..codegen.entries import Backend, entry_name
from ..codegen.lower import lower
from ..compiler.interpret import bind_symbols
from ..compiler.ir import Graph
from ..compiler.pipeline import PassResult
from ..compiler.target import Target
from ..compiler.torch_types import torch_dtype
from ..compiler.weights import Weights
from ..runtime.driver import Driver, Executable


@dataclass(frozen=True)
class ModuleReport:
    """What the compiler did: the passes, and wall seconds by stage."""

    name: str
    target: str
    passes: tuple[PassResult, ...]
    seconds: Mapping[str, float]


class CompiledModule:
    """Calls the program that fits the shapes of its arguments; one is built for each new binding
    of the dynamic dims.
    """

    def __init__(
        self,
        graphs: Mapping[str, Graph],
        weights: Weights,
        target: Target,
        driver: Driver,
        backend: Callable[[], Backend | None],
        report: ModuleReport,
        structure: Any,
    ) -> None:
        """`backend` makes what generates kernels for `target`, None for the cpu; `structure` is
        the pytree spec of what the module returns."""
        self._graphs = dict(graphs)
        self._weights = weights
        self._target = target
        self._driver = driver
        self._backend = backend
        self._structure = structure
        self._programs: dict[tuple[int, ...], Executable] = {}
        self.report = report

    def graph(self, which: str = "final") -> Graph:
        """The IR as "traced", "final", or after the pass of that name. KeyError lists the names."""
        if which not in self._graphs:
            raise KeyError(f"no graph {which!r}; there are {', '.join(self._graphs)}")
        return self._graphs[which]

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """What the module gives for `inputs`. ValueError when they do not fit."""
        graph = self.graph()
        if len(inputs) != len(graph.params):
            raise ValueError(f"expected {len(graph.params)} inputs, found {len(inputs)}")
        named = {p.attrs["name"]: x for p, x in zip(graph.params, inputs, strict=True)}
        binding = bind_symbols(graph, {n: tuple(x.shape) for n, x in named.items()})
        key = tuple(binding[n] for n in graph.symbols if n in binding)
        if key not in self._programs:
            self._programs[key] = self._build(graph, binding)
        arrays: dict[str, Any] = {n: x.detach() for n, x in named.items()}
        results = self._programs[key].run(entry_name(binding), arrays)
        outputs = [
            torch.from_numpy(results[name]).to(torch_dtype(value.type.dtype))
            for name, value in zip(_output_names(graph), graph.outputs, strict=True)
        ]
        return tree_unflatten(outputs, self._structure)

    def _build(self, graph: Graph, binding: Mapping[str, int]) -> Executable:
        names = _output_names(graph)
        backend = self._backend()
        lowered = lower(graph, self._weights, self._target, [binding], names, backend=backend)
        return self._driver.load(lowered.program, lowered.load_weight)


def _output_names(graph: Graph) -> Sequence[str]:
    return [f"out.{i}" for i in range(len(graph.outputs))]
