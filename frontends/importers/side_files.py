"""Files of a model directory, which come from anywhere: read whole, within bounds."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from ...runtime.artifact.strict_json import IngotError, bounded_json
from .source_error import SourceError

MOST_BYTES = 1 << 26


def read_file(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file; SourceError unless it is a regular one of at most `most` bytes."""
    try:
        # A FIFO must not be waited for: it is opened only to be seen and refused.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SourceError(f"{path}: expected a regular file, found something else")
            size = os.fstat(file.fileno()).st_size
            data = file.read(most + 1) if size <= most else b""
    except OSError as error:
        raise SourceError(f"{path}: not readable: {error.strerror}") from error
    if (found := max(size, len(data))) > most:
        raise SourceError(f"{path}: expected at most {most} bytes, found {found}")
    return data


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """The object that is JSON in `data`; SourceError for anything else, and beyond bounds.

    NaN and infinities, which transformers writes, are numbers.
    """
    try:
        value = bounded_json(data, where, MOST_BYTES)
    except IngotError as error:
        raise SourceError(str(error)) from error
    if not isinstance(value, dict):
        raise SourceError(f"{where}: expected an object, found {type(value).__name__}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """`json_object` of a file."""
    return json_object(read_file(path), str(path))
