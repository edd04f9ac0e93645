"""Renders one chat template: the program of the child process that `chat` starts.

Templates are untrusted code: they run in jinja2's immutable sandbox on plain data, with the same
environment as in transformers (`utils/chat_template_utils.py`) and nothing more. Loops may be
nested, and values doubled, without end: the process has a limit of time and one of memory.
"""

from __future__ import annotations

import json
import pickle
import resource
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.utils
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Limits of the process: seconds of computing, and bytes of address space.
SECONDS = 10
BYTES = 2 << 30


def rendered(source: str, data: Mapping[str, Any]) -> dict[str, str]:
    """The `text` of a template, or the `error` that it ends in, to follow the template's name."""
    try:
        return {"text": _environment().from_string(source).render(data)}
    except SecurityError as error:
        return {"error": f" is refused as unsafe: {error}"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f", line {error.lineno}: {error}"}
    except jinja2.TemplateError as error:
        return {"error": f": {error}"}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return {"error": f" fails with {type(error).__name__}: {error}"}
    except (MemoryError, RecursionError):
        return {"error": " uses too much memory"}


def main() -> None:
    """A pickled source and its data on stdin, JSON of `rendered` on stdout."""
    source, data = pickle.load(sys.stdin.buffer)  # noqa: S301 (of the process that started this one)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    sys.stdout.write(json.dumps(rendered(source, data)))


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said; here it is plain."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict(...)` without the type, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that keeps no names with an underscore in front."""

    def __init__(*args: Any, **items: Any) -> None:  # as jinja2: `namespace(self=...)` is allowed
        self, *given = args
        values = dict(*given, **items)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace does not keep {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses unsafe attributes on access, not only on use."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    provided: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    environment.globals.update(provided)
    environment.filters["tojson"] = _to_json
    return environment


if __name__ == "__main__":
    main()
