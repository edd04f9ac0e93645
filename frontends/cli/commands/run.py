"""`ingot run`: generates from a prompt and streams the text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...options import CompileOptions, GenerateOptions
from ..flags import ONE, USUAL, Json, ModelPath, UsageError
from ..models import open_model
from ..output import print_json, visible

if TYPE_CHECKING:
    from ....runtime.serving.sequence import SequenceStats
    from ...text.completion import TextEvent
    from ...text.text_model import TextModel


def command(
    source: ModelPath,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; without it, stdin is read.")
    ] = None,
    ids: Annotated[
        str | None, typer.Option(help="Token ids to continue instead, separated by spaces.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="The prompt is what the user says in a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    generating: GenerateOptions = USUAL,
    compiling: CompileOptions = ONE,
    as_json: Json = False,
) -> None:
    """Continue a text, or answer in a chat, token by token."""
    if prompt is not None and ids is not None:
        raise UsageError("--prompt and --ids: give one of them")
    if chat and ids is not None:
        raise UsageError("--chat takes text: give --prompt")
    if system is not None and not chat:
        raise UsageError("--system belongs to --chat")
    given = prompt if ids is None else parse_ids(ids)
    if given is None:
        given = read_stdin()
    model = open_model(source, compiling, ONE)
    if chat:
        said = message("system", system) + message("user", str(given))
        given = chat_encoder(model)(said)
    if isinstance(given, str) and model.tokenizer is None:
        raise UsageError(f"{source} has no tokenizer.json: give the prompt as --ids")
    events = model.generate(given, stream=True, **generating.keywords())
    echo = prompt if sys.stdout.isatty() and not chat else None
    stream(events, as_json=as_json, as_ids=model.tokenizer is None, echo=echo)


def parse_ids(text: str) -> list[int]:
    """Token ids separated by spaces or commas."""
    try:
        ids = [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"--ids: expected numbers separated by spaces, found {text!r}") from error
    if not ids:
        raise UsageError("--ids: expected token ids, found none")
    return ids


def read_stdin() -> str:
    """The prompt from stdin, to its end."""
    if sys.stdin.isatty():
        typer.secho("reading the prompt from the terminal; end it with Ctrl-D", dim=True, err=True)
    text = sys.stdin.read()
    if not text:
        raise UsageError("no prompt: give --prompt TEXT, --ids, or text on stdin")
    return text


def message(role: str, content: str | None) -> list[dict[str, str]]:
    """A message of a chat, none without content."""
    return [] if content is None else [{"role": role, "content": content}]


def chat_encoder(model: TextModel) -> Callable[[list[dict[str, str]]], list[int]]:
    """Messages to tokens; the template writes the special tokens itself."""
    tokenizer = model.tokenizer
    if tokenizer is None or (template := tokenizer.chat_template) is None:
        raise UsageError("this model has no chat template: use `ingot run` to continue a text")
    return lambda messages: tokenizer.encode(template.render(messages), special_tokens=False)


def stream(events: Iterator[TextEvent], *, as_json: bool, as_ids: bool, echo: str | None) -> str:
    """Print text as it is generated, then statistics; returns the text."""
    start = perf_counter()
    times: list[float] = []
    pieces: list[str] = []
    tokens: list[int] = []
    reason, message = "", ""
    stats: SequenceStats | None = None
    if echo is not None and not as_json:
        typer.secho(echo, dim=True, nl=False)
    for event in events:
        if event.token is not None:
            times.append(perf_counter() - start)
            tokens.append(event.token)
        text = f"{event.token} " if as_ids and event.token is not None else event.text
        pieces.append(text)
        if not as_json:
            sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
        reason, message = event.finish_reason or reason, event.message or message
        stats = event.stats or stats
    decode = times[-1] - times[0] if len(times) > 1 else 0.0
    figures = {
        "tokens": len(tokens),
        "seconds": perf_counter() - start,
        "time_to_first_token": times[0] if times else None,
        "tokens_per_second": (len(times) - 1) / decode if decode else None,
        **(_speculation(stats) if stats else {}),
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


def _speculation(stats: SequenceStats) -> dict[str, Any]:
    """Figures of a sequence that had drafted tokens verified; none of another."""
    if stats.acceptance_length is None:
        return {}
    return {
        "verified_steps": stats.verified_steps,
        "acceptance_length": stats.acceptance_length,
        "acceptance_rates": list(stats.acceptance_rates),
        "draft_seconds": stats.draft_seconds,
        "verify_seconds": stats.verify_seconds,
        "speedup": stats.speedup,
    }


def _figures_line(figures: dict[str, Any], reason: str) -> str:
    first, rate = figures["time_to_first_token"], figures["tokens_per_second"]
    parts = [f"{figures['tokens']} tokens"]
    parts += [f"{rate:.1f} tokens/s"] if rate else []
    parts += [f"first token after {first * 1000:.0f} ms"] if first is not None else []
    if length := figures.get("acceptance_length"):
        parts.append(f"{length:.2f} tokens in each of {figures['verified_steps']} verified steps")
    if speedup := figures.get("speedup"):
        parts.append(f"decoding {speedup:.2f}x as fast as without drafts")
    return ", ".join([*parts, f"ended by {reason}"])
