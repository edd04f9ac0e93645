"""The front door: `compile` a model, or `compile_to` an ingot, which `load` serves."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch.export import export as export_program

from ..codegen.entries import entry_name
from ..codegen.lower import UnsupportedTarget, lower, serving_bindings
from ..compiler.ir import Graph
from ..compiler.pipeline import Pass, PassContext, PassResult, run_pipeline
from ..compiler.target import Target, target_of
from ..compiler.torch_types import TORCH_DTYPES, dtype_name
from ..compiler.validate import check_rewrite
from ..compiler.weights import Weights
from ..passes.pipelines import causal_lm, module
from ..passes.serving.insert_kv_cache import InsertKvCache
from ..passes.serving.sample_on_device import output_names
from ..passes.transforms.mxfp4_policy import MXFP4
from ..passes.transforms.quantize_mxfp4 import QuantizeMxfp4
from ..passes.transforms.shard_tensor_parallel import ShardTensorParallel
from ..runtime.artifact.writer import check_free
from ..runtime.devices.collectives import ProcessGroup
from ..runtime.driver import Driver
from ..runtime.serving.session import Session
from .aot import Exportable, export
from .cli.launches import chosen_entry
from .drivers import driver_here, present_target
from .importers.torch_export import import_program
from .loading import IngotError, LoadedModel, load
from .model import Model, NotYetError, Plan, Report, WrittenIngot, entry_sizes
from .module import CompiledModule, ModuleReport
from .progress import Progress
from .text.calibration import TextCalibration
from .text.completion import Completion, TextEvent
from .text.tokenizer import Tokenizer
from .weight_report import PackingErrors, weight_reports

if TYPE_CHECKING:
    from ..codegen.kernel_backend import KernelBackend


def compile(
    source: Any,
    *,
    target: str = "auto",
    quantize: str | MXFP4 | None = None,
    speculate: str | None = None,
    tensor_parallel: int = 1,
    max_sequences: int = 8,
    max_tokens_per_sequence: int = 4096,
    dtype: str | torch.dtype | None = None,
    passes: Sequence[Pass] | None = None,
    verify: bool = False,
    progress: bool = True,
    example_inputs: Sequence[torch.Tensor] | None = None,
    dynamic_shapes: Any = None,
) -> Any:
    """Compile `source`: a Hugging Face directory, a `PreTrainedModel`, or an `nn.Module`.

    A language model becomes a Model that serves up to `max_sequences` sequences at once, each of up
    to `max_tokens_per_sequence` tokens (less where the model was made for less). `dtype` None keeps
    the checkpoint's; weights are converted as they are loaded. An `nn.Module` needs
    `example_inputs`, becomes a CompiledModule, and is traced with torch.export, to which
    `dynamic_shapes` goes.

    `quantize` "mxfp4", or an MXFP4 with options, packs the weights of products; the report lists
    them. The cpu target computes with what the packed weights stand for. Options that need a text
    (GPTQ) run the model over it, which takes a while.

    `tensor_parallel` N splits a language model over N processes that were started together
    (torchrun) and share a gloo group of torch.distributed: each calls `compile` with the same
    arguments, loads its share of the weights, and then makes the same calls; every one gets the
    same tokens. GroupError tells what is amiss with the group, PassError heads and dims that do not
    divide. With `passes` of your own, put ShardTensorParallel among them.

    `target` "auto" is the first GPU of this machine, or "cpu" where it has none (and with
    `tensor_parallel`); code for a device that is not here is compiled by `compile_to`. `passes`
    replaces the pipeline. `verify` runs every rewritten region, before and after, on sampled
    inputs. `progress` shows a bar on stderr.

    Raises SourceError for a checkpoint that cannot be read, ImportFailure for a model that cannot
    be expressed, PassError for a pass that broke the graph, NoKernelError and BuildError where a
    GPU cannot compute it, DriverMissingError, DeviceError or NoDriverError where the device is not
    here, UnsupportedTarget and NotYetError for options that this version does not have, ValueError
    for wrong arguments.
    """
    chosen = _target("cpu" if target == "auto" and tensor_parallel > 1 else target)
    driver = driver_here(chosen.name)
    packing = _quantization(quantize)
    if packing is not None and packing.calibrated and tensor_parallel > 1:
        raise ValueError(
            f"quantize: calibration runs the whole model, not one of {tensor_parallel} ranks: "
            "quantize into a directory first, then compile that with tensor_parallel="
            f"{tensor_parallel}"
        )
    _check_options(speculate, tensor_parallel, max_sequences, max_tokens_per_sequence)
    group = ProcessGroup(tensor_parallel) if tensor_parallel > 1 else None
    with Progress(enabled=progress) as bar:
        stages = _Stages(bar)
        check = check_rewrite if verify else None
        if _is_module(source):
            if dtype is not None:
                raise ValueError("dtype: a module keeps its own; convert it before (module.to)")
            if packing is not None:
                raise NotYetError("quantize: this version packs only language models' weights")
            if group:
                raise NotYetError("tensor_parallel: this version splits language models only")
            return _compile_module(
                source, example_inputs, dynamic_shapes, chosen, driver, passes, check, stages
            )
        if example_inputs is not None or dynamic_shapes is not None:
            raise ValueError("example_inputs and dynamic_shapes belong to an nn.Module")
        lowered = _lower_language_model(
            source,
            chosen,
            max_sequences,
            max_tokens_per_sequence,
            _dtype(dtype),
            packing,
            passes,
            check,
            stages,
            group,
        )
        return _open(lowered, driver, stages, group)


def compile_to(
    source: Any,
    path: str | Path,
    *,
    overwrite: bool = False,
    target: str = "auto",
    quantize: str | MXFP4 | None = None,
    max_sequences: int = 8,
    max_tokens_per_sequence: int = 4096,
    dtype: str | torch.dtype | None = None,
    passes: Sequence[Pass] | None = None,
    verify: bool = False,
    progress: bool = True,
) -> WrittenIngot:
    """Compile a language model into an ingot at `path`, without running it.

    The device of `target` need not be there, and of the weights one at a time is in memory. Options
    and errors are those of `compile`, and those of `export` in `aot`.
    """
    chosen, packing = _target(target), _quantization(quantize)
    check_free(Path(path), overwrite)  # told before the minutes that compiling takes
    _check_options(None, 1, max_sequences, max_tokens_per_sequence)
    if _is_module(source):
        raise NotYetError("an ingot holds a language model; a module is compiled where it runs")
    with Progress(enabled=progress) as bar:
        stages = _Stages(bar)
        lowered = _lower_language_model(
            source,
            chosen,
            max_sequences,
            max_tokens_per_sequence,
            _dtype(dtype),
            packing,
            passes,
            check_rewrite if verify else None,
            stages,
            None,
        )
        with stages("write"):
            bar.expect(lowered.weight_count)
            manifest = export(
                lowered.exportable, path, overwrite=overwrite, written=lambda _: bar.advance()
            )
    return WrittenIngot(Path(path), manifest, lowered.graphs, lowered.report())


def plan(
    source: Any,
    *,
    target: str = "auto",
    entry: str | None = None,
    quantize: str | MXFP4 | None = None,
    max_sequences: int = 8,
    max_tokens_per_sequence: int = 4096,
    dtype: str | torch.dtype | None = None,
    passes: Sequence[Pass] | None = None,
    verify: bool = False,
    progress: bool = True,
) -> Plan:
    """Compile a language model to look at it: its device need not be there, nor its weights.

    A directory may hold config.json alone. Of the kernels those of `entry` are built: the name of
    one, or how many tokens it is for; by default the first, which is a step of decoding. Other
    options and errors are those of `compile`.
    """
    chosen, packing = _target(target), _quantization(quantize)
    _check_options(None, 1, max_sequences, max_tokens_per_sequence)
    if _is_module(source):
        raise NotYetError("only language models are planned; a module is compiled where it runs")
    with Progress(enabled=progress) as bar:
        stages = _Stages(bar)
        lowered = _lower_language_model(
            source,
            chosen,
            max_sequences,
            max_tokens_per_sequence,
            _dtype(dtype),
            packing,
            passes,
            check_rewrite if verify else None,
            stages,
            None,
            plan_only=True,
            entry=entry,
        )
    program = lowered.exportable.lowered.program
    name = chosen_entry([e.name for e in program.entries], entry)
    return Plan(program, name, lowered.graphs, lowered.report())


class _Stages:
    """Times the stages of one compilation and tells the progress bar of them."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Generator[None, None, None]:
        self.bar.stage(name)
        start = perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    def run(
        self,
        graph: Graph,
        steps: Sequence[Pass],
        context: PassContext,
        check: Callable[..., None] | None,
    ) -> list[PassResult]:
        with self("passes"):
            return run_pipeline(graph, steps, context, check=check, progress=self.bar.stage)


def _target(name: str) -> Target:
    return target_of(present_target() if name == "auto" else name)


def _backend(
    target: Target, group: ProcessGroup | None, stages: _Stages, only: str | None = None
) -> KernelBackend | None:
    """What generates kernels for a GPU, of the entry `only` if one is named; None for the cpu."""
    if not target.is_gpu:
        return None
    if group is not None:
        raise UnsupportedTarget(
            f"tensor_parallel: this version exchanges data between cpu processes only, not on "
            f"{target.name}"
        )
    from ..codegen.kernel_backend import KernelBackend  # needs triton

    return KernelBackend(target, stages.bar.count, only)


def _quantization(given: str | MXFP4 | None) -> MXFP4 | None:
    if given is None or isinstance(given, MXFP4):
        return given
    if given != "mxfp4":
        raise ValueError(f"quantize: expected 'mxfp4', an MXFP4 or None, found {given!r}")
    return MXFP4()


def _check_options(
    speculate: str | None,
    tensor_parallel: int,
    max_sequences: int,
    max_tokens_per_sequence: int,
) -> None:
    for name, value, default in (("speculate", speculate, None),):
        if value != default:
            raise NotYetError(f"{name}={value!r}: this version supports only {name}={default!r}")
    for name, value in (
        ("tensor_parallel", tensor_parallel),
        ("max_sequences", max_sequences),
        ("max_tokens_per_sequence", max_tokens_per_sequence),
    ):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    floats = {n: t for n, t in TORCH_DTYPES.items() if n in ("f16", "bf16", "f32", "f64")}
    known = {**floats, **{str(t).removeprefix("torch."): t for t in floats.values()}}
    if dtype not in known:
        raise ValueError(f"dtype: expected one of {', '.join(known)}; found {dtype!r}")
    return known[dtype]


def _is_module(source: Any) -> bool:
    """A module that is no transformers model (those have a config with a model_type)."""
    config = getattr(source, "config", None)
    return isinstance(source, torch.nn.Module) and not hasattr(config, "model_type")


def _graphs(traced: Graph, results: Sequence[PassResult]) -> dict[str, Graph]:
    """Every stage by name; "final" is the last."""
    final = results[-1].graph if results else traced
    return {"traced": traced, **{r.name: r.graph for r in results}, "final": final}


def _compile_module(
    source: torch.nn.Module,
    example_inputs: Sequence[torch.Tensor] | None,
    dynamic_shapes: Any,
    target: Target,
    driver: Driver,
    passes: Sequence[Pass] | None,
    check: Callable[..., None] | None,
    stages: _Stages,
) -> CompiledModule:
    if example_inputs is None:
        raise ValueError("an nn.Module needs example_inputs=(tensor, ...) to be traced with")
    training = source.training
    try:
        with stages("trace"), torch.no_grad():
            program = export_program(
                source.eval(), tuple(example_inputs), dynamic_shapes=dynamic_shapes
            )
            program = program.run_decompositions({})
    finally:
        source.train(training)
    with stages("import"):
        imported = import_program(program, type(source).__name__, symbols=_bounds(program))
        held = {n: t for n, t in program.constants.items() if isinstance(t, torch.Tensor)}
        weights = Weights.of({**held, **program.state_dict}, "the module")
    context = PassContext(target, weights)
    results = stages.run(imported.graph, module() if passes is None else passes, context, check)
    report = ModuleReport(imported.graph.name, target.name, tuple(results), stages.seconds)
    structure = program.call_spec.out_spec
    return CompiledModule(
        _graphs(imported.graph, results),
        weights,
        target,
        driver,
        lambda: _backend(target, None, stages),
        report,
        structure,
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


@dataclass(frozen=True)
class _LoweredModel:
    """A language model on its way: all but its weights, which no one has loaded yet."""

    exportable: Exportable
    graphs: Mapping[str, Graph]
    tokenizer: Tokenizer | None
    report: Callable[[], Report]  # with the errors of the weights that were loaded so far

    @property
    def weight_count(self) -> int:
        buffers = self.exportable.lowered.program.buffers.values()
        return sum(b.kind == "weight" for b in buffers)


def _open(
    model: _LoweredModel, driver: Driver, stages: _Stages, group: ProcessGroup | None
) -> Model:
    """Load the weights of `model` and make it ready to serve."""
    lowered = model.exportable.lowered
    with stages("load weights"):
        stages.bar.expect(model.weight_count)

        def load_weight(name: str) -> torch.Tensor:
            tensor = lowered.load_weight(name)
            stages.bar.advance()
            return tensor

        draw_seed = group.draw_seed if group else None
        session = Session(lowered.program, driver, load_weight, draw_seed=draw_seed)
    return Model(session, model.exportable, model.graphs, model.report(), model.tokenizer)


def _lower_language_model(
    source: Any,
    target: Target,
    max_sequences: int,
    max_tokens: int,
    dtype: torch.dtype | None,
    packing: MXFP4 | None,
    passes: Sequence[Pass] | None,
    check: Callable[..., None] | None,
    stages: _Stages,
    group: ProcessGroup | None,
    plan_only: bool = False,
    entry: str | None = None,
) -> _LoweredModel:
    """The whole way to a program; with `plan_only` to one of which only `entry` has its kernels,
    and whose weights need not be there."""
    from .importers.huggingface import import_hugging_face  # needs transformers, which is an extra

    with stages("trace and import"):
        model = import_hugging_face(
            source, dtype=dtype, max_tokens=max_tokens, weightless=plan_only
        )
    if passes is None:
        passes = causal_lm(
            max_sequences=max_sequences,
            max_tokens_per_sequence=model.max_tokens,
            quantize=packing,
            shard=ShardTensorParallel(group.ranks, group.rank) if group else None,
            sample=target.is_gpu,
        )
    elif packing is not None:
        raise ValueError("quantize: with passes=, put a QuantizeMxfp4 among them")
    directory = None if isinstance(source, torch.nn.Module) else Path(source)
    tokenizer = Tokenizer.open(directory) if directory else None
    calibration = TextCalibration(tokenizer, model.max_tokens, stages.bar)
    context = PassContext(target, model.weights, calibration)
    results = stages.run(model.graph, passes, context, check)
    graphs = _graphs(model.graph, results)
    final = graphs["final"]
    if (meta := context.facts.get(InsertKvCache.name)) is None:
        raise ValueError(f"a serving pipeline has {InsertKvCache.name}, found none in passes=")
    assert context.weights is not None
    weights = context.weights
    errors = PackingErrors()
    with stages("lower"):
        bindings = serving_bindings(meta["max_sequences"], meta["max_tokens_per_sequence"])
        only = chosen_entry(list(map(entry_name, bindings)), entry) if plan_only else None
        backend = _backend(target, group, stages, only)
        outputs = output_names(final)
        lowered = lower(
            final, weights, target, bindings, outputs, meta, errors.observe, group, backend
        )
    stops = tokenizer.stop_token_ids if tokenizer else _eos(source, model.config)
    if group:
        group.agree(_exchanges(final, meta, stops))
    exportable = Exportable(
        lowered,
        final,
        model.config.model_type,
        dtype_name(model.dtype),
        frozenset(stops),
        tokenizer.files if tokenizer else {},
    )

    def report() -> Report:
        buffers = lowered.program.buffers.values()
        return Report(
            model_type=exportable.model_type,
            target=target.name,
            dtype=exportable.dtype,
            passes=tuple(results),
            entries=entry_sizes(lowered.program),
            weight_bytes=sum(b.nbytes for b in buffers if b.kind == "weight"),
            state_bytes=sum(b.nbytes for b in buffers if b.kind == "state"),
            arena_bytes=lowered.program.arena_bytes,
            unused=model.unused,
            seconds=stages.seconds,
            weights=weight_reports(context.facts.get(QuantizeMxfp4.name, ()), errors),
            choices=tuple(lowered.choices),
            kernels_built=len(lowered.program.kernels) - backend.from_cache if backend else 0,
            kernels_cached=backend.from_cache if backend else 0,
        )

    return _LoweredModel(exportable, graphs, tokenizer, report)


def _exchanges(final: Graph, meta: Mapping[str, Any], stops: Iterable[int]) -> str:
    """What must be the same on every rank: the collectives in order, and what steps depend on."""
    lines = [
        f"{node.op.name} {node.attrs} {node.types}" for node in final.nodes() if node.op.collective
    ]
    return "\n".join([*lines, str(sorted(meta.items())), str(sorted(stops))])


def _eos(source: Any, config: Any) -> set[int]:
    """The end-of-text ids of a model without a tokenizer: its generation config's and its own."""
    found: set[int] = set()
    for holder in (getattr(source, "generation_config", None), config, config.get_text_config()):
        eos = getattr(holder, "eos_token_id", None)
        found |= set(eos) if isinstance(eos, list) else set() if eos is None else {eos}
    return found


__all__ = [
    "MXFP4",
    "CompiledModule",
    "Completion",
    "IngotError",
    "LoadedModel",
    "Model",
    "TextEvent",
    "WrittenIngot",
    "compile",
    "compile_to",
    "load",
    "plan",
]
