"""The files of a model directory that text needs: tokenizer, chat templates, generation config."""

from __future__ import annotations

from pathlib import Path

from ..importers.source_error import SourceError

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
TEMPLATES = "additional_chat_templates"


def read_model_files(directory: Path) -> dict[str, bytes]:
    """The content of those that are there, by their path in `directory`.

    SourceError for one that cannot be read.
    """
    paths = [directory / name for name in NAMES]
    paths += sorted((directory / TEMPLATES).glob("*.jinja"))
    try:
        return {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for path in paths
            if path.is_file()
        }
    except OSError as error:
        raise SourceError(f"{directory}: not readable: {error}") from error
