"""fuse-mla-projections: one product for what reads the hidden values, and what stays apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import pytest
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import PassContext, run_pipeline
from ingot.compiler.rewrite import Log
from ingot.compiler.validate import check_rewrite
from ingot.compiler.verify import verify
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.passes.fusion.fuse_mla_projections import FuseMlaProjections
from ingot.passes.raising.canonicalize import Canonicalize
from ingot.passes.raising.raise_ops import RaiseOps
from ingot.passes.serving.insert_kv_cache import InsertKvCache
from ingot.passes.transforms.absorb_mla import AbsorbMla
from ingot.passes.transforms.mxfp4_policy import MXFP4
from ingot.passes.transforms.quantize_mxfp4 import QuantizeMxfp4
from mla_graphs import LATENT, MODELS, OUTPUT, QUERY, mla_text
from pass_checks import applied, assert_equal_results, graph_of, ops
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

PASS = FuseMlaProjections()
APART = """
    %low = linear(%x, @w_dc)
    %c_kv = rms_norm(%low, weight=@kv_norm, eps=1e-05)
    %pe = linear(%x, @w_kr)
    %k_pe = rope(%pe, %c, %s, form='deinterleaved')
"""


@cache
def absorbed(text: str, premultiply: bool = False) -> Graph:
    graph, log = applied(AbsorbMla(premultiply), graph_of(text))
    assert log.matches["absorb-mla"] == 1
    return graph


# Text of the attention, how many products become one, and how many are left of all.
FUSES: dict[str, tuple[str, int, int]] = {
    "as traced": (mla_text(), 2, 3),
    "three products": (mla_text(latent=APART), 3, 3),
    "biases of some": (mla_text(latent=LATENT.replace("@w_dkv", "@w_dkv, bias=@b_dkv")), 2, 3),
    "biases of all": (
        mla_text(
            query=QUERY.replace("@w_dq", "@w_dq, bias=@b_dq"),
            latent=LATENT.replace("@w_dkv", "@w_dkv, bias=@b_dkv"),
        ),
        2,
        3,
    ),
    "a scaled latent": (
        mla_text(latent=LATENT.replace("%c_kv =", "%c_n =") + "%c_kv = mul(%c_n, f32(1.5))"),
        2,
        3,
    ),
    "no low rank of the query": (
        mla_text(query="%qp = linear(%x, @w_q)\n" + QUERY[QUERY.index("%qh") :]),
        2,
        2,
    ),
    "results used elsewhere": (mla_text(results="%y, %kv, %ql"), 2, 3),
    "another product of the hidden values": (
        mla_text(output=OUTPUT + "%g = linear(%x, @w_dq)\n", results="%y, %g"),
        2,
        3,
    ),
}


@pytest.mark.parametrize("premultiply", [False, True])
@pytest.mark.parametrize("form", FUSES)
def test_fuses(form: str, premultiply: bool) -> None:
    text, count, left = FUSES[form]
    before = absorbed(text, premultiply)
    after, log = applied(PASS, before)
    assert log.matches == {"fuse-mla-projections": 1}
    assert not log.declined
    (rewrite,) = log.applied
    assert len(rewrite.before) == count
    assert ops(after)["linear"] == left
    assert ops(after)["linear"] < ops(before)["linear"] or "another" in form
    assert_equal_results(before, after)
    check_rewrite(after, rewrite)


def test_text(golden: Callable[[str], None]) -> None:
    before = absorbed(mla_text(latent=LATENT.replace("@w_dkv", "@w_dkv, bias=@b_dkv")))
    golden(str(applied(PASS, before)[0]))


def test_packed_weights_are_joined_packed() -> None:
    text = """
        graph @g(%x: f32[T, 32], %q: f32[T, 2, 4], %positions: i32[T]) T=1..8 {
          %d1, %d2 = mxfp4_encode(@w_dq, group=16, scale='mse')
          %d = mxfp4(%d1, %d2, dtype='f32')
          %e1, %e2 = mxfp4_encode(@w_dkv, group=KV, scale='mse')
          %e = mxfp4(%e1, %e2, dtype='f32')
          %ql = linear(%x, %d)
          %qn = rms_norm(%ql, weight=@q_norm, eps=1e-06)
          %qp = linear(%qn, @w_uq)
          %qh = view(%qp, shape=[T, 2, 7])
          %q_latent = slice(%qh, dim=2, start=0, stop=4)
          %q_pe = slice(%qh, dim=2, start=4, stop=7)
          %kv = linear(%x, %e)
          %o = mla_attention(%q_latent, %q_pe, %kv, scale=0.3)
          return %o
        } where {
          @w_dq: f32[8, 32]
          @w_dkv: f32[7, 32]
          @q_norm: f32[8]
          @w_uq: f32[14, 8]
        }"""
    before = graph_of(text.replace("KV", "16"))
    after, _ = applied(PASS, before)
    (product,) = [n for n in after.nodes() if n.op.name == "linear" and n.types[0].shape[1] == 15]
    assert product.args[1].op.name == "mxfp4"
    assert_equal_results(before, after)
    log = Log()
    mixed = graph_of(text.replace("KV", "32"))
    assert PASS(mixed, PassContext(log=log)) is mixed
    assert "weights in several formats are not one weight: mxfp4g16, mxfp4g32" in log.declined[0]


STAYS: dict[str, tuple[str, str]] = {
    "a query of other values": (
        mla_text(query="%z = tanh(%x)" + QUERY.replace("(%x, @w_dq", "(%z, @w_dq")),
        "tanh lies between a product and the attention",
    ),
    "a latent of other values": (
        mla_text(latent="%z = tanh(%x)" + APART.replace("(%x, @w_kr", "(%z, @w_kr")),
        "the latent is made of products of different values",
    ),
    "one product already": (
        mla_text(
            query=QUERY.replace(
                "%ql = linear(%x, @w_dq)",
                "%all = linear(%x, @w_all)\n%ql = slice(%all, dim=1, start=11, stop=19)",
            ),
            latent=LATENT.replace("%kv = linear(%x, @w_dkv)\n", "").replace("%kv", "%all"),
        ).replace("@w_o1:", "@w_all: f32[19, 12]\n@w_o1:"),
        "the projections are one product already",
    ),
}


@pytest.mark.parametrize("kind", STAYS)
def test_declines(kind: str) -> None:
    text, reason = STAYS[kind]
    before = absorbed(text)
    log = Log()
    assert PASS(before, PassContext(log=log)) is before
    (declined,) = log.declined
    assert re.search(f"fuse-mla-projections: mla_attention: {reason}", declined)


def test_graphs_without_latent_attention_are_left_alone() -> None:
    text = "graph @g(%x: f32[T, 4]) T=1..8 {\n%y = linear(%x, @w)\nreturn %y\n"
    graph = graph_of(text + "} where {\n@w: f32[4, 4]\n}")
    log = Log()
    assert PASS(graph, PassContext(log=log)) is graph
    assert not log.declined


@pytest.mark.parametrize("name", [n for n in MODELS if "glm4" not in n and "minicpm" not in n])
def test_models(name: str) -> None:
    model = tiny_model(name.split()[0], **MODELS[name])
    imported = import_hugging_face(model, dtype=None, max_tokens=96)
    passes = (Canonicalize(), RaiseOps(), AbsorbMla())
    before = run_pipeline(imported.graph, passes)[-1].graph
    after, log = applied(PASS, before)
    assert log.matches == {"fuse-mla-projections": 2}
    assert not log.declined
    assert ops(before)["linear"] - ops(after)["linear"] == 2
    assert_equal_results(before, after, 1e-5)


def test_after_the_cache_is_in(golden: Callable[[str], None]) -> None:
    cached = InsertKvCache(3, 24, page_size=4)(absorbed(mla_text(latent=APART)), PassContext())
    log = Log()
    after = PASS(cached, PassContext(log=log))
    verify(after)
    assert log.matches == {"fuse-mla-projections": 1}
    golden(str(after))


def test_quantized_models_stay_packed() -> None:
    imported = import_hugging_face(tiny_model("deepseek_v3"), dtype=None, max_tokens=96)
    passes = (
        *(Canonicalize(), RaiseOps(), AbsorbMla(premultiply=False)),
        QuantizeMxfp4(MXFP4(group=16, also=("*.q_a_proj.*",))),
    )
    before = run_pipeline(imported.graph, passes)[-1].graph
    after, log = applied(PASS, before)
    assert log.matches == {"fuse-mla-projections": 2}
    heads = [n.args[1].op.name for n in after.nodes() if n.op.name == "head_linear"]
    assert heads == ["mxfp4"] * 4
    weights = [n.args[1] for n in after.nodes() if n.op.name == "linear"]
    joined = [w for w in weights if w.op.name == "mxfp4" and w.node.args[0].op.name == "cat"]
    assert [w.type.shape for w in joined] == [(24 + 40, 64)] * 2
    assert_equal_results(before, after, 1e-5, sizes=(3,))
