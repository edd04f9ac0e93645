"""`ingot compile`: compile a model, report on it, and with -o write an ingot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...options import CompileOptions
from ..flags import MANY, Directory, UsageError
from ..models import compile_model
from ..output import Shown


def command(
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
    options: CompileOptions = MANY,
) -> Shown:
    """Compile a model and print what the compiler did; with -o into an ingot.

    For an ingot the device of the target need not be there. `ingot run` and `ingot.load` serve it.
    """
    if overwrite and output is None:
        raise UsageError("--overwrite belongs to --output")
    from ... import api
    from ..report import entry_table, pass_table, report_data, summary_lines

    if output is None:
        model = compile_model(directory, options)
    else:
        model = api.compile_to(directory, output, overwrite=overwrite, **options.keywords())
    data = report_data(model)
    return Shown(lambda: data, [pass_table(data), entry_table(data), summary_lines(data)])
