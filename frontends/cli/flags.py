"""Flags of commands: those that many share, and one for each field of options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import CompileOptions, GenerateOptions

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
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")]

MANY, ONE = CompileOptions(), CompileOptions(max_sequences=1)
USUAL = GenerateOptions()


class UsageError(Exception):
    """Options that are wrong or do not go together."""


def flag_name(field: Any) -> str:
    """`--max-tokens` for the field `max_tokens_per_sequence`, as its metadata says."""
    return "--" + (field.metadata["flag"] or field.name).replace("_", "-")


def _flags(options: Any) -> dict[str, Parameter]:
    """A parameter for each field that has a flag; what `options` holds is its default."""
    found: dict[str, Parameter] = {}
    for field in fields(options):
        if not field.metadata:
            continue
        default = getattr(options, field.name)
        type_ = field.metadata["type"] or type(field.default)
        flag = typer.Option(flag_name(field), help=field.metadata["help"])
        found[field.name] = Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=None if default == () else default,
            annotation=Annotated[type_, flag],
        )
    return found


def with_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` as typer takes it: for a parameter whose default are options, a flag a field."""
    groups: dict[str, tuple[Any, dict[str, Parameter]]] = {}
    shown: list[Parameter] = []
    for p in signature(command, eval_str=True).parameters.values():
        if is_dataclass(p.default):
            groups[p.name] = p.default, _flags(p.default)
            shown += groups[p.name][1].values()
        else:
            shown.append(p.replace(kind=Parameter.KEYWORD_ONLY))

    def flat(**given: Any) -> Any:
        for name, (options, flags) in groups.items():
            values = {flag: given.pop(flag) for flag in flags}
            given[name] = replace(options, **{n: v for n, v in values.items() if v is not None})
        return command(**given)

    flat.__doc__ = command.__doc__
    flat.__dict__["__signature__"] = Signature(shown)
    return flat
