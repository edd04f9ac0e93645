"""draft-next-tokens: what it makes, when it declines, and what of the whole graph is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.ops.draft import accept, follow
from ingot.compiler.pipeline import PassError, run_pipeline
from ingot.compiler.text import parse
from ingot.compiler.weights import Weights
from ingot.passes.serving.draft_next_tokens import DraftNextTokens
from ingot.passes.serving.insert_kv_cache import InsertKvCache
from ingot.passes.serving.sample_on_device import SampleOnDevice
from pass_checks import applied, graph_of, ops, random_inputs, random_weights

# A model of one layer, and a layer that predicts; of both the hidden states and the logits.
GRAPH = """
    graph @both(%tokens: i32[T], %positions: i32[T], %following: i32[T]) T=1..9 {
      %x = embedding(%tokens, @embed)
      %q = view(%x, shape=[T, 2, 4])
      %a = attention(%q, %q, %q, scale=0.5)
      %y = view(%a, shape=[T, 8])
      %hidden = add(%x, %y)
      %logits = linear(%hidden, @head)
      %e = embedding(%following, @embed)
      %both = cat(%e, %hidden, dim=1)
      %z = linear(%both, @eh_proj)
      %p = view(%z, shape=[T, 2, 4])
      %b = attention(%p, %p, %p, scale=0.5)
      %w = view(%b, shape=[T, 8])
      %state = add(%z, %w)
      %predicted = linear(%state, @head)
      %drafted = likeliest(%predicted)
      return %logits, %hidden, %drafted, %state
    } where {
      @embed: f32[12, 8]
      @head: f32[12, 8]
      @eh_proj: f32[8, 16]
    }"""
# The same model, and a smaller one of its own that drafts.
MODEL = """
    graph @both(%tokens: i32[T], %positions: i32[T]) T=1..9 {
      %x = embedding(%tokens, @embed)
      %q = view(%x, shape=[T, 2, 4])
      %a = attention(%q, %q, %q, scale=0.5)
      %y = view(%a, shape=[T, 8])
      %hidden = add(%x, %y)
      %logits = linear(%hidden, @head)
      %e = embedding(%tokens, @draft.embed)
      %p = view(%e, shape=[T, 1, 4])
      %b = attention(%p, %p, %p, scale=0.5)
      %w = view(%b, shape=[T, 4])
      %state = add(%e, %w)
      %predicted = linear(%state, @draft.head)
      %drafted = likeliest(%predicted)
      return %logits, %drafted
    } where {
      @embed: f32[12, 8]
      @head: f32[12, 8]
      @draft.embed: f32[12, 4]
      @draft.head: f32[12, 4]
    }"""
SERVING = (InsertKvCache(2, 16, page_size=8), SampleOnDevice(candidates=0))


def sampling(text: str = GRAPH) -> Graph:
    return run_pipeline(graph_of(text), SERVING)[-1].graph


@pytest.mark.parametrize("tokens", [1, 2])
def test_what_it_makes(golden: Callable[[str], None], tokens: int) -> None:
    after, log = applied(DraftNextTokens(tokens), sampling())
    assert log.matches["draft-next-tokens"] == 1
    assert str(parse(str(after))) == str(after)
    golden(str(after))


@pytest.mark.parametrize("tokens", [1, 2])
def test_what_it_makes_of_a_model(golden: Callable[[str], None], tokens: int) -> None:
    after, log = applied(DraftNextTokens(tokens), sampling(MODEL))
    assert log.matches["draft-next-tokens"] == 1
    assert str(parse(str(after))) == str(after)
    golden(str(after))


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_what_was_there_stays_and_drafts_are_the_layer_s(tokens: int) -> None:
    """The first drafted token is that of the graph before, with the sampled tokens for those that
    follow; logits, tokens and the model's own cache are the same."""
    before = sampling()
    after, _ = applied(DraftNextTokens(tokens), before)
    weights = random_weights(before)
    for seed in range(5):
        sizes = {"T": 7, "L": 3}
        inputs = random_inputs(after, sizes, seed, high=2)
        inputs |= {
            "tokens": torch.randint(12, (7,), dtype=torch.int32),
            "positions": torch.tensor([4, 5, 6, 0, 1, 2, 0], dtype=torch.int32),
            "slots": torch.tensor([0, 0, 0, 1, 1, 1, -1], dtype=torch.int32),
            "page_table": torch.tensor([[2, 3], [0, 1]], dtype=torch.int32),
            "logit_rows": torch.tensor([1, 2, 5], dtype=torch.int32),
            "following": torch.tensor([3, -1, -1, 7, 8, -1, -1], dtype=torch.int32),
        }
        found = interpret(after, inputs, weights)
        logits, token, logprob, draft = found.outputs
        filled = follow.reference(inputs["following"], inputs["logit_rows"], token)[0]
        mine = {p.attrs["name"]: inputs[p.attrs["name"]] for p in before.params}
        expected = interpret(before, {**mine, "following": filled}, weights)
        for a, b in zip((logits, token, logprob), expected.outputs, strict=False):
            assert torch.equal(a, b)
        assert torch.equal(draft[:, 0], expected.outputs[4])
        assert draft.shape == (3, tokens)
        for name in ("k_cache.0", "v_cache.0"):
            assert torch.equal(found.updates[name], expected.updates[name])
        if tokens == 1:
            continue
        # The next is what a step gives that takes the row where the draft goes on, one position
        # on, with the layer's own state for the model's: which no input says, so of the op alone.
        given = [inputs[n] for n in ("tokens", "positions", "slots", "logit_rows")]
        slots, positions, *_ = accept.reference(*given, token, inputs["room"], steps=1)
        moved = (found.updates["k_cache.1"] != expected.updates["k_cache.1"]).any((2, 3)).nonzero()
        table, size = inputs["page_table"], 8
        places = {
            (int(table[s, (p + i) // size]), (p + i) % size)
            for s, p, r in zip(
                slots.tolist(), positions.tolist(), inputs["room"].tolist(), strict=True
            )
            for i in range(min(tokens - 1, r))
            if s >= 0
        }
        assert {(int(page), int(at)) for page, at in moved} == places


@given(st.data())
@hypothesis_settings(max_examples=25)
def test_what_was_there_stays_and_a_model_drafts(data: st.DataObject) -> None:
    """Logits, tokens and the model's own cache are the same; what is drafted behind each run of
    rows is what the smaller model goes on with, which sees what was accepted in any number of steps
    before, and its cache holds that and no more."""
    count = data.draw(st.integers(1, 4))
    before = sampling(MODEL)
    after, _ = applied(DraftNextTokens(count), before)
    weights = random_weights(before, data.draw(st.integers(0, 9)))
    state = {
        name: torch.zeros([int(n) for n in after.param(name).type.shape]) for name in after.updates
    }
    vocab, table = 12, torch.tensor([[2, 3], [0, 1]], dtype=torch.int32)
    some = st.integers(0, vocab - 1)
    known = {slot: data.draw(st.lists(some, min_size=1, max_size=4)) for slot in (0, 1)}
    seen = {0: 0, 1: 0}
    drafts: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(3):
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        of: list[tuple[int, list[int]]] = []
        for slot in data.draw(st.permutations((0, 1))):
            # As drafted, or anything.
            drafted = data.draw(st.sampled_from([drafts[slot], [3, 4], []]))
            drafted = drafted[: 14 - len(known[slot])]
            chunk = [*known[slot][seen[slot] :], *drafted]
            first = len(tokens) + len(chunk) - len(drafted) - 1
            of.append((slot, drafted))
            rows += range(first, len(tokens) + len(chunk))
            positions += range(seen[slot], seen[slot] + len(chunk))
            tokens, slots = tokens + chunk, slots + [slot] * len(chunk)
        padding = data.draw(st.integers(0, 2))
        room = [15 - positions[row] for row in rows] + [0] * padding
        tokens, positions = tokens + [0] * padding, positions + [0] * padding
        slots, rows = slots + [-1] * padding, rows + [0] * padding
        inputs = random_inputs(after, {"T": len(tokens), "L": len(rows)}, 0, high=2)
        for name, given_ in (
            ("tokens", tokens),
            ("positions", positions),
            ("slots", slots),
            ("logit_rows", rows),
            ("room", room),
        ):
            inputs[name] = torch.tensor(given_, dtype=torch.int32)
        for name in ("temperature", "seen", "top"):
            inputs[name] = torch.zeros_like(inputs[name])
        inputs |= {"penalty": torch.ones_like(inputs["penalty"]), "page_table": table, **state}
        found = interpret(after, inputs, weights)
        expected = interpret(before, inputs, weights)
        for a, b in zip(found.outputs[:3], expected.outputs[:3], strict=True):
            assert torch.equal(a, b)
        for name in ("k_cache.0", "v_cache.0"):
            assert torch.equal(found.updates[name], expected.updates[name])
        state = dict(found.updates)
        token, draft = found.outputs[1].tolist(), found.outputs[-1].tolist()
        at = 0
        for slot, drafted in of:
            right = 0
            while right < len(drafted) and token[at + right] == drafted[right]:
                right += 1
            known[slot] += token[at : at + right + 1]
            seen[slot] = len(known[slot]) - 1
            drafts[slot] = draft[at + right][: 15 - seen[slot]]
            assert drafts[slot] == _continued(weights, known[slot], len(drafts[slot]))
            at += len(drafted) + 1
            # A row of the cache is the embedding of the token that was written there.
            held = state["k_cache.1"].flatten(0, 1)[:, 0]
            places = [int(table[slot, p // 8]) * 8 + p % 8 for p in range(len(known[slot]))]
            embedded = weights.load("draft.embed")[torch.tensor(known[slot])]
            assert torch.equal(held[torch.tensor(places)], embedded)


def _continued(weights: Weights, tokens: list[int], count: int) -> list[int]:
    """The likeliest `count` tokens behind `tokens` by the smaller model of MODEL alone."""
    made = list(tokens)
    for _ in range(count):
        x = weights.load("draft.embed")[torch.tensor(made)]
        chances = torch.softmax(0.5 * x @ x[-1], 0)
        logits = weights.load("draft.head") @ (x[-1] + chances @ x)
        made.append(int(logits.argmax()))
    return made[len(tokens) :]


def test_refuses_a_model_that_reads_the_other() -> None:
    text = MODEL.replace("@draft.embed: f32[12, 4]", "@draft.part: f32[4, 8]").replace(
        "embedding(%tokens, @draft.embed)", "linear(%hidden, @draft.part)"
    )
    with pytest.raises(PassError, match="expected what drafts to read the tokens alone of a step"):
        run_pipeline(sampling(text), (DraftNextTokens(1),))


def test_only_what_predicts_drafts() -> None:
    text = GRAPH.replace("return %logits, %hidden, %drafted, %state", "return %logits")
    text = text.replace(", %following: i32[T]", "").replace("%following", "%tokens")
    plain = run_pipeline(graph_of(text), SERVING)[-1].graph
    for graph, reason in (
        (plain, "it predicts nothing behind the tokens that it samples"),
        (run_pipeline(graph_of(GRAPH), SERVING[:1])[-1].graph, "it does not sample"),
    ):
        after, log = applied(DraftNextTokens(), graph)
        assert after is graph
        assert DraftNextTokens().expected(graph) == 0
        (declined,) = log.declined
        assert declined.endswith(reason)


def test_it_drafts_once() -> None:
    assert DraftNextTokens().expected(sampling()) == 1
    once, _ = applied(DraftNextTokens(3), sampling())
    twice, _ = applied(DraftNextTokens(3), once)
    assert twice is once
    assert ops(twice)["likeliest"] == 3


def test_a_model_drafts_once() -> None:
    assert DraftNextTokens().expected(sampling(MODEL)) == 1
    once, _ = applied(DraftNextTokens(3), sampling(MODEL))
    assert DraftNextTokens().expected(once) == 0
    twice, _ = applied(DraftNextTokens(3), once)
    assert twice is once
    # Of its runs none is over the step's tokens alone.
    assert ops(twice)["likeliest"] == 3 and ops(twice)["kv_append"] == 1 + 3


def test_refuses_a_layer_that_reads_the_model_s_tokens() -> None:
    text = GRAPH.replace(
        "%b = attention(%p, %p, %p,",
        "%u = embedding(%tokens, @embed)\n"
        "%v = view(%u, shape=[T, 2, 4])\n%b = attention(%p, %p, %v,",
    )
    graph = run_pipeline(graph_of(text), SERVING)[-1].graph
    applied(DraftNextTokens(1), graph)
    with pytest.raises(PassError, match="expected what drafts to read the hidden state alone"):
        run_pipeline(graph, (DraftNextTokens(2),))


@pytest.mark.parametrize("tokens", [0, 5])
def test_how_many(tokens: int) -> None:
    with pytest.raises(PassError, match=f"expected 1 to 4 tokens, found {tokens}"):
        run_pipeline(sampling(), (DraftNextTokens(tokens),))
