"""Command output: tables and lines for people, plain data for `--json`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.theme import Theme


class IrHighlighter(RegexHighlighter):
    """Colours for the textual IR and the page."""

    base_style = "ir."
    highlights = [  # noqa: RUF012 (rich declares it so)
        r"(?P<type>\b(?:[bfiu]\d+|bf16|bool|c64|c128|f8e\dm\d|e8m0|f4e2m1)\[[^\]]*\])",
        r"(?P<value>%[\w.]+)",
        r"(?P<weight>@[\w.]+)",
        r"(?:= )(?P<op>[a-z_][\w.]*)(?=\()",
        r"(?P<word>^ *(?:graph|return|update)\b)",
        r"(?P<note>^ *#.*$)",
    ]


THEME = Theme(
    {
        "ir.type": "magenta",
        "ir.value": "cyan",
        "ir.weight": "green",
        "ir.op": "bold",
        "ir.word": "bold yellow",
        "ir.note": "bright_black",
    }
)


# What a terminal acts on instead of showing it: control characters, but for tabs and ends of lines,
# marks that change the direction of text, and halves of surrogate pairs, which no encoding has.
_ACTED_ON = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """`text` with what a terminal would act on as escapes: text out of files may hold anything."""
    return _ACTED_ON.sub(lambda found: ascii(found[0])[1:-1], text)


@dataclass(frozen=True)
class Shown:
    """The output of a command: `data` makes the JSON, `parts` are tables and lines for people.

    Only one of them is used. The exit code is 0 if `ok`, else 1.
    """

    data: Callable[[], Any]
    parts: Iterable[Table | Sequence[str]]
    ok: bool = True

    def print(self, *, as_json: bool) -> None:
        """Tables keep their columns when they go to a file; lines of IR are never broken."""
        if as_json:
            print_json(self.data())
            return
        out = Console(theme=THEME, width=None if sys.stdout.isatty() else 120)
        highlight = IrHighlighter()
        for part in self.parts:
            if isinstance(part, Table):
                out.print(part)
            else:
                for line in part:
                    out.print(highlight(Text(visible(line))), soft_wrap=True)


def print_json(data: Any) -> None:
    """One JSON value on stdout."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    typer.echo(_ACTED_ON.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def table(
    title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()
) -> Table:
    """A table whose columns numbered `right` are right-justified."""
    made = Table(title=escape(visible(title)), title_justify="left", title_style="bold")
    for i, head in enumerate(heads):
        made.add_column(head, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(visible(cell)) for cell in row))
    return made
