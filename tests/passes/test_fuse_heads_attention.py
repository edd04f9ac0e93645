"""fuse-heads-attention: attention makes the heads, or the rows, that it takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.text import parse, same_structure
from ingot.compiler.validate import check_rewrite
from ingot.passes.target.fuse_heads_attention import FuseHeadsAttention
from pass_checks import applied, graph_of, ops, random_inputs, random_weights

STEP = FuseHeadsAttention()
PLACES = "%slots: i32[T], %positions: i32[T], %table: i32[2, 2]"
CACHES = "%kc: f32[5, 4, 2, 8], %vc: f32[5, 4, 2, 6], %other: f32[5, 4, 2, 8]"
INDEX = "slots=%slots, positions=%positions, page_table=%table"
HEADS = f"""%q, %k, %v, %s, %ka, %va = project_heads(%x, @w, norm=@norm, delta=%x, norm_0=@gain, \
cos=%cos, sin=%sin, cache_1=%kc, cache_2=%vc, {INDEX}, heads=[4, 2, 2], dims=[8, 8, 6], \
rotate=[True, True, False], form='half', head_eps=1e-05, eps=1e-05)"""
GRAPH = f"""
    graph @block(%x: f32[T, 12], %cos: f32[T, 2], %sin: f32[T, 2], {PLACES}, %at: i32[T], \
%logits: f32[4], {CACHES}) T=1..8 {{{{
      {{lines}}
    }}}} where {{{{
      @gain: f32[8]
      @norm: f32[12]
      @sinks: f32[4]
      @w: f32[60, 12]
    }}}}"""
ATTENTION = "%y = cached_attention(%q, %ka, %va, %slots, %positions, %table, scale=0.3)"
UPDATES = ("update %kc = %ka", "update %vc = %va")


def block(*lines: str) -> Graph:
    return graph_of(GRAPH.format(lines="\n".join(lines)))


def places(tokens: int) -> dict[str, torch.Tensor]:
    """Tokens of two slots at places of their own; the third is padding."""
    slots = torch.tensor([0, 1, -1, 0, 1, 1, 0, 1])[:tokens]
    positions = torch.tensor([0, 3, 0, 1, 4, 5, 2, 6])[:tokens]
    table = torch.tensor([[2, 0], [4, 1]])
    return {"slots": slots.int(), "positions": positions.int(), "table": table.int()}


def fused(before: Graph) -> Graph:
    """The graph after the pass; outputs and caches are those of before."""
    after = run_pipeline(before, (STEP,), check=check_rewrite)[-1].graph
    assert same_structure(parse(str(after)), after)
    assert (STEP.expected(before), STEP.expected(after)) == (1, 0)
    weights = random_weights(before)
    for tokens in (1, 3, 8):
        inputs = {**random_inputs(before, {"T": tokens}, tokens), **places(tokens)}
        expected, found = (interpret(g, inputs, weights) for g in (before, after))
        for a, b in zip(expected.outputs, found.outputs, strict=True):
            assert torch.equal(a, b)
        for name, cache in expected.updates.items():
            assert torch.equal(cache, found.updates[name])
    return after


def test_heads_with_their_attention(golden: Callable[[str], None]) -> None:
    attention = ATTENTION.replace("scale", "sinks=@sinks, scale").replace("0.3", "0.3, window=3")
    after = fused(block(HEADS, attention, "return %y, %s", *UPDATES))
    assert ops(after) == {"project_attention": 1}
    golden(str(after))


def test_keys_and_the_new_cache_may_be_read_too() -> None:
    lines = (HEADS, ATTENTION, "%n = neg(%k)", "%m = neg(%va)", "return %y, %n, %m", *UPDATES)
    assert ops(fused(block(*lines))) == {"project_attention": 1, "neg": 2}


# Attention that stays, and why.
STAY = {
    "queries read elsewhere": ((HEADS, ATTENTION, "return %y, %q"), "read elsewhere"),
    "queries read by another op": (
        (HEADS, ATTENTION, "%n = neg(%q)", "return %y, %n"),
        "read elsewhere",
    ),
    "computed queries": (
        (HEADS, "%n = neg(%q)", ATTENTION.replace("%q", "%n"), "return %y"),
        "not the first heads of a product",
    ),
    "the cache before": (
        (HEADS, ATTENTION.replace("%ka", "%kc"), "return %y", UPDATES[0]),
        "its caches are not what the product appends",
    ),
    "another cache": (
        (HEADS, ATTENTION.replace("%ka", "%other"), "return %y"),
        "its caches are not what the product appends",
    ),
    "other positions": (
        (HEADS, ATTENTION.replace("%positions", "%at"), "return %y"),
        "other slots, positions or pages",
    ),
    "computed sinks": (
        (
            HEADS,
            "%n = neg(%logits)",
            ATTENTION.replace("scale", "sinks=%n, scale"),
            "return %y",
        ),
        "its sinks are computed",
    ),
}


@pytest.mark.parametrize("name", STAY)
def test_what_stays(name: str) -> None:
    lines, reason = STAY[name]
    before = block(*lines)
    after, log = applied(STEP, before)
    assert after is before
    (declined,) = log.declined
    assert reason in declined


# ---- rows of a latent

LATENT = f"""
    graph @block(%q: f32[T, 3, 8], %p: f32[T, 3, 4], %kv: f32[T, 12], %cos: f32[T, 2], \
%sin: f32[T, 2], %more: f32[T, 2], {PLACES}, %at: i32[T], %c: f32[5, 4, 12], \
%other: f32[5, 4, 12], %x: f32[T, 6], %heads: f32[T, 3, 8]) T=1..8 {{{{
      {{lines}}
    }}}} where {{{{
      @each: f32[8]
      @gain: f32[6]
      @norm: f32[8]
      @up: f32[3, 8, 4]
      @w: f32[24, 6]
    }}}}"""
ROWS = f"%row, %ca = mla_latent(%kv, @norm, %cos, %sin, cache=%c, {INDEX}, eps=1e-05, form='half')"
TURNED = "%t = rope(%p, %cos, %sin, form='half')"
ATTENDS = "%y = cached_mla_attention(%q, %t, %ca, %slots, %positions, %table, scale=0.3)"


def latent(*lines: str) -> Graph:
    return graph_of(LATENT.format(lines="\n".join((*lines, "update %c = %ca"))))


def test_rows_and_queries_that_turn_with_them(golden: Callable[[str], None]) -> None:
    after = fused(latent(ROWS, TURNED, ATTENDS, "return %y"))
    assert ops(after) == {"latent_attention": 1}
    golden(str(after))


# Queries that are rotated by a launch of their own: read elsewhere, by other tables, or otherwise.
TAKEN = {
    "read elsewhere": ((ROWS, TURNED, ATTENDS, "%n = neg(%t)", "return %y, %n"), {"neg", "rope"}),
    "an output": ((ROWS, TURNED, ATTENDS, "return %y, %t"), {"rope"}),
    "by other tables": (
        (ROWS, TURNED.replace("%cos", "%more"), ATTENDS, "return %y"),
        {"rope"},
    ),
    "in another form": (
        (ROWS, TURNED.replace("half", "interleaved"), ATTENDS, "return %y"),
        {"rope"},
    ),
    "not at all": ((ROWS, ATTENDS.replace("%t,", "%p,"), "return %y"), set[str]()),
    "computed": ((ROWS, "%t = neg(%p)", ATTENDS, "return %y"), {"neg"}),
}


@pytest.mark.parametrize("name", TAKEN)
def test_rows_alone(name: str) -> None:
    lines, others = TAKEN[name]
    after = fused(latent(*lines))
    assert ops(after).keys() == {"latent_attention", *others}
    (node,) = (n for n in after.nodes() if n.op.name == "latent_attention")
    assert not node.attrs["rotate"]


# Queries of which the last dims are rotated, and how they were made.
QUERIES = {
    "rotated": ("%h = rope(%heads, %cos, %sin, form='half', start=4)",),
    "of a product": (
        """%h = project_heads(%x, @w, norm=@gain, cos=%cos, sin=%sin, heads=[3], dims=[8], \
rotate=[True], form='half', start=4, eps=1e-05)""",
    ),
}
CUT = (
    "%nope = slice(%h, dim=2, start=0, stop=4)",
    "%t = slice(%h, dim=2, start=4, stop=8)",
    "%l = head_linear(%nope, @up)",
)
OF_CUT = ATTENDS.replace("%q,", "%l,")


@pytest.mark.parametrize("name", QUERIES)
def test_queries_that_are_rotated_in_part(name: str) -> None:
    after = fused(latent(ROWS, *QUERIES[name], *CUT, OF_CUT, "return %y"))
    assert not {"rope", "project_heads"} & ops(after).keys()
    (node,) = (n for n in after.nodes() if n.op.name == "latent_attention")
    assert node.attrs["rotate"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return %y", "return %y, %h"),
        ("return %y", "return %y, %t"),
        ("return %y", "%n = neg(%h)\nreturn %y, %n"),
        ("return %y", "%n = slice(%h, dim=2, start=2, stop=6)\nreturn %y, %n"),
        ("return %y", "%n = slice(%h, dim=1, start=0, stop=2)\nreturn %y, %n"),
        ("norm=@gain,", "norm=@gain, norm_0=@each, head_eps=1e-05,"),
        ("cos=%cos, sin=%sin, heads", "cos=%more, sin=%sin, heads"),
        ("rotate=[True], form='half'", "rotate=[True], form='interleaved'"),
    ],
)
def test_queries_that_stay_rotated_in_part(old: str, new: str) -> None:
    lines = (ROWS, *QUERIES["of a product"], *CUT, OF_CUT, "return %y")
    before = latent(*(line.replace(old, new) for line in lines))
    after = fused(before)
    assert ops(after)["project_heads"] == 1
    (node,) = (n for n in after.nodes() if n.op.name == "latent_attention")
    assert not node.attrs["rotate"]


def test_the_row_may_be_read_too() -> None:
    after = fused(latent(ROWS, TURNED, ATTENDS, "%n = neg(%row)", "return %y, %n"))
    assert ops(after) == {"latent_attention": 1, "neg": 1}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("%ca, %slots", "%c, %slots", "not what rows of a latent are appended to"),
        ("%ca, %slots", "%other, %slots", "not what rows of a latent are appended to"),
        ("%positions", "%at", "other slots, positions or pages"),
    ],
)
def test_latent_attention_that_stays(old: str, new: str, reason: str) -> None:
    before = latent(ROWS, TURNED, ATTENDS.replace(old, new), "return %y")
    after, log = applied(STEP, before)
    assert after is before
    (declined,) = log.declined
    assert reason in declined
