"""Compilation of an `nn.Module` that is no language model, to a callable on tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

import torch
from numpy.typing import NDArray
from torch.export import export as export_program
from torch.utils._pytree import tree_unflatten

from ..codegen.entries import Backend
from ..codegen.lower import lower
from ..compiler.ambient import default_torch
from ..compiler.interpret import bind_symbols
from ..compiler.ir import Graph
from ..compiler.pipeline import PassContext, PassResult
from ..compiler.target import Target
from ..compiler.torch_types import torch_dtype
from ..passes.pipelines import module
from ..runtime.driver import Driver, Executable
from ..runtime.program import STEP
from .compilation import graphs_by_stage, kernel_backend, run_passes
from .held_weights import HeldWeights
from .importers.module_tensors import shared_copy
from .importers.torch_export import ImportFailure, import_program
from .importers.tracing import one_at_a_time
from .model import Compiled
from .module_check import check_module
from .module_inputs import module_input
from .options import CompileOptions
from .progress import Progress


@dataclass(frozen=True)
class ModuleReport:
    """What the compiler did: the passes, wall seconds by stage, and what of the import was
    checked."""

    name: str
    target: str
    passes: tuple[PassResult, ...]
    seconds: Mapping[str, float]
    import_check: str = ""


@dataclass(eq=False)
class CompiledModule(Compiled):
    """Calls the program that fits the shapes of its arguments; for a GPU one is built for each new
    binding of the dynamic dims.

    `backend` makes what generates kernels for `target`, None for the cpu; `structure` is the pytree
    spec of what the module returns. Calls of several threads take turns.
    """

    graphs: Mapping[str, Graph]
    report: ModuleReport
    tensors: HeldWeights
    target: Target
    driver: Driver
    backend: Callable[[], Backend | None]
    structure: Any
    programs: dict[tuple[int, ...], Executable] = field(default_factory=dict, init=False)
    lock: Lock = field(default_factory=Lock, init=False, repr=False)

    @default_torch()
    def __call__(self, *inputs: torch.Tensor | NDArray[Any]) -> Any:
        """What the module gives for `inputs`, tensors or numpy arrays (see `module_input`).

        ValueError when they do not fit, and for weights that were changed (see `HeldWeights`).
        """
        graph = self.graph()
        if len(inputs) != len(graph.params):
            raise ValueError(f"expected {len(graph.params)} inputs, found {len(inputs)}")
        named = {
            p.attrs["name"]: module_input(p.attrs["name"], p.type, x)
            for p, x in zip(graph.params, inputs, strict=True)
        }
        binding = bind_symbols(graph, {n: tuple(x.shape) for n, x in named.items()})
        symbols = binding if self.target.is_gpu else {}
        key = tuple(symbols.values())
        arrays: dict[str, Any] = {**named}
        with self.lock:
            self.tensors.check(building=key not in self.programs)
            if key not in self.programs:
                self.programs[key] = self._build(graph, symbols)
            results = self.programs[key].run(STEP, binding, arrays)
        outputs = [
            torch.from_numpy(results[name]).to(torch_dtype(value.type.dtype))
            for name, value in zip(_output_names(graph), graph.outputs, strict=True)
        ]
        return tree_unflatten(outputs, self.structure)

    def _build(self, graph: Graph, symbols: Mapping[str, int]) -> Executable:
        """The program where `symbols` have these values, and others any in their range."""
        names = _output_names(graph)
        ends = [{**{n: r[end] for n, r in graph.symbols.items()}, **symbols} for end in (0, -1)]
        bindings = ends[: 1 if self.target.is_gpu else 2]
        backend = self.backend()
        weights = self.tensors.weights
        lowered = lower(graph, weights, self.target, bindings, names, backend=backend)
        return self.driver.load(lowered.program, self.tensors.loader(lowered.load_weight))


def _output_names(graph: Graph) -> Sequence[str]:
    return [f"out.{i}" for i in range(len(graph.outputs))]


def compile_module(
    source: torch.nn.Module,
    example_inputs: Sequence[torch.Tensor],
    dynamic_shapes: Any,
    options: CompileOptions,
    target: Target,
    driver: Driver,
    progress: Progress,
) -> CompiledModule:
    """Trace `source` with torch.export, to which `dynamic_shapes` goes, and run the passes.

    A copy in eval mode is traced, which shares its tensors: `source` is not touched. ImportFailure
    where torch.export cannot, and unless the graph computes what the module does, call after call;
    SourceError for a module that cannot be copied.
    """
    copy = shared_copy(source)
    try:
        quiet = warnings.catch_warnings()
        with progress.timed("trace"), one_at_a_time(), torch.no_grad(), quiet:
            warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)  # torch's own
            warnings.filterwarnings("ignore", r".*was assigned during export")  # checked below
            program = export_program(copy, tuple(example_inputs), dynamic_shapes=dynamic_shapes)
            program = program.run_decompositions({})
    except Exception as error:  # the module's own code runs here, and may fail in any way
        raise ImportFailure(
            f"{type(source).__name__}: torch.export cannot trace it: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    with progress.timed("import"):
        imported = import_program(program, type(source).__name__, symbols=_bounds(program))
        held = {n: t for n, t in program.constants.items() if isinstance(t, torch.Tensor)}
        held |= program.state_dict
        if not target.is_gpu:  # who changes the module later would change what is not folded
            copies = {id(tensor): tensor.clone() for tensor in held.values()}
            held = {name: copies[id(tensor)] for name, tensor in held.items()}
        tensors = HeldWeights(held)
        weights = tensors.weights
    checked = ""
    if options.check_import:
        with progress.timed("check import"):
            checked = check_module(imported.graph, weights, source, example_inputs)
    passes = module() if options.passes is None else options.passes
    context = PassContext(target, weights)
    results = run_passes(imported.graph, passes, context, options, progress)
    return CompiledModule(
        graphs_by_stage(imported.graph, results),
        ModuleReport(imported.graph.name, target.name, tuple(results), progress.seconds, checked),
        tensors,
        target,
        driver,
        partial(kernel_backend, target, progress),
        program.call_spec.out_spec,
    )


def _bounds(program: Any) -> dict[str, range]:
    """The ranges of the program's symbols, in order of appearance in its inputs, as s0, s1, ..."""
    seen: dict[Any, range] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, torch.Tensor):
            continue
        for size in value.shape:
            if isinstance(size, torch.SymInt):
                for s in size.node.expr.free_symbols:
                    limits = program.range_constraints.get(s)
                    low = int(limits.lower) if limits is not None else 1
                    high = limits.upper if limits is not None else 2**31
                    top = int(high) if high.is_finite and high < 2**31 else 2**31
                    seen.setdefault(s, range(max(low, 1), top + 1))
    return {f"s{i}": bounds for i, bounds in enumerate(seen.values())}
