"""absorb-mla: every form that models write, what stays as it is, and both forms of the weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Literal

import pytest
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import PassContext, run_pipeline
from ingot.compiler.rewrite import Log
from ingot.compiler.validate import check_rewrite
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.passes.raising.canonicalize import Canonicalize
from ingot.passes.raising.raise_ops import RaiseOps
from ingot.passes.transforms.absorb_mla import AbsorbMla
from mla_graphs import ATTENTION, KEYS, LATENT, MODELS, OUTPUT, QUERY, UP, mla_text
from pass_checks import applied, assert_equal_results, ops
from pass_checks import graph_of as parsed
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

graph_of = cache(parsed)
Premultiply = bool | Literal["auto"]
RUN_TIME = AbsorbMla(premultiply=False)

# Ways to write the same attention, and how often mla_latent comes of each.
FORMS: dict[str, tuple[str, int]] = {
    "as traced": (mla_text(), 1),
    "no low rank of the query": (
        mla_text(query="%qp = linear(%x, @w_q)\n" + QUERY[QUERY.index("%qh") :]),
        1,
    ),
    "rotated part first": (
        mla_text(
            query=QUERY.replace(", start=6", ""),
            keys=KEYS.replace("%k_nope, %p3", "%p3, %k_nope"),
        ),
        1,
    ),
    "values first in the up-projection": (
        mla_text(
            up=UP.replace("start=0, stop=6", "start=5, stop=11").replace(
                "start=6, stop=11", "start=0, stop=5"
            )
        ),
        1,
    ),
    "the up-projection in two blocks": (
        mla_text(
            up="""
            %up = linear(%c_kv, @w_ukv)
            %kb = slice(%up, dim=1, start=0, stop=18)
            %k_nope = view(%kb, shape=[T, 3, 6])
            %vb = slice(%up, dim=-1, start=18, stop=33)
            %v = view(%vb, shape=[T, 3, 5])"""
        ),
        1,
    ),
    "an up-projection each": (
        mla_text(
            up="""
            %kb = linear(%c_kv, @w_uk)
            %k_nope = view(%kb, shape=[T, 3, 6])
            %vb = linear(%c_kv, @w_uv)
            %v = view(%vb, shape=[T, 3, 5])"""
        ),
        1,
    ),
    "heads last in the up-projection": (
        mla_text(
            up=UP.replace("[T, 3, 11]", "[T, 11, 3]")
            .replace("%k_nope", "%ut = permute(%uh, dims=[0, 2, 1])\n%k_nope")
            .replace("slice(%uh", "slice(%ut")
        ),
        1,
    ),
    "every second row of the up-projection": (
        mla_text(
            up=UP.replace("[T, 3, 11]", "[T, 3, 11]")
            .replace("start=0, stop=6", "start=0, stop=11, step=2")
            .replace("start=6, stop=11", "start=1, stop=11, step=2")
        ),
        1,
    ),
    "biases of the up-projection": (mla_text(up=UP.replace("@w_ukv", "@w_ukv, bias=@b_ukv")), 1),
    "biases elsewhere": (
        mla_text(
            query=QUERY.replace("@w_dq", "@w_dq, bias=@b_dq").replace("@w_uq", "@w_uq, bias=@b_q"),
            latent=LATENT.replace("@w_dkv", "@w_dkv, bias=@b_dkv"),
            output=OUTPUT.replace("@w_o", "@w_o, bias=@b_o"),
        ),
        1,
    ),
    "one head": (
        mla_text(
            query=QUERY.replace("@w_uq", "@w_uq1").replace("[T, 3, 10]", "[T, 1, 10]"),
            up=UP.replace("@w_ukv", "@w_ukv1").replace("[T, 3, 11]", "[T, 1, 11]"),
            keys="%p1 = view(%k_pe, shape=[T, 1, 4])\n%k = cat(%k_nope, %p1, dim=2)",
            output=OUTPUT.replace("[T, 15]", "[T, 5]").replace("@w_o", "@w_o1"),
        ),
        1,
    ),
    "the query's parts made apart": (
        mla_text(
            query="""
            %ql = linear(%x, @w_dq)
            %qn = rms_norm(%ql, weight=@q_norm, eps=1e-06)
            %qp = linear(%qn, @w_uq_nope)
            %qh = view(%qp, shape=[T, 3, 6])
            %qr = linear(%qn, @w_uq_pe)
            %qrh = view(%qr, shape=[T, 3, 4])
            %qt = rope(%qrh, %c, %s, form='deinterleaved')
            %q = cat(%qh, %qt, dim=2)"""
        ),
        1,
    ),
    "parts of the latent in a wider product": (
        mla_text(
            latent=LATENT.replace("@w_dkv", "@w_dkv_wide")
            .replace("start=0, stop=7", "start=3, stop=10")
            .replace("start=7, stop=11", "start=10, stop=14")
        ),
        1,
    ),
    "packed weights": (
        mla_text(
            latent=LATENT.replace("@w_dkv", "@w_dkv_32")
            .replace("@kv_norm", "@kv_norm_32")
            .replace("stop=7", "stop=32")
            .replace("start=7, stop=11", "start=32, stop=36"),
            up="%e1, %e2 = mxfp4_encode(@w_ukv_32, group=32, scale='mse')\n"
            "%w = mxfp4(%e1, %e2, dtype='f32')" + UP.replace("@w_ukv", "%w"),
        ),
        1,
    ),
    "the latent in another order": (
        mla_text(
            latent=LATENT.replace("start=0, stop=7", "start=4, stop=11").replace(
                "start=7, stop=11", "start=0, stop=4"
            )
        ),
        0,
    ),
    "a product for each part of the latent": (
        mla_text(
            latent="""
            %low = linear(%x, @w_dc)
            %c_kv = rms_norm(%low, weight=@kv_norm, eps=1e-05)
            %pe = linear(%x, @w_kr)
            %k_pe = rope(%pe, %c, %s, form='deinterleaved')"""
        ),
        0,
    ),
    "a scaled latent": (  # LongCat-Flash
        mla_text(
            latent=LATENT.replace("%c_kv =", "%c_n =") + "%c_kv = mul(%c_n, f32(1.5))",
        ),
        0,
    ),
    "a latent without a norm": (
        mla_text(latent=LATENT.replace("rms_norm(%low, weight=@kv_norm, eps=1e-05)", "tanh(%low)")),
        0,
    ),
    "a norm without a weight": (mla_text(latent=LATENT.replace(", weight=@kv_norm", "")), 0),
    "keys that are not rotated": (
        mla_text(latent=LATENT.replace("rope(%pe, %c, %s, form='deinterleaved')", "neg(%pe)")),
        0,
    ),
    "a latent with other users": (mla_text(results="%y, %c_kv"), 0),
    "rotated keys with other users": (mla_text(results="%y, %k_pe"), 0),
}


@pytest.mark.parametrize("premultiply", ["auto", True, False])
@pytest.mark.parametrize("form", FORMS)
def test_absorbs(form: str, premultiply: Premultiply) -> None:
    text, latents = FORMS[form]
    before = graph_of(text)
    after, log = applied(AbsorbMla(premultiply), before)
    found = ops(after)
    assert found["attention"] == 0, log.declined
    assert found["mla_attention"] == log.matches["absorb-mla"] == 1
    assert found["mla_latent"] == latents
    assert found["expand"] == 0
    assert_equal_results(before, after, 2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_each_rewrite_holds_on_its_own(form: str) -> None:
    before = graph_of(FORMS[form][0])
    after, log = applied(AbsorbMla(premultiply=True), before)
    assert log.applied
    for rewrite in log.applied:
        check_rewrite(after, rewrite)


def test_run_time_text(golden: Callable[[str], None]) -> None:
    golden(str(applied(RUN_TIME, graph_of(mla_text()))[0]))


def test_premultiplied_text(golden: Callable[[str], None]) -> None:
    golden(str(applied(AbsorbMla(premultiply=True), graph_of(mla_text()))[0]))


def test_what_is_rotated_is_sliced_where_it_was_joined() -> None:
    after, _ = applied(RUN_TIME, graph_of(FORMS["the query's parts made apart"][0]))
    q_latent, q_pe, _ = next(n for n in after.nodes() if n.op.name == "mla_attention").args
    assert q_latent.node.args[0].op.name == "view"
    assert q_pe.op.name == "rope"


# ---- what stays

STAYS: dict[str, tuple[str, str]] = {
    "not causal": (
        mla_text(attention=ATTENTION.replace("scale=0.3", "scale=0.3, causal=False")),
        "it is not causal",
    ),
    "window": (mla_text(attention=ATTENTION.replace("0.3", "0.3, window=4")), "it has a window"),
    "softcap": (
        mla_text(attention=ATTENTION.replace("0.3", "0.3, softcap=2.0")),
        "it has a soft cap",
    ),
    "sinks": (mla_text(attention=ATTENTION.replace("%v,", "%v, sinks=@sinks,")), "it has sinks"),
    "keys used elsewhere": (mla_text(results="%y, %k"), "cat inside the match is used outside"),
    "up-projection used elsewhere": (
        mla_text(results="%y, %up"),
        "linear inside the match is used outside",
    ),
    "values used elsewhere": (mla_text(results="%y, %v"), "slice inside the match is used outside"),
    "two latents": (
        mla_text(
            up="""
            %kb = linear(%c_kv, @w_uk)
            %k_nope = view(%kb, shape=[T, 3, 6])
            %c2 = tanh(%c_kv)
            %vb = linear(%c2, @w_uv)
            %v = view(%vb, shape=[T, 3, 5])"""
        ),
        "keys and values are not made of one latent",
    ),
    "values that are no product": (
        mla_text(up=UP.replace("%v =", "%v0 =") + "%v = tanh(%v0)"),
        "tanh where a product of tokens and a weight is expected",
    ),
    "keys that are no product": (
        mla_text(up=UP.replace("%k_nope =", "%k0 =") + "%k_nope = tanh(%k0)"),
        "tanh where a product of tokens and a weight is expected",
    ),
    "a rotated part for each head": (
        mla_text(
            keys="%p1 = slice(%q, dim=2, start=6, stop=10)\n%k = cat(%k_nope, %p1, dim=2)",
        ),
        "slice gives each head a part of its own",
    ),
    "rows that were viewed across tokens": (
        mla_text(
            up=UP.replace("%uh =", "%us = view(%up, shape=[3*T, 11])\n%uh =").replace(
                "(%up, shape=[T", "(%us, shape=[T"
            )
        ),
        "a view of the product touches the tokens",
    ),
    "heads that are shared": (
        mla_text(
            up=UP.replace("@w_ukv", "@w_ukv1").replace("[T, 3, 11]", "[T, 1, 11]"),
            keys="%p1 = view(%k_pe, shape=[T, 1, 4])\n%k = cat(%k_nope, %p1, dim=2)",
        ),
        r"heads of f32\[T, 3, 10\] share those of f32\[T, 1, 10\]",
    ),
    "no smaller cache": (
        mla_text(
            query=QUERY.replace("@w_uq", "@w_uq1").replace("[T, 3, 10]", "[T, 1, 10]"),
            latent=LATENT.replace("@w_dkv", "@w_dkv_32")
            .replace("@kv_norm", "@kv_norm_32")
            .replace("stop=7", "stop=32")
            .replace("start=7, stop=11", "start=32, stop=36"),
            up="%w = slice(@w_ukv_32, dim=0, start=0, stop=11)"
            + UP.replace("@w_ukv", "%w").replace("[T, 3, 11]", "[T, 1, 11]"),
            keys="%p1 = view(%k_pe, shape=[T, 1, 4])\n%k = cat(%k_nope, %p1, dim=2)",
            output=OUTPUT.replace("[T, 15]", "[T, 5]").replace("@w_o", "@w_o1"),
        ),
        "a latent row of 36 is no less than 15",
    ),
}


@pytest.mark.parametrize("kind", STAYS)
def test_declines(kind: str) -> None:
    text, reason = STAYS[kind]
    before = graph_of(text)
    log = Log()
    assert AbsorbMla()(before, PassContext(log=log)) is before
    assert not log.matches
    (declined,) = log.declined
    assert re.search(rf"^absorb-mla: attention: .*{reason}", declined), declined


def test_plain_attention_is_no_near_miss() -> None:
    text = mla_text(keys="%k = rope(%qh, %c, %s, form='half', start=6)")
    log = Log()
    AbsorbMla()(graph_of(text), PassContext(log=log))
    assert not log.declined
    assert not log.matches


# ---- products at run time, or pre-multiplied weights

QUERY_BYTES = (
    4 * ((8 + 30 * 8 + 30) + (30 + 4 + 30) + 2 * (18 + 12) + (18 + 3 * 7 * 6 + 21)),
    4 * ((8 + 33 * 8 + 33) + (33 + 4 + 33) + 2 * (21 + 12)),
)
OUTPUT_BYTES = (
    4 * ((21 + 3 * 5 * 7 + 15) + (15 + 12 * 15 + 12)),
    4 * (21 + 12 * 21 + 12),
)


@pytest.mark.parametrize(
    ("premultiply", "verdict"),
    [("auto", "pre-multiplied"), (True, "pre-multiplied"), (False, "two products")],
)
def test_notes_say_what_was_decided_and_why(premultiply: Premultiply, verdict: str) -> None:
    (result,) = run_pipeline(graph_of(mla_text()), [AbsorbMla(premultiply)])
    assert result.notes == tuple(
        f"{products} of 1 of 1 layers: {verdict} ({now:,} bytes a token as two products, {new:,} "
        "pre-multiplied)"
        for products, (now, new) in (
            ("W_UQ and W_UK, query", QUERY_BYTES),
            ("W_UV and W_O, output", OUTPUT_BYTES),
        )
    )
    assert result.declined == ()
    taken = verdict == "pre-multiplied"
    assert result.matches["premultiply-query"] == result.matches["premultiply-output"] == taken


def test_the_figures_are_what_the_graphs_differ_by() -> None:
    both = [applied(AbsorbMla(p), graph_of(mla_text()))[0] for p in (False, True)]
    now, new = (g.cost({"T": 1}).bytes for g in both)
    assert now - new == sum(a - b for a, b in (QUERY_BYTES, OUTPUT_BYTES))


def test_fewest_bytes_wins_on_either_side() -> None:
    """A latent of 32 dims makes pre-multiplied rows long."""
    before = graph_of(FORMS["packed weights"][0])
    after, log = applied(AbsorbMla(), before)
    costs = {p: applied(AbsorbMla(p), before)[0].cost({"T": 1}).bytes for p in (False, True)}
    assert after.cost({"T": 1}).bytes == min(costs.values()) == costs[False]
    assert [": two products (" in note for note in log.notes] == [True, True]
    # Codes and scales of one weight, viewed by heads for keys and for values.
    assert log.matches == {"absorb-mla": 1, "common-subexpression": 2}
    assert not log.declined


BETWEEN: dict[str, tuple[str, str, str | None]] = {
    "rotated dims": (
        mla_text(query=QUERY.replace("start=6", "start=4")),
        "query",
        r"dims 4 to 8 of f32\[T, 3, 10\] are rotated before W_UK",
    ),
    "a bias of the query": (
        mla_text(query=QUERY.replace("@w_uq", "@w_uq, bias=@b_q")),
        "query",
        None,
    ),
    "a function of the query": (
        mla_text(
            query=QUERY.replace("%qh =", "%q0 =").replace(
                "%q = rope(%qh", "%qh = tanh(%q0)\n%q = rope(%qh"
            )
        ),
        "query",
        None,
    ),
    "a query with other users": (
        mla_text(results="%y, %q"),
        "query",
        "rope inside the match is used outside",
    ),
    "a bias of the values": (
        mla_text(up=UP.replace("@w_ukv", "@w_ukv, bias=@b_ukv")),
        "output",
        None,
    ),
    "a function of the output": (
        mla_text(output=OUTPUT.replace("%of = view(%o", "%ot = tanh(%o)\n%of = view(%ot")),
        "output",
        None,
    ),
}


@pytest.mark.parametrize("kind", BETWEEN)
def test_what_lies_between_stays(kind: str) -> None:
    text, side, reason = BETWEEN[kind]
    before = graph_of(text)
    after, log = applied(AbsorbMla(premultiply=True), before)
    assert log.matches["absorb-mla"] == 1
    assert log.matches[f"premultiply-{side}"] == 0
    assert log.matches["premultiply-output" if side == "query" else "premultiply-query"] == 1
    (note,) = [n for n in log.notes if "something lies between" in n]
    assert f"{side} of 1 of 1 layers: two products" in note
    assert (len(log.declined) == 1) == (reason is not None)
    if reason:
        assert re.search(rf"premultiply-{side}: .*{reason}", log.declined[0])
    assert_equal_results(before, after, 2e-5)


# ---- models


def raised(name: str) -> tuple[Graph, str]:
    kind, *_ = name.split()
    model = tiny_model(kind, **MODELS[name])
    imported = import_hugging_face(model, dtype=None, max_tokens=96)
    return run_pipeline(imported.graph, (Canonicalize(), RaiseOps()))[-1].graph, kind


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    before, _ = raised(name)
    for premultiply in ("auto", True, False):
        (result,) = run_pipeline(before, [AbsorbMla(premultiply)], require_match=["absorb-mla"])
        assert result.declined == ()
        found = ops(result.graph)
        assert found["attention"] == found["expand"] == 0
        assert found["mla_attention"] == found["mla_latent"] == 2
        assert (found["head_linear"] == 4) == (result.matches["premultiply-query"] == 0)
        assert_equal_results(before, result.graph, 1e-4)
