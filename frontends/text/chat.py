"""Chat templates: render messages as the text that the model was trained on.

Templates are untrusted code. `render_template` runs them in a sandbox, in a process of its own with
limits of time and memory.
"""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ...runtime.artifact.reader import TEMPLATES
from ..importers.source_error import SourceError
from . import render_template

_DEFAULT = "default"
_TOOL_USE = "tool_use"
# Runs a file with the search path of this process, whatever the environment says.
_START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "runpy.run_path(sys.argv[1], run_name='__main__')"
)
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
        name: str | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of `messages` (each with `role` and `content`), special tokens included.

        `variables` are seen by the template under their names (`tools`, `documents`,
        `enable_thinking`, ...). Without a `name` the template is "tool_use" where there is one and
        `tools` are given, else "default". What a message has as None it does not have, as in
        transformers. ChatError when the template raises, violates the sandbox, or takes too much
        time or memory, and for messages with parts that are images, video or sound.
        """
        _refuse_other_than_text(messages)
        if name is None:
            with_tools = variables.get("tools") is not None and _TOOL_USE in self.sources
            name = _TOOL_USE if with_tools else _DEFAULT
        if name not in self.sources:
            raise ChatError(f"no chat template {name!r}; there are {', '.join(self.sources)}")
        given = {"tools": None, "documents": None, **self.tokens, **variables}
        said = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        given |= {"messages": said, "add_generation_prompt": add_generation_prompt}
        data = {key: _plain(value) for key, value in given.items()}
        found = _run(self.sources[name], data)
        if "error" in found:
            raise ChatError(f"chat template {name!r}{found['error']}")
        return found["text"]


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


def _run(source: str, data: Mapping[str, Any]) -> dict[str, str]:
    """What `render_template.rendered` gives, in a process of its own."""
    path = json.dumps([entry for entry in sys.path if Path(entry).is_absolute()])
    command = [sys.executable, "-I", "-S", "-c", _START, str(Path(render_template.__file__)), path]
    done = subprocess.run(
        command, input=pickle.dumps((source, data)), capture_output=True, check=False
    )
    if done.returncode == -signal.SIGXCPU or done.returncode == -signal.SIGKILL:
        return {"error": f" takes more than {render_template.SECONDS} seconds"}
    if done.returncode < 0:
        return {"error": f" ends by signal {-done.returncode}"}
    if done.returncode > 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        kind = lines[-1][:200]
        return {"error": " uses too much memory" if "MemoryError" in kind else f" fails: {kind}"}
    return json.loads(done.stdout)


def _plain(value: Any) -> Any:
    """`value` out of JSON's types alone: what has methods of its own could leave the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    raise ChatError(f"expected messages of JSON's types, found a {type(value).__name__}")
