"""Collectives: their meaning among ranks in one process, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.ops.collective import Communicator, all_gather, all_reduce, summed
from ingot.compiler.ops.pointwise import add
from ingot.compiler.ranks import Echo, interpret_ranks, run_ranks
from ingot.compiler.rewrite import Log, Pat, Rule, pat, rewrite
from ingot.compiler.text import parse
from ingot.compiler.types import VerifyError
from ingot.compiler.validate import check_rewrite
from pass_checks import graph_of

SUM = """graph @sum(%x: f32[T, 4]) T=1..8 {{
  %0 = all_reduce(%x, ranks={ranks})
  %1 = all_gather(%0, dim=1, ranks={ranks})
  return %0, %1
}}"""


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_sum_and_gather(ranks: int) -> None:
    graph = graph_of(SUM.format(ranks=ranks))
    given = [torch.randn(3, 4) for _ in range(ranks)]
    results = interpret_ranks([graph] * ranks, [{"x": x} for x in given])
    total = torch.stack(given).sum(0)
    for found in results:
        torch.testing.assert_close(found.outputs[0], total)
        torch.testing.assert_close(found.outputs[1], torch.cat([total] * ranks, 1))
        assert torch.equal(found.outputs[0], results[0].outputs[0])  # the same bits everywhere


def test_sum_is_rounded_once() -> None:
    """In bf16, 256 + 1 is 256: only a sum in f32 sees that 256 ones are more."""
    one, many = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 256, dtype=torch.bfloat16)
    jobs = [lambda c, x=x: summed(x, 257, c) for x in (many, *[one] * 256)]
    assert {float(r) for r in run_ranks(jobs)} == {512.0}


def test_text_holds_collectives() -> None:
    graph = graph_of(SUM.format(ranks=4))
    assert str(parse(str(graph))) == str(graph)
    assert graph.outputs[1].type.shape[1] == 16


def test_no_rank_computes_alone_what_was_made_for_more() -> None:
    graph = graph_of(SUM.format(ranks=2))
    with pytest.raises(VerifyError, match="among 2 ranks runs among 1"):
        interpret(graph, {"x": torch.ones(3, 4)})
    with pytest.raises(VerifyError, match="among 2 ranks runs among 3"):
        interpret_ranks([graph] * 3, {"x": torch.ones(3, 4)})


def test_what_is_refused() -> None:
    param = graph_of("graph @g(%x: i32[3]) {\n return %x\n}").outputs[0]
    with pytest.raises(VerifyError, match="expected a float"):
        all_reduce(param, ranks=2)
    with pytest.raises(VerifyError, match="at least one rank"):
        all_gather(param, dim=0, ranks=0)
    with pytest.raises(VerifyError, match="has no dim 1"):
        all_gather(param, dim=1, ranks=2)


def test_failing_rank_ends_all() -> None:
    def fail(communicator: Communicator) -> None:
        raise KeyError("rank 1 has no weight")

    def wait(communicator: Communicator) -> None:
        communicator.exchange(torch.ones(1))

    with pytest.raises(KeyError, match="rank 1 has no weight"):
        run_ranks([wait, fail, wait])


def test_ranks_that_disagree_are_told() -> None:
    jobs = [lambda c, n=n: c.exchange(torch.ones(n)) for n in (1, 2)]
    with pytest.raises(RuntimeError, match="different types"):
        run_ranks(jobs)


def test_rewrites_around_collectives_are_validated() -> None:
    """add(all_reduce(x), all_reduce(y)) == all_reduce(add(x, y)), and not all_reduce(x) + y."""
    graph = graph_of(
        """graph @g(%x: f32[T, 4], %y: f32[T, 4]) T=1..8 {
          %0 = all_reduce(%x, ranks=3)
          %1 = all_reduce(%y, ranks=3)
          %2 = add(%0, %1)
          return %2
        }"""
    )
    x, y = Pat(), Pat()
    root = pat(add, pat(all_reduce, x), pat(all_reduce, y))
    right = Rule("one", (root,), lambda m: all_reduce(add(m[x], m[y]), ranks=3))
    wrong = Rule("half", (root,), lambda m: add(all_reduce(m[x], ranks=3), m[y]))
    for rule in (right, wrong):
        rewrite(graph, (rule,), log := Log())
        (applied,) = log.applied
        if rule is right:
            check_rewrite(graph, applied)
            continue
        with pytest.raises(VerifyError, match="rule half changes a result"):
            check_rewrite(graph, applied)


def test_echo_is_many_of_one() -> None:
    x = torch.ones(2)
    assert len(Echo(3).exchange(x)) == 3
