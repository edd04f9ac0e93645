"""sample-on-device: what it makes, when it declines, and that the logits stay what they were."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.ops.sampling import sample
from ingot.compiler.text import parse
from ingot.passes.serving.sample_on_device import SampleOnDevice, output_names
from pass_checks import applied, graph_of, ops, random_inputs, random_weights

GRAPH = """
    graph @end(%x: f32[T, 8], %rows: i32[L]) T=1..8 L=1..8 {
      %t = take(%x, %rows)
      %logits = linear(%t, @v)
      return %logits
    } where {
      @v: f32[70, 8]
    }"""


def test_what_it_makes(golden: Callable[[str], None]) -> None:
    after, log = applied(SampleOnDevice(candidates=3), graph_of(GRAPH))
    assert log.matches == {"sample-on-device": 1}
    assert str(parse(str(after))) == str(after)
    golden(str(after))


@pytest.mark.parametrize("candidates", [0, 4, 100])
def test_the_logits_stay_and_the_rest_is_the_op(candidates: int) -> None:
    before = graph_of(GRAPH)
    after, _ = applied(SampleOnDevice(candidates), before)
    weights = random_weights(before)
    for size in (1, 3, 8):
        inputs = random_inputs(after, {"T": size, "L": size}, size, high=size)
        mine = {p.attrs["name"]: inputs[p.attrs["name"]] for p in before.params}
        (logits,) = interpret(before, mine, weights).outputs
        found = interpret(after, inputs, weights).outputs
        given = [inputs[p.attrs["name"]] for p in after.params[len(before.params) :]]
        expected = sample.reference(logits, *given, candidates=min(candidates, 70))
        assert len(found) == len(output_names(after)) == (5 if candidates else 3)
        for a, b in zip(found, (logits, *expected), strict=True):
            assert torch.equal(a, b)


def test_it_samples_once() -> None:
    once, _ = applied(SampleOnDevice(), graph_of(GRAPH))
    twice, log = applied(SampleOnDevice(), once)
    assert twice is once
    assert ops(twice)["sample"] == 1
    assert log.declined == ["sample-on-device: sample: the graph samples already"]
    assert SampleOnDevice().expected(once) == 0


@pytest.mark.parametrize(
    ("results", "found"),
    [
        ("%logits, %t", r"found f32\[L, 70\], f32\[L, 8\]"),
        ("%v", r"found f32\[L, 10, 7\]"),
        ("%rows", r"found i32\[L\]"),
    ],
)
def test_declines_what_are_no_logits(results: str, found: str) -> None:
    text = GRAPH.replace(
        "return %logits", f"%v = view(%logits, shape=[L, 10, 7])\nreturn {results}"
    )
    before = graph_of(text)
    after, log = applied(SampleOnDevice(), before)
    assert after is before
    (reason,) = log.declined
    assert re.search(f"expected logits .L, V., {found}$", reason)
    assert SampleOnDevice().expected(before) == 1
