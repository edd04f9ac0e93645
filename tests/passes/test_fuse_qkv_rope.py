"""fuse-qkv-rope: q, k and v from one product, with norms and RoPE."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ingot.compiler.ir import Graph, Node
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.validate import check_rewrite
from ingot.passes.fusion.fuse_norm_linear import FuseNormLinear
from ingot.passes.fusion.fuse_qkv_rope import FuseQkvRope
from pass_checks import applied, assert_equal_results, checked, graph_of, ops
from serving_checks import assert_same_logits, cached, traced

PASS = FuseQkvRope()
GRAPH = """
    graph @layer(%x: f32[T, 8], %positions: i32[T], %z: f32[T, 8]{params}) T=1..8 {{
      %c, %s = rope_tables(%positions, @inv, scale=1.0, dtype='f32')
      {lines}
      %o = {attention}
      return %o{more}
    }} where {{
      @inv: f32[2]
      @wq: f32[16, 8]
      @wk: f32[8, 8]
      @wv: f32[8, 8]
      @w1: f32[4, 8]
      @wide: f32[32, 8]
      @narrow: f32[12, 8]
      @groups: f32[48, 8]
      @bq: f32[16]
      @bk: f32[8]
      @b12: f32[12]
      @b32: f32[32]
      @g4: f32[4]
      @h4: f32[4]
      @g8: f32[8]
      @g16: f32[16]
      @sinks: f32[4]
      @codes: u8[8, 16]
      @codes2: u8[16, 16]
      @scales: u8[8, 1]
      @scales2: u8[16, 1]
    }}"""
Q = "%q = rope(%q3, %c, %s, form='half')"
K = "%k = rope(%k3, %c, %s, form='half')"
PLAIN = f"""
    %q1 = linear(%x, @wq)
    %q3 = view(%q1, shape=[T, 4, 4])
    {Q}
    %k1 = linear(%x, @wk)
    %k3 = view(%k1, shape=[T, 2, 4])
    {K}
    %v1 = linear(%x, @wv)
    %v = view(%v1, shape=[T, 2, 4])"""
ATTENTION = "attention(%q, %k, %v, scale=0.5)"
CACHED = """
    %ka, %va = kv_append(%kc, %vc, %k, %v, %slots, %positions, %pages)
    """
INDEX = "%slots: i32[T], %pages: i32[2, 2], %kc: f32[4, 4, 2, 4], %vc: f32[4, 4, 2, 4]"


def text(lines: str, attention: str = ATTENTION, more: str = "", params: str = "") -> str:
    return GRAPH.format(lines=lines, attention=attention, more=more, params=params)


def projected(graph: Graph) -> Node:
    (node,) = (n for n in graph.nodes() if n.op.name == "project_heads")
    return node


def test_plain(golden: Callable[[str], None]) -> None:
    golden(str(checked(PASS, text(PLAIN))))


def test_cached(golden: Callable[[str], None]) -> None:
    attention = "cached_attention(%q, %ka, %va, %slots, %positions, %pages, scale=0.5)"
    before = graph_of(text(PLAIN + CACHED, attention, ", %ka, %va", f", {INDEX}"))
    after, log = applied(PASS, before)
    assert log.matches == {"qkv": 1}
    check_rewrite(before, log.applied[0])
    golden(str(after))


def in_order(*lines: str) -> str:
    return "\n".join(lines)


# What is written -> what the one project_heads says beside heads and dims, and the ops that stay.
FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "biases, one missing": (
        PLAIN.replace("@wq)", "@wq, bias=@bq)").replace("@wk)", "@wk, bias=@bk)"),
        {"given": ("bias", "cos", "sin")},
    ),
    "no rope": (
        PLAIN.replace(Q, "").replace(K, "").replace("%q3", "%q").replace("%k3", "%k"),
        {"given": (), "rotate": None},
    ),
    "interleaved": (
        PLAIN.replace("form='half'", "form='interleaved'"),
        {"form": "interleaved"},
    ),
    "head norms": (
        PLAIN.replace("rope(%q3", "rope(%qn")
        .replace("rope(%k3", "rope(%kn")
        .replace(
            Q.replace("%q3", "%qn"),
            "%qn = rms_norm(%q3, weight=@g4, eps=0.1)\n" + Q.replace("%q3", "%qn"),
        )
        .replace(
            K.replace("%k3", "%kn"),
            "%kn = rms_norm(%k3, weight=@h4, eps=0.1)\n" + K.replace("%k3", "%kn"),
        ),
        {"given": ("norm_0", "norm_1", "cos", "sin"), "head_eps": 0.1, "norm_of": None},
    ),
    "a norm of q alone, without a weight": (
        PLAIN.replace(Q, "%qn = rms_norm(%q3, eps=0.1)\n" + Q.replace("%q3", "%qn")),
        {"given": ("norm_0", "cos", "sin")},
    ),
    "norms of whole parts": (
        PLAIN.replace("view(%q1", "view(%qn")
        .replace("view(%k1", "view(%kn")
        .replace("%q3 =", "%qn = rms_norm(%q1, weight=@g16, eps=0.1)\n%q3 =")
        .replace("%k3 =", "%kn = rms_norm(%k1, weight=@g8, eps=0.1)\n%k3 ="),
        {"norm_of": "part", "given": ("norm_0", "norm_1", "cos", "sin")},
    ),
    "norms after rope": (
        PLAIN.replace("%q = rope", "%qr = rope").replace("%k = rope", "%kr = rope")
        + "\n%q = rms_norm(%qr, weight=@g4, eps=0.1)\n%k = rms_norm(%kr, weight=@h4, eps=0.1)",
        {"norm_of": "rotated head", "given": ("norm_0", "norm_1", "cos", "sin")},
    ),
    "a norm of v": (
        PLAIN.replace("%v = view", "%v3 = view") + "\n%v = rms_norm(%v3, weight=@g4, eps=0.1)",
        {"given": ("norm_2", "cos", "sin"), "norm_of": None},
    ),
    "one key head, whose unit dim comes last": (
        in_order(
            "%q1 = linear(%x, @wq)\n%q3 = view(%q1, shape=[T, 4, 4])",
            "%qn = rms_norm(%q3, weight=@g4, eps=0.1)",
            Q.replace("%q3", "%qn"),
            "%k1 = linear(%x, @w1)\n%kn = rms_norm(%k1, weight=@h4, eps=0.1)",
            "%kr = rope(%kn, %c, %s, form='half')\n%k = view(%kr, shape=[T, 1, 4])",
            "%w = slice(@wv, dim=0, start=0, stop=4)\n%v1 = linear(%x, %w)",
            "%v = view(%v1, shape=[T, 1, 4])",
        ),
        {"heads": (4, 1, 1), "norm_of": None, "given": ("norm_0", "norm_1", "cos", "sin")},
    ),
    "whole parts normed, of which k is one head": (
        in_order(
            "%q1 = linear(%x, @wq)\n%qn = rms_norm(%q1, weight=@g16, eps=0.1)",
            "%q3 = view(%qn, shape=[T, 4, 4])",
            Q,
            "%k1 = linear(%x, @w1)\n%kn = rms_norm(%k1, weight=@h4, eps=0.1)",
            "%k = view(%kn, shape=[T, 1, 4])",
            "%w = slice(@wv, dim=0, start=0, stop=4)\n%v1 = linear(%x, %w)",
            "%v = view(%v1, shape=[T, 1, 4])",
        ),
        {"norm_of": "part", "rotate": (True, False, False)},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    lines, expected = FORMS[name]
    after = checked(PASS, text(lines))
    attrs = {"given": projected(after).given, **projected(after).attrs}
    assert {key: attrs.get(key) for key in expected} == expected
    assert attrs["dims"] == (4, 4, 4)
    rope_of_x = {"linear", "view", "rope", "rms_norm"} & ops(after).keys()
    assert not rope_of_x


def test_deinterleaved_from_a_dim_on() -> None:
    lines = PLAIN.replace("[T, 4, 4]", "[T, 2, 8]").replace("[T, 2, 4]", "[T, 1, 8]")
    lines = lines.replace("form='half'", "form='deinterleaved', start=3")
    attrs = projected(checked(PASS, text(lines))).attrs
    assert (attrs["form"], attrs["start"], attrs["dims"]) == ("deinterleaved", 3, (8, 8, 8))


# ---- fused projections

COLUMNS = (
    """
    %y = linear(%x, @wide{bias})
    %q1 = slice(%y, dim=1, start={0}, stop={1})
    %q3 = view(%q1, shape=[T, 4, 4])
    %k1 = slice(%y, dim=1, start={2}, stop={3})
    %k3 = view(%k1, shape=[T, 2, 4])
    %v1 = slice(%y, dim=1, start={4}, stop={5})
    %v = view(%v1, shape=[T, 2, 4])
    """
    + Q
    + "\n"
    + K
)


def columns(*bounds: int, bias: str = "") -> str:
    return COLUMNS.format(*bounds, bias=bias)


@pytest.mark.parametrize("bias", ["", ", bias=@b32"])
def test_a_fused_projection_keeps_its_weight(bias: str) -> None:
    after = checked(PASS, text(columns(0, 16, 16, 24, 24, 32, bias=bias)))
    node = projected(after)
    assert node.args[1].attrs["name"] == "wide"
    held = node.operand("bias")
    assert (held and held.attrs["name"]) == ("b32" if bias else None)
    assert ops(after) == {"rope_tables": 1, "project_heads": 1, "attention": 1}


@pytest.mark.parametrize("bias", ["", ", bias=@b32"])
def test_a_fused_projection_in_another_order(bias: str) -> None:
    after = checked(PASS, text(columns(16, 32, 0, 8, 8, 16, bias=bias)))
    slices = 2 * (2 if bias else 1)
    expected = {"rope_tables": 1, "project_heads": 1, "attention": 1}
    assert ops(after) == {**expected, "slice": slices, "cat": slices // 2}


GROUPS = (
    """
    %y = linear(%x, @groups)
    %g = view(%y, shape=[T, {0}])
    %q0 = slice(%g, dim={1}, start=0, stop={2})
    %q3 = view(%q0, shape=[T, {3}, 4])
    %k0 = slice(%g, dim={1}, start={2}, stop={4})
    %k3 = view(%k0, shape=[T, {5}, 4])
    %v0 = slice(%g, dim={1}, start={4}, stop={6})
    %v = view(%v0, shape=[T, {5}, 4])
    """
    + Q
    + "\n"
    + K
)


@pytest.mark.parametrize(
    "layout",
    [
        ("4, 12", 2, 4, 4, 8, 4, 12),  # q, k, v of each head together (GPT-NeoX)
        ("3, 4, 4", 2, 2, 6, 3, 3, 4),  # two q, one k, one v of each group (InternLM 2)
    ],
    ids=["heads", "groups"],
)
def test_projections_of_heads_together(layout: tuple[object, ...]) -> None:
    after = checked(PASS, text(GROUPS.format(*layout)))
    assert projected(after).attrs["heads"] == (layout[3], layout[5], layout[5])
    assert "linear" not in ops(after)


PACKED = """
    %x4 = cat(%x, %z, %x, %z, dim=1)
    %wq = mxfp4(@codes2, @scales2, dtype='f32')
    %wk = mxfp4(@codes, @scales, dtype='f32')
    """ + PLAIN.replace("%x,", "%x4,").replace("@wq", "%wq").replace("@wk", "%wk")


def test_packed_weights_stay_packed() -> None:
    """mxfp4 of q, k, v: codes with codes, scales with scales."""
    after, log = applied(PASS, graph_of(text(PACKED.replace("@wv", "%wk"))))
    assert log.matches == {"qkv": 1}
    weight = projected(after).args[1]
    assert weight.op.name == "mxfp4"
    assert [a.op.name for a in weight.node.args] == ["cat", "cat"]


def test_packed_rows_stay_packed() -> None:
    """q and k are columns of one packed product, with rows between them that nobody reads."""
    lines = PACKED.replace("%k1 = linear(%x4, %wk)\n", "").replace("%q1 =", "%y =")
    lines = lines.replace("view(%q1, shape=[T, 4, 4])", "view(%ya, shape=[T, 1, 4])")
    lines = lines.replace("view(%k1, shape=[T, 2, 4])", "view(%yb, shape=[T, 1, 4])").replace(
        "%q3 =",
        "%ya = slice(%y, dim=1, start=0, stop=4)\n%yb = slice(%y, dim=1, start=12, stop=16)\n%q3 =",
    )
    lines = lines.replace("linear(%x4, @wv)", "linear(%x4, %wk)")
    lines = lines.replace(
        "%v = view(%v1", "%v2 = slice(%v1, dim=1, start=2, stop=6)\n%v = view(%v2"
    )
    lines = lines.replace("view(%v2, shape=[T, 2, 4])", "view(%v2, shape=[T, 1, 4])")
    after, log = applied(PASS, graph_of(text(lines)))
    assert log.matches == {"qkv": 1}
    assert projected(after).args[1].op.name == "mxfp4"
    assert ops(after)["slice"] == 3 * 2  # of codes and scales


def test_declines_packed_and_plain_weights() -> None:
    plain = "%wz = cat(@wv, @wv, @wv, @wv, dim=1)\n" + PACKED.replace("@wv", "%wz")
    after, log = applied(PASS, graph_of(text(plain)))
    assert "weights in several formats are not one weight" in "\n".join(log.declined)
    assert log.matches == {"heads": 2}  # q and k, each for itself
    assert ops(after)["linear"] == 1


# ---- what comes before goes into the prologue


@pytest.mark.parametrize("shared", [False, True])
def test_with_a_norm_and_a_sum(shared: bool) -> None:
    """The sum that others use too is the last result."""
    before_heads = """
        %p = rms_norm(%z, weight=@g8, eps=0.2)
        %sum = add(%x, %p)
        %n = rms_norm(%sum, weight=@bk, eps=0.1)"""
    lines = before_heads + PLAIN.replace("linear(%x", "linear(%n")
    lines += "\n%other = tanh(%sum)" if shared else ""
    before = graph_of(text(lines, more=", %other" if shared else ""))
    after = run_pipeline(before, (PASS, FuseNormLinear()))[-1].graph
    assert_equal_results(before, after)
    assert projected(after).given == ("norm", "delta", "post_norm", "cos", "sin")
    assert {"rms_norm", "add", "linear"}.isdisjoint(ops(after))


# ---- one part alone

ALONE = """
    %q1 = linear(%x, @wq)
    %q3 = view(%q1, shape=[T, 2, 8])
    %q = rope(%q3, %c, %s, form='deinterleaved', start=4)
    %nope = slice(%q, dim=2, start=0, stop=4)
    %pe = slice(%q, dim=2, start=4, stop=8)
    %e = exp(%nope)"""


def test_the_query_of_latent_attention(golden: Callable[[str], None]) -> None:
    golden(str(checked(PASS, text(ALONE, "add(%e, %pe)"))))


def test_keys_that_another_layer_made() -> None:
    """The second attention has its own query over the first one's keys and values."""
    second = """
        %p = tanh(%z)
        %r1 = linear(%p, @wq)
        %r3 = view(%r1, shape=[T, 4, 4])
        %r = rope(%r3, %c, %s, form='half')
        %o2 = attention(%r, %k, %v, scale=0.5)"""
    before = graph_of(text(PLAIN + second, more=", %o2"))
    after, log = applied(PASS, before)
    assert log.matches == {"qkv": 1, "heads": 1}
    assert_equal_results(before, after)
    assert ops(after)["project_heads"] == 2


# ---- declines: nothing of q, k and v may change into something else

DECLINES: dict[str, tuple[str, str, str]] = {
    "clipped": (
        PLAIN.replace("%v = view(%v1", "%vc = clamp(%v1, min=-1.0, max=1.0)\n%v = view(%vc"),
        "",
        "clamp stands between v and its product",
    ),
    "scaled": (
        PLAIN.replace("%q = rope", "%qr = rope") + "\n%q = mul(%qr, f32(0.5))",
        "",
        "mul stands between q and its product",
    ),
    "layer_norm": (
        PLAIN.replace("%v = view", "%v3 = view") + "\n%v = layer_norm(%v3, weight=@g4, eps=0.1)",
        "",
        "layer_norm stands between v and its product",
    ),
    "another x": (PLAIN.replace("linear(%x, @wv)", "linear(%z, @wv)"), "", "v has a product of"),
    "a product that others use": (PLAIN, ", %v1", "linear inside the match is used outside"),
    "tables of another rope": (
        PLAIN.replace("rope(%k3, %c, %s", "rope(%k3, %s, %c"),
        "",
        "v has a product of its own",
    ),
    "normed twice": (
        PLAIN.replace("%v = view", "%v3 = view")
        + "\n%v4 = rms_norm(%v3, weight=@g4, eps=0.1)\n%v = rms_norm(%v4, weight=@g4, eps=0.1)",
        "",
        "normed or turned twice",
    ),
    "another eps": (
        PLAIN.replace("%v = view", "%v3 = view").replace("%q = rope", "%qr = rope")
        + "\n%v = rms_norm(%v3, weight=@g4, eps=0.1)\n%q = rms_norm(%qr, weight=@g4, eps=0.2)",
        "",
        "parts differ in",
    ),
    "forms": (
        PLAIN.replace(K, K.replace("half", "interleaved")),
        "",
        "parts differ in form: half, interleaved",
    ),
    "starts": (
        PLAIN.replace("view(%k1, shape=[T, 2, 4])", "view(%k1, shape=[T, 1, 8])")
        .replace(K, K.replace("'half'", "'half', start=2"))
        .replace("[T, 4, 4]", "[T, 2, 8]")
        .replace("%v = view(%v1, shape=[T, 2, 4])", "%v = view(%v1, shape=[T, 1, 8])"),
        "",
        "parts differ in start: 0, 2",
    ),
    "a norm over two heads": (
        PLAIN.replace("%v = view(%v1, shape=[T, 2, 4])", "%v2 = view(%v1, shape=[T, 2, 4])")
        .replace(
            "%q3 = view(%q1, shape=[T, 4, 4])",
            "%q2 = view(%q1, shape=[T, 2, 8])\n"
            "%qn = rms_norm(%q2, weight=@g8, eps=0.1)\n%q3 = view(%qn, shape=[T, 4, 4])",
        )
        .replace("%v2", "%v"),
        "",
        "a norm over 8 is neither over heads of 4 nor before RoPE",
    ),
    "heads chosen after rope": (
        PLAIN.replace("%q = rope", "%qr = rope") + "\n%q = slice(%qr, dim=1, start=0, stop=2)",
        "",
        "heads are chosen after their norm or RoPE",
    ),
    "one value for k and v": (
        PLAIN.replace("%v1 = linear(%x, @wv)\n", "").replace("%v = view(%v1", "%v = view(%k1"),
        "",
        "parts share rows of a product",
    ),
}


@pytest.mark.parametrize("name", DECLINES)
def test_declines(name: str) -> None:
    lines, more, reason = DECLINES[name]
    before = graph_of(text(lines, more=more))
    after, log = applied(PASS, before)
    assert log.matches["qkv"] == 0
    assert reason in "\n".join(log.declined)
    assert_equal_results(before, after)


def test_tables_that_depend_on_a_value_would_wait_for_themselves() -> None:
    """cos is made of v: one product of q and v would need its own result."""
    q, k = (part.replace("%c,", "%cv,") for part in (Q, K))
    lines = (
        PLAIN.replace(Q, "").replace(K, "")
        + f"""
        %vt = view(%v, shape=[T, 8])
        %cv = slice(%vt, dim=1, start=0, stop=2)
        {q}
        {k}"""
    )
    before = graph_of(text(lines))
    after, log = applied(PASS, before)
    assert log.matches["qkv"] == 0
    assert "an input of the match depends on one of its results" in "\n".join(log.declined)
    assert_equal_results(before, after)


def test_a_weight_that_is_a_parameter_is_no_weight() -> None:
    lines = PLAIN.replace("linear(%x, @wv)", "linear(%x, %w)")
    after, log = applied(PASS, graph_of(text(lines, params=", %w: f32[8, 8]")))
    assert ops(after)["linear"] == 1
    assert "v has a product of its own" in "\n".join(log.declined)


# ---- traced models

PER_LAYER = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "gemma2", "gemma3_text", "smollm3"),
    *("cohere2", "granite", "glm4", "ernie4_5_moe", "glm4_moe", "qwen3_moe", "mixtral", "gpt_oss"),
    *("dots1", "olmoe"),
)
LATENT = ("deepseek_v2", "deepseek_v3", "minicpm3")
SAID = {
    "llama": {"rotate": (True, True, False), "form": "half"},
    "qwen2": {"given": ("bias", "cos", "sin")},
    "qwen3": {"given": ("norm_0", "norm_1", "cos", "sin")},
    "olmo2": {"norm_of": "part"},
    "olmoe": {"norm_of": "part"},
    "gemma3_text": {"given": ("norm_0", "norm_1", "cos", "sin")},
    "cohere2": {"form": "interleaved"},
    "ernie4_5_moe": {"form": "interleaved"},
    "gpt_oss": {"given": ("bias", "cos", "sin")},
}


@pytest.mark.parametrize("name", [*PER_LAYER, *LATENT])
def test_traced(name: str) -> None:
    plain, weights = traced(name)
    for before in (plain, cached(plain)):
        result = run_pipeline(before, (PASS,))[-1]
        assert result.matches == ({"heads": 2} if name in LATENT else {"qkv": 2})
        first = next(n for n in result.graph.nodes() if n.op.name == "project_heads")
        expected = SAID.get(name, {})
        said = {"given": first.given, **first.attrs}
        assert {key: said.get(key) for key in expected} == expected
        left = ops(result.graph)
        assert left["rope"] == (2 if name in LATENT else 0)  # k_pe of latent attention
        assert_same_logits(before, result.graph, weights)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "olmo2"])
def test_traced_with_one_key_head(name: str) -> None:
    """A unit dim is dropped: norm and RoPE of k are over [T, D]."""
    before, weights = traced(name, num_key_value_heads=1)
    result = run_pipeline(cached(before), (PASS,))[-1]
    assert result.matches == {"qkv": 2}
    assert_same_logits(cached(before), result.graph, weights)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gpt_oss"])
def test_traced_in_bf16(name: str) -> None:
    """Every rewritten region against what it replaces."""
    before, _ = traced(name, "bf16")
    result = run_pipeline(cached(before), (PASS,), check=check_rewrite)[-1]
    assert result.matches == {"qkv": 2}
