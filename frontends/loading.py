"""Loads and serves an ingot; one for a GPU needs neither torch nor triton."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.artifact.manifest import MANIFEST, Manifest
from ..runtime.artifact.reader import FINAL_GRAPH, Artifact, open_ingot
from ..runtime.artifact.strict_json import IngotError
from ..runtime.driver import Driver
from ..runtime.program import Program
from .drivers import driver_for
from .importers.source_error import SourceError
from .options import NotYetError, speculation_of
from .speculate import MTP, Draft, Eagle3, NGram, Speculation, check_rows, kind_of, open_session
from .text.text_model import TextModel
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..compiler.ir import Graph


# Errors that broken tokenizer files cause.
_BROKEN = (
    SourceError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


@dataclass(eq=False)
class LoadedModel(TextModel):
    """A language model loaded from an ingot, with its `manifest` and the text of its final IR."""

    manifest: Manifest
    graph_text: str

    @property
    def asked_tokens(self) -> int | None:
        """See TextModel."""
        asked = self.manifest.options.get("max_tokens_per_sequence")
        return asked if isinstance(asked, int) else None

    def graph(self) -> Graph:
        """The final IR (imports torch); ParseError or VerifyError for text that is none."""
        from ..compiler.text import parse

        return parse(self.graph_text, trusted=False)


def load(
    path: str | Path,
    *,
    driver: Driver | None = None,
    speculate: str | NGram | MTP | Eagle3 | Draft | None = None,
) -> LoadedModel:
    """Load the ingot at `path`, a directory or a zip, and make it ready to serve.

    Every file is validated first; IngotError, one line, names an invalid one. `driver` is by
    default that of the ingot's target, and raises its own error if the machine has no such device.
    `speculate` is an NGram, an MTP, an Eagle3 or a Draft, or text for one, in place of what the
    ingot was compiled with, or "none" (see CompileOptions): ValueError where a step gives fewer
    results than a draft needs, or does not draft so many tokens in that way. The directory of an
    Eagle3 or a Draft is not read, and need not be there.

    Device code from an untrusted ingot is untrusted code: hashes detect corruption, not origin.
    """
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path: expected the path of an ingot, found a {type(path).__name__}")
    speculation = speculation_of(speculate)
    artifact = open_ingot(path)
    manifest = artifact.manifest
    driver = driver or driver_for(manifest.target)
    tokenizer = _tokenizer(artifact)
    if artifact.program is None:
        from .cpu_ingot import read_cpu_program, torch_weights

        program = read_cpu_program(artifact)
        weights = torch_weights(artifact.weights(program.buffers), program.buffers)
    else:
        program = artifact.program
        weights = artifact.weights(program.buffers)
    if speculate is None:
        speculation = _recorded(manifest, program)
    else:
        check_rows(speculation, program)
        _check_kind(speculation, manifest)
    session = open_session(program, driver.load(program, weights), speculation)
    text = artifact.graphs[FINAL_GRAPH]
    return LoadedModel(session, tokenizer, frozenset(manifest.stop_tokens), manifest, text)


def _recorded(manifest: Manifest, program: Program) -> Speculation | None:
    """The way to draft that an ingot was compiled with; its program can."""
    given = manifest.options.get("speculate")
    try:
        speculation = speculation_of(given)
        check_rows(speculation, program)
        return speculation
    except (NotYetError, TypeError, ValueError) as error:
        raise IngotError(f"{MANIFEST}: options: {error}") from error


def _check_kind(speculation: Speculation | None, manifest: Manifest) -> None:
    """ValueError where steps draft by themselves, and in another way than `speculation`."""
    recorded = str(manifest.options.get("speculate"))
    if isinstance(speculation, MTP | Eagle3 | Draft) and kind_of(recorded) != kind_of(
        str(speculation)
    ):
        raise ValueError(f"speculate: {speculation}: the steps of this ingot draft by {recorded}")


def _tokenizer(artifact: Artifact) -> Tokenizer | None:
    try:
        return Tokenizer.of(artifact.model_files, "tokenizer")
    except _BROKEN as error:
        first = (str(error).splitlines() or [""])[0]
        raise IngotError(f"{artifact.path}: tokenizer: {type(error).__name__}: {first}") from error
