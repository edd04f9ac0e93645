"""`ingot run`: what is run, where the prompt comes from, and text as it comes out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import typer

from ...runtime.artifact.manifest import MANIFEST

if TYPE_CHECKING:
    from ..text.completion import TextEvent
    from ..text.text_model import TextModel


class UsageError(Exception):
    """Options that are wrong or do not go together."""


def is_ingot(path: Path) -> bool:
    """A file, or a directory with a manifest: what is not a Hugging Face directory."""
    return path.is_file() or (path / MANIFEST).is_file()


def check_options(path: Path, given: Mapping[str, tuple[Any, Any]]) -> None:
    """UsageError for an option, name -> (value, default), that an ingot was compiled with."""
    for name, (value, default) in given.items():
        if value != default:
            raise UsageError(
                f"--{name.replace('_', '-')}: {path} is compiled already; compile the model anew "
                "to change it"
            )


def print_json(data: Any) -> None:
    """One JSON value on stdout."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def parse_ids(text: str) -> list[int]:
    """Token ids separated by spaces or commas."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"--ids: expected numbers separated by spaces, found {text!r}") from error


def read_stdin() -> str:
    """The prompt from stdin, to its end."""
    if sys.stdin.isatty():
        typer.secho("reading the prompt from the terminal; end it with Ctrl-D", dim=True, err=True)
    text = sys.stdin.read()
    if not text:
        raise UsageError("no prompt: give --prompt TEXT, --ids, or text on stdin")
    return text


def chat_ids(model: TextModel, said: str, system: str | None) -> list[int]:
    """The tokens of a chat's first turn; the template writes the special tokens itself."""
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise UsageError(
            "--chat: this model has no chat template; leave it out to continue the text"
        )
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": said})
    text = tokenizer.chat_template.render(messages)
    return tokenizer.encode(text, special_tokens=False)


def stream(events: Iterator[TextEvent], *, as_json: bool, as_ids: bool, echo: str | None) -> str:
    """Print text as it comes and the figures at the end; gives the text."""
    start = perf_counter()
    times: list[float] = []
    pieces: list[str] = []
    tokens: list[int] = []
    reason, message = "", ""
    if echo is not None and not as_json:
        typer.secho(echo, dim=True, nl=False)
    for event in events:
        if event.token is not None:
            times.append(perf_counter() - start)
            tokens.append(event.token)
        text = f"{event.token} " if as_ids and event.token is not None else event.text
        pieces.append(text)
        if not as_json:
            sys.stdout.write(text)
            sys.stdout.flush()
        reason, message = event.finish_reason or reason, event.message or message
    decode = times[-1] - times[0] if len(times) > 1 else 0.0
    figures = {
        "tokens": len(tokens),
        "seconds": perf_counter() - start,
        "time_to_first_token": times[0] if times else None,
        "tokens_per_second": (len(times) - 1) / decode if decode else None,
    }
    if as_json:
        text = "".join(pieces).rstrip() if as_ids else "".join(pieces)
        print_json({"text": text, "tokens": tokens, "finish_reason": reason, "stats": figures})
    else:
        sys.stdout.write("\n")
        typer.secho(_figures_line(figures, reason), dim=True, err=True)
    if reason == "error":
        raise RuntimeError(message)
    return "".join(pieces)


def _figures_line(figures: dict[str, Any], reason: str) -> str:
    first, rate = figures["time_to_first_token"], figures["tokens_per_second"]
    parts = [f"{figures['tokens']} tokens"]
    parts += [f"{rate:.1f} tokens/s"] if rate else []
    parts += [f"first token after {first * 1000:.0f} ms"] if first is not None else []
    return ", ".join([*parts, f"ended by {reason}"])
