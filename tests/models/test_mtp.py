"""Multi-token prediction, from a checkpoint in the published layout to tokens.

The references are transformers' own: its layer for what is drafted, its generation with the layer
for what is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ingot
import pytest
import torch
from ingot.codegen.cpu import CpuDriver
from ingot.codegen.lower import Lowered, lower, serving_bindings
from ingot.compiler.pipeline import PassContext, run_pipeline
from ingot.compiler.target import CPU
from ingot.frontends.importers.huggingface import HuggingFaceModel, import_hugging_face
from ingot.frontends.loading import LoadedModel
from ingot.passes.pipelines import STAGES, causal_lm
from ingot.passes.serving.insert_kv_cache import InsertKvCache
from ingot.passes.serving.sample_on_device import output_names
from ingot.passes.transforms.mxfp4_policy import MXFP4
from ingot.passes.transforms.quantize_mxfp4 import QuantizeMxfp4
from ingot.runtime.program import STEP
from ingot.runtime.serving.abi import ServingAbi
from ingot.runtime.serving.device_drafts import DeviceDrafter
from ingot.runtime.serving.sequence import Sequence
from ingot.runtime.serving.session import Session
from mtp_checkpoints import without_stop, write_mtp
from transformers import AutoModelForCausalLM
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.modeling_layers import MtpModel

MODELS = ("deepseek_v3", pytest.param("glm4_moe", marks=pytest.mark.slow))
VOCAB, SEQUENCES, LENGTH, NEW = 8, 3, 96, 40
# Of so few tokens a layer of random weights drafts one right now and then.
PROMPTS = ([5, 6, 7], [3, 4, 5, 6, 7] * 4, [7])


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


# By directory, of the last program in MXFP4: the weights that are packed.
PACKED: dict[Path, set[str]] = {}


@cache
def program(directory: Path, tokens: int, group: int = 0) -> Lowered:
    """With `group` the weights are in MXFP4."""
    model = imported(directory, tokens > 0)
    passes = causal_lm(
        max_sequences=SEQUENCES,
        max_tokens_per_sequence=LENGTH,
        quantize=MXFP4(group=group, method="rtn") if group else None,
        draft=tokens,
    )
    context = PassContext(CPU, model.weights)
    graph = run_pipeline(model.graph, passes, context, stages=STAGES)[-1].graph
    bindings = serving_bindings(SEQUENCES, LENGTH, rows=SEQUENCES * (tokens + 1))
    meta = context.facts[InsertKvCache.name]
    packings = context.facts.get(QuantizeMxfp4.name, ())
    PACKED[directory] = {p.site.name for p in packings if p.site.action == "quantize"}
    assert context.weights is not None
    return lower(graph, context.weights, CPU, bindings, output_names(graph), meta)


@dataclass
class Recorded(DeviceDrafter):
    """What was drafted behind so many tokens of a sequence, in order."""

    drafted: list[tuple[int, list[int]]] = field(default_factory=list[Any])

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        found = super().draft(sequence, most)
        if found:
            self.drafted.append((sequence.length, found))
        return found


def opened(lowered: Lowered, drafter: DeviceDrafter | None = None) -> Session:
    """A session that drafts what the program does."""
    program = lowered.program
    if drafter is None and "draft" in program.functions[STEP].outputs:
        drafter = DeviceDrafter(ServingAbi(program).drafts)
    executable = CpuDriver().load(program, lowered.load_weight)
    return Session(program, executable, drafter=drafter)


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
        assert drafter.drafted == drafts[: len(drafter.drafted)]
        assert len(drafts) - len(drafter.drafted) <= 1
        accepted += NEW - steps
    assert accepted > 5


@pytest.mark.parametrize("tokens", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_further_tokens_are_made_of_the_layer_s_own_state(directory: Path, tokens: int) -> None:
    model, layer = reference(directory)
    drafter = Recorded(tokens)
    with opened(program(directory, tokens), drafter) as session:
        sequences = session.generate(PROMPTS, max_new_tokens=NEW)
    by_length = [dict[int, list[int]]() for _ in sequences]
    seen = 0
    for length, drafted in drafter.drafted:
        # Sequences of one length are told apart by what was drafted.
        wanted = [
            self_fed(model, layer, s.history[:length], len(drafted))
            for s in sequences
            if len(s.prompt) < length <= s.length
        ]
        assert drafted in wanted
        seen += len(drafted) > 1
    assert seen > 20, by_length


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
    lowered = program(directory, 2, 16)
    packed = PACKED[directory]
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
