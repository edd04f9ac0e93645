"""The public API: `compile` a model, `compile_to` an ingot, `load` and serve one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import torch

from ..codegen.cpu import CPU, CpuDriver, check_memory
from ..codegen.lower import Lowered
from ..codegen.price_table import add_points, known_points
from ..compiler.ambient import default_torch
from ..compiler.target import target_of
from ..passes.transforms.mxfp4_policy import MXFP4
from ..runtime.artifact.atomic_write import check_free
from ..runtime.devices.graph_executable import GpuDriver
from ..runtime.driver import Driver
from .aot import export
from .bench.tune import tune
from .compilation import ALL, LoweredModel, lower_language_model
from .drivers import driver_here, present_target
from .importers.source_error import SourceError
from .loading import IngotError, LoadedModel, load
from .model import Model, Plan, WrittenIngot
from .module import CompiledModule, compile_module
from .options import (
    AUTO,
    CompileKeywords,
    CompileOptions,
    GenerateOptions,
    NotYetError,
    keywords_of,
)
from .progress import Progress
from .speculate import MTP, Draft, Eagle3, NGram, Speculation, open_session
from .text.completion import Completion, TextEvent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@overload
def compile(source: str | Path | PreTrainedModel, **options: Unpack[CompileKeywords]) -> Model: ...
@overload
def compile(
    source: torch.nn.Module,
    *,
    example_inputs: Sequence[torch.Tensor],
    dynamic_shapes: object = None,
    **options: Unpack[CompileKeywords],
) -> CompiledModule: ...
@keywords_of(CompileOptions)
@default_torch()
def compile(
    source: str | Path | torch.nn.Module,
    *,
    example_inputs: Sequence[torch.Tensor] | None = None,
    dynamic_shapes: object = None,
    **options: Unpack[CompileKeywords],
) -> Model | CompiledModule:
    """Compile `source`: a Hugging Face directory, a `PreTrainedModel`, or an `nn.Module`.

    A language model becomes a Model that serves, with the weights that `source` has now. An
    `nn.Module` needs `example_inputs`, becomes a CompiledModule, and is traced with torch.export,
    to which `dynamic_shapes` goes. The other keywords are the fields of CompileOptions, which says
    what they mean.

    The cpu target computes with dequantized weights; the report lists the quantized ones.
    `compile_to` compiles for devices that are not present.

    With `tensor_parallel` N ranks, which are threads of this process, each compute with their share
    of the weights; the graphs and the passes of the report are the first rank's. PassError tells of
    heads and dims that do not divide. With `passes` of your own, put ShardTensorParallel(N, 0)
    among them. `target` "auto" is then the cpu.

    Raises SourceError for a checkpoint that cannot be read, ImportFailure for a model that cannot
    be expressed, PassError for a pass that broke the graph, NoKernelError and BuildError where a
    GPU cannot compute it, DriverMissingError, DeviceError or NoDriverError where the device is not
    here, NotEnoughMemory (a MemoryError) where this host cannot hold the program, UnsupportedTarget
    and NotYetError for options that this version does not have, ValueError for wrong arguments.
    """
    chosen = CompileOptions(**options)
    ranks = chosen.tensor_parallel
    target = target_of("cpu" if chosen.target == AUTO and ranks > 1 else _target(chosen))
    driver = driver_here(target.name)
    with Progress(enabled=chosen.progress) as progress:
        model = _language_model(source, given=example_inputs is not None)
        if model is None:
            assert isinstance(source, torch.nn.Module)
            if chosen.dtype is not None:
                raise ValueError("dtype: a module keeps its own; convert it before (module.to)")
            if chosen.quantize is not None:
                raise NotYetError("quantize: this version packs only language models' weights")
            if chosen.tune:
                raise NotYetError("tune: this version times the kernels of language models only")
            if ranks > 1:
                raise NotYetError("tensor_parallel: this version splits language models only")
            if chosen.speculation is not None:
                raise ValueError("speculate: a module has no tokens to draft")
            if example_inputs is None:
                raise ValueError("an nn.Module needs example_inputs=(tensor, …) to be traced with")
            if not isinstance(example_inputs, list | tuple):
                raise TypeError(
                    "example_inputs: expected a tuple of tensors, found a "
                    f"{type(example_inputs).__name__}"
                )
            return compile_module(
                source, example_inputs, dynamic_shapes, chosen, target, driver, progress
            )
        if example_inputs is not None or dynamic_shapes is not None:
            raise ValueError("example_inputs and dynamic_shapes belong to an nn.Module")
        if chosen.tune:
            _tune(model, chosen, driver, progress)
        lowered = lower_language_model(model, chosen, target, progress)
        held = () if isinstance(model, str | Path) else (*model.parameters(), *model.buffers())
        return _open(lowered, driver, progress, held, chosen.speculation)


@keywords_of(CompileOptions)
@default_torch()
def compile_to(
    source: str | Path | PreTrainedModel,
    path: str | Path,
    *,
    overwrite: bool = False,
    **options: Unpack[CompileKeywords],
) -> WrittenIngot:
    """Compile a language model into an ingot at `path`, without running it.

    The device of `target` need not be there, and of the weights one at a time is in memory. Options
    and errors are those of `compile`, and those of `export` in `aot`.
    """
    chosen = _for_one_device(options)
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path: expected where to write, found a {type(path).__name__}")
    if not isinstance(overwrite, bool):
        raise TypeError(f"overwrite: expected True or False, found {overwrite!r:.80}")
    check_free(Path(path), overwrite)  # before compiling, which takes minutes
    if (model := _language_model(source)) is None:
        raise NotYetError("an ingot holds a language model; a module is compiled where it runs")
    with Progress(enabled=chosen.progress) as progress:
        if chosen.tune:
            _tune(model, chosen, driver_here(_target(chosen)), progress)
        lowered = lower_language_model(model, chosen, target_of(_target(chosen)), progress)
        with progress.timed("write"):
            progress.count(0, lowered.weight_count)
            manifest = export(
                lowered.exportable, path, overwrite=overwrite, written=lambda _: progress.done()
            )
    return WrittenIngot(Path(path), manifest, lowered.graphs, lowered.report())


@keywords_of(CompileOptions)
@default_torch()
def plan(
    source: str | Path | PreTrainedModel,
    *,
    entry: str | None = None,
    **options: Unpack[CompileKeywords],
) -> Plan:
    """Compile a language model to look at it: its device need not be there, nor its weights.

    A directory may hold config.json alone. Of the kernels those of `entry` are built: the name of
    one, how many tokens it is for, or "all"; by default the first, which is a step of decoding.
    Other options and errors are those of `compile`.
    """
    chosen = _for_one_device(options)
    if (model := _language_model(source)) is None:
        raise NotYetError("only language models are planned; a module is compiled where it runs")
    with Progress(enabled=chosen.progress) as progress:
        if chosen.tune:
            _tune(model, chosen, driver_here(_target(chosen)), progress)
        lowered = lower_language_model(
            model, chosen, target_of(_target(chosen)), progress, plan_only=True, entry=entry
        )
    return Plan(lowered.exportable.lowered.program, lowered.graphs, lowered.report())


def _target(options: CompileOptions) -> str:
    return present_target() if options.target == AUTO else options.target


def _tune(
    source: str | Path | PreTrainedModel,
    options: CompileOptions,
    driver: Driver,
    progress: Progress,
) -> None:
    """Add to the user's table of prices what it lacks of this device's kernels for `source`."""
    if not isinstance(driver, GpuDriver):
        raise ValueError("tune: expected a GPU target, found cpu, which has no kernels to choose")
    device = driver.info.name
    with progress.timed("tune"):
        points = tune(source, options, driver, progress, known_points(driver.target, device))
        add_points(driver.target, device, points)


def _for_one_device(options: CompileKeywords) -> CompileOptions:
    chosen = CompileOptions(**options)
    if chosen.tensor_parallel > 1:
        raise NotYetError(
            f"tensor_parallel={chosen.tensor_parallel}: an ingot or a plan is of a whole model"
        )
    return chosen


def _language_model(source: Any, *, given: bool = False) -> str | Path | PreTrainedModel | None:
    """`source`, unwrapped; None for a module that is no transformers model.

    A module whose config has a model_type is one, or, with example inputs `given`, may be a wrapper
    that is traced as a module. TypeError for what is no model at all.
    """
    if isinstance(source, str | Path):
        return source
    if not isinstance(source, torch.nn.Module):
        raise TypeError(
            "expected the path of a model directory, a PreTrainedModel or an nn.Module, "
            f"found {type(source).__name__}"
        )
    if not hasattr(getattr(source, "config", None), "model_type"):
        return None
    from .importers.in_memory import unwrapped  # needs transformers, which is an extra

    try:
        return unwrapped(source)
    except SourceError:
        if given:
            return None
        raise


def _open(
    model: LoweredModel,
    driver: Driver,
    progress: Progress,
    held: Sequence[torch.Tensor],
    speculation: Speculation | None,
) -> Model:
    """Load the weights of `model` and make it ready to serve.

    What is `held` by a model in memory is copied: who changes that later would change some of the
    weights, and not those that are folded.
    """
    storages = {tensor.untyped_storage().data_ptr() for tensor in held}

    def load_weight(rank: Lowered, name: str) -> torch.Tensor:
        tensor = rank.load_weight(name)
        progress.done()
        return tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor

    programs = [rank.program for rank in model.ranks]
    if programs[0].target == CPU:
        check_memory(programs, model.exportable.model_type, mapped=False)
    loaders = [partial(load_weight, rank) for rank in model.ranks]
    with progress.timed("load weights"):
        progress.count(0, model.weight_count)
        if len(programs) == 1:
            executable = driver.load(programs[0], loaders[0])
        else:
            executable = CpuDriver().load_ranks(programs, loaders)
    session, exportable = open_session(programs[0], executable, speculation), model.exportable
    stops = exportable.stop_tokens
    return Model(session, model.tokenizer, stops, exportable, model.graphs, model.report())


__all__ = [
    "ALL",
    "MTP",
    "MXFP4",
    "CompileOptions",
    "CompiledModule",
    "Completion",
    "Draft",
    "Eagle3",
    "GenerateOptions",
    "IngotError",
    "LoadedModel",
    "Model",
    "NGram",
    "NotYetError",
    "TextEvent",
    "WrittenIngot",
    "compile",
    "compile_to",
    "load",
    "plan",
]
