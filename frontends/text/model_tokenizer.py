"""The tokenizer of a model directory, as transformers builds it.

Many classes of transformers do not take tokenizer.json as it is: they keep its vocabulary and make
normalizer, pre-tokenizer and decoder anew, out of the class and of tokenizer_config.json
(`add_prefix_space`, `legacy`). What they made is written down, in files that `Tokenizer.of` reads
the same everywhere: when a directory is compiled, and out of an ingot.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ...runtime.artifact.reader import TEMPLATES, TOKENIZER_FILES
from ..importers.side_files import read_file
from ..importers.source_error import SourceError
from .special_tokens import CONFIG, STANDARD_NAMES, listed_tokens, read_json
from .tokenizer import TOKENIZER, Tokenizer, library_errors, stop_tokens

_MOST_BYTES = 1 << 27
# transformers looks each of them up in a list of all.
_MOST_LISTED = 10_000
_GENERATION = "generation_config.json"
# What classes treat differently: ends, runs of spaces, digits, marks, accents, other scripts.
_PROBES = (
    "",
    " ",
    "a",
    " a",
    "  a  b ",
    "a b\n\n  c\td\r\n",
    "Hello, World! It's don't we'll I'M",
    "0123456789 3.14 x_y==z->w//2 <tag>",
    "Köln naïve e\u0301 façade ﬁ Ⅷ \u00a0\u200b\u3000",
    "東京の天気 Привет мир שלום 🙂🙃 \u0000\u0007",
    "def f(x):\n    return [x]\n",
)


def open_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer of a directory, None without a tokenizer.json. SourceError as below."""
    return Tokenizer.of(tokenizer_files(Path(directory))[0], str(directory))


def tokenizer_files(directory: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The files of a directory's tokenizer, special tokens, templates and configs; and notes.

    Where there is a tokenizer.json, it is written anew as transformers loads it, and tokenizer_
    config.json has the named tokens and templates of all side files. SourceError, one line, where a
    file cannot be read, transformers does not load the tokenizer, or `tokenizers` alone would not
    repeat it. A tokenizer whose class is code beside the checkpoint is read as the files say: that
    is a note.
    """
    files = _read_files(directory)
    stop_tokens(files, str(directory))  # what is malformed is refused by its name
    own = Tokenizer.of(files, str(directory))
    if own is None:
        return files, ()
    config = read_json(files, CONFIG, str(directory))
    if (count := len(listed_tokens(config))) > _MOST_LISTED:
        raise SourceError(
            f"{directory}/{CONFIG}: expected at most {_MOST_LISTED} extra special tokens, found "
            f"{count}"
        )
    if fifo := next((path for path in directory.iterdir() if path.is_fifo()), None):
        raise SourceError(f"{fifo}: expected a regular file, found something else")
    try:
        with library_errors(f"{directory}: transformers cannot load its tokenizer"):
            theirs: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except SourceError as error:
        if "trust_remote_code" not in str(error.__cause__):
            raise
        note = f"its class is code beside the checkpoint, not run: {TOKENIZER} is taken as it is"
        return files, (f"tokenizer: {note}",)
    kind = type(theirs).__name__
    if not getattr(theirs, "is_fast", False):
        raise SourceError(
            f"{directory}: its tokenizer is a {kind}, Python code of transformers: expected one of "
            "the tokenizers library"
        )
    with library_errors(f"{directory}: {TOKENIZER} cannot repeat what a {kind} makes"):
        made = _written(theirs, files)
        ours = Tokenizer.of(made, str(directory))
        assert ours is not None
        _check_repeats(ours, theirs)
    return made, ()


def _read_files(directory: Path) -> dict[str, bytes]:
    """Tokenizer, chat templates and configs that are there, by their path in `directory`."""
    paths = [directory / name for name in (*TOKENIZER_FILES, "config.json")]
    paths += sorted((directory / TEMPLATES).glob("*.jinja"))
    there = [path for path in paths if path.is_file()]
    return {path.relative_to(directory).as_posix(): read_file(path, _MOST_BYTES) for path in there}


def _written(theirs: Any, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """`theirs` in the files that `Tokenizer.of` reads, with the configs among `files`."""
    tokens = {name: str(token) for name, token in theirs.special_tokens_map.items()}
    config: dict[str, Any] = {n: t for n, t in tokens.items() if n in STANDARD_NAMES}
    config["extra_special_tokens"] = {n: t for n, t in tokens.items() if n not in STANDARD_NAMES}
    config["added_tokens_decoder"] = {}  # all are in tokenizer.json
    config["split_special_tokens"] = theirs.split_special_tokens
    config["chat_template"] = theirs.chat_template
    made = {
        TOKENIZER: theirs.backend_tokenizer.to_str().encode(),
        CONFIG: json.dumps(config).encode(),
    }
    return made | {n: files[n] for n in (_GENERATION, "config.json") if n in files}


def _check_repeats(ours: Tokenizer, theirs: Any) -> None:
    """ValueError unless both have the same tokens, show the same, and make the same ids of texts.

    Texts that both cannot encode are the same.
    """
    added: Mapping[int, Any] = ours.backend.get_added_tokens_decoder()
    if {i: repr(t) for i, t in added.items()} != {
        i: repr(t) for i, t in theirs.added_tokens_decoder.items()
    }:
        raise ValueError("added tokens differ")
    ids = sorted(added)
    shown, expected = (
        backend.decode_batch([[id_] for id_ in ids], skip_special_tokens=True)
        for backend in (ours.backend, theirs.backend_tokenizer)
    )
    if ours_only := [i for i, a, b in zip(ids, shown, expected, strict=True) if a != b]:
        raise ValueError(
            f"{added[ours_only[0]].content!r:.80} is listed both as a special token and as another"
        )
    special = "x".join(added[id_].content for id_ in ids[:64])
    for text in (*_PROBES, special, f" {special} "):
        for ends in (True, False):
            found = _ids(lambda: ours.encode(text, special_tokens=ends))  # noqa: B023
            wanted = _ids(lambda: theirs.encode(text, add_special_tokens=ends))  # noqa: B023
            if found != wanted:
                raise ValueError(f"of {text!r:.40} {wanted!r:.60}, not {found!r:.60}")


def _ids(encode: Callable[[], list[int]]) -> list[int] | None:
    try:
        with library_errors(""):
            return encode()
    except SourceError:
        return None
