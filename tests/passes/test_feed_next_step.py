"""feed-next-step: what it makes, when it declines, and that one step leaves the next."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.ops.feed import feed
from ingot.compiler.text import parse
from ingot.passes.serving.feed_next_step import FeedNextStep
from ingot.passes.serving.sample_on_device import SampleOnDevice
from pass_checks import applied, graph_of, ops, random_inputs, random_weights

GRAPH = """
    graph @end(%tokens: i32[T], %positions: i32[T], %slots: i32[T], %rows: i32[L]) T=1..8 L=1..8 {
      %x = embedding(%tokens, @embed)
      %y = embedding(%positions, @places)
      %z = add(%x, %y)
      %t = take(%z, %rows)
      %logits = linear(%t, @v)
      return %logits
    } where {
      @embed: f32[70, 8]
      @places: f32[9, 8]
      @v: f32[70, 8]
    }""".replace("%rows", "%logit_rows")


def test_what_it_makes(golden: Callable[[str], None]) -> None:
    before, _ = applied(SampleOnDevice(candidates=0), graph_of(GRAPH))
    after, log = applied(FeedNextStep(), before)
    assert log.matches == {"feed-next-step": 1}
    assert str(parse(str(after))) == str(after)
    assert after.fed == ("tokens", "positions", "draw", "seen")
    assert after.state == ()
    golden(str(after))


def test_the_outputs_stay_and_the_inputs_are_the_op_s() -> None:
    before, _ = applied(SampleOnDevice(candidates=2), graph_of(GRAPH))
    after, _ = applied(FeedNextStep(), before)
    weights = random_weights(before)
    for size in (1, 3, 8):
        inputs = random_inputs(after, {"T": size, "L": size}, size, high=size)
        mine = {p.attrs["name"]: inputs[p.attrs["name"]] for p in before.params}
        expected, found = interpret(before, mine, weights), interpret(after, inputs, weights)
        for a, b in zip(found.outputs, expected.outputs, strict=True):
            assert torch.equal(a, b)
        given = {**inputs, "token": found.outputs[1]}
        nexts = feed.reference(*(given[name] for name in feed.required))
        for name, value in zip(after.fed, nexts, strict=True):
            assert torch.equal(found.updates[name], value)


def test_it_feeds_once() -> None:
    before, _ = applied(SampleOnDevice(), graph_of(GRAPH))
    assert FeedNextStep().expected(before) == 1
    once, _ = applied(FeedNextStep(), before)
    twice, log = applied(FeedNextStep(), once)
    assert twice is once
    assert ops(twice)["feed"] == 1
    assert FeedNextStep().expected(once) == 0
    (reason,) = log.declined
    assert reason.endswith("the graph feeds itself already")


def test_declines_what_does_not_sample() -> None:
    before = graph_of(GRAPH)
    after, log = applied(FeedNextStep(), before)
    assert after is before
    (reason,) = log.declined
    assert reason.endswith("it does not sample")
    assert FeedNextStep().expected(before) == 0
