"""`ingot bench`: speed on this machine's GPU, beside the memory's limit and peers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...options import AUTO, speculation_of
from ..flags import UsageError
from ..output import Shown

if TYPE_CHECKING:
    from ...bench.workload import Workload


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A directory with a config.json, an ingot, or a name: qwen3-8b, qwen3-30b-a3b, "
            "deepseek-v2-lite, gpt-oss-20b, deepseek-v3-wide, kimi-k2.5-wide, glm-5-wide.",
        ),
    ],
    batch: Annotated[str, typer.Option(help="Sequences that decode at once: 1,8.")] = "1",
    context: Annotated[str, typer.Option(help="Tokens before the one that is decoded.")] = "512",
    prefill: Annotated[str, typer.Option(help="Tokens of a prompt in one step.")] = "512",
    quantize: Annotated[
        str | None, typer.Option(help="mxfp4 (default), or none; an ingot is as it is.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the model has.")] = None,
    peer: Annotated[str, typer.Option(help="hf-eager,hf-compile: transformers beside it.")] = "",
    plots: Annotated[
        Path | None,
        typer.Option(help="Write bandwidths, a timeline (PNG) and a Perfetto trace into a folder."),
    ] = None,
    replays: Annotated[int, typer.Option(min=1, help="Of each step; the median counts.")] = 100,
    target: Annotated[str, typer.Option(help="Target, or auto; see `ingot doctor`.")] = AUTO,
    speculate: Annotated[
        str | None,
        typer.Option(
            help="Serving drafts: ngram[:k[:min_match]], mtp[:k], eagle3:k:DIR, draft:k:DIR; none."
        ),
    ] = None,
) -> Shown:
    """Time decoding and prefill on the GPU that is here: each launch, and the whole step.

    Weights are random and made on the device, but for an ingot's own. Every figure stands beside
    the read bandwidth and the GEMM rate that were measured in the same run.
    """
    from ....runtime.artifact.manifest import is_ingot
    from ...bench.peers import PEERS
    from ...bench.run import Benchmark, run
    from ...drivers import gpu_here
    from ..benchmark import result_lines, result_tables
    from ..models import check_compiled

    if quantize not in (None, "mxfp4", "none"):
        raise UsageError(f"--quantize {quantize}: expected mxfp4 or none")
    if quantize and is_ingot(Path(model)):
        check_compiled(Path(model), "--quantize")
    peers = tuple(filter(None, peer.split(",")))
    if unknown := {*peers} - {*PEERS}:
        raise UsageError(f"--peer {min(unknown)}: expected one of {', '.join(PEERS)}")
    benchmark = Benchmark(
        model,
        _workloads(batch, context, prefill),
        None if quantize == "none" else "mxfp4",
        layers,
        peers,
        replays,
        timeline=plots is not None,
        speculate=speculation_of(speculate),
    )
    result = run(benchmark, gpu_here(target))
    if plots is not None:
        from ...bench.plots import write_plots

        write_plots(result, plots)
    return Shown(lambda: asdict(result), [*result_tables(result), result_lines(result)])


def _workloads(batch: str, context: str, prefill: str) -> tuple[Workload, ...]:
    from ...bench.workload import Workload

    contexts, prompts = _counts("--context", context), _counts("--prefill", prefill)
    decodes = [Workload(b, 1, c) for b in _counts("--batch", batch) for c in contexts]
    if not decodes:
        raise UsageError("expected one --batch and one --context at least")
    return (*decodes, *(Workload(1, tokens, 0) for tokens in prompts))


def _counts(flag: str, text: str) -> list[int]:
    """The numbers of a flag, "1,8"; UsageError for what is none."""
    parts = list(filter(None, text.split(",")))
    if bad := [part for part in parts if not part.strip().isdecimal() or int(part) < 1]:
        raise UsageError(f"{flag} {text}: expected numbers from 1, found {bad[0]!r}")
    return [int(part) for part in parts]
