"""`ingot chat`: a conversation over stdin; each answer sees the whole conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from ...options import CompileOptions, GenerateOptions
from ..flags import ONE, ModelPath
from ..models import open_model
from .run import chat_encoder, message, stream

_ANSWER = GenerateOptions(max_new_tokens=512)


def command(
    source: ModelPath,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    generating: GenerateOptions = _ANSWER,
    compiling: CompileOptions = ONE,
) -> None:
    """Answer line by line, with all that was said before.

    A conversation that no longer fits the model's longest sequence ends.
    """
    model = open_model(source, compiling, ONE)
    encode = chat_encoder(model)
    messages = message("system", system)
    for line in _lines():
        messages += message("user", line)
        events = model.generate(encode(messages), stream=True, **generating.keywords())
        messages += message("assistant", stream(events, as_json=False, as_ids=False, echo=None))


def _lines() -> Iterator[str]:
    """Lines of stdin that say something, with a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            typer.secho("> ", dim=True, nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if said := line.strip():
            yield said
