"""Models that may not draft for another: each is refused in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ingot
import pytest
import tokenizers
import torch
from draft_models import write_pair
from ingot.codegen.lower import lower
from ingot.compiler.interpret import interpret
from ingot.compiler.pipeline import PassContext, run_pipeline
from ingot.compiler.target import target_of
from ingot.frontends.draft_model import with_draft_model
from ingot.frontends.importers.huggingface import HuggingFaceModel, import_hugging_face
from ingot.frontends.importers.source_error import SourceError
from ingot.frontends.text.model_tokenizer import open_tokenizer
from ingot.passes.pipelines import causal_lm
from ingot.passes.serving.sample_on_device import output_names
from interpreted import InterpretedBackend
from pass_checks import for_target
from tiny_models import tiny_model
from tiny_tokenizers import save
from tokenizers import models

pytestmark = pytest.mark.usefixtures("shared_traces")

OPTIONS: dict[str, Any] = {"dtype": None, "weightless": False, "allow_unused": False}


def imported(directory: Path) -> HuggingFaceModel:
    return import_hugging_face(directory, dtype=None, max_tokens=64)


def merged(model: Path, draft: Path) -> HuggingFaceModel:
    return with_draft_model(imported(model), draft, open_tokenizer(model), **OPTIONS)


def saved(directory: Path, **sizes: Any) -> Path:
    tiny_model("llama", **sizes).save_pretrained(directory)
    return directory


def tokenized(directory: Path, *words: str) -> None:
    """Give `directory` a tokenizer of `words`, by their places."""
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=words[0]))
    save(directory, tokenizer, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"})


def test_another_vocabulary(tmp_path: Path) -> None:
    model, draft = saved(tmp_path / "a", vocab_size=8), saved(tmp_path / "b", vocab_size=12)
    with pytest.raises(SourceError, match="b: expected a .* vocabulary .*, 8 tokens, found 12"):
        merged(model, draft)
    tokenized(model, "?", "a", "b")
    with pytest.raises(SourceError, match="vocabulary of the model, 8 tokens, found 12"):
        merged(model, draft)
    for same in (("?", "a", "b"), ("?", "a", "b", "c"), ("?", "a")):
        tokenized(draft, *same)
        merged(model, draft)
    for other, told in (
        (("?", "b", "a"), "where 'b' is 2, found 1"),
        (("?", "c", "b"), "where 1 is 'a', found 'c'"),
        (("?", "c", "d", "a"), "where 'a' is 1, found 3"),
    ):
        tokenized(draft, *other)
        with pytest.raises(SourceError, match=f"vocabulary of the model, {told}"):
            merged(model, draft)


def test_fewer_tokens(tmp_path: Path) -> None:
    model = saved(tmp_path / "a")
    draft = saved(tmp_path / "b", max_position_embeddings=48)
    with pytest.raises(SourceError, match="at most 48 tokens, .* max_tokens_per_sequence=48"):
        merged(model, draft)


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    model = saved(tmp_path / "a")
    with pytest.raises(SourceError, match="nowhere"):
        ingot.compile(model, speculate=ingot.Draft(tmp_path / "nowhere"), progress=False)


@pytest.mark.parametrize(("vocab", "drafts"), [(12, 8), (8, 12)])
def test_padded_vocabularies(tmp_path: Path, vocab: int, drafts: int) -> None:
    """A token that only the model has is read as the last that both have, and none is drafted that
    it has not."""
    made = [saved(tmp_path / str(n), vocab_size=n) for n in (vocab, drafts)]
    for directory in made:
        tokenized(directory, "?", "a")
    model = merged(*made)
    tokens = torch.tensor([5, 7, 9, 11, 8], dtype=torch.int32).clamp(max=vocab - 1)
    inputs = {"tokens": tokens, "positions": torch.arange(5, dtype=torch.int32)}
    logits, drafted = interpret(model.graph, inputs, model.weights).outputs
    (alone,) = interpret(imported(made[0]).graph, inputs, model.weights).outputs
    assert torch.equal(logits, alone)
    known = {**inputs, "tokens": tokens.clamp(max=drafts - 1)}
    draft = imported(made[1])
    (theirs,) = interpret(draft.graph, known, draft.weights).outputs
    assert torch.equal(drafted, theirs[:, :vocab].argmax(1).int())


@pytest.mark.parametrize("target", ["cuda:sm_90", "hip:gfx950"])
def test_a_step_copies_no_cache(target: str, tmp_path: Path) -> None:
    """Planned for a GPU, each run of the smaller model attends and appends in one launch a layer,
    and writes caches in place."""
    made = write_pair(tmp_path, "llama", "llama", dtype="bfloat16")
    model = merged(*made)
    passes = causal_lm(max_sequences=2, max_tokens_per_sequence=64, sample=True, draft=4)
    context = PassContext(target_of(target), model.weights)
    graph = for_target(run_pipeline(model.graph, passes, context)[-1].graph, target_of(target))
    assert context.weights is not None
    bindings, names = ({"T": 1, "L": 1}, {"T": 8, "L": 5}), output_names(graph)
    backend = InterpretedBackend(target_of(target))
    program = lower(
        graph, context.weights, backend.target, bindings, names, backend=backend
    ).program
    caches = {program.buffers[name].shape for name in graph.state}
    for entry in program.entries:
        assert not [b for b in entry.buffers if b.shape in caches]
        attends = [n.label for n in entry.launches if n.label.startswith("project_attention")]
        assert attends and all("+kv_append" in label for label in attends)
        # Two layers of the model, and of the smaller one in each of four runs.
        products = [n for n in entry.launches if "mlp.down_proj" in n.label]
        assert len({n.label for n in products}) == 4 and len(products) >= 2 + 4 * 2


def test_what_is_said_of_it(tmp_path: Path) -> None:
    """Its weights, and what is reported of it, have its name before them."""
    made = write_pair(tmp_path, "llama", "llama")
    (made[1] / "adapter_config.json").write_text("{}")
    model = with_draft_model(
        imported(made[0]), made[1], None, dtype=None, weightless=False, allow_unused=True
    )
    (note,) = model.notes
    assert note.startswith(f"{made[1]}, which drafts: adapter_config.json")
    own = {name for name in model.weights if not name.startswith("draft.")}
    assert {n.removeprefix("draft.") for n in model.weights if n.startswith("draft.")} == own
