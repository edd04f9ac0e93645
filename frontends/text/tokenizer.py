"""Tokenization and incremental detokenization with the `tokenizers` library alone."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tokenizers

from ..importers.source_error import SourceError
from .chat import ChatTemplate, chat_template_of
from .special_tokens import CONFIG, add_special_tokens, read_json

TOKENIZER = "tokenizer.json"
# Stands for bytes that are no character, and for the start of one whose rest has not come yet.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """The tokenizer of a model directory.

    `eos_token_id` ends a completion, beside the ids of `stop_tokens`. It and `chat_template` are
    None where the model has none.
    """

    backend: tokenizers.Tokenizer
    eos_token_id: int | None
    chat_template: ChatTemplate | None

    @classmethod
    def of(cls, files: Mapping[str, bytes], place: str) -> Tokenizer | None:
        """The tokenizer in the files of a model directory, None without a tokenizer.json.

        Tokens are added, and the file's own post-processor used, as transformers does for the same
        directory. SourceError names a file of `place` that cannot be read.
        """
        if TOKENIZER not in files:
            return None
        with library_errors(f"{place}/{TOKENIZER} is no tokenizer of the tokenizers library"):
            backend = tokenizers.Tokenizer.from_buffer(files[TOKENIZER])
        with library_errors(f"{place}: its tokens cannot be added"):
            names = add_special_tokens(backend, files, place)
        backend.no_truncation()
        backend.no_padding()
        config = read_json(files, CONFIG, place)
        backend.encode_special_tokens = config.get("split_special_tokens") is True
        eos = backend.token_to_id(names.get("eos_token", ""))
        return cls(backend, eos, chat_template_of(files, config, names))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """The ids of `text`; with the special tokens that the tokenizer itself puts around it.

        `special_tokens=False` is for text that has them already, as a chat template's.
        """
        with library_errors("the tokenizer cannot encode this text"):
            return self.backend.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens and ids that the tokenizer lacks are left out."""
        with library_errors("the tokenizer cannot decode these ids"):
            return self.backend.decode(list(ids), skip_special_tokens=True)

    def hidden_text(self, token: int) -> str:
        """The text of a special token, which `decode` leaves out; empty for any other."""
        return self._special.get(token, "")

    def special_id(self, text: str) -> int | None:
        """The special token that `text` is, None where it is none."""
        return next((id_ for id_, content in self._special.items() if content == text), None)

    def decoder(self) -> IncrementalDetokenizer:
        """A new stream that decodes token by token."""
        return IncrementalDetokenizer(self.decode, self._is_silent, self._byte_ids)

    def _is_silent(self, token: int) -> bool:
        """Whether `decode` leaves the token out."""
        return token in self._special or self.backend.id_to_token(token) is None

    @cached_property
    def _special(self) -> Mapping[int, str]:
        """The texts of the special tokens, which `decode` leaves out, by their ids."""
        added = self.backend.get_added_tokens_decoder()
        return {id_: token.content for id_, token in added.items() if token.special}

    @cached_property
    def _byte_ids(self) -> frozenset[int]:
        """The tokens <0x00> to <0xFF>, where the decoder takes a run of them as UTF-8."""
        decoder: Any = self.backend.decoder
        if decoder is None or "A" not in decoder.decode(["B", "<0x41>"]):
            return frozenset()
        ids = (self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(id_ for id_ in ids if id_ is not None)


class IncrementalDetokenizer:
    """Decodes token by token: the pieces from `push` and `flush` concatenate to `decode(all)`.

    Text that a later token could still change is held back: the start of a character, and a run of
    byte tokens, which is UTF-8 only as a whole. Only the last few tokens are decoded again for each
    push: those since the boundary before the last one, at which every character was complete. That
    context keeps decoders from treating the next token as the first of the text.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        is_silent: Callable[[int], bool] = lambda token: False,
        byte_ids: Set[int] = frozenset(),
    ) -> None:
        self._decode = decode
        self._is_silent = is_silent
        self._byte_ids = byte_ids
        self._ids: list[int] = []  # the window
        self._given = 0  # characters of the window's text that were handed out
        self._boundary = 0  # tokens of the window up to the last boundary

    def push(self, token: int) -> str:
        """The text that `token` completes, often none."""
        if self._is_silent(token):
            return ""
        self._ids.append(token)
        if token in self._byte_ids:
            return ""
        text = self._decode(self._ids)
        stable = text.removesuffix(_REPLACEMENT)
        new = stable[self._given :]
        self._given = max(self._given, len(stable))
        if stable == text:
            self._start_from_boundary()
        return new

    def flush(self) -> str:
        """The text held back; resets the stream."""
        rest = self._decode(self._ids)[self._given :]
        self._ids, self._given, self._boundary = [], 0, 0
        return rest

    def _start_from_boundary(self) -> None:
        context = self._ids[self._boundary :]
        text = self._decode(context)
        if text:
            self._ids, self._given = context, len(text)
        self._boundary = len(self._ids)


def stop_tokens(files: Mapping[str, bytes], place: str) -> set[int]:
    """Every `eos_token_id` of generation_config.json and config.json; SourceError for no id."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        content = read_json(files, name, place)
        for holder in (content, content.get("text_config")):
            given: Any = holder.get("eos_token_id") if isinstance(holder, Mapping) else None
            ids: list[Any] = given if isinstance(given, list) else [] if given is None else [given]
            for id_ in ids:
                if not isinstance(id_, int) or isinstance(id_, bool):
                    raise SourceError(
                        f"{place}/{name}: eos_token_id: expected an id or a list of ids, "
                        f"found {given!r:.80}"
                    )
                found.add(id_)
    return found


@contextmanager
def library_errors(what: str) -> Generator[None]:
    """SourceError for any error of the tokenizers library: it raises bare Exceptions, and where its
    Rust code panics PanicException, which is no Exception."""
    try:
        yield
    except SourceError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise SourceError(f"{what}: {' '.join(str(error).split())[:300]}") from error
