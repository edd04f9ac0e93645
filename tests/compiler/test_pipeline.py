"""The pipeline: order, verification after each pass, reports, required matches, the check."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
from ingot.compiler.ir import Graph, Node, Op, Value
from ingot.compiler.ops.leaf import constant, literal, param
from ingot.compiler.pipeline import PassContext, PassError, count_nodes, run_pipeline
from ingot.compiler.rewrite import Applied, Pat, Rule, pat, rebuild, rewrite_all
from ingot.compiler.target import CPU, TARGETS, target_of
from ingot.compiler.types import TensorType, VerifyError, symbol
from ingot.compiler.validate import check_rewrite

T = symbol("T")
X = TensorType("f32", (T, 4))
SYMBOLS = {"T": range(1, 65)}
relu, neg, add = (Op.registry[n] for n in ("relu", "neg", "add"))
A = Pat()
NEG_NEG = Rule("neg-neg", (pat(neg, pat(neg, A)),), lambda m: m[A])
RELU_RELU = Rule("relu-relu", (pat(relu, pat(relu, A)),), lambda m: relu(m[A]))


@dataclass(frozen=True)
class Apply:
    """One rule."""

    name: ClassVar[str] = "apply"
    rule: Rule = NEG_NEG

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        return rewrite_all(graph, (self.rule,), context.log)


@dataclass(frozen=True)
class Collapse:
    """Another rule."""

    name: ClassVar[str] = "collapse"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        return rewrite_all(graph, (RELU_RELU,), context.log)


@dataclass(frozen=True)
class Break:
    """A graph that is wrong."""

    name: ClassVar[str] = "break-it"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        wrong = Value(Node(relu, (graph.params[0],), {}, (TensorType("f32", (T, 5)),)))
        return Graph("g", graph.params, (wrong,), graph.symbols)


@dataclass(frozen=True)
class Endless:
    """A rule that always matches."""

    name: ClassVar[str] = "endless"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        again = Rule("again", (pat(relu, A),), lambda m: relu(m[A]))
        return rewrite_all(graph, (again,), context.log)


@dataclass(frozen=True)
class Knot:
    """A value that needs itself."""

    name: ClassVar[str] = "knot"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        return rebuild(graph, {graph.outputs[0]: neg(graph.outputs[0])})


@dataclass(frozen=True)
class Unlogged:
    """A change that no log knows."""

    name: ClassVar[str] = "unlogged"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        rewritten = rewrite_all(graph, (NEG_NEG,), context.log)
        return rebuild(rewritten, {rewritten.outputs[0]: relu(rewritten.params[0])})


@dataclass(frozen=True)
class Declared:
    """A change that is declared with a reason, and what is true of it."""

    name: ClassVar[str] = "declared"
    relus: int = 1

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        old, new = graph.outputs[0], graph.params[0]
        for _ in range(self.relus):
            new = relu(new)
        after = rebuild(graph, {old: new})
        claim = Applied("one-relu", graph.params, (old,), (new,))
        return context.log.declare(graph, after, "relu is idempotent", claims=(claim,))


@dataclass(frozen=True)
class Abandon:
    """Rewrites of which the result is not taken."""

    name: ClassVar[str] = "abandon"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        rewrite_all(graph, (NEG_NEG,), context.log)
        return rewrite_all(graph, (RELU_RELU,), context.log)


def sample() -> Graph:
    x = param(name="x", type=X)
    return Graph("g", (x,), (relu(relu(neg(neg(x)))),), SYMBOLS)


def test_passes_run_in_order_and_report() -> None:
    heard: list[str] = []
    graph = sample()
    results = run_pipeline(graph, (Apply(), Collapse(), Apply()), progress=heard.append)
    assert heard == ["apply", "collapse", "apply"]
    assert [r.name for r in results] == heard
    assert [(r.nodes_before, r.nodes_after) for r in results] == [(4, 2), (2, 1), (1, 1)]
    assert [r.matches for r in results] == [
        Counter({"neg-neg": 1}),
        Counter({"relu-relu": 1}),
        Counter(),
    ]
    assert all(r.declined == () and r.seconds > 0 for r in results)
    assert [n.op.name for n in results[0].graph.nodes()] == ["param", "relu", "relu"]
    assert results[2].graph is results[1].graph


def test_no_passes_no_results() -> None:
    assert run_pipeline(sample(), ()) == []


def test_declines_are_reported_once() -> None:
    x = param(name="x", type=X)
    inner = neg(x)
    graph = Graph("g", (x,), (neg(inner), neg(inner), inner), SYMBOLS)
    (result,) = run_pipeline(graph, (Apply(),))
    assert result.declined == ("neg-neg: neg: neg inside the match is used outside",)


def test_counts_that_are_not_by_rules_are_matches_too() -> None:
    @dataclass(frozen=True)
    class Count:
        name: ClassVar[str] = "count"
        by: int = 2

        def __call__(self, graph: Graph, context: PassContext) -> Graph:
            context.log.counts["merge"] += self.by
            return graph

    (result,) = run_pipeline(sample(), (Count(),), require_match=["count"])
    assert result.matches == Counter({"merge": 2})
    with pytest.raises(PassError, match="matched nothing"):
        run_pipeline(sample(), (Count(0),), require_match=["count"])


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    with pytest.raises(PassError) as caught:
        run_pipeline(sample(), (Apply(), Break(), Collapse()))
    message = str(caught.value)
    assert message.startswith("pass break-it: relu: expected results f32[T, 4], found f32[T, 5]")
    assert "\n>   %0 = relu(%x) : f32[T, 5]" in message


def test_a_pass_that_fails_in_rewriting_is_named() -> None:
    with pytest.raises(PassError, match="pass endless: rewriting did not end"):
        run_pipeline(sample(), (Endless(),))
    with pytest.raises(PassError, match="pass knot: neg would depend on its own result"):
        run_pipeline(sample(), (Knot(),))


def test_a_required_pass_that_matches_nothing_tells_its_nearest_misses() -> None:
    x = param(name="x", type=X)
    (inner,) = neg.node((x,), {}, "model.a").results
    (outer,) = neg.node((inner,), {}, "model.b").results
    near = Graph("g", (x,), (outer, inner), SYMBOLS)
    with pytest.raises(PassError) as caught:
        run_pipeline(near, (Collapse(), Apply()), require_match=["apply"])
    assert str(caught.value) == (
        "pass apply was required but matched nothing:\n"
        "  neg-neg: neg at model.b: neg inside the match is used outside"
    )
    far = Graph("g", (x,), (relu(x),), SYMBOLS)
    with pytest.raises(PassError, match="matched nothing:\n  nothing came near"):
        run_pipeline(far, (Apply(),), require_match=["apply"])
    run_pipeline(sample(), (Apply(),), require_match=["apply"])
    assert run_pipeline(far, (Apply(),))[0].matches == Counter()


def test_near_misses_are_few_and_differ() -> None:
    x = param(name="x", type=X)
    outputs: list[Value] = []
    for i in range(16):
        (inner,) = neg.node((x,), {}, f"model.{i // 2}").results
        (outer,) = neg.node((inner,), {}, f"model.{i // 2}").results
        outputs += [inner, outer]
    with pytest.raises(PassError) as caught:
        run_pipeline(Graph("g", (x,), tuple(outputs), SYMBOLS), (Apply(),), require_match=["apply"])
    misses = str(caught.value).splitlines()[1:]
    assert len(misses) == len(set(misses)) == 5


def test_a_required_pass_must_be_in_the_pipeline() -> None:
    with pytest.raises(ValueError, match="not in the pipeline: fold, fuse"):
        run_pipeline(sample(), (Apply(),), require_match=["fuse", "apply", "fold"])


def test_the_check_sees_every_rewrite_with_the_graph_it_was_made_in() -> None:
    seen: list[tuple[Graph, str]] = []
    graph = sample()
    results = run_pipeline(
        graph, (Apply(), Collapse()), check=lambda g, a: seen.append((g, a.rule))
    )
    assert seen == [(graph, "neg-neg"), (results[0].graph, "relu-relu")]


def test_a_check_that_fails_stops_the_pipeline() -> None:
    def check(_: Graph, applied: Applied) -> None:
        raise VerifyError(f"{applied.rule} changes a result")

    ran: list[str] = []
    with pytest.raises((PassError, VerifyError), match="neg-neg changes a result"):
        run_pipeline(sample(), (Apply(), Collapse()), check=check, progress=ran.append)
    assert ran == ["apply"]


def test_a_change_that_was_not_logged_is_an_error() -> None:
    with pytest.raises(PassError, match="pass unlogged: unlogged change"):
        run_pipeline(sample(), (Unlogged(),))


def test_a_declared_change_is_told_and_its_claims_are_checked() -> None:
    (result,) = run_pipeline(sample(), (Declared(),), check=check_rewrite)
    assert result.unchecked == ("relu is idempotent",)
    with pytest.raises(PassError, match="pass declared: rule one-relu changes a result"):
        run_pipeline(sample(), (Declared(0),), check=check_rewrite)


def test_only_rewrites_of_the_result_are_checked() -> None:
    seen: list[str] = []
    run_pipeline(sample(), (Abandon(),), check=lambda graph, applied: seen.append(applied.rule))
    assert seen == ["relu-relu"]


def test_only_what_computes_is_counted() -> None:
    x, w = param(name="x", type=X), constant(name="w", type=TensorType("f32", (4,)))
    half = literal(value=0.5, dtype="f32")
    assert count_nodes(Graph("g", (x,), (add(add(x, w), half),), SYMBOLS)) == 2


# ---- targets


def test_targets() -> None:
    assert target_of("cpu") is CPU
    assert not CPU.is_gpu
    assert all(
        t.is_gpu and t.warp and t.shared_bytes and t.bytes_per_second
        for n, t in TARGETS.items()
        if n != "cpu"
    )
    with pytest.raises(
        ValueError, match=r"unknown target 'cuda:sm_10'; expected one of cpu, cuda:sm_90"
    ):
        target_of("cuda:sm_10")
