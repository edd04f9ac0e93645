"""fuse-kv-append: rows are written into the cache where they are made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.text import parse, same_structure
from ingot.compiler.validate import check_rewrite
from ingot.passes.target.fuse_kv_append import FuseKvAppend
from pass_checks import applied, graph_of, ops, random_inputs, random_weights

STEP = FuseKvAppend()
PLACES = "%slots: i32[T], %positions: i32[T], %table: i32[2, 2]"
CACHES = "%kc: f32[5, 4, 2, 8], %vc: f32[5, 4, 2, 8], %c: f32[5, 4, 12]"
GRAPH = f"""
    graph @block(%x: f32[T, 12], %cos: f32[T, 2], %sin: f32[T, 2], {PLACES}, {CACHES}) T=1..8 {{{{
      %q, %k, %v = project_heads(%x, @w, heads=[4, 2, 2], dims=[8, 8, 8])
      %row = mla_latent(%x, @norm, %cos, %sin, eps=1e-05, form='half')
      {{lines}}
    }}}} where {{{{
      @w: f32[64, 12]
      @norm: f32[8]
    }}}}"""
HEADS = "kv_append(%kc, %vc, %k, %v, %slots, %positions, %table)"


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
    weights = random_weights(before)
    for tokens in (1, 3, 8):
        inputs = {**random_inputs(before, {"T": tokens}, tokens), **places(tokens)}
        expected, found = (interpret(g, inputs, weights) for g in (before, after))
        assert expected.updates.keys() == found.updates.keys() != set()
        for a, b in zip(expected.outputs, found.outputs, strict=True):
            assert torch.equal(a, b)
        for name, cache in expected.updates.items():
            assert torch.equal(cache, found.updates[name])
            assert not torch.equal(cache, inputs[name])
    return after


def test_keys_values_and_latent_rows(golden: Callable[[str], None]) -> None:
    before = block(
        f"%ka, %va = {HEADS}",
        "%ca = kv_append(%c, %row, %slots, %positions, %table)",
        "return %q",
        "update %kc = %ka",
        "update %vc = %va",
        "update %c = %ca",
    )
    after = fused(before)
    assert ops(after) == {"project_heads": 1, "mla_latent": 1}
    assert (STEP.expected(before), STEP.expected(after)) == (2, 0)
    golden(str(after))


def test_rows_that_others_read_too_and_change_places() -> None:
    after = fused(
        block(
            "%ka, %va = kv_append(%kc, %vc, %v, %k, %slots, %positions, %table)",
            "%n = neg(%v)",
            "return %k, %n",
            "update %kc = %ka",
            "update %vc = %va",
        )
    )
    assert ops(after) == {"project_heads": 1, "neg": 1}


# Appends that stay, the results that go to the caches, and why.
STAY = {
    "one row twice": (
        "%a, %b = kv_append(%kc, %vc, %k, %k, %slots, %positions, %table)",
        "not different results of one node",
    ),
    "rows of two": (
        "%n = neg(%v)\n%a, %b = kv_append(%kc, %vc, %k, %n, %slots, %positions, %table)",
        "not different results of one node",
    ),
    "computed rows": (
        "%n = neg(%v)\n%a = kv_append(%kc, %n, %slots, %positions, %table)",
        "neg does not write it into a cache",
    ),
    "a cache of the same results": (
        """%n = neg(%v)
        %m = kv_append(%kc, %n, %slots, %positions, %table)
        %a, %b = kv_append(%m, %vc, %k, %v, %slots, %positions, %table)""",
        "a cache or a place in it is computed from the same results",
    ),
}


@pytest.mark.parametrize("name", STAY)
def test_what_stays(name: str) -> None:
    lines, reason = STAY[name]
    before = block(lines, "return %q, %a")
    after, log = applied(STEP, before)
    assert after is before
    *_, declined = log.declined
    assert reason in declined


def test_a_cache_and_a_place_that_are_computed_before() -> None:
    after = fused(
        block(
            "%n = neg(%kc)",
            "%p = maximum(%positions, %positions)",
            "%a, %b = kv_append(%n, %vc, %k, %v, %slots, %p, %table)",
            "return %q",
            "update %kc = %a",
            "update %vc = %b",
        )
    )
    assert ops(after) == {"project_heads": 1, "neg": 1, "maximum": 1}


def test_rows_are_appended_once_with_their_producer() -> None:
    before = block(f"%a, %b = {HEADS}", f"%d, %e = {HEADS}", "return %a, %b, %d, %e")
    after, log = applied(STEP, before)
    assert ops(after) == {"project_heads": 1, "kv_append": 1}
    assert any("another append of the same rows" in reason for reason in log.declined)
