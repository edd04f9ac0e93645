"""shard-tensor-parallel: N ranks together compute what one rank computes, with few collectives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ingot.codegen.constants import evaluate_constant
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import PassContext, run_pipeline
from ingot.compiler.ranks import interpret_ranks
from ingot.compiler.rewrite import Log
from ingot.compiler.verify import verify
from ingot.compiler.weights import Weights
from ingot.frontends.importers.huggingface import HuggingFaceModel, import_hugging_face
from ingot.passes.raising.canonicalize import Canonicalize
from ingot.passes.raising.raise_ops import RaiseOps
from ingot.passes.serving.gather_logits import GatherLogits
from ingot.passes.serving.insert_kv_cache import InsertKvCache
from ingot.passes.transforms.mxfp4_policy import MXFP4
from ingot.passes.transforms.quantize_mxfp4 import QuantizeMxfp4
from ingot.passes.transforms.shard_tensor_parallel import CannotShard, ShardTensorParallel
from pass_checks import body, graph_of, ops, random_inputs, random_weights
from tiny_models import tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")


def sharded(graph: Graph, ranks: int) -> tuple[list[Graph], Log]:
    """The graph of each rank, verified, and what the first of them reported."""
    logs = [Log() for _ in range(ranks)]
    graphs = [
        ShardTensorParallel(ranks, rank)(graph, PassContext(log=log))
        for rank, log in enumerate(logs)
    ]
    for after in graphs:
        verify(after)
    assert all(log.counts == logs[0].counts for log in logs)
    return graphs, logs[0]


def assert_ranks_agree(
    before: Graph,
    graphs: list[Graph],
    weights: Weights | None = None,
    tolerance: float = 1e-5,
    high: int = 8,
) -> None:
    """All ranks give the same bits, and those are what one rank gives."""
    weights = weights or random_weights(before)
    for seed, size in enumerate((1, 3, 8)):
        inputs = random_inputs(before, dict.fromkeys(before.symbols, size), seed, high)
        expected = interpret(before, inputs, weights).outputs
        results = [r.outputs for r in interpret_ranks(graphs, inputs, weights)]
        for i, value in enumerate(expected):
            assert all(torch.equal(found[i], results[0][i]) for found in results)
            torch.testing.assert_close(
                results[0][i], value, rtol=0, atol=tolerance * float(value.abs().max())
            )


def checked(text: str, ranks: int, tolerance: float = 1e-5, high: int = 8) -> tuple[Graph, Log]:
    """The last rank's graph of `text`, after all ranks together gave what one gives."""
    before = graph_of(text)
    graphs, log = sharded(before, ranks)
    assert_ranks_agree(before, graphs, tolerance=tolerance, high=high)
    return graphs[-1], log


# ---- the text of one layer

LAYER = """graph @layer(%x: f32[T, 16], %positions: i32[T]) T=1..64 {
  %n = rms_norm(%x, weight=@norm, eps=1e-05)
  %q = linear(%n, @wq)
  %qh = view(%q, shape=[T, 4, 4])
  %cos, %sin = rope_tables(%positions, @inv_freq, scale=1.0, dtype='f32')
  %qr = rope(%qh, %cos, %sin, form='half')
  %k = linear(%n, @wk)
  %kh = view(%k, shape=[T, 2, 4])
  %kr = rope(%kh, %cos, %sin, form='half')
  %v = linear(%n, @wv)
  %vh = view(%v, shape=[T, 2, 4])
  %a = attention(%qr, %kr, %vh, scale=0.5)
  %f = view(%a, shape=[T, 16])
  %o = linear(%f, @wo)
  %h = add(%x, %o)
  %m = rms_norm(%h, weight=@post, eps=1e-05)
  %g = linear(%m, @gate)
  %u = linear(%m, @up)
  %s = glu(%g, %u, activation='silu')
  %d = linear(%s, @down)
  %y = add(%h, %d)
  return %y
} where {
  @norm: f32[16]
  @post: f32[16]
  @inv_freq: f32[2]
  @wq: f32[16, 16]
  @wk: f32[8, 16]
  @wv: f32[8, 16]
  @wo: f32[16, 16]
  @gate: f32[24, 16]
  @up: f32[24, 16]
  @down: f32[16, 24]
}"""


def test_llama_layer(golden: Callable[[str], None]) -> None:
    after, log = checked(LAYER, 2)
    assert log.matches == {"column-parallel": 5, "row-parallel": 2, "all-reduce": 2}
    assert not log.declined
    golden(str(after))


def test_four_ranks_of_two_key_value_heads() -> None:
    """Two ranks need the same key/value head: both have it."""
    before = graph_of(LAYER)
    graphs, _ = sharded(before, 4)
    assert_ranks_agree(before, graphs)
    heads = [next(n for n in g.nodes() if n.op.name == "attention").args[1].type for g in graphs]
    assert {t.shape[1] for t in heads} == {1}
    rows = [[line for line in body(g) if "@wk" in line] for g in graphs]
    assert rows[0] == rows[1] != rows[2] == rows[3]


# ---- every architecture

MODELS = (
    *("llama", "qwen2", "phi3", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss"),
    *("deepseek_v3", "deepseek_v2", "glm4_moe", "olmo2", "cohere2", "granite"),
)


def imported(name: str, **overrides: object) -> tuple[Graph, HuggingFaceModel]:
    model = import_hugging_face(tiny_model(name, **overrides), dtype=None, max_tokens=64)
    return run_pipeline(model.graph, (Canonicalize(), RaiseOps()))[-1].graph, model


def held_bytes(graph: Graph) -> int:
    """Bytes of the weights, folded, that something computes with."""
    used = {a for n in graph.nodes() if not n.is_constant for a in n.args if a.node.is_constant}
    return sum(v.type.nbytes for v in used)


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    before, model = imported(name)
    for ranks in (2, 4):
        graphs, log = sharded(before, ranks)
        assert_ranks_agree(before, graphs, model.weights, tolerance=1e-4, high=128)
        # One after the embedding, then two a layer, and the logits are gathered once.
        assert ops(graphs[0])["all_reduce"] == log.matches["all-reduce"] == 1 + 2 * 2
        assert ops(graphs[0])["all_gather"] == 1
        # Norms, routers, latents and key/value heads are on several ranks, the rest on one.
        whole, most = held_bytes(before), max(map(held_bytes, graphs))
        shared = {"olmo2": 1.3, "deepseek_v3": 1.35, "deepseek_v2": 1.35}.get(name, 1.15)
        assert most * ranks < shared * whole if ranks == 2 else most * ranks < 1.5 * shared * whole


def test_vocabulary_that_does_not_divide() -> None:
    """The last rank's part is padded, once for a table that is embedding and head."""
    for tied in (False, True):
        before, model = imported("llama", vocab_size=129, tie_word_embeddings=tied)
        graphs, _ = sharded(before, 4)
        assert_ranks_agree(before, graphs, model.weights, tolerance=1e-4, high=129)
        parts = {
            a: evaluate_constant(a, model.weights)
            for n in graphs[3].nodes()
            for a in n.args
            if n.op.name in ("embedding", "linear") and a.type.shape == (33, 64)
        }
        assert len(parts) == (1 if tied else 2)
        for part in parts.values():
            assert part[:30].any(1).all() and not part[30:].any()


# ---- what is not split


def test_norm_over_all_heads_keeps_its_products() -> None:
    before, model = imported("olmo2")
    graphs, log = sharded(before, 2)
    assert len(log.declined) == 4  # q and k of two layers
    assert all("rms_norm needs all of it" in reason for reason in log.declined)
    assert_ranks_agree(before, graphs, model.weights, tolerance=1e-4, high=128)


REFUSED = {
    "heads": (LAYER, 3, r"linear at .*: 16 inputs \(4 · 4\) do not divide over 3 ranks"),
    "more ranks than heads": (
        LAYER,
        8,
        r"view at .*: .* are cut in parts of .*: it does not divide over 8 ranks",
    ),
    "key/value heads": (
        LAYER.replace("[T, 4, 4]", "[T, 6, 4]").replace("[T, 2, 4]", "[T, 3, 4]")
        .replace("[T, 16])\n  %o", "[T, 24])\n  %o").replace("@wq: f32[16", "@wq: f32[24")
        .replace("@wk: f32[8", "@wk: f32[12").replace("@wv: f32[8", "@wv: f32[12")
        .replace("@wo: f32[16, 16", "@wo: f32[16, 24"),
        2,
        r"attention at .*: 3 blocks of 2 are cut in parts of 3",
    ),
    "intermediate": (
        LAYER.replace("24", "30"),
        4,
        r"linear at .*: 30 inputs do not divide over 4 ranks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_divide_is_refused_on_every_rank(case: str) -> None:
    text, ranks, message = REFUSED[case]
    for rank in range(ranks):
        with pytest.raises(CannotShard, match=message):
            ShardTensorParallel(ranks, rank)(graph_of(text), PassContext())


def test_one_rank_is_the_graph() -> None:
    graph = graph_of(LAYER)
    assert ShardTensorParallel(1, 0)(graph, PassContext()) is graph


def test_options() -> None:
    with pytest.raises(ValueError, match="expected a rank below 2, found 2"):
        ShardTensorParallel(2, 2)
    before, _ = imported("llama")
    cached = InsertKvCache(2, 64, 16)(before, PassContext())
    with pytest.raises(ValueError, match="without state"):
        ShardTensorParallel(2, 0)(cached, PassContext())


# ---- sums

MLP = """graph @mlp(%x: f32[T, 16]) T=1..8 {{
  %h = linear(%x, @up, bias=@up_bias)
  %a = silu(%h)
  %d = linear(%a, @down, bias=@down_bias)
  {tail}
}} where {{
  @up: f32[64, 16]
  @up_bias: f32[64]
  @down: f32[16, 64]
  @down_bias: f32[16]
  @norm: f32[16]
  @more: f32[8, 16]
}}"""


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bias_is_added_once(ranks: int) -> None:
    after, _ = checked(MLP.format(tail="return %d"), ranks)
    assert ops(after)["all_reduce"] == 1
    assert "@down_bias" not in str(after) and "@up_bias" in str(after)


def test_sums_are_added_before_they_are_exchanged() -> None:
    """all_reduce(x) + all_reduce(y) == all_reduce(x + y); scaling by what is whole goes along."""
    tail = """%s = mul(%d, f32(0.5))
    %g = linear(%x, @down2)
    %b = silu(%g)
    %e = linear(%b, @down3)
    %y = add(%s, %e)
    return %y"""
    text = MLP.format(tail=tail).replace(
        "@norm", "@down2: f32[32, 16]\n  @down3: f32[16, 32]\n  @norm"
    )
    after, log = checked(text, 2)
    assert log.matches["all-reduce"] == 1 and "all_reduce" in body(after)[-2]


def test_sum_that_others_need_whole_is_exchanged_where_it_is_made() -> None:
    tail = """%n = rms_norm(%d, weight=@norm, eps=1e-05)
    %s = mul(%d, f32(0.5))
    %y = add(%n, %s)
    return %y"""
    after, _ = checked(MLP.format(tail=tail), 2)
    assert ops(after)["all_reduce"] == 1


def test_product_of_a_sum_is_split_again() -> None:
    """Without a norm between: the third product is column-parallel, its result is gathered."""
    tail = """%z = linear(%d, @more)
    %t = tanh(%z)
    return %t"""
    after, _ = checked(MLP.format(tail=tail), 2, tolerance=1e-4)
    assert (ops(after)["all_reduce"], ops(after)["all_gather"]) == (1, 1)


# ---- experts

MOE = """graph @moe(%x: f32[T, 64]) T=1..8 {{
  %l = linear(%x, @router)
  %w, %i = router(%l, k=2, score='softmax', normalize=True, dtype='f32')
  {weights}
  %y = experts(%x, %w, %i, %g, %d, gate_up_bias=@gb, down_bias=@db, \
activation='clamped_swiglu', alpha=1.7, limit=7.0)
  return %y
}} where {{
  @router: f32[{experts}, 64]
  @gb: f32[{experts}, {rows}]
  @db: f32[{experts}, 64]
  {constants}
}}"""


def moe_text(experts: int, hidden: int, group: int | None) -> str:
    """Experts with plain weights, or with packed ones in groups of `group` along K."""
    rows = 2 * hidden
    if group is None:
        weights = "%g = cast(@g, dtype='f32')\n  %d = permute(@dt, dims=[0, 2, 1])"
        constants = f"@g: f32[{experts}, {rows}, 64]\n  @dt: f32[{experts}, {hidden}, 64]"
    else:
        weights = "%g = mxfp4(@gc, @gs, dtype='f32')\n  %d = mxfp4(@dc, @ds, dtype='f32')"
        constants = f"""@gc: u8[{experts}, {rows}, 32]
  @gs: u8[{experts}, {rows}, {64 // group}]
  @dc: u8[{experts}, 64, {hidden // 2}]
  @ds: u8[{experts}, 64, {hidden // group}]"""
    return MOE.format(experts=experts, rows=rows, weights=weights, constants=constants)


@pytest.mark.parametrize(
    ("experts", "hidden", "group", "ranks", "layout"),
    [
        (8, 96, None, 2, "intermediate"),
        (8, 96, None, 4, "intermediate"),
        (6, 96, 16, 2, "intermediate"),
        (8, 96, 32, 2, "expert"),  # 48 units of a rank are no whole groups of 32
        (8, 30, None, 4, "expert"),
    ],
)
def test_experts(experts: int, hidden: int, group: int | None, ranks: int, layout: str) -> None:
    after, log = checked(moe_text(experts, hidden, group), ranks, tolerance=1e-4)
    assert log.counts == {f"experts-by-{layout}": 1, "all-reduce": 1}
    (node,) = [n for n in after.nodes() if n.op.name == "experts"]
    expected = (experts, 2 * hidden // ranks) if layout == "intermediate" else (experts // ranks,)
    assert node.args[3].type.shape[: len(expected)] == expected
    if group:  # still packed: kernels match the packed form
        assert [a.op.name for a in node.args[3:5]] == ["mxfp4", "mxfp4"]


def test_experts_that_do_not_divide() -> None:
    with pytest.raises(CannotShard, match="neither 30 hidden units nor 6 experts divide over 4"):
        sharded(graph_of(moe_text(6, 30, None)), 4)


def test_packed_experts_without_a_whole_cut_stay() -> None:
    after, log = checked(moe_text(7, 96, 32), 2, tolerance=1e-4)
    assert any("3 blocks of 32 are cut in parts of 48" in r for r in log.declined)
    assert ops(after)["all_reduce"] == 0


# ---- packed weights

PACKED = """graph @mlp(%x: f32[T, 64]) T=1..8 {
  %up = mxfp4(@uc, @us, dtype='f32')
  %h = linear(%x, %up)
  %a = silu(%h)
  %down = mxfp4(@dc, @ds, dtype='f32')
  %d = linear(%a, %down)
  return %d
} where {
  @uc: u8[96, 32]
  @us: u8[96, 2]
  @dc: u8[64, 48]
  @ds: u8[64, 3]
}"""


def test_packed_weights_are_cut_packed() -> None:
    after, log = checked(PACKED, 3, tolerance=1e-4)
    assert log.matches == {"column-parallel": 1, "row-parallel": 1, "all-reduce": 1}
    lines = body(after)
    assert "%2 = mxfp4(%0, %1, dtype='f32')" in lines
    assert "%0 = slice(@uc, dim=0, start=64, stop=96)" in lines
    assert any("slice(@dc, dim=1, start=32, stop=48)" in line for line in lines)
    assert any("slice(@ds, dim=1, start=2, stop=3)" in line for line in lines)


def test_packed_weight_that_has_no_boundary_there_stays() -> None:
    after, log = checked(PACKED, 2, tolerance=1e-4)
    assert any("3 blocks of 32 are cut in parts of 48" in r for r in log.declined)
    assert ops(after)["all_reduce"] == 0


def test_sum_keeps_a_packed_weight_that_cannot_be_cut() -> None:
    """What other ranks must have whole is computed on each: no collective comes in its place."""
    text = PACKED.replace(
        "return %d", "%y = add(%x, %d)\n  %n = rms_norm(%y, eps=1e-5)\n  return %n"
    )
    after, log = checked(text, 2, tolerance=1e-4)
    assert not log.matches and len(log.declined) == 2
    assert not {"all_reduce", "all_gather"} & ops(after).keys()


# ---- with the passes that follow


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_shares_are_packed_as_the_whole_is(name: str) -> None:
    """Where groups lie within shares; the product that gives the logits is kept on ranks too."""
    sizes = {"intermediate_size": 128, "moe_intermediate_size": 64}
    sizes = {k: v for k, v in sizes.items() if hasattr(tiny_config(name), k)}
    before, model = imported(name, **sizes)
    pack = QuantizeMxfp4(MXFP4())
    graphs = [
        run_pipeline(before, (ShardTensorParallel(2, rank), pack))[-1].graph for rank in range(2)
    ]
    whole = run_pipeline(before, (pack,))[-1].graph
    assert ops(whole)["mxfp4"] == ops(graphs[0])["mxfp4"] > 10
    assert_ranks_agree(whole, graphs, model.weights, tolerance=1e-4, high=128)


def test_end_of_the_network_runs_for_wanted_rows_alone() -> None:
    before, _ = imported("deepseek_v3")
    steps = (ShardTensorParallel(2, 1), InsertKvCache(2, 64, 16), GatherLogits())
    final = run_pipeline(before, steps)[-1].graph
    gathered = next(n for n in final.nodes() if n.op.name == "all_gather")
    assert str(gathered.types[0].shape[0]) == "L"
    assert [str(n.types[0].shape[0]) for n in final.nodes() if n.op.name == "all_reduce"] == [
        *("T", "T", "T", "T", "L"),
    ]
    caches = [p.type.shape for p in final.params if "cache" in p.attrs["name"]]
    assert {s[2] for s in caches} == {2}  # heads of one rank
