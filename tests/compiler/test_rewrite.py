"""Rewriting: what matches, what declines and why, what is shared, and that it comes to an end."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph, Op, Value
from ingot.compiler.ops import linear, norm, pointwise, reduce, shape
from ingot.compiler.ops.leaf import constant, literal, param
from ingot.compiler.rewrite import (
    Applied,
    Decline,
    Log,
    Match,
    Other,
    Pat,
    Rule,
    either,
    maybe,
    pat,
    rebuild,
    rewrite,
    rewrite_all,
)
from ingot.compiler.text import same_structure
from ingot.compiler.types import TensorType, VerifyError, symbol
from ingot.compiler.verify import verify
from random_graphs import graphs

T = symbol("T")
SYMBOLS = {"T": range(1, 65)}
X = TensorType("f32", (T, 4))
relu, neg, add, mul, sub = (Op.registry[n] for n in ("relu", "neg", "add", "mul", "sub"))

# Two results at once: what a fused kernel of an addition and an activation would be.
add_relu = Op(
    "test.add_relu",
    lambda x, y: (x, x),
    lambda x, y: (x + y, torch.relu(x + y)),
)
A, B, C = Pat(), Pat(), Pat()
SUM = pat(add, A, B)
ADD_RELU = Rule("add-relu", (pat(relu, SUM), SUM), lambda m: add_relu.all(m[A], m[B])[::-1])


def p(name: str = "x", type_: TensorType = X) -> Value:
    return param(name=name, type=type_)


def graph_of(*outputs: Value, **updates: Value) -> Graph:
    nodes = Graph("g", (), outputs, SYMBOLS, updates).nodes()
    params = tuple(Value(n) for n in nodes if n.op is param)
    graph = Graph("g", params, outputs, SYMBOLS, updates)
    verify(graph)
    return graph


def names(graph: Graph) -> Counter[str]:
    return Counter(n.op.name for n in graph.nodes() if n.op is not param)


def assert_same_meaning(a: Graph, b: Graph) -> None:
    verify(b)
    inputs = {
        q.attrs["name"]: torch.randn(
            *q.type.bind({"T": 5}).shape, generator=torch.Generator().manual_seed(i)
        )
        for i, q in enumerate(a.params)
    }
    one, two = interpret(a, inputs), interpret(b, inputs)
    for x, y in zip(one.outputs, two.outputs, strict=True):
        torch.testing.assert_close(x, y)
    assert one.updates.keys() == two.updates.keys()
    for name in one.updates:
        torch.testing.assert_close(one.updates[name], two.updates[name])


def applied(graph: Graph, *rules: Rule) -> tuple[Graph, Log]:
    log = Log()
    done = rewrite(graph, rules, log)
    assert_same_meaning(graph, done)
    return done, log


def structure(graph: Graph) -> nx.MultiDiGraph:
    g = nx.MultiDiGraph()
    for node in graph.nodes():
        g.add_node(id(node), label=f"{node.op.name} {dict(node.attrs)}")
        for i, a in enumerate(node.args):
            # The order of the operands of commutative ops is no part of the structure.
            g.add_edge(id(a.node), id(node), at=(a.index, 0 if node.op.commutative else i))
    return g


def isomorphic(a: Graph, b: Graph) -> bool:
    same_node = lambda m, n: m["label"] == n["label"]  # noqa: E731
    edges = lambda m, n: sorted(e["at"] for e in m.values()) == sorted(e["at"] for e in n.values())  # noqa: E731
    return nx.is_isomorphic(structure(a), structure(b), node_match=same_node, edge_match=edges)


# ---- matching

NEG_NEG = Rule("neg-neg", (pat(neg, pat(neg, A)),), lambda m: m[A])


def test_a_match_is_replaced() -> None:
    x = p()
    done, log = applied(graph_of(relu(neg(neg(x)))), NEG_NEG)
    assert isomorphic(done, graph_of(relu(p())))
    assert log.matches == Counter({"neg-neg": 1})
    assert log.declined == []


def test_what_a_rewrite_did_is_logged() -> None:
    x = p()
    inner = neg(x)
    root = neg(inner)
    _, log = applied(graph_of(relu(root)), NEG_NEG)
    assert log.applied == [Applied("neg-neg", (x,), (root,), (x,))]


def test_without_a_match_the_graph_is_returned_as_it_is() -> None:
    graph = graph_of(relu(neg(p())))
    assert rewrite(graph, (NEG_NEG, ADD_RELU)) is graph
    assert rewrite_all(graph, (NEG_NEG, ADD_RELU)) is graph
    assert rewrite(graph, ()) is graph


def test_what_nothing_touches_is_shared() -> None:
    x = p()
    before, beside = relu(x), pointwise.exp(x)
    after = pointwise.tanh(neg(neg(before)))
    graph = graph_of(after, beside)
    done, _ = applied(graph, NEG_NEG)
    assert done.outputs[1] is beside or done.outputs[1].node is beside.node
    assert done.outputs[0].node is not after.node
    assert done.outputs[0].node.args[0].node is before.node
    assert done.params == graph.params
    assert done.symbols is graph.symbols


def test_attributes_indices_and_conditions_decide() -> None:
    x = p()
    values, indices = reduce.topk.all(x, k=2, dim=-1)
    graph = graph_of(values, indices, reduce.softmax(x, dim=0), reduce.softmax(x, dim=-1))
    seen: list[str] = []

    def note(name: str) -> Callable[[Match], Value]:
        def build(m: Match) -> Value:
            seen.append(name)
            raise Decline("only looking")

        return build

    rules = [
        Rule("first", (pat(reduce.topk, k=2),), note("first")),
        Rule("second", (pat(reduce.topk, index=1),), note("second")),
        Rule("three", (pat(reduce.topk, k=3),), note("three")),
        Rule("last", (pat(reduce.softmax, dim=-1),), note("last")),
        Rule("where", (Pat(where=lambda v: v.attrs.get("dim") == 0),), note("where")),
        Rule("name", (pat("softmax", dim=0),), note("name")),
        Rule("arity", (pat(reduce.softmax, A, B),), note("arity")),
    ]
    # Both results of topk are used: a rule that replaces one of them leaks the other.
    log = Log()
    assert rewrite(graph, rules, log) is graph
    assert sorted(seen) == ["last", "name", "where"]
    assert sum("topk inside the match is used outside" in d for d in log.declined) == 2


def test_a_pattern_that_stands_twice_matches_one_value() -> None:
    square = Rule(
        "square", (pat(mul, A, A),), lambda m: pointwise.pow_(m[A], literal(value=2.0, dtype="f32"))
    )
    x, y = p("x"), p("y")
    done, _ = applied(graph_of(mul(x, x)), square)
    assert names(done)["pow"] == 1
    graph = graph_of(mul(x, y))
    assert rewrite(graph, (square,)) is graph
    same_but_repeated = graph_of(mul(relu(x), relu(x)))
    assert rewrite(same_but_repeated, (square,)) is same_but_repeated


@pytest.mark.parametrize("order", list(itertools.product((0, 1), repeat=2)))
def test_operands_of_commutative_ops_match_in_both_orders(order: tuple[int, int]) -> None:
    x, y = p("x"), p("y")
    # x · sigmoid(x) + y == silu(x) + y
    gate = pat(pointwise.sigmoid, A)
    rule = Rule(
        "silu", (pat(add, pat(mul, A, gate), B),), lambda m: add(pointwise.silu(m[A]), m[B])
    )
    product = mul(*(x, pointwise.sigmoid(x))[:: -1 if order[0] else 1])
    done, _ = applied(graph_of(add(*(product, y)[:: -1 if order[1] else 1])), rule)
    assert names(done) == Counter({"silu": 1, "add": 1})


def test_operands_of_other_ops_match_in_order_only() -> None:
    rule = Rule("sub", (pat(sub, A, pat(neg, B)),), lambda m: add(m[A], m[B]))
    x, y = p("x"), p("y")
    assert names(applied(graph_of(sub(x, neg(y))), rule)[0]) == Counter({"add": 1})
    graph = graph_of(sub(neg(x), y))
    assert rewrite(graph, (rule,)) is graph


def test_all_ways_to_match_are_tried() -> None:
    """The first way that the pattern matches leaks; the other does not."""
    x = p()
    used, free = neg(x), neg(pointwise.exp(x))
    rule = Rule("join", (pat(add, pat(neg, A), B),), lambda m: sub(m[B], m[A]))
    for operands in ((used, free), (free, used)):
        done, log = applied(graph_of(add(*operands), used), rule)
        assert names(done) == Counter({"neg": 1, "exp": 1, "sub": 1})
        assert log.declined == []


def test_nonlinear_patterns_with_nested_choices() -> None:
    # (a + b) · (a - b) == a² - b²
    rule = Rule(
        "squares",
        (pat(mul, pat(add, A, B), pat(sub, A, B)),),
        lambda m: sub(mul(m[A], m[A]), mul(m[B], m[B])),
    )
    x, y = p("x"), p("y")
    for first in (add(x, y), add(y, x)):
        for product in (mul(first, sub(x, y)), mul(sub(x, y), first)):
            done, _ = applied(graph_of(product), rule)
            assert names(done) == Counter({"mul": 2, "sub": 1})
    graph = graph_of(mul(add(x, y), sub(x, relu(y))))
    assert rewrite(graph, (rule,)) is graph


def test_optional_ops_may_be_absent() -> None:
    cast = maybe(pointwise.cast, A)
    rule = Rule(
        "exp",
        (pat(pointwise.exp, cast),),
        lambda m: pointwise.exp(pointwise.cast(m[A], dtype="f32")),
    )
    x = p()
    with_cast = graph_of(pointwise.exp(pointwise.cast(x, dtype="f32")))
    without = graph_of(pointwise.exp(x))
    for graph in (with_cast, without):
        done, log = applied(graph, rule)
        assert names(done) == Counter({"exp": 1, "cast": 1})
        assert log.applied[0].leaves == (x,)


def test_optional_root() -> None:
    inner = pat(neg, A)
    rule = Rule("root", (maybe(relu, inner),), lambda m: relu(neg(m[A])))
    x = p()
    _, log = applied(graph_of(relu(neg(x))), rule)
    assert log.applied[0].before[0].op is relu


def test_either_matches_what_any_option_matches() -> None:
    sine, cosine = pat(pointwise.sin, A), pat(pointwise.cos, A)
    rule = Rule(
        "even", (pat(pointwise.abs_, either(sine, cosine)),), lambda m: pointwise.abs_(m[A])
    )
    x = p()
    for op in (pointwise.sin, pointwise.cos):
        log = Log()
        done = rewrite(graph_of(pointwise.abs_(op(x))), (rule,), log)
        assert names(done) == Counter({"abs": 1})
        assert log.applied[0].leaves == (x,)
    graph = graph_of(pointwise.abs_(pointwise.tanh(x)))
    assert rewrite(graph, (rule,)) is graph


def test_a_result_in_the_option_not_taken_is_no_match() -> None:
    inner = pat(add, A, B)
    choice = either(pat(neg, inner), pat(pointwise.exp, A))
    rule = Rule("either", (pat(relu, choice), inner), lambda m: (m[A], m[A]))
    graph = graph_of(relu(pointwise.exp(p())))
    assert rewrite(graph, (rule,)) is graph
    wide = Rule("other", (pat(relu, choice), Other(inner, 0)), lambda m: (m[A], m[A]))
    assert rewrite(graph, (wide,)) is graph


def test_rules_are_tried_in_order_from_the_results_backwards() -> None:
    first = Rule(
        "first", (pat(relu, A),), lambda m: pointwise.maximum(m[A], literal(value=0.0, dtype="f32"))
    )
    second = Rule("second", (pat(relu, A),), lambda m: m[A])
    _, log = applied(graph_of(relu(p())), first, second)
    assert log.matches == Counter({"first": 1})
    chain = neg(neg(neg(p())))
    _, log = applied(graph_of(chain), NEG_NEG)
    assert log.applied[0].before == (chain,)
    assert log.matches == Counter({"neg-neg": 1})


# ---- declines


def test_a_rule_may_decline_and_another_may_take_its_place() -> None:
    def unwilling(m: Match) -> Value:
        raise Decline("not today")

    no = Rule("no", (pat(relu, A),), unwilling)
    yes = Rule(
        "yes",
        (pat(relu, pat(neg, A)),),
        lambda m: pointwise.maximum(neg(m[A]), literal(value=0.0, dtype="f32")),
    )
    (node,) = (n for n in [relu.node((neg(p()),), {}, "model.act")])
    done, log = applied(graph_of(*node.results), no, yes)
    assert log.declined == ["no: relu at model.act: not today"]
    assert names(done)["maximum"] == 1


def test_a_value_inside_the_match_that_is_used_outside_declines() -> None:
    x = p()
    inner = neg(x)
    log = Log()
    graph = graph_of(add(neg(inner), relu(inner)))
    assert rewrite(graph, (NEG_NEG,), log) is graph
    assert log.declined == ["neg-neg: neg: neg inside the match is used outside"]
    as_output = graph_of(neg(inner), inner)
    assert rewrite(as_output, (NEG_NEG,)) is as_output
    as_update = graph_of(neg(inner), x=inner)
    assert rewrite(as_update, (NEG_NEG,)) is as_update


def test_weights_and_literals_inside_a_match_may_be_used_elsewhere() -> None:
    x, one = p(), literal(value=1.0, dtype="f32")
    times_one = Rule("one", (pat(mul, A, pat(literal, value=1.0)),), lambda m: m[A])
    done = rewrite(graph_of(mul(x, one), add(x, one)), (times_one,))
    assert names(done) == Counter({"add": 1, "literal": 1})


def test_a_multi_result_rule_replaces_every_result_that_others_use() -> None:
    x, y = p("x"), p("y")
    total = add(x, y)
    graph = graph_of(mul(relu(total), total), total)
    done, log = applied(graph, ADD_RELU)
    assert names(done) == Counter({"test.add_relu": 1, "mul": 1})
    (fused,) = (n for n in done.nodes() if n.op is add_relu)
    assert done.outputs[1] == Value(fused, 0)
    assert done.outputs[0].node.args == (Value(fused, 1), Value(fused, 0))
    assert log.applied[0].before == (relu_of(graph), total)


def relu_of(graph: Graph) -> Value:
    return next(Value(n) for n in graph.nodes() if n.op is relu)


def test_other_results_of_a_matched_node_can_be_replaced() -> None:
    x = p()
    values, indices = reduce.topk.all(x, k=2, dim=-1)
    doubled = pat(neg, TOPK)
    rule = Rule("neg-topk", (doubled, Other(TOPK, 1)), lambda m: neg_topk(m[A]))
    done, _ = applied(graph_of(neg(values), shape.view(indices, shape=(2 * T,))), rule)
    assert names(done) == Counter({"topk": 1, "neg": 1, "view": 1})
    # Without the other result the rule would run topk twice.
    leaky = Rule("leaky", (doubled,), lambda m: neg_topk(m[A])[0])
    graph = graph_of(neg(values), indices)
    log = Log()
    assert rewrite(graph, (leaky,), log) is graph
    assert log.declined == ["leaky: neg: topk inside the match is used outside"]


TOPK = pat(reduce.topk, A, k=2)


def neg_topk(x: Value) -> tuple[Value, Value]:
    values, indices = reduce.topk.all(x, k=2, dim=-1)
    return neg(values), indices


def test_a_region_that_would_wait_for_itself_declines() -> None:
    """exp needs the sum, and the product needs exp: fused, the sum would need the product."""
    x, y = p("x"), p("y")
    total = add(x, y)
    detour = pointwise.exp(total)
    fused = pat(mul, SUM, C)
    rule = Rule("mul-add", (fused, SUM), lambda m: (mul(add(m[A], m[B]), m[C]), add(m[A], m[B])))
    graph = graph_of(mul(total, detour))
    log = Log()
    assert rewrite(graph, (rule,), log) is graph
    assert log.declined[0] == "mul-add: mul: an input of the match depends on one of its results"
    fine = graph_of(mul(total, pointwise.exp(x)), total)
    assert len(applied(fine, rule)[1].applied) == 1


pair = Op("test.pair", lambda x, y: (x, y), lambda x, y: (torch.relu(x), -y))
# Two unrelated results in one region, as far as the pattern goes: relu(a) and -b, joined by +.
LEFT, RIGHT = pat(relu, A), pat(neg, B)


def pair_rule(root: Op) -> Rule:
    """root(relu(a), -b) where both operands are used elsewhere too."""
    top = pat(root, LEFT, RIGHT)

    def build(m: Match) -> tuple[Value, ...]:
        one, two = pair.all(m[A], m[B])
        return root(one, two), one, two

    return Rule(f"pair-{root.name}", (top, LEFT, RIGHT), build)


@pytest.mark.parametrize("between", [0, 1, 3])
def test_two_regions_that_would_form_a_cycle_together(between: int) -> None:
    """Each is convex alone; together each would wait for the other: only one is taken.

    `between` ops lie on one of the ways from region to region.
    """
    x, y = p("x"), p("y")
    one, three = relu(x), relu(y)
    way = one
    for _ in range(between):
        way = pointwise.tanh(way)
    two, four = neg(three), neg(way)
    graph = graph_of(sub(one, two), mul(three, four))
    for rules in ((pair_rule(sub), pair_rule(mul)), (pair_rule(mul), pair_rule(sub))):
        done, log = applied(graph, *rules)
        assert len(log.applied) == 1
        assert any("depends on one of its results" in d for d in log.declined)
        assert names(done)["test.pair"] == 1


def test_a_cycle_through_nodes_that_come_before_the_region() -> None:
    """The way from the one region to the other lies before all of the other, in graph order."""
    x, y = p("x"), p("y")
    three = relu(y)
    way = pointwise.tanh(three)
    one = relu(x)
    graph = graph_of(way, sub(one, neg(way)), mul(three, neg(one)))
    done, log = applied(graph, pair_rule(sub), pair_rule(mul))
    assert len(log.applied) == 1
    assert names(done)["test.pair"] == 1


def test_two_regions_that_only_follow_each_other_are_both_taken() -> None:
    x, y = p("x"), p("y")
    one, two = relu(x), neg(y)
    three, four = relu(two), neg(one)
    graph = graph_of(sub(one, two), mul(three, four))
    done, log = applied(graph, pair_rule(sub), pair_rule(mul))
    assert len(log.applied) == 2
    assert names(done)["test.pair"] == 2


@given(st.integers(0, 2**32))
def test_random_regions_never_form_a_cycle(seed: int) -> None:
    """Any mix of pairs in a random graph is rewritten without error and means the same."""
    chance = random.Random(seed)
    values = [p("x"), p("y")]
    for _ in range(24):
        op = chance.choice((relu, neg, sub, mul, relu, neg, pointwise.tanh))
        count = 2 if op in (sub, mul) else 1
        values.append(op(*(chance.choice(values[-8:]) for _ in range(count))))
    graph = graph_of(*values[-3:])
    rules = [pair_rule(sub), pair_rule(mul), ADD_RELU, NEG_NEG]
    chance.shuffle(rules)
    assert_same_meaning(graph, rewrite(graph, rules))


def test_a_wildcard_may_not_match_a_result_of_its_own_region() -> None:
    """relu(x) - (-relu(x)): the second input of the pair is the first result of the pair."""
    one = relu(p())
    graph = graph_of(sub(one, neg(one)))
    log = Log()
    assert rewrite(graph, (pair_rule(sub),), log) is graph
    assert log.declined == ["pair-sub: sub: an input of the match depends on one of its results"]


def test_a_wildcard_may_match_what_an_op_pattern_matches_too() -> None:
    n = neg(p())
    rule = Rule("sub", (pat(add, A, pat(neg, B)),), lambda m: sub(m[A], m[B]))
    done, log = applied(graph_of(add(n, n)), rule)
    assert names(done) == Counter({"neg": 1, "sub": 1})
    assert log.applied[0].leaves == (n,)


def test_a_rule_that_replaces_a_value_by_itself_declines() -> None:
    graph = graph_of(relu(neg(p())))
    root = pat(relu, A)
    log = Log()
    assert rewrite(graph, (Rule("same", (root,), lambda m: m[root]),), log) is graph
    assert log.declined == ["same: relu: it would be replaced by itself"]
    assert rewrite_all(graph, (Rule("same", (root,), lambda m: m[root]),)) is graph


def test_a_result_may_stay_while_others_change() -> None:
    x, y = p("x"), p("y")
    total = add(x, y)
    keep = Rule(
        "keep",
        (pat(relu, SUM), SUM),
        lambda m: (pointwise.maximum(m[SUM], literal(value=0.0, dtype="f32")), m[SUM]),
    )
    done, _ = applied(graph_of(relu(total), total), keep)
    assert done.outputs[1].node is total.node
    assert names(done) == Counter({"add": 1, "maximum": 1, "literal": 1})


def test_replacements_of_another_type_are_refused() -> None:
    rule = Rule("bad", (pat(relu, A),), lambda m: pointwise.cast(m[A], dtype="f16"))
    with pytest.raises(VerifyError, match=r"rule bad: replaces f32\[T, 4\] by f16\[T, 4\]"):
        rewrite(graph_of(relu(p())), (rule,))
    few = Rule("few", (pat(relu, SUM), SUM), lambda m: m[A])
    with pytest.raises(VerifyError, match="rule few: expected 2 results, found 1"):
        rewrite(graph_of(relu(add(p("x"), p("y")))), (few,))


# ---- sources and repetition


def test_new_nodes_take_the_source_of_what_they_replace() -> None:
    x = p()
    (inner,) = neg.node((x,), {}, "model.a").results
    (root,) = relu.node((inner,), {}, "model.b @f.py:3").results
    (after,) = pointwise.tanh.node((root,), {}, "model.c").results
    rule = Rule(
        "max",
        (pat(relu, pat(neg, A)),),
        lambda m: neg(pointwise.minimum(m[A], literal(value=0.0, dtype="f32"))),
    )
    done, _ = applied(graph_of(after), rule)
    by_name = {n.op.name: n.source for n in done.nodes()}
    assert by_name["neg"] == by_name["minimum"] == "model.b @f.py:3"
    assert by_name["tanh"] == "model.c"
    assert by_name["param"] == ""


def test_rewrite_all_goes_on_until_nothing_matches() -> None:
    value = p()
    for _ in range(16):
        value = neg(value)
    graph = graph_of(relu(value))
    once = rewrite(graph, (NEG_NEG,))
    assert names(once) == Counter({"relu": 1})
    odd = graph_of(relu(neg(value)))
    log = Log()
    assert names(rewrite_all(odd, (NEG_NEG,), log)) == Counter({"relu": 1, "neg": 1})
    assert log.matches["neg-neg"] == 8


def test_only_the_declines_of_the_last_sweep_are_kept() -> None:
    x = p()
    shared = neg(neg(neg(x)))
    log = Log(declined=["earlier"])
    rewrite_all(graph_of(neg(shared), relu(shared)), (NEG_NEG,), log)
    assert log.declined[0] == "earlier"
    assert all("neg-neg" in d for d in log.declined[1:])
    assert len(log.declined) == 2


def test_rules_that_do_not_end_are_named() -> None:
    grow = Rule("grow", (pat(relu, A),), lambda m: relu(relu(m[A])))
    with pytest.raises(RuntimeError, match=r"did not end after \d+ .* still matching: \['grow'\]"):
        rewrite_all(graph_of(relu(p())), (grow,))
    there = Rule("there", (pat(sub, A, B),), lambda m: neg(sub(m[B], m[A])))
    with pytest.raises(RuntimeError, match=r"\['there'\]"):
        rewrite_all(graph_of(sub(p("x"), p("y"))), (there,))


@given(graphs(extra=False))
def test_random_graphs_mean_the_same_after_rewriting(graph: Graph) -> None:
    rules = (
        NEG_NEG,
        Rule("sub", (pat(sub, A, B),), lambda m: add(m[A], neg(m[B]))),
        Rule("relu-relu", (pat(relu, pat(relu, A)),), lambda m: relu(m[A])),
    )
    done = rewrite_all(graph, rules)
    verify(done)
    assert "sub" not in names(done)
    if done is not graph:
        assert not same_structure(done, graph)


# ---- rebuild


def test_rebuild_follows_chains_of_replacements() -> None:
    x = p()
    one, two, three = relu(x), neg(x), pointwise.exp(x)
    graph = graph_of(pointwise.tanh(one), x=one)
    done = rebuild(graph, {one: two, two: three})
    assert names(done) == Counter({"exp": 1, "tanh": 1})
    assert done.updates["x"] == three


def test_rebuild_refuses_what_needs_itself() -> None:
    x = p()
    one = relu(x)
    with pytest.raises(ValueError, match="would depend on its own result"):
        rebuild(graph_of(one), {one: neg(one)})
    two = neg(x)
    with pytest.raises(ValueError, match="would be replaced by itself"):
        rebuild(graph_of(pointwise.tanh(one)), {one: two, two: one})
    with pytest.raises(ValueError, match="would be replaced by itself"):
        rebuild(graph_of(pointwise.tanh(one)), {one: two, two: two})
    far = pointwise.exp(add(one, two))
    with pytest.raises(ValueError, match="would depend on its own result"):
        rebuild(graph_of(far, one), {x: far})


def test_rebuild_keeps_nodes_of_which_another_result_is_replaced() -> None:
    x = p()
    values, indices = reduce.topk.all(x, k=2, dim=-1)
    graph = graph_of(neg(values), indices)
    done = rebuild(graph, {values: shape.slice_(x, dim=1, start=0, stop=2)})
    assert done.outputs[1] == indices
    assert names(done) == Counter({"topk": 1, "neg": 1, "slice": 1})


# ---- constants


def test_what_depends_on_constants_alone() -> None:
    x, w = p(), constant(name="w", type=TensorType("f32", (4, 4)))
    turned = shape.permute(w, dims=(1, 0))
    rows = shape.full(value=1.0, shape=(T, 4), dtype="f32")
    at_t = shape.slice_(
        constant(name="t", type=TensorType("f32", (64, 4))), dim=0, start=T, stop=T + 1
    )
    answers: list[tuple[Value, bool]] = [
        (turned, True),
        (mul(turned, literal(value=2.0, dtype="f32")), True),
        (linear.linear(x, turned), False),
        (x, False),
        (rows, False),
        (at_t, False),
        (norm.rms_norm(rows, eps=1e-6), False),
    ]
    for value, expected in answers:
        assert value.node.is_constant is expected


def test_a_deep_region_is_left_in_time() -> None:
    """Convexity looks only as far back as a region reaches, not through the whole graph."""
    x, y = p("x"), p("y")
    value = add(x, y)
    for _ in range(3000):
        value = add(relu(value), value)
    log = Log()
    done = rewrite(graph_of(value), (ADD_RELU,), log)
    verify(done)
    assert len(log.applied) >= 1000
