"""Rules that are broken on purpose: checked rewriting tells of every one, by pass and by rule.

Each mutation changes what one rule builds, in the graph and in the log alike, as a mistake in its
code would; types stay right, so that only the comparison of both sides can see it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from ingot.compiler.ir import Graph, Node, Op, Value, walk
from ingot.compiler.ops.collective import all_reduce
from ingot.compiler.ops.leaf import literal
from ingot.compiler.ops.pointwise import add, ge, mul, sub
from ingot.compiler.ops.shape import cat, slice_
from ingot.compiler.pipeline import Pass, PassContext, PassError, run_pipeline
from ingot.compiler.rewrite import Applied, Log
from ingot.compiler.target import Target, target_of
from ingot.compiler.validate import RewriteCheck
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.passes.pipelines import RAISING, TARGET, causal_lm
from ingot.passes.raising import canonicalize
from ingot.passes.serving import insert_kv_cache, sample_on_device
from ingot.passes.transforms import quantize_mxfp4, shard_tensor_parallel, shares
from ingot.passes.transforms.absorb_mla import AbsorbMla
from ingot.passes.transforms.mxfp4_policy import MXFP4
from ingot.passes.transforms.propagate_slice import Cut
from ingot.passes.transforms.shard_tensor_parallel import ShardTensorParallel
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

# A changed node, from a node that a rule built and its operands.
Change = Callable[[Node, tuple[Value, ...]], Node]


def attributes(**attrs: Any) -> Change:
    return lambda node, args: node.rebuilt(args, {**node.attrs, **attrs})


def without(attribute: str) -> Change:
    def change(node: Node, args: tuple[Value, ...]) -> Node:
        kept = {k: v for k, v in node.attrs.items() if k != attribute}
        return node.rebuilt(args, kept)

    return change


def swapped(i: int, j: int) -> Change:
    def change(node: Node, args: tuple[Value, ...]) -> Node:
        order = list(args)
        order[i], order[j] = order[j], order[i]
        return node.rebuilt(order)

    return change


def dropped(name: str) -> Change:
    """The optional operand `name` left out, with its eps."""

    def change(node: Node, args: tuple[Value, ...]) -> Node:
        eps = {"norm": "eps", "post_norm": "post_eps"}.get(name)
        left_out = {name: None, **({eps: None} if eps else {})}
        return node.rebuilt(args).replace(**left_out)

    return change


def exchanged(name: str, other: str) -> Change:
    """Two optional operands in each other's place."""

    def change(node: Node, args: tuple[Value, ...]) -> Node:
        return swapped(node.index_of(name), node.index_of(other))(node, args)

    return change


def one_more(attribute: str, by: float = 1) -> Change:
    return lambda node, args: attributes(**{attribute: node.attrs[attribute] + by})(node, args)


def first_more(i: int) -> Change:
    """1 added to operand i."""

    def change(node: Node, args: tuple[Value, ...]) -> Node:
        more = add(args[i], literal(value=1, dtype=args[i].type.dtype))
        return node.rebuilt((*args[:i], more, *args[i + 1 :]))

    return change


def moved_slice(node: Node, args: tuple[Value, ...]) -> Node:
    """A slice of the same length, from the other end."""
    size: Any = args[0].type.shape[node.attrs["dim"]]
    start, stop = node.attrs["start"], node.attrs["stop"]
    return attributes(start=size - stop, stop=size - start)(node, args)


def swapped_along(dim: int) -> Change:
    """The first two operands of a concatenation along `dim` swapped; others stay."""

    def change(node: Node, args: tuple[Value, ...]) -> Node:
        there = node.attrs["dim"] == dim
        return swapped(0, 1)(node, args) if there else node.rebuilt(args)

    return change


def first_step(op: str) -> Change:
    """Another op in the place of the first of a region."""

    def change(node: Node, args: tuple[Value, ...]) -> Node:
        (_, *named), *steps = node.attrs["steps"]
        return attributes(steps=((op, *named), *steps))(node, args)

    return change


def doubled_last(node: Node, args: tuple[Value, ...]) -> Node:
    """Twice the last operand."""
    return node.rebuilt((*args[:-1], add(args[-1], args[-1])))


@dataclass(frozen=True)
class Mutation:
    """In what rule `rule` builds for the tiny model `model`, every `op` is changed."""

    model: str
    rule: str
    op: str
    change: Change
    config: tuple[tuple[str, Any], ...] = ()
    packed: bool = False
    target: Target | None = None

    def of(self, after: tuple[Value, ...], before: tuple[Value, ...]) -> tuple[Value, ...]:
        old = set(walk(before))
        new: dict[Node, Node] = {}
        for node in walk(after):
            if node in old or not node.args:
                continue
            args = tuple(Value(new.get(a.node, a.node), a.index) for a in node.args)
            changed = node.op.name == self.op
            new[node] = self.change(node, args) if changed else replace(node, args=args)
        return tuple(Value(new.get(v.node, v.node), v.index) for v in after)


def zeroed(i: int) -> Change:
    """Operand i, integers, multiplied by 0."""

    def change(node: Node, args: tuple[Value, ...]) -> Node:
        none = mul(args[i], literal(value=0, dtype=args[i].type.dtype))
        return node.rebuilt((*args[:i], none, *args[i + 1 :]))

    return change


def repeated(i: int, j: int) -> Change:
    """Operand j in place of operand i as well."""

    def change(node: Node, args: tuple[Value, ...]) -> Node:
        return node.rebuilt((*args[:i], args[j], *args[i + 1 :]))

    return change


def of_a_part(node: Node, args: tuple[Value, ...]) -> Node:
    """The same without the last index of the dim that it works along."""
    axis = node.attrs["dim"]
    size: Any = args[0].type.shape[axis]
    return node.rebuilt((slice_(args[0], dim=axis, start=0, stop=size - 1),))


def other_rows(node: Node, args: tuple[Value, ...]) -> Node:
    """The row before or after the wanted one, of rows 0 and 1."""
    one = literal(value=1, dtype=args[1].type.dtype)
    return node.rebuilt((args[0], sub(one, args[1])))


MLA, NVIDIA = "deepseek_v3", target_of("cuda:sm_90")
BF16 = (("dtype", torch.bfloat16),)
MUTATIONS: dict[str, Mutation] = {
    # what models say
    "equal parts of a cat in the other order": Mutation(
        "llama", "drop-unit-dims", "cat", swapped(0, 1)
    ),
    "mean of a part of the dim": Mutation("llama", "drop-unit-dims", "mean", of_a_part),
    "eps of another norm": Mutation("llama", "rms-norm", "rms_norm", attributes(eps=0.1)),
    "norm without its weight": Mutation("llama", "rms-norm", "rms_norm", dropped("weight")),
    "halves of rope are pairs": Mutation(
        "llama", "rope-half", "rope", attributes(form="interleaved")
    ),
    "pairs of rope are halves": Mutation(MLA, "rope-pairs", "rope", attributes(form="half")),
    "cos for sin": Mutation("llama", "rope-half", "rope", swapped(1, 2)),
    "rope of the first dims": Mutation(MLA, "rope-part", "rope", without("start")),
    "gate for up": Mutation("llama", "glu-silu", "glu", swapped(0, 1)),
    "another activation": Mutation("llama", "glu-silu", "glu", attributes(activation="gelu")),
    "missing renormalise": Mutation(MLA, "router", "router", attributes(normalize=False)),
    "wrong group limit": Mutation(MLA, "router", "router", attributes(topk_groups=1)),
    "groups by their largest": Mutation(MLA, "router", "router", attributes(group_score="max")),
    "dropped correction": Mutation(MLA, "router", "router", dropped("correction")),
    "dropped scaling factor": Mutation(MLA, "router", "router", without("scale")),
    "softmax for sigmoid": Mutation(MLA, "router", "router", attributes(score="softmax")),
    # what they compute with
    "W_UK where W_UV belongs": Mutation(MLA, "absorb-mla", "slice", moved_slice),
    "scale of the latent": Mutation(MLA, "absorb-mla", "mla_attention", one_more("scale", 0.1)),
    "unnormed latent": Mutation(MLA, "absorb-mla", "mla_latent", attributes(eps=10.0)),
    "scale exponent off by one": Mutation("llama", "mxfp4-projection", "mxfp4", first_more(1)),
    "codes off by one": Mutation("llama", "mxfp4-projection", "mxfp4", first_more(0)),
    "exponents of experts": Mutation("qwen3_moe", "mxfp4-experts", "mxfp4", first_more(1)),
    "unrotated slice of the query": Mutation(MLA, "premultiply-query", "slice", moved_slice),
    "W_O W_UV twice": Mutation(MLA, "premultiply-output", "matmul", doubled_last),
    # how they serve
    "another row's logits": Mutation("llama", "take-before-linear", "take", zeroed(1)),
    "the next row's logits": Mutation("llama", "take-before-linear", "take", other_rows),
    "slots for positions, written": Mutation("llama", "cache", "kv_append", repeated(5, 4)),
    "slots for positions, read": Mutation("llama", "cache", "cached_attention", repeated(4, 3)),
    "window off by one": Mutation(
        "mistral", "cache", "cached_attention", one_more("window"), (("sliding_window", 3),)
    ),
    "dropped sinks": Mutation("gpt_oss", "cache", "cached_attention", dropped("sinks")),
    "dropped soft cap": Mutation("gemma2", "cache", "cached_attention", without("softcap")),
    "written one position on": Mutation("llama", "cache", "kv_append", first_more(5)),
    # what one kernel does
    "wrong half of W_DQ, W_DKV": Mutation(MLA, "fuse-mla-projections", "slice", moved_slice),
    "dropped bias of q, k, v": Mutation("qwen2", "qkv", "project_heads", dropped("bias")),
    "norm of q for that of k": Mutation(
        "qwen3", "qkv", "project_heads", exchanged("norm_0", "norm_1")
    ),
    "rotated values": Mutation(
        "llama", "qkv", "project_heads", attributes(rotate=(True, True, True))
    ),
    "unrotated keys": Mutation(
        "llama", "qkv", "project_heads", attributes(rotate=(True, False, False))
    ),
    "up before gate": Mutation("llama", "two-products", "cat", swapped(0, 1)),
    "gating without its correction": Mutation(
        MLA, "moe-gating", "moe_gating", dropped("correction")
    ),
    "gating without groups": Mutation(MLA, "moe-gating", "moe_gating", attributes(topk_groups=4)),
    "up before gate in experts": Mutation("glm4_moe", "shared-experts", "cat", swapped_along(1)),
    "residual twice": Mutation("llama", "product-residual", "linear", doubled_last),
    "dropped norm": Mutation("llama", "norm-linear", "linear", dropped("norm")),
    "post-norm for norm": Mutation(
        "gemma3_text", "sandwich-linear", "linear", exchanged("norm", "post_norm")
    ),
    "dropped post-norm": Mutation("gemma3_text", "sandwich-linear", "linear", dropped("post_norm")),
    # the same on packed weights: codes and scales are drawn for what they stand for
    "packed, up before gate": Mutation("llama", "two-products", "cat", swapped(0, 1), packed=True),
    "packed, rotated values": Mutation(
        "llama", "qkv", "project_heads", attributes(rotate=(True, True, True)), packed=True
    ),
    "packed, codes off by one": Mutation(
        "llama", "two-products", "mxfp4", first_more(0), packed=True
    ),
    "packed, wrong half of W_DQ, W_DKV": Mutation(
        MLA, "fuse-mla-projections", "slice", moved_slice, packed=True
    ),
    "packed, up before gate in experts": Mutation(
        "glm4_moe", "shared-experts", "cat", swapped_along(1), packed=True
    ),
    "packed, dropped norm": Mutation(
        "llama", "norm-linear", "linear", dropped("norm"), packed=True
    ),
    # what a GPU wants
    "tiles of other scales": Mutation(
        "llama", "weight-in-tiles", "mxfp4_fragments", first_more(1), BF16, True, NVIDIA
    ),
    "gate rows by turns, up rows not": Mutation(
        "llama", "weight-in-tiles", "mxfp4_tiled", without("gated"), BF16, True, NVIDIA
    ),
    "tiles of other experts' scales": Mutation(
        "qwen3_moe", "experts-in-tiles", "mxfp4_fragments", first_more(1), BF16, True, NVIDIA
    ),
    "gate and up rows of experts one after the other": Mutation(
        "qwen3_moe", "experts-in-tiles", "mxfp4_tiled", without("gated"), BF16, True, NVIDIA
    ),
    "appended one position on": Mutation(
        MLA, "fuse-kv-append", "mla_latent", first_more(6), target=NVIDIA
    ),
    "keys in the cache of values": Mutation(
        "llama", "fuse-kv-append", "project_heads", exchanged("cache_1", "cache_2"), target=NVIDIA
    ),
    "attention to values, of keys": Mutation(
        "llama",
        "fuse-heads-attention",
        "project_attention",
        exchanged("k_cache", "v_cache"),
        target=NVIDIA,
    ),
    "attention of another scale": Mutation(
        "llama", "fuse-heads-attention", "project_attention", one_more("scale"), target=NVIDIA
    ),
    "rows of a latent turned by sines for cosines": Mutation(
        MLA, "fuse-heads-attention", "latent_attention", swapped(4, 5), target=NVIDIA
    ),
    "latent attention of another scale": Mutation(
        MLA, "fuse-heads-attention", "latent_attention", one_more("scale"), target=NVIDIA
    ),
    "another first step of a region": Mutation(
        "gemma2", "fuse-elementwise", "region", first_step("mul"), target=NVIDIA
    ),
}


@cache
def traced(model: str, config: tuple[tuple[str, Any], ...]) -> Graph:
    return import_hugging_face(tiny_model(model, **dict(config)), dtype=None, max_tokens=64).graph


def compiled(mutation: Mutation, check: Callable[[Graph, Applied], None] | None) -> None:
    packed = mutation.packed or mutation.rule.startswith("mxfp4")
    packing = MXFP4(group=32 if mutation.target else 16) if packed else None
    passes = causal_lm(max_sequences=2, max_tokens_per_sequence=64, quantize=packing)
    if mutation.target:
        passes = (*passes, *TARGET)
    if mutation.rule.startswith("premultiply"):
        passes = (*RAISING, AbsorbMla(premultiply=True))
    context = PassContext(mutation.target)
    run_pipeline(traced(mutation.model, mutation.config), passes, context, check=check)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mutation], list[str]]:
    """Breaks the rule of a mutation; the list grows whenever it is used."""

    def set_up(mutation: Mutation) -> list[str]:
        uses: list[str] = []

        def changed(one: Applied) -> Applied:
            if one.rule != mutation.rule:
                return one
            uses.append(one.rule)
            return replace(one, after=mutation.of(one.after, one.before))

        apply, declare = Log.apply, Log.declare

        def applying(log: Log, graph: Graph, applied: Sequence[Applied]) -> Graph:
            return apply(log, graph, [changed(one) for one in applied])

        def declaring(log: Log, *graphs: Any, claims: Sequence[Applied] = ()) -> Graph:
            return declare(log, *graphs, claims=[changed(one) for one in claims])

        monkeypatch.setattr(Log, "apply", applying)
        monkeypatch.setattr(Log, "declare", declaring)
        return uses

    return set_up


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_rule_is_caught(name: str, broken: Callable[[Mutation], list[str]]) -> None:
    mutation = MUTATIONS[name]
    uses = broken(mutation)
    check_rewrite = RewriteCheck()

    def check(graph: Graph, applied: Applied) -> None:
        if applied.rule == mutation.rule:  # the others are checked below, unbroken
            check_rewrite(graph, applied)

    with pytest.raises(PassError) as caught:
        compiled(mutation, check)
    assert uses
    said = str(caught.value)
    assert re.match(
        rf"pass [a-z0-9-]+: rule {mutation.rule} changes a result by \S+ \(allowed", said
    )
    assert "before:\n" in said and "after:\n" in said


# ---- what passes build by themselves, not by rewrites


def _wrong_rows(patch: pytest.MonkeyPatch) -> None:
    take = insert_kv_cache.take
    nothing = literal(value=0, dtype="i32")
    patch.setattr(insert_kv_cache, "take", lambda x, rows: take(x, mul(rows, nothing)))


def _caches_swapped(patch: pytest.MonkeyPatch) -> None:
    """The keys of a layer are what is kept in place of its values."""

    def swapped(*parts: Any) -> Graph:
        graph = Graph(*parts)
        kept = graph.updates
        names = {n: ("v" if n[0] == "k" else "k") + n[1:] for n in kept}
        return replace(graph, updates={n: kept[names[n]] for n in kept})

    patch.setattr(insert_kv_cache, "Graph", swapped)


def _temperature_for_min_p(patch: pytest.MonkeyPatch) -> None:
    names = {"temperature": "min_p", "min_p": "temperature"}
    mixed = tuple((names.get(name, name), kind) for name, kind in sample_on_device.SETTINGS)
    patch.setattr(sample_on_device, "SETTINGS", mixed)


class _OtherTop:
    """`sample` with top_k in place of top."""

    def __init__(self, op: Op) -> None:
        self.op = op

    def all(self, *args: Value, **attrs: Any) -> tuple[Value, ...]:
        return self.op.all(*args[:-1], args[2], **attrs)


def _top_k_for_top(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sample_on_device, "sample", _OtherTop(sample_on_device.sample))


def _keys_for_values(patch: pytest.MonkeyPatch) -> None:
    """Two packed weights of one type change places."""
    whole = quantize_mxfp4._with_operands

    def changed(swap: Mapping[tuple[Node, int], Value]) -> dict[Node, Node]:
        places = list(swap)
        one = places[0]
        other = next(p for p in places[1:] if swap[p].type == swap[one].type)
        return whole({**swap, one: swap[other], other: swap[one]})

    patch.setattr(quantize_mxfp4, "_with_operands", changed)


class _OtherScales:
    """`mxfp4` with the scales of the next row."""

    def __init__(self, op: Op) -> None:
        self.op = op

    def node(self, args: tuple[Value, ...], *rest: Any) -> Node:
        codes, scales = args
        rows = scales.type.shape[0]
        first = slice_(scales, dim=0, start=0, stop=1)
        others = slice_(scales, dim=0, start=1, stop=rows)
        return self.op.node((codes, cat(others, first, dim=0)), *rest)


def _scales_of_another_row(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quantize_mxfp4, "mxfp4", _OtherScales(quantize_mxfp4.mxfp4))


def _merged(*facts: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Nodes of which only these facts are equal are merged."""

    def merged(graph: Graph, log: Log) -> Graph:
        seen: dict[Any, Node] = {}
        applied: list[Applied] = []
        for node in graph.nodes():
            if node.args:
                key = (node.op, node.types, *(repr(getattr(node, fact)) for fact in facts))
                first = seen.setdefault(key, node)
                if first is not node and not applied:
                    rule = "common-subexpression"
                    applied.append(Applied(rule, node.args, node.results, first.results))
        return log.apply(graph, applied)

    def breaks(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(canonicalize, "common_subexpressions", merged)

    return breaks


def _slice_of_another_rank(patch: pytest.MonkeyPatch) -> None:
    """The columns of row-parallel weights, of two ranks."""
    right = shard_tensor_parallel.cut_weight

    def wrong(weight: Value, cut: Cut) -> Value:
        start = cut.start if cut.axis == 0 else cut.size - cut.start
        return right(weight, Cut(cut.axis, start, start + cut.size))

    patch.setattr(shard_tensor_parallel, "cut_weight", wrong)


def _missing_all_reduce(patch: pytest.MonkeyPatch) -> None:
    emit = shard_tensor_parallel.emit

    def emitted(node: Node, op: Op, *args: Value, **attrs: Any) -> Value:
        return args[0] if op is all_reduce else emit(node, op, *args, **attrs)

    patch.setattr(shard_tensor_parallel, "emit", emitted)


def _bias_on_every_rank(patch: pytest.MonkeyPatch) -> None:
    emit = shard_tensor_parallel.emit

    def emitted(node: Node, op: Op, *args: Value, **attrs: Any) -> Value:
        if "bias" in attrs:
            attrs["bias"] = node.operand("bias")
        return emit(node, op, *args, **attrs)

    patch.setattr(shard_tensor_parallel, "emit", emitted)


def _experts_of_other_ranks_count(patch: pytest.MonkeyPatch) -> None:
    """Choices of experts that a rank does not hold are not weighed 0."""
    held = shares._held

    def all_held(node: Node, ids: Value, mine: Cut) -> tuple[Value, Value]:
        _, index = held(node, ids, mine)
        return ge(index, literal(value=0, dtype=ids.type.dtype)), index

    patch.setattr(shares, "_held", all_held)


SERVING = causal_lm(
    max_sequences=2, max_tokens_per_sequence=64, quantize=MXFP4(group=16), sample=True
)
SHARDED = (*RAISING, ShardTensorParallel(2, 0))
_SHARDED = "shard-tensor-parallel: rule whole-on-every-rank"
Breaks = Callable[[pytest.MonkeyPatch], None]
# What is broken, in which model and pipeline, and what the check says.
BUILT: dict[str, tuple[Breaks, str, Sequence[Pass], str]] = {
    "nodes that differ in an attribute": (
        _merged("args"),
        "llama",
        RAISING,
        "canonicalize: rule common-subexpression",
    ),
    "nodes that differ in an argument": (
        _merged("attrs"),
        "llama",
        RAISING,
        "canonicalize: rule common-subexpression",
    ),
    "rows of other tokens": (
        _wrong_rows,
        "llama",
        SERVING,
        "insert-kv-cache: rule (logit|written)-rows",
    ),
    "caches of each other": (
        _caches_swapped,
        "llama",
        SERVING,
        "insert-kv-cache: rule written-rows",
    ),
    "temperature for min_p": (
        _temperature_for_min_p,
        "llama",
        SERVING,
        "sample-on-device: rule greedy-sample",
    ),
    "top_k for top": (_top_k_for_top, "llama", SERVING, "sample-on-device: rule greedy-sample"),
    "another weight packed": (
        _keys_for_values,
        "llama",
        SERVING,
        "quantize-mxfp4: rule quantize-mxfp4-product",
    ),
    "scales of another row": (
        _scales_of_another_row,
        "llama",
        SERVING,
        "quantize-mxfp4: rule mxfp4-projection",
    ),
    "slice of another rank": (_slice_of_another_rank, "llama", SHARDED, _SHARDED),
    "missing all_reduce": (_missing_all_reduce, "llama", SHARDED, _SHARDED),
    "bias on every rank": (_bias_on_every_rank, "gpt_oss", SHARDED, _SHARDED),
    "ids of other ranks count": (_experts_of_other_ranks_count, "llama", SHARDED, _SHARDED),
}


@cache
def checked(model: str, passes: tuple[Pass, ...]) -> None:
    """Nothing is caught where nothing is broken."""
    run_pipeline(traced(model, ()), passes, check=RewriteCheck())


@pytest.mark.parametrize("name", BUILT)
def test_what_a_pass_builds_wrong_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks, model, passes, message = BUILT[name]
    checked(model, tuple(passes))
    breaks(monkeypatch)
    with pytest.raises(PassError, match=rf"^pass {message} changes a result"):
        run_pipeline(traced(model, ()), passes, check=RewriteCheck())


def test_unbroken_rules_pass_the_same_check() -> None:
    seen: set[str] = set()
    check_rewrite = RewriteCheck()

    def check(graph: Graph, applied: Applied) -> None:
        seen.add(applied.rule)
        check_rewrite(graph, applied)

    chosen: Mapping[Any, Mutation] = {
        (m.model, m.config, m.packed, m.rule.startswith(("mxfp4", "premultiply")), m.target): m
        for m in MUTATIONS.values()
    }
    for mutation in chosen.values():
        compiled(mutation, check)
    assert seen >= {m.rule for m in MUTATIONS.values()}
