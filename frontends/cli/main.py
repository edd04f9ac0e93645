"""The command line: compile, run, chat, inspect, verify, quantize, doctor.

What is heavy is imported inside the commands, so that `ingot --help` is quick. Text and tables go
to stdout, progress and figures to stderr. Exit codes: 0, 1 when something failed or disagrees, 2
for wrong usage, 130 when interrupted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...runtime.artifact.strict_json import IngotError
from .run import (
    UsageError,
    chat_ids,
    check_options,
    is_ingot,
    parse_ids,
    print_json,
    read_stdin,
    stream,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..model import Model, Plan, WrittenIngot
    from ..text.text_model import TextModel

app = typer.Typer(
    name="ingot",
    help="Compile a transformer into one short, static plan of kernels, and replay it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Directory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        exists=True,
        file_okay=False,
        help="Hugging Face directory: config.json, safetensors, tokenizer.json.",
    ),
]
ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", exists=True, help="Hugging Face directory, or an ingot of `ingot compile`."
    ),
]
Target = Annotated[str, typer.Option(help="Target, or auto; see `ingot doctor`.")]
Dtype = Annotated[
    str | None, typer.Option(help="bf16, f16, f32 or f64 instead of the checkpoint's own.")
]
Quantize = Annotated[
    str | None, typer.Option(help="mxfp4 packs the weights of products (4.25 bits each).")
]
Sequences = Annotated[int, typer.Option(min=1, help="Sequences that are served at once.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest sequence, in tokens.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")]


@contextmanager
def _errors_in_one_line(traceback: bool) -> Generator[None]:
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
    except Exception as error:
        if traceback:
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        more = " (more with --traceback)" if len(lines) > 1 else ""
        typer.secho(f"error: {lines[0]}{more}", fg="red", err=True)
        raise typer.Exit(2 if _is_usage(error) else 1) from error


def _is_usage(error: Exception) -> bool:
    """Whether other options would mend it: wrong values, but no model that cannot be read."""
    if isinstance(error, UsageError | FileExistsError):
        return True
    if isinstance(error, IngotError):
        return False
    from ...codegen.lower import UnsupportedTarget
    from ..importers.source_error import SourceError
    from ..options import NotYetError

    usage = ValueError | NotYetError | UnsupportedTarget
    return isinstance(error, usage) and not isinstance(error, SourceError)


def _version(wanted: bool) -> None:
    if wanted:
        from ... import __version__

        typer.echo(f"ingot {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("compile")
def compile_command(
    directory: Directory,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write an ingot: a file where it ends in .ingot, or a directory."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With -o: replace an ingot that is there.")
    ] = False,
    target: Target = "auto",
    dtype: Dtype = None,
    quantize: Quantize = None,
    max_sequences: Sequences = 8,
    max_tokens: MaxTokens = 4096,
    validate: Annotated[
        bool, typer.Option(help="Run every rewritten region, before and after, on samples.")
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Compile a model and print what the compiler did; with -o into an ingot.

    For an ingot the device of the target need not be there. `ingot run` and `ingot.load` serve it.
    """
    with _errors_in_one_line(traceback):
        if overwrite and output is None:
            raise UsageError("--overwrite belongs to --output")
        options: dict[str, Any] = {
            "target": target,
            "dtype": dtype,
            "quantize": quantize,
            "max_sequences": max_sequences,
            "max_tokens_per_sequence": max_tokens,
            "verify": validate,
        }
        model: Model | WrittenIngot
        if output is None:
            model = _compile(directory, **options)
        else:
            model = _compile(directory, output=output, overwrite=overwrite, **options)
        from .report import entry_table, pass_table, report_data, summary_lines

        data = report_data(model)
        if as_json:
            print_json(data)
        else:
            out = _console()
            out.print(pass_table(data), entry_table(data))
            _print_lines(out, summary_lines(data))


@app.command()
def run(
    source: ModelPath,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; without it, stdin is read.")
    ] = None,
    ids: Annotated[
        str | None, typer.Option(help="Token ids to continue instead, separated by spaces.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="The prompt is what the user says in a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Choose among the k most likely; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest of this mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Least likelihood relative to the top's.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Repeats the same draws.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")
    ] = None,
    target: Target = "auto",
    dtype: Dtype = None,
    quantize: Quantize = None,
    max_tokens: MaxTokens = 4096,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Continue a text, or answer in a chat, token by token."""
    with _errors_in_one_line(traceback):
        if prompt is not None and ids is not None:
            raise UsageError("--prompt and --ids: give one of them")
        if chat and ids is not None:
            raise UsageError("--chat takes text: give --prompt")
        if system is not None and not chat:
            raise UsageError("--system belongs to --chat")
        given: str | list[int] = parse_ids(ids) if ids is not None else prompt or ""
        if prompt is None and ids is None:
            given = read_stdin()
        from ...runtime.serving.sampling import Sampling

        # Wrong values are told before the model is compiled.
        Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        model = _open(source, target, dtype, quantize, max_tokens)
        if chat:
            given = chat_ids(model, str(given), system)
        if isinstance(given, str) and model.tokenizer is None:
            raise UsageError(f"{source} has no tokenizer.json: give the prompt as --ids")
        events = model.generate(
            given,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or (),
            stream=True,
        )
        echo = prompt if sys.stdout.isatty() and not chat else None
        stream(events, as_json=as_json, as_ids=model.tokenizer is None, echo=echo)


@app.command()
def chat(
    source: ModelPath,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest of this mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Repeats the same draws.")] = None,
    target: Target = "auto",
    dtype: Dtype = None,
    quantize: Quantize = None,
    max_tokens: MaxTokens = 4096,
    traceback: Traceback = False,
) -> None:
    """Answer line by line, with all that was said before."""
    with _errors_in_one_line(traceback):
        from ...runtime.serving.sampling import Sampling
        from .chat import converse

        Sampling(temperature, top_p=top_p, seed=seed)  # wrong values are told at once
        model = _open(source, target, dtype, quantize, max_tokens)
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        converse(model, system, {**options, "top_p": top_p, "seed": seed})


@app.command()
def inspect(
    source: ModelPath,
    after: Annotated[
        str | None,
        typer.Option(metavar="PASS", help="The graph after this pass; or traced, final (default)."),
    ] = None,
    passes: Annotated[bool, typer.Option("--passes", help="The table of passes.")] = False,
    entries: Annotated[bool, typer.Option("--entries", help="Launches of each entry.")] = False,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights", help="With --quantize: how each weight is held, and why. Of an ingot: all."
        ),
    ] = False,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels", help="What each launch of a step is, and every kernel as it was built."
        ),
    ] = False,
    entry: Annotated[
        str | None,
        typer.Option(help="With --kernels: the entry for so many tokens; without it, one."),
    ] = None,
    dot: Annotated[Path | None, typer.Option(help="Write the graph as Graphviz DOT.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the graph (needs Graphviz).")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every layer, as text that can be parsed.")
    ] = False,
    target: Target = "auto",
    dtype: Dtype = None,
    quantize: Quantize = None,
    max_sequences: Sequences = 8,
    max_tokens: MaxTokens = 4096,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Print the graph after any pass; or what the passes did, or a picture; or what an ingot holds.

    Layers that are built alike are shown once; --all prints every one. With --kernels the target's
    device need not be here. A directory with config.json alone can be inspected too.
    """
    with _errors_in_one_line(traceback):
        if entry is not None and not kernels:
            raise UsageError("--entry belongs to --kernels")
        if is_ingot(source):
            made = {"target": (target, "auto"), "dtype": (dtype, None)}
            made |= {"quantize": (quantize, None), "max_tokens": (max_tokens, 4096)}
            made |= {"max_sequences": (max_sequences, 8), "after": (after, None)}
            made |= {"passes": (passes, False), "dot": (dot, None), "svg": (svg, None)}
            check_options(source, made)
            shown = {"weights": weights, "everything": everything, "kernels": kernels}
            _inspect_ingot(source, **shown, entry=entry, as_json=as_json)
            return
        options: dict[str, Any] = {
            "target": target,
            "dtype": dtype,
            "quantize": quantize,
            "max_sequences": max_sequences,
            "max_tokens_per_sequence": max_tokens,
        }
        from ..checkpoints.safetensors_files import holds_weights
        from .kernels import kernel_data, kernel_page
        from .launches import Step

        model: Model | Plan
        planned: Step | None = None
        if kernels or not holds_weights(source):
            model = plan = _plan(source, kernels=kernels, entry=entry, **options)
            if kernels:
                planned = Step.of(plan.program, plan.entry, plan.report.choices)
        else:
            model = _compile(source, **options)
        names = ("traced", *(p.name for p in model.report.passes), "final")
        which = after or "final"
        if which not in names:
            raise UsageError(f"--after {which}: expected one of {', '.join(names)}")
        graph = model.graph(which)
        from . import report as cli_report
        from .graph import dot as dot_text
        from .graph import write_svg
        from .inspect_view import page

        if dot is not None:
            dot.write_text(dot_text(graph, everything=everything), encoding="utf-8")
        if svg is not None:
            write_svg(dot_text(graph, everything=everything), svg)
        if weights and not model.report.weights:
            raise UsageError("--weights tells of quantized weights: give --quantize too")
        tables = passes or entries or weights or kernels
        wanted = after is not None or everything or not (tables or dot or svg)
        if as_json:
            text = {"graph": {"name": which, "text": str(graph)}} if wanted else {}
            step = {"step": kernel_data(planned)} if planned else {}
            print_json({**cli_report.report_data(model), **text, **step})
            return
        out = _console()
        if wanted:
            title = "as traced" if which == "traced" else f"after {which}"
            text = str(graph) if everything else page(graph, title)
            _print_lines(out, text.splitlines())
        if not tables:
            return
        data = cli_report.report_data(model)
        if passes:
            out.print(cli_report.pass_table(data))
            _print_lines(out, cli_report.declined_lines(data))
        if entries:
            out.print(cli_report.entry_table(data))
        if weights:
            out.print(cli_report.weight_table(data))
        lines = cli_report.summary_lines(data)
        if planned:
            page_tables, page_lines = kernel_page(planned)
            out.print(*page_tables)
            lines += page_lines
        _print_lines(out, lines)


@app.command()
def verify(
    directory: Directory,
    prompts: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Prompts, one a line, for the built-in."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each.")] = 32,
    top: Annotated[int, typer.Option(min=1, help="n of the top-n rule.")] = 5,
    target: Target = "auto",
    dtype: Annotated[str, typer.Option(help="Both sides compute in this.")] = "f32",
    quantize: Annotated[
        str | None,
        typer.Option(help="mxfp4: a GPU beside the cpu target with the same weights dequantized."),
    ] = None,
    max_tokens: MaxTokens = 4096,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative Δlogits; without it, 1e-4 in f32.")
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Compare with transformers: greedy tokens, logits, and what leaves each layer.

    Where the greedy tokens first differ, each must be among the other's top n. With --quantize a
    GPU is compared with the cpu target instead, which computes with the same weights dequantized.
    """
    with _errors_in_one_line(traceback):
        from .verify import check_data, check_gpu, check_tables, compared, prompts_of, verdict

        lines = prompts_of(prompts)
        options: dict[str, Any] = {
            "dtype": dtype,
            "quantize": quantize,
            "max_tokens_per_sequence": max_tokens,
        }
        on_cpu = None
        if quantize is not None:
            check_gpu(target)
            on_cpu = partial(_compile, directory, target="cpu", **options)
        model = _compile(directory, target=target, **options)
        with _status("comparing"):
            check = compared(
                directory,
                model,
                on_cpu,
                prompts=lines,
                tokens=tokens,
                top=top,
                tolerance=tolerance,
            )
        if as_json:
            print_json(check_data(check))
        else:
            out = _console()
            out.print(*check_tables(check))
            _print_lines(out, verdict(check))
        if not check.ok:
            raise typer.Exit(1)


@app.command()
def quantize(
    directory: Directory,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR2", help="New directory to write.")
    ],
    format: Annotated[
        str | None,
        typer.Option(help="compressed-tensors, or gpt-oss for a gpt-oss; without it, which fits."),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="Rule of the scales: mse, even, floor, rceil or ceil.")
    ] = "mse",
    group: Annotated[int, typer.Option(help="Numbers that share a scale.")] = 32,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Glob of weights to leave as they are; may be repeated."),
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Write a model with its weights in MXFP4, for transformers and Ingot to read."""
    with _errors_in_one_line(traceback):
        from ...passes.transforms.mxfp4_policy import MXFP4
        from ..checkpoints.export_quantized import quantize_directory
        from .quantize import bar, exported_data, kept_table, summary

        options = MXFP4(group=group, scale=scale, keep=tuple(keep or ()))
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        with bar() as progress:
            exported = quantize_directory(
                directory, output, options, format=format, progress=progress
            )
        if as_json:
            print_json(exported_data(exported))
        else:
            out = _console()
            out.print(kept_table(exported))
            _print_lines(out, [summary(exported)])


@app.command()
def doctor(as_json: Json = False, traceback: Traceback = False) -> None:
    """Say what this machine has, and what Ingot can do on it."""
    with _errors_in_one_line(traceback):
        from .doctor import diagnose
        from .report import doctor_tables

        found = diagnose()
        if as_json:
            print_json(asdict(found))
        else:
            _console().print(*doctor_tables(found))


def _compile(directory: Path, output: Path | None = None, **options: Any) -> Any:
    """A Model, or with `output` the ingot that was written there."""
    from .. import api

    # torch's own, about what its exporter does to its own structures.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    progress = sys.stderr.isatty()
    if output is not None:
        return api.compile_to(directory, output, **options, progress=progress)
    return api.compile(directory, **options, progress=progress)


def _plan(directory: Path, *, kernels: bool, **options: Any) -> Plan:
    """A model that is only looked at; UsageError for kernels of the cpu target."""
    from ...compiler.target import GPUS
    from .. import api
    from ..drivers import present_target

    if options["target"] == "auto":
        options["target"] = present_target()
    if kernels and options["target"] == "cpu":
        gpus = ", ".join(GPUS)
        raise UsageError(f"--kernels: the cpu target has no kernels; give --target, one of {gpus}")
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    return api.plan(directory, **options, progress=sys.stderr.isatty())


def _open(
    source: Path, target: str, dtype: str | None, quantize: str | None, max_tokens: int
) -> TextModel:
    """The model of a directory, compiled for one sequence, or that of an ingot, loaded."""
    if not is_ingot(source):
        return _compile(
            source,
            target=target,
            dtype=dtype,
            quantize=quantize,
            max_sequences=1,
            max_tokens_per_sequence=max_tokens,
        )
    made = {"target": (target, "auto"), "dtype": (dtype, None)}
    check_options(source, {**made, "quantize": (quantize, None), "max_tokens": (max_tokens, 4096)})
    from ..loading import load

    return load(source)


def _inspect_ingot(
    source: Path,
    *,
    weights: bool,
    everything: bool,
    kernels: bool,
    entry: str | None,
    as_json: bool,
) -> None:
    from ...runtime.artifact.reader import FINAL_GRAPH, open_ingot
    from .ingot import ingot_data, ingot_lines, ingot_tables
    from .kernels import kernel_data, kernel_page
    from .launches import Step

    artifact = open_ingot(source)
    step = None
    if kernels:
        if artifact.program is None:
            raise UsageError(f"--kernels: {source} is for the cpu target, which has no kernels")
        step = Step.of(artifact.program, entry)
    data = ingot_data(artifact, weights=weights)
    if as_json:
        print_json({**data, "step": kernel_data(step)} if step else data)
        return
    out = _console()
    if everything:
        _print_lines(out, artifact.graphs[FINAL_GRAPH].splitlines())
    out.print(*ingot_tables(data, artifact.program))
    lines = ingot_lines(data)
    if step:
        tables, more = kernel_page(step)
        out.print(*tables)
        lines += more
    _print_lines(out, lines)


def _console() -> Console:
    from rich.console import Console

    from .report import THEME

    # Tables keep their columns when they go to a file or a pipe.
    return Console(theme=THEME, width=None if sys.stdout.isatty() else 120)


@contextmanager
def _status(text: str) -> Generator[None]:
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def _print_lines(out: Console, lines: list[str]) -> None:
    """Lines of IR or plain text, coloured on a terminal, never broken."""
    from rich.text import Text

    from .report import IrHighlighter

    highlight = IrHighlighter()
    for line in lines:
        out.print(highlight(Text(line)), soft_wrap=True)


def main() -> None:
    """The console script."""
    app()


__all__ = ["app", "main"]
