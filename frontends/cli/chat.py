"""`ingot chat`: turn by turn, what was said before included."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from .run import UsageError, stream

if TYPE_CHECKING:
    from ..text.text_model import TextModel


def converse(model: TextModel, system: str | None, options: dict[str, Any]) -> None:
    """Answer each line of stdin until it ends; UsageError without a chat template.

    `options` go to `generate`. A conversation that no longer fits the model's longest sequence ends
    with a ValueError that says so.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise UsageError("this model has no chat template: use `ingot run` to continue a text")
    messages = [{"role": "system", "content": system}] if system is not None else []
    for said in _lines():
        messages.append({"role": "user", "content": said})
        text = tokenizer.chat_template.render(messages)
        ids = tokenizer.encode(text, special_tokens=False)
        events = model.generate(ids, stream=True, **options)
        answer = stream(events, as_json=False, as_ids=False, echo=None)
        messages.append({"role": "assistant", "content": answer})


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


__all__ = ["converse"]
