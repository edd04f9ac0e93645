"""Multi-token prediction, from a checkpoint in the published layout to tokens.

The references are transformers' own: its layer for what is drafted, its generation with the layer
for what is accepted.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ingot
import pytest
import torch
from drafting_programs import (
    LENGTH,
    NEW,
    PROMPTS,
    VOCAB,
    Recorded,
    drafting_program,
    opened,
)
from ingot.codegen.lower import Lowered
from ingot.frontends.importers.huggingface import HuggingFaceModel, import_hugging_face
from ingot.frontends.loading import LoadedModel
from mtp_checkpoints import without_stop, write_mtp
from transformers import AutoModelForCausalLM
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.modeling_layers import MtpModel

MODELS = ("deepseek_v3", pytest.param("glm4_moe", marks=pytest.mark.slow))


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    write_mtp(made, request.param, seed=1, vocab_size=VOCAB)
    without_stop(made)
    return made


@cache
def imported(directory: Path, predict: bool) -> HuggingFaceModel:
    return import_hugging_face(
        directory, dtype=None, max_tokens=LENGTH, predict=ingot.MTP() if predict else None
    )


@cache
def built(directory: Path, tokens: int, group: int = 0) -> tuple[Lowered, set[str]]:
    """With `group` the weights are in MXFP4; see drafting_program."""
    return drafting_program(imported(directory, tokens > 0), tokens, group)


def program(directory: Path, tokens: int, group: int = 0) -> Lowered:
    return built(directory, tokens, group)[0]


def reference(directory: Path) -> tuple[Any, MtpModel]:
    """The model and its layer as transformers loads them."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    # transformers knows the layer by its number in the published models.
    model._keys_to_ignore_on_load_unexpected = [rf"layers\.{model.config.num_hidden_layers}\."]
    return model, MtpModel.from_pretrained(model).eval()


@torch.no_grad()
def self_fed(model: Any, layer: MtpModel, history: list[int], count: int) -> list[int]:
    """`count` tokens drafted behind `history` by the layer from its own state, computed anew."""
    hidden = model(torch.tensor([history[:-1]]), output_hidden_states=True).hidden_states[-1]
    following = list(history[1:])
    drafted: list[int] = []
    for _ in range(count):
        positions = torch.arange(len(following))[None]
        inputs = torch.tensor([following])
        state = layer.forward_layer(0, hidden, positions, None, input_ids=inputs)
        drafted.append(int(layer._project_to_logits(state)[0, -1].argmax()))
        hidden = torch.cat([hidden, state[:, -1:]], dim=1)
        following.append(drafted[-1])
    return drafted


def test_transformers_accepts_the_same(directory: Path) -> None:
    """Draft by draft, hence as many steps, as its generation with the layer (one token a step)."""
    model, _ = reference(directory)
    drafts: list[tuple[int, list[int]]] = []
    get = MTPCandidateGenerator.get_candidates

    def recording(self: Any, ids: torch.Tensor, *args: Any, **named: Any) -> Any:
        candidates, logits = get(self, ids, *args, **named)
        if logits is not None:
            drafts.append((ids.shape[1], candidates[0, ids.shape[1] :].tolist()))
        return candidates, logits

    accepted = 0
    for prompt in PROMPTS:
        drafts.clear()
        with patch.object(MTPCandidateGenerator, "get_candidates", recording), torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, use_mtp=True
            )
        drafter = Recorded()
        with opened(program(directory, 1), drafter) as session:
            (found,) = session.generate([prompt], max_new_tokens=NEW)
            steps = session.stats.steps
        assert list(found.tokens) == out[0, len(prompt) :].tolist()
        # Where one token is left to be made none is drafted, which transformers does all the same.
        mine = [(length, drafted) for _, length, drafted in drafter.drafted]
        assert mine == drafts[: len(mine)]
        assert len(drafts) - len(mine) <= 1
        accepted += NEW - steps
    assert accepted > 5


@pytest.mark.parametrize("tokens", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_further_tokens_are_made_of_the_layer_s_own_state(directory: Path, tokens: int) -> None:
    model, layer = reference(directory)
    drafter = Recorded(tokens)
    with opened(program(directory, tokens), drafter) as session:
        session.generate(PROMPTS, max_new_tokens=NEW)
    for sequence, length, drafted in drafter.drafted:
        assert drafted == self_fed(model, layer, sequence.history[:length], len(drafted))
    assert sum(len(drafted) > 1 for *_, drafted in drafter.drafted) > 20


@pytest.mark.parametrize("tokens", [1, 3])
def test_tokens_are_those_without_it(directory: Path, tokens: int) -> None:
    with opened(program(directory, 0)) as session:
        expected = session.generate(PROMPTS, max_new_tokens=NEW)
    with opened(program(directory, tokens)) as session:
        found = session.generate(PROMPTS, max_new_tokens=NEW)
    assert [s.tokens for s in found] == [s.tokens for s in expected]
    assert all(s.stats.steps == NEW for s in expected)
    assert sum(s.stats.steps for s in found) < NEW * len(PROMPTS) - 5


def test_quantized_like_any_other_layer(directory: Path) -> None:
    """Its weights are packed, and the tokens are those of the quantized model without it."""
    lowered, packed = built(directory, 2, 16)
    trunk = {
        name.removeprefix("model.layers.1.")
        for name in packed
        if name.startswith("model.layers.1.")
    }
    layer = {n.removeprefix("mtp.layers.0.mtp_block.") for n in packed if n.startswith("mtp.")}
    assert layer >= {*trunk, "mtp.layers.0.eh_proj.weight"} and len(trunk) > 5
    with opened(program(directory, 0, 16)) as session:
        expected = [s.tokens for s in session.generate(PROMPTS, max_new_tokens=NEW)]
    with opened(lowered) as session:
        found = [s.tokens for s in session.generate(PROMPTS, max_new_tokens=NEW)]
    assert found == expected


def test_embedding_and_head_are_there_once(directory: Path) -> None:
    """Drafting more tokens adds no weights: all its passes share the layer's, and the model's."""

    def weights(lowered: Lowered) -> dict[str, int]:
        buffers = lowered.program.buffers.values()
        return {b.name: b.nbytes for b in buffers if b.kind == "weight"}

    model = imported(directory, True)
    own = sum(int(e.type.nbytes) for n, e in model.weights.items() if n.startswith("mtp."))
    plain, one, four = (sum(weights(program(directory, k)).values()) for k in (0, 1, 4))
    assert one == four
    # What absorption folds of the layer is as large as what it folds of another.
    assert 0 < one - plain <= 2 * own
    names = [*program(directory, 4).program.buffers]
    for shared in ("embed_tokens", "lm_head"):
        assert sum(shared in name for name in names) == 1


def test_through_the_doors(directory: Path, tmp_path: Path) -> None:
    """Compiled, as an ingot, without it, and by another way to draft: the same tokens."""
    sizes: Any = {"max_sequences": 2, "max_tokens_per_sequence": LENGTH, "target": "cpu"}

    def tokens(model: ingot.Model | LoadedModel) -> list[Any]:
        found = model.session.generate(PROMPTS, max_new_tokens=NEW)
        return [s.tokens for s in found]

    expected = tokens(ingot.compile(directory, **sizes))
    model = ingot.compile(directory, speculate=ingot.MTP(k=2), **sizes)
    assert tokens(model) == expected
    report = model.report.speculation
    assert report is not None and report.kind == "mtp:2" and report.verified > 0
    ingot.compile_to(directory, tmp_path / "made", speculate="mtp:2", **sizes)
    for speculate in (None, "mtp", "ngram:2", "none"):
        assert tokens(ingot.load(tmp_path / "made", speculate=speculate)) == expected
    with pytest.raises(ValueError, match="mtp:3 needs a program that drafts 3 tokens .* drafts 2"):
        ingot.load(tmp_path / "made", speculate=ingot.MTP(3))
