"""The command line: `app` of the commands, their errors in one line, and exit codes.

Text and tables go to stdout, progress and figures to stderr. Exit codes: 0, 1 when something
failed or disagrees, 2 for wrong usage, 130 when interrupted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from inspect import Parameter, signature
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from ... import __version__
from ...runtime.artifact.strict_json import IngotError
from ..importers.source_error import SourceError
from ..options import NotYetError
from .commands import COMMANDS
from .flags import Json, Traceback, UsageError, with_flags
from .output import Shown, visible

app = typer.Typer(
    name="ingot",
    help="Compile a transformer into one short, static plan of kernels, and replay it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _parameter(name: str, annotation: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


def _console_command(command: Callable[..., Shown | None]) -> Callable[..., None]:
    """`command` with `--traceback`, and with `--json` where it gives something to show."""
    shows = signature(command, eval_str=True).return_annotation is Shown
    flat = with_flags(command)

    def run(*, traceback: bool, **given: Any) -> None:
        as_json = given.pop("as_json") if shows else False
        # torch's own, about what its exporter does to its own structures.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        try:
            shown = flat(**given)
            if shown is not None:
                shown.print(as_json=as_json)
                if not shown.ok:
                    raise typer.Exit(1)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error
        except Exception as error:
            if traceback:
                raise
            lines = str(error).splitlines() or [type(error).__name__]
            more = " (more with --traceback)" if len(lines) > 1 else ""
            typer.secho(f"error: {visible(lines[0])}{more}", fg="red", err=True)
            raise typer.Exit(2 if _is_usage(error) else 1) from error

    flags = [*signature(flat).parameters.values()]
    flags += [_parameter("as_json", Json)] if shows else []
    flags += [_parameter("traceback", Traceback)]
    run.__doc__ = flat.__doc__
    run.__dict__["__signature__"] = signature(flat).replace(parameters=flags)
    return run


def _is_usage(error: Exception) -> bool:
    """Whether other options would mend it: wrong values, but no model that cannot be read."""
    usage = UsageError | FileExistsError | ValueError | NotYetError
    return isinstance(error, usage) and not isinstance(error, IngotError | SourceError)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ingot {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _name, _command in COMMANDS.items():
    app.command(_name)(_console_command(_command))


def main() -> None:
    """The console script. What the terminal's encoding lacks is shown as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
