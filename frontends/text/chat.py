"""Chat templates: render messages as the text that the model was trained on.

Templates are untrusted code: they run in jinja2's immutable sandbox on plain data, with the same
environment as in transformers (`utils/chat_template_utils.py`) and nothing more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.utils
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...runtime.artifact.reader import TEMPLATES
from ..importers.source_error import SourceError

_DEFAULT = "default"
_FILE = "chat_template.jinja"
_MORE = f"{TEMPLATES}*.jinja"


class ChatError(ValueError):
    """A chat template that is missing, broken or hostile, or that refuses these messages."""


@dataclass(frozen=True)
class ChatTemplate:
    """The templates of a model directory by name; most have one alone, "default".

    `tokens` are the special tokens that templates write by name (`bos_token`, `eos_token`, ...).
    """

    sources: Mapping[str, str]
    tokens: Mapping[str, str] = field(default_factory=dict[str, str])

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        name: str = _DEFAULT,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of `messages` (each with `role` and `content`), special tokens included.

        `variables` are seen by the template under their names (`tools`, `documents`,
        `enable_thinking`, ...). ChatError when the template raises or violates the
        sandbox, and for messages with parts that are images, video or sound.
        """
        _refuse_other_than_text(messages)
        if name not in self.sources:
            raise ChatError(f"no chat template {name!r}; there are {', '.join(self.sources)}")
        given = {"tools": None, "documents": None, **self.tokens, **variables}
        given |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        data = {key: _plain(value) for key, value in given.items()}
        try:
            return _environment().from_string(self.sources[name]).render(data)
        except SecurityError as error:
            raise ChatError(f"chat template {name!r} is refused as unsafe: {error}") from error
        except jinja2.TemplateSyntaxError as error:
            raise ChatError(f"chat template {name!r}, line {error.lineno}: {error}") from error
        except jinja2.TemplateError as error:
            raise ChatError(f"chat template {name!r}: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = type(error).__name__
            raise ChatError(f"chat template {name!r} fails with {kind}: {error}") from error
        except (MemoryError, RecursionError) as error:
            raise ChatError(f"chat template {name!r} uses too much memory") from error


def _refuse_other_than_text(messages: Sequence[Mapping[str, Any]]) -> None:
    """ChatError for the first part of a message's content that is an image, video or sound."""
    for i, message in enumerate(messages):
        content: Any = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            kind = str(part.get("type", "")) if isinstance(part, Mapping) else ""
            if any(other in kind for other in ("image", "video", "audio")):
                raise ChatError(
                    f"message {i} has a part of type {kind!r}: models take text alone, expected "
                    "parts of type 'text'"
                )


def chat_template_of(
    files: Mapping[str, bytes], config: Mapping[str, Any], tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The chat templates among the files of a model directory, None when there are none.

    chat_template.jinja (and additional_chat_templates/*.jinja) go before `chat_template` in
    `config` (of tokenizer_config.json), which is one template or a list of named ones.
    """
    found = _template_files(files) or _configured(config.get("chat_template"))
    return ChatTemplate(found, tokens) if found else None


def _template_files(files: Mapping[str, bytes]) -> dict[str, str]:
    found = {PurePosixPath(name).stem: name for name in files if PurePosixPath(name).match(_MORE)}
    if _FILE in files:
        found[_DEFAULT] = _FILE
    try:
        return {stem: files[name].decode("utf-8") for stem, name in found.items()}
    except UnicodeDecodeError as error:
        raise SourceError(f"a chat template cannot be read: {error}") from error


def _configured(entry: Any) -> dict[str, str]:
    if isinstance(entry, str):
        return {_DEFAULT: entry}
    named: Any = entry if isinstance(entry, list) else []
    if isinstance(entry, dict):
        named = [{"name": name, "template": text} for name, text in entry.items()]
    try:
        return {str(item["name"]): str(item["template"]) for item in named}
    except (KeyError, TypeError) as error:
        raise SourceError(
            "tokenizer_config.json: expected chat_template to be a string or a list of objects "
            f"with name and template, found {str(entry)[:80]}"
        ) from error


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


def _plain(value: Any) -> Any:
    """`value` out of JSON's types alone: what has methods of its own could leave the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise ChatError(f"expected messages of JSON's types, found a {type(value).__name__}")
