"""hadamard: the matrix, its identities, and the rotation of weights and activations."""

from __future__ import annotations

from typing import Any

import ingot
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ingot.compiler.microscaling import decode, encode
from ingot.compiler.ops.hadamard import hadamard
from ingot.compiler.ops.linear import linear
from ingot.compiler.validate import check_rewrite
from ingot.passes.serving.insert_kv_cache import InsertKvCache
from ingot.passes.transforms.mxfp4_policy import MXFP4, can_rotate, find_sites
from ingot.passes.transforms.quantize_mxfp4 import QuantizeMxfp4
from pass_checks import applied, assert_equal_results, graph_of, ops
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

ATTENTION = """
graph @layer(%tokens: i32[T], %positions: i32[T]) T=1..64 {
  %0 = embedding(%tokens, @embed)
  %1 = linear(%0, @q)
  %2 = linear(%0, @k)
  %3 = linear(%0, @v)
  %4 = view(%1, shape=[T, 2, 32])
  %5 = view(%2, shape=[T, 2, 32])
  %6 = view(%3, shape=[T, 2, 32])
  %7 = attention(%4, %5, %6, scale=0.2)
  %8 = view(%7, shape=[T, 64])
  %9 = linear(%8, @o)
  %10 = linear(%9, @router)
  %11, %12 = router(%10, k=2, score='softmax', normalize=True, dtype='f32')
  %13 = experts(%9, %11, %12, @gate_up, @down, activation='silu')
  %14 = linear(%13, @narrow)
  %15 = linear(%14, @head)
  return %15
} where {
  @down: f32[4, 64, 32]
  @embed: f32[100, 64]
  @gate_up: f32[4, 64, 64]
  @head: f32[100, 48]
  @k: f32[64, 64]
  @narrow: f32[48, 64]
  @o: f32[64, 64]
  @q: f32[64, 64]
  @router: f32[4, 64]
  @v: f32[64, 64]
}
"""


def matrix(block: int) -> torch.Tensor:
    """Sylvester's construction, in f64."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / block**0.5


def rotated(x: torch.Tensor, block: int = 32) -> torch.Tensor:
    return hadamard.reference(x, block=block)[0]


@given(st.integers(0, 6), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31))
def test_blocks_times_the_matrix(log: int, blocks: int, rows: int, seed: int) -> None:
    block = 2**log
    x = torch.randn(rows, blocks * block, generator=torch.Generator().manual_seed(seed)).double()
    expected = (x.view(rows, blocks, block) @ matrix(block)).view_as(x)
    torch.testing.assert_close(rotated(x, block), expected)
    torch.testing.assert_close(rotated(rotated(x, block), block), x)


def test_products_of_rotated_operands_are_the_products() -> None:
    x, w = torch.randn(5, 96).double(), torch.randn(7, 96).double()
    torch.testing.assert_close(rotated(x) @ rotated(w).T, x @ w.T)


def test_a_row_is_the_same_among_any_others() -> None:
    x = torch.randn(33, 64, dtype=torch.bfloat16)
    assert torch.equal(rotated(x)[7:8], rotated(x[7:8]))


def test_outliers_are_spread() -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    w[:, 5] *= 40

    def lost(w: torch.Tensor) -> float:
        return float((w - decode(*encode(w), torch.float32)).square().sum())

    assert lost(rotated(w)) < 0.8 * lost(w)


@pytest.mark.parametrize(
    ("type_", "block"), [("f32[4, 48]", 32), ("f32[4, 48]", 24), ("i32[4, 64]", 32), ("f32[]", 2)]
)
def test_what_it_refuses(type_: str, block: int) -> None:
    with pytest.raises(Exception, match="hadamard: expected"):
        graph_of(f"graph @g(%x: {type_}) {{\n %0 = hadamard(%x, block={block})\n return %0\n}}")


def test_text(golden: Any) -> None:
    graph, _ = applied(QuantizeMxfp4(MXFP4(hadamard=True)), graph_of(ATTENTION))
    golden(str(graph))


def test_one_rotation_for_each_activation() -> None:
    options = MXFP4(hadamard=True)
    before = graph_of(ATTENTION)
    graph, log = applied(QuantizeMxfp4(options), before)
    on_activations = [n for n in graph.nodes() if n.op is hadamard and n not in graph.constants()]
    # q, k and v share one; o, the experts and narrow have one each. The router reads x as it is.
    assert len(on_activations) == 4
    users = graph.users()
    (shared,) = (n for n in on_activations if n.args[0].op.name == "embedding")
    assert [n.op for n in users[shared.results[0]]] == [linear] * 3
    sites = {s.name: can_rotate(s) for s in find_sites(before, options)}
    assert sites["gate_up"] and not sites["down"]
    assert log.matches == {
        "mxfp4-projection-rotated": 5,
        "mxfp4-experts-rotated": 1,
        "mxfp4-experts": 1,
    }


def test_weights_that_blocks_do_not_divide_stay_as_they_lie() -> None:
    text = """
graph @g(%x: f32[T, 48], %positions: i32[T]) T=1..9 {
  %0 = linear(%x, @w)
  %1 = linear(%0, @head)
  return %1
} where {
  @head: f32[100, 64]
  @w: f32[64, 48]
}
"""
    graph, log = applied(QuantizeMxfp4(MXFP4(group=16, hadamard=True)), graph_of(text))
    assert log.matches == {"mxfp4-projection": 1} and "hadamard" not in ops(graph)


def test_the_graph_computes_what_it_did_but_for_rounding() -> None:
    before = graph_of(ATTENTION)
    for rewritten in applied(QuantizeMxfp4(MXFP4(hadamard=True)), before)[1].applied:
        check_rewrite(before, rewritten)
    after, _ = applied(QuantizeMxfp4(MXFP4(hadamard=True)), before)
    # Without the rounding (the encoded weight replaced by itself) nothing is left to differ.
    text = str(after)
    lines: list[str] = []
    names: dict[str, str] = {}
    for line in text.splitlines():
        left, _, right = line.strip().partition(" = ")
        if right.startswith("mxfp4_encode("):
            names[left.split(",")[0]] = right.removeprefix("mxfp4_encode(").split(",")[0]
        elif right.startswith("mxfp4("):
            names[left] = names[right.removeprefix("mxfp4(").split(",")[0]]
        else:
            lines.append(line)
    plain = "\n".join(lines)
    for packed in sorted(names, key=len, reverse=True):
        plain = plain.replace(f"{packed},", f"{names[packed]},").replace(
            f"{packed})", f"{names[packed]})"
        )
    unrounded = graph_of(plain)
    assert ops(unrounded)["hadamard"] == ops(after)["hadamard"]
    assert_equal_results(before, unrounded, tolerance=1e-4)


def test_a_cache_is_inserted_as_before() -> None:
    graph, _ = applied(QuantizeMxfp4(MXFP4(hadamard=True)), graph_of(ATTENTION))
    cached, _ = applied(InsertKvCache(2, 64), graph)
    assert ops(cached)["cached_attention"] == 1


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_models(name: str) -> None:
    source = tiny_model(name)
    tokens = list(range(1, 30))
    plain, straight, turned = (
        ingot.compile(
            source, quantize=q, max_tokens_per_sequence=64, verify=q is not None, progress=False
        )
        for q in (None, MXFP4(), MXFP4(hadamard=True))
    )
    expected, *found = (m.logits(tokens) for m in (plain, straight, turned))
    without, with_ = (np.abs(f - expected).mean() / np.abs(expected).mean() for f in found)
    assert 0.3 * without < with_ < 2 * without
    reasons = {w.name: w.reason for w in turned.report.weights if w.format == "mxfp4g32"}
    for weight, reason in reasons.items():
        assert reason.endswith("rotated") == ("mlp.experts.down_proj" not in weight)
