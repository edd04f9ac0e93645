"""A smaller model that drafts, beside the model in one graph.

It reads the tokens of the model, which has to share its vocabulary, and has weights and caches of
its own. How its tokens become drafts is the pass draft-next-tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..compiler.ir import Graph, walk
from ..compiler.ops.draft import likeliest
from ..compiler.ops.leaf import constant, literal
from ..compiler.ops.pointwise import minimum
from ..compiler.ops.shape import slice_
from .importers.huggingface import HuggingFaceModel, import_hugging_face
from .importers.source_error import SourceError
from .text.model_tokenizer import open_tokenizer
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

# Before the names of its weights and the places in it.
PREFIX = "draft."


def with_draft_model(
    model: HuggingFaceModel,
    directory: str | Path,
    tokenizer: Tokenizer | None,
    *,
    dtype: torch.dtype | None,
    weightless: bool,
    allow_unused: bool,
) -> HuggingFaceModel:
    """`model` with the one at `directory` beside it: outputs logits [T, vocab] and drafted i32[T],
    the likeliest token behind each by the smaller model.

    `tokenizer` is that of `model`; the others are as import_hugging_face has them. SourceError
    where the smaller model cannot be read, has another vocabulary or takes fewer tokens.
    """
    draft = import_hugging_face(
        directory,
        dtype=dtype,
        max_tokens=model.max_tokens,
        weightless=weightless,
        allow_unused=allow_unused,
    )
    if draft.max_tokens < model.max_tokens:
        raise SourceError(
            f"{directory}: the model that drafts takes at most {draft.max_tokens} tokens, and the "
            f"model {model.max_tokens}: compile with max_tokens_per_sequence={draft.max_tokens}"
        )
    _check_vocabulary(_vocab(model.graph), _vocab(draft.graph), tokenizer, directory)
    unused = {f"{PREFIX}{name}": why for name, why in draft.unused.items()}
    weights = {f"{PREFIX}{name}": entry for name, entry in draft.weights.items()}
    return replace(
        model,
        graph=_merged(model.graph, draft.graph),
        weights=model.weights.merged(weights),
        unused={**model.unused, **unused},
        notes=(*model.notes, *(f"{directory}, which drafts: {note}" for note in draft.notes)),
    )


def _vocab(graph: Graph) -> int:
    vocab = graph.outputs[0].type.shape[-1]
    assert isinstance(vocab, int)
    return vocab


def _check_vocabulary(
    vocab: int, drafted: int, tokenizer: Tokenizer | None, directory: str | Path
) -> None:
    """SourceError unless the tokens below both sizes are the same: those of both tokenizers, and
    where one is missing as many."""
    other = open_tokenizer(directory)
    shared = f"{directory}: expected a model that drafts to share the vocabulary of the model"
    if tokenizer is None or other is None:
        if vocab != drafted:
            raise SourceError(f"{shared}, {vocab} tokens, found {drafted}")
        return
    both = min(vocab, drafted)
    ours, theirs = (_ids(t, both) for t in (tokenizer, other))
    for token, id_ in theirs.items():
        if ours.get(token, id_) != id_:
            raise SourceError(f"{shared}, where {token!r:.60} is {ours[token]}, found {id_}")
    names = {id_: token for token, id_ in ours.items()}
    for token, id_ in theirs.items():
        if names.get(id_, token) != token:
            raise SourceError(f"{shared}, where {id_} is {names[id_]!r:.60}, found {token!r:.60}")


def _ids(tokenizer: Tokenizer, most: int) -> Mapping[str, int]:
    """The ids below `most` by token."""
    every = tokenizer.backend.get_vocab(with_added_tokens=True)
    return {token: id_ for id_, token in sorted((i, t) for t, i in every.items()) if id_ < most}


def _merged(graph: Graph, draft: Graph) -> Graph:
    """Both graphs over the parameters of the first."""
    tokens = graph.param("tokens")
    (logits,) = draft.outputs
    columns, vocab = _vocab(draft), _vocab(graph)
    # What only the model knows is the last token that its draft does.
    known = tokens if columns >= vocab else minimum(tokens, literal(value=columns - 1, dtype="i32"))
    made = {draft.param("tokens"): known, draft.param("positions"): graph.param("positions")}
    leaves = {value.node for value in made}
    for node in walk(draft.outputs, leaves.__contains__):
        if node in leaves:
            continue
        copied = replace(
            node,
            args=tuple(made[a] for a in node.args),
            attrs={**node.attrs, "name": PREFIX + node.attrs["name"]}
            if node.op is constant
            else node.attrs,
            source=node.source and PREFIX + node.source,
        )
        made.update(zip(node.results, copied.results, strict=True))
    predicted = made[logits]
    if columns > vocab:
        predicted = slice_(predicted, dim=1, start=0, stop=vocab)
    outputs = (*graph.outputs, likeliest(predicted))
    return Graph(graph.name, graph.params, outputs, graph.symbols)
