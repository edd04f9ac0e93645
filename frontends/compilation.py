"""From a language model to a program: trace, passes, lowering; its weights are not loaded yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..codegen.lower import Lowered, UnsupportedTarget, lower, serving_bindings
from ..compiler.ir import Graph
from ..compiler.pipeline import Pass, PassContext, PassResult, run_pipeline
from ..compiler.target import Target
from ..compiler.torch_types import dtype_name, torch_dtype
from ..compiler.validate import RewriteCheck
from ..passes.pipelines import STAGES, TARGET, causal_lm, of_rank
from ..passes.serving.insert_kv_cache import InsertKvCache
from ..passes.serving.sample_on_device import output_names
from ..passes.transforms.quantize_mxfp4 import QuantizeMxfp4
from ..passes.transforms.shard_tensor_parallel import ShardTensorParallel
from ..runtime.program import entry_name
from .aot import Exportable
from .launches import chosen_entry
from .model import Report, entry_sizes
from .options import CompileOptions
from .progress import Progress
from .speculate import Draft
from .text.calibration import TextCalibration
from .text.generation_config import not_taken
from .text.special_tokens import read_json
from .text.tokenizer import Tokenizer, stop_tokens
from .weight_report import PackingErrors, weight_reports

if TYPE_CHECKING:
    from ..codegen.kernel_backend import KernelBackend
    from .importers.meta_model import PreTrainedModel

# In place of the name of an entry: all of them.
ALL = "all"


def run_passes(
    graph: Graph,
    passes: Sequence[Pass],
    context: PassContext,
    options: CompileOptions,
    progress: Progress,
) -> list[PassResult]:
    """`passes` in order, and those of a GPU; each rewritten region is checked where the options
    say so."""
    if context.target and context.target.is_gpu:
        passes = (*passes, *TARGET)
    check = RewriteCheck() if options.verify else None
    with progress.timed("passes"):
        return run_pipeline(
            graph, passes, context, check=check, progress=progress.stage, stages=STAGES
        )


def kernel_backend(
    target: Target, progress: Progress, only: str | None = None, prefer: str = ""
) -> KernelBackend | None:
    """What generates kernels for a GPU, of the entry `only` if one is named; None for the cpu.

    The kernel `prefer` is taken wherever it can be, whatever it costs.
    """
    if not target.is_gpu:
        return None
    from ..codegen.kernel_backend import KernelBackend  # needs triton

    return KernelBackend(target, progress.count, only, prefer)


def graphs_by_stage(traced: Graph, results: Sequence[PassResult]) -> dict[str, Graph]:
    """Every stage by name; "final" is the last."""
    final = results[-1].graph if results else traced
    return {"traced": traced, **{r.name: r.graph for r in results}, "final": final}


@dataclass(frozen=True)
class LoweredModel:
    """A language model on its way: all but its weights, which no one has loaded yet.

    `ranks` are what each rank was lowered to; `exportable` and `graphs` are those of the first.
    """

    ranks: Sequence[Lowered]
    exportable: Exportable
    graphs: Mapping[str, Graph]
    tokenizer: Tokenizer | None
    report: Callable[[], Report]  # with the errors of the weights that were loaded so far

    @property
    def weight_count(self) -> int:
        programs = (rank.program for rank in self.ranks)
        return sum(b.kind == "weight" for p in programs for b in p.buffers.values())


def lower_language_model(
    source: str | Path | PreTrainedModel,
    options: CompileOptions,
    target: Target,
    progress: Progress,
    *,
    plan_only: bool = False,
    entry: str | None = None,
    prefer: str = "",
) -> LoweredModel:
    """The whole way to a program; with `plan_only` to one of which only `entry` has its kernels (or
    every one, for ALL), and whose weights need not be there. `prefer` is as kernel_backend has it.
    """
    from .draft_model import with_draft_model  # needs transformers, which is an extra
    from .import_check import check_import
    from .importers.huggingface import import_hugging_face
    from .text.model_tokenizer import tokenizer_files

    count = options.tensor_parallel
    if count > 1 and target.is_gpu:
        raise UnsupportedTarget(
            f"tensor_parallel: this version exchanges data between threads of the cpu target only, "
            f"not on {target.name}"
        )
    dtype = torch_dtype(str(options.dtype)) if options.dtype else None
    with progress.timed("trace and import"):
        model = import_hugging_face(
            source,
            dtype=dtype,
            max_tokens=options.max_tokens_per_sequence,
            weightless=plan_only,
            allow_unused=options.unused == "allow",
            predict=options.inner_drafter,
        )
    checked = ""
    if options.check_import and not plan_only:
        with progress.timed("check import"):
            checked = str(check_import(model, source))
    directory = None if isinstance(source, torch.nn.Module) else Path(source)
    files, notes = tokenizer_files(directory) if directory else ({}, ())
    tokenizer = Tokenizer.of(files, str(directory))
    if isinstance(options.speculation, Draft):
        with progress.timed("trace and import"):
            model = with_draft_model(
                model,
                Path(options.speculation.directory),
                tokenizer,
                dtype=dtype,
                weightless=plan_only,
                allow_unused=options.unused == "allow",
            )
    passes = options.passes
    if passes is None:
        passes = causal_lm(
            max_sequences=options.max_sequences,
            max_tokens_per_sequence=model.max_tokens,
            quantize=options.packing,
            shard=ShardTensorParallel(count, 0) if count > 1 else None,
            sample=target.is_gpu,
            draft=options.predicted,
        )
    calibration = TextCalibration(tokenizer, model.max_tokens, progress)
    errors = PackingErrors()

    def lowered_rank(
        rank: int,
    ) -> tuple[list[PassResult], PassContext, Lowered, KernelBackend | None]:
        context = PassContext(target, model.weights, calibration)
        results = run_passes(model.graph, of_rank(passes, rank), context, options, progress)
        final = results[-1].graph if results else model.graph
        if (meta := context.facts.get(InsertKvCache.name)) is None:
            raise ValueError(f"a serving pipeline has {InsertKvCache.name}, found none in passes=")
        assert context.weights is not None
        with progress.timed("lower"):
            bindings = serving_bindings(
                meta["max_sequences"],
                meta["max_tokens_per_sequence"],
                rows=options.rows(meta["max_sequences"]),
            )
            only = None
            if plan_only and entry != ALL:
                only = chosen_entry(list(map(entry_name, bindings)), entry)
            backend = kernel_backend(target, progress, only, prefer)
            lowered = lower(
                final,
                context.weights,
                target,
                bindings,
                output_names(final),
                meta,
                errors.observe,
                backend,
            )
        return results, context, lowered, backend

    ranks = [lowered_rank(rank) for rank in range(count)]
    results, context, lowered, backend = ranks[0]
    every = [of_rank[2] for of_rank in ranks]
    graphs = graphs_by_stage(model.graph, results)
    final = graphs["final"]
    stops = stop_tokens(files, str(directory))
    defaults = set[int]()  # of classes: what the model lacks does not come
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        defaults.add(tokenizer.eos_token_id)
    if directory is None:
        stops |= _eos(source, model.config)
    elif "generation_config.json" not in files:
        defaults |= _eos(None, model.config)
    vocab = range(lowered.program.meta["vocab_size"])
    stops |= {id_ for id_ in defaults if id_ in vocab}
    departures = (*model.notes, *notes, *not_taken(_generation_config(source, files)))
    exportable = Exportable(
        lowered,
        final,
        model.config.model_type,
        dtype_name(model.dtype),
        frozenset(stops),
        options.data(),
        files,
    )

    def report() -> Report:
        programs = [rank.program for rank in every]
        buffers = [b for program in programs for b in program.buffers.values()]
        return Report(
            model_type=exportable.model_type,
            target=target.name,
            dtype=exportable.dtype,
            passes=tuple(results),
            entries=entry_sizes(lowered.program),
            weight_bytes=sum(b.nbytes for b in buffers if b.kind == "weight"),
            state_bytes=sum(b.nbytes for b in buffers if b.kind == "state"),
            arena_bytes=sum(program.arena_bytes for program in programs),
            unused=model.unused,
            seconds=progress.seconds,
            weights=weight_reports(context.facts.get(QuantizeMxfp4.name, ()), errors),
            choices=tuple(lowered.choices),
            kernels_built=len(lowered.program.kernels) - backend.from_cache if backend else 0,
            kernels_cached=backend.from_cache if backend else 0,
            departures=departures,
            import_check=checked,
        )

    return LoweredModel(every, exportable, graphs, tokenizer, report)


def _generation_config(source: Any, files: Mapping[str, bytes]) -> Mapping[str, Any]:
    """The generation config of a model in memory, or in the `files` of a directory."""
    if not isinstance(source, torch.nn.Module):
        return read_json(files, "generation_config.json", str(source))
    held: Any = getattr(source, "generation_config", None)
    return {} if held is None else held.to_dict()


def _eos(source: Any, config: Any) -> set[int]:
    """The end-of-text ids of a model in memory and of a config, with its defaults."""
    found: set[int] = set()
    for holder in (getattr(source, "generation_config", None), config, config.get_text_config()):
        eos = getattr(holder, "eos_token_id", None)
        found |= set(eos) if isinstance(eos, list) else set() if eos is None else {eos}
    return found
