"""The model that a command is given: compiled from a directory, or loaded from an ingot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ...runtime.artifact.manifest import is_ingot
from ..options import CompileOptions
from .flags import UsageError, flag_name
from .output import visible

if TYPE_CHECKING:
    from ..model import Model
    from ..text.text_model import TextModel


def check_compiled(path: Path, *flags: str) -> None:
    """UsageError if there are `flags`, which an ingot was compiled with."""
    for flag in flags:
        raise UsageError(f"{flag}: {path} is compiled already; compile the model anew to change it")


def check_options(path: Path, options: CompileOptions, usual: CompileOptions) -> None:
    """As `check_compiled`, for options that differ from `usual`."""
    changed = [f for f in fields(options) if getattr(options, f.name) != getattr(usual, f.name)]
    check_compiled(path, *map(flag_name, changed))


def compile_model(directory: Path, options: CompileOptions) -> Model:
    """See `api.compile`."""
    from .. import api

    return api.compile(directory, **options.keywords())


def open_model(source: Path, options: CompileOptions, usual: CompileOptions) -> TextModel:
    """Compile a model directory, or load an ingot; say what is not as it was asked for."""
    if not is_ingot(source):
        model = compile_model(source, options)
        _note(model.report.departures)
        return model
    check_options(source, replace(options, speculate=usual.speculate), usual)
    from ..loading import load

    loaded = load(source, speculate=options.speculate)
    asked, limit = loaded.asked_tokens, loaded.session.meta.max_tokens_per_sequence
    if asked is not None and asked > limit:
        _note([f"max_tokens_per_sequence: {asked} was lowered to {limit}, the limit of the model"])
    return loaded


def _note(lines: Iterable[str]) -> None:
    for line in lines:
        typer.secho(visible(line), dim=True, err=True)
