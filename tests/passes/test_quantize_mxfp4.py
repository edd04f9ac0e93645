"""quantize-mxfp4: which weights are packed, what stands for them, and what is reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ingot
import pytest
import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.microscaling import decode, encode
from ingot.compiler.ops.leaf import literal
from ingot.compiler.ops.mxfp4 import mxfp4, mxfp4_encode
from ingot.compiler.ops.pointwise import add
from ingot.compiler.pipeline import PassError
from ingot.compiler.types import VerifyError
from ingot.compiler.validate import check_rewrite
from ingot.compiler.weights import Weights
from ingot.passes.transforms.mxfp4_policy import MXFP4, find_sites
from ingot.passes.transforms.quantize_mxfp4 import QuantizeMxfp4
from pass_checks import applied, graph_of, ops, random_inputs, random_weights
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

# A layer of experts and the head that follows it.
MODEL = """
graph @model(%tokens: i32[T], %x: f32[T, 64]) T=1..64 {
  %0 = embedding(%tokens, @embed)
  %1 = add(%0, %x)
  %2 = linear(%1, @router)
  %3, %4 = router(%2, k=2, score='softmax', normalize=True, dtype='f32')
  %5 = experts(%1, %3, %4, @gate_up, @down, activation='silu')
  %6 = linear(%5, @proj, bias=@bias)
  %7 = linear(%6, @odd)
  %8 = linear(%6, @proj2)
  %9 = linear(%6, @gate)
  %10 = sigmoid(%9)
  %11 = mul(%8, %10)
  %12 = linear(%11, @head)
  %13 = cast(%12, dtype='f64')
  return %13, %7
} where {
  @bias: f32[48]
  @down: f32[16, 64, 32]
  @embed: f32[100, 64]
  @gate: f32[1, 48]
  @gate_up: f32[16, 64, 64]
  @head: f32[100, 64]
  @odd: f32[32, 48]
  @proj: f32[48, 64]
  @proj2: f32[64, 48]
  @router: f32[16, 64]
}
"""


def actions(graph: Graph, **options: Any) -> dict[str, str]:
    return {site.name: site.action for site in find_sites(graph, MXFP4(**options))}


def test_text(golden: Any) -> None:
    graph, _ = applied(QuantizeMxfp4(), graph_of(MODEL))
    golden(str(graph))


def test_each_weight_is_judged_by_what_it_does() -> None:
    found = {s.name: (s.action, s.reason) for s in find_sites(graph_of(MODEL), MXFP4())}
    assert found == {
        "embed": ("keep", "rows are looked up"),
        "router": ("keep", "scores experts for the router"),
        "gate_up": ("quantize", "experts"),
        "down": ("quantize", "experts"),
        "proj": ("quantize", "a projection"),
        "odd": ("keep", "groups of 32 do not divide K = 48"),
        "proj2": ("keep", "groups of 32 do not divide K = 48"),
        "gate": ("keep", "groups of 32 do not divide K = 48"),
        "head": ("keep", "gives an output of the model"),
    }


def test_options() -> None:
    graph = graph_of(MODEL)
    sixteen = actions(graph, group=16)
    assert sixteen["proj2"] == "quantize"
    assert sixteen["odd"] == sixteen["gate"] == "keep"  # an output; one row
    chosen = actions(graph, keep=["*_up"], also=["head", "router"])
    assert (chosen["gate_up"], chosen["head"], chosen["router"]) == ("keep", "quantize", "quantize")
    assert chosen["embed"] == "keep"
    _, log = applied(QuantizeMxfp4(MXFP4(keep=("gate_up",))), graph)
    assert log.matches == {"mxfp4-experts": 1, "mxfp4-projection": 1}
    assert any("gate_up: matches keep='gate_up'" in line for line in log.declined)


def test_packed_weights_stay_as_they_are() -> None:
    once, _ = applied(QuantizeMxfp4(), graph_of(MODEL))
    again, log = applied(QuantizeMxfp4(MXFP4(scale="floor")), once)
    assert again is once and not log.matches
    assert {s.action for s in find_sites(once, MXFP4()) if s.weight.op.name == "mxfp4"} == {
        "packed"
    }


@pytest.mark.parametrize("options", [{}, {"scale": "even"}, {"group": 16}], ids=str)
def test_the_graph_computes_with_the_rounded_weights(options: dict[str, Any]) -> None:
    before = graph_of(MODEL)
    after, _ = applied(QuantizeMxfp4(MXFP4(**options)), before)
    weights = random_weights(before)
    packed = {s.name for s in find_sites(before, MXFP4(**options)) if s.action == "quantize"}
    group, scale = options.get("group", 32), options.get("scale", "mse")
    rounded = {
        name: decode(*encode(weights.load(name), group, scale), torch.float32)
        if name in packed
        else weights.load(name)
        for name in weights
    }
    assert packed >= {"proj", "gate_up", "down"}
    for size in (1, 7):
        inputs = random_inputs(before, {"T": size})
        expected = interpret(before, inputs, Weights.of(rounded)).outputs
        found = interpret(after, inputs, weights).outputs
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_costs_are_of_the_packed_form() -> None:
    before = graph_of(MODEL)
    after, _ = applied(QuantizeMxfp4(), before)
    saved = before.cost({"T": 1}).bytes - after.cost({"T": 1}).bytes
    elements = 48 * 64 + 2 * (64 * 64 + 64 * 32)  # proj, and two of sixteen experts
    assert saved == elements * (32 - 4.25) / 8
    assert before.cost({"T": 1}).flops == after.cost({"T": 1}).flops


def test_translation_validation_sees_a_wrong_scale() -> None:
    graph = graph_of(MODEL)
    _, log = applied(QuantizeMxfp4(), graph)
    assert log.applied
    for rewritten in log.applied:
        check_rewrite(graph, rewritten)
        (packed,) = rewritten.after
        codes, scales = packed.node.args
        more = add(scales, literal(value=1, dtype="u8"))
        wrong = mxfp4(codes, more, dtype="f32")
        with pytest.raises(VerifyError, match=f"rule {rewritten.rule} changes a result"):
            check_rewrite(graph, replace(rewritten, after=(wrong,)))


def test_nan_is_refused_by_name() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight: .*NaN"):
        ingot.compile(model, quantize="mxfp4", max_tokens_per_sequence=64, progress=False)


def test_packing_nothing_is_told() -> None:
    with pytest.raises(PassError, match=r"(?s)packed nothing:.*matches keep='\*'"):
        ingot.compile(
            tiny_model("llama"),
            quantize=MXFP4(keep=("*",)),
            max_tokens_per_sequence=64,
            progress=False,
        )


def test_wrong_options_are_refused() -> None:
    for wrong in ({"group": 64}, {"scale": "best"}, {"keep": "lm_head"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            MXFP4(**wrong)
    with pytest.raises(ValueError, match="quantize: expected 'mxfp4'"):
        ingot.compile(tiny_model("llama"), quantize="int4", progress=False)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_models(name: str) -> None:
    options = MXFP4(group=16)
    model = ingot.compile(
        tiny_model(name), quantize=options, max_tokens_per_sequence=64, progress=False
    )
    for weight in model.report.weights:
        assert (weight.error is not None) == (weight.format == "mxfp4g16")
        assert weight.error is None or 0.05 < weight.error < 0.15
        assert weight.bits == (4.5 if weight.error is not None else 32)
    packed = {w.name for w in model.report.weights if w.format == "mxfp4g16"}
    assert not any("mlp.gate.weight" in n or "router" in n or "lm_head" in n for n in packed)
    assert any("self_attn.o_proj" in n for n in packed) and any("mlp" in n for n in packed)
    assert len(model.generate([1, 2, 3], max_new_tokens=4).tokens) == 4


def test_pico(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "pico"
    model = ingot.compile(path, quantize="mxfp4", max_tokens_per_sequence=128, progress=False)
    packed = [w for w in model.report.weights if w.format == "mxfp4g32"]
    assert len(packed) == 5 * 6 + 3 + 4 * 5 and all(w.error < 0.12 for w in packed)
    assert ops(model.graph("final"))["mxfp4_encode"] == len(packed)
    assert any(n.op is mxfp4_encode for n in model.graph("final").constants())
    plain = ingot.compile(path, max_tokens_per_sequence=128, progress=False)
    assert plain.tokenizer is not None
    ids = plain.tokenizer.encode("class Stack:\n    def __init__(self):\n        self.items = []\n")
    ours, theirs = (torch.log_softmax(torch.tensor(m.logits(ids)), -1) for m in (model, plain))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert 0.001 < divergence < 0.3  # nats a token


def test_products_with_a_norm_inside_are_told() -> None:
    graph = graph_of(
        "graph @g(%x: f32[T, 64]) T=1..8 {\n"
        "%0 = linear(%x, @a)\n%1 = linear(%0, @b, norm=@n, eps=1e-06)\n"
        "%2 = linear(%1, @c)\n%3 = tanh(%2)\nreturn %3\n"
        "} where {\n@a: f32[64, 64]\n@b: f32[64, 64]\n@c: f32[32, 64]\n@n: f32[64]\n}"
    )
    _, log = applied(QuantizeMxfp4(MXFP4()), graph)
    assert "quantize-mxfp4: linear: it has a norm or a sum inside" in log.declined
