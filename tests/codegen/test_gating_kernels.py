"""Kernels for routers and gates of mixtures: the choice is exact, weights and rows nearly so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.codegen import select
from ingot.codegen.kernel_query import Candidate, Declined, KernelQuery, Template
from ingot.codegen.templates.moe import gating
from ingot.compiler.ops.gating import moe_gating
from ingot.compiler.ops.moe import router
from kernel_checks import (
    ON_DEVICE,
    Given,
    Strided,
    Weight,
    build_everywhere,
    check_node,
    chosen,
    run_node,
)


def few_apart(query: KernelQuery) -> list[Candidate | Declined]:
    """`few_tokens` with a launch that chooses."""
    return [c for c in gating.few_tokens(query) if isinstance(c, Declined) or not c.counters]


KINDS: dict[str, Template] = {
    "one": gating.one_launch,
    "few": gating.few_tokens,
    "few apart": few_apart,
    "many": gating.many_tokens,
}
SOFTMAX: dict[str, Any] = {"k": 2, "score": "softmax", "normalize": True, "dtype": "f32"}
DEEPSEEK: dict[str, Any] = {
    "k": 3,
    "score": "sigmoid",
    "normalize": True,
    "dtype": "f32",
    "groups": 4,
    "topk_groups": 2,
    "group_score": "top2",
    "scale": 2.5,
    "shared": 2,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each template in turn, whatever it costs."""
    monkeypatch.setattr(select, "_TABLES", ({"moe_gating": (KINDS[request.param],)},))
    return request.param


def apart(tokens: int, count: int) -> torch.Tensor:
    """Logits [tokens, count] that differ by a tenth at least, exact in every dtype."""
    return (torch.rand(tokens, count).argsort(1) - count // 2) / 8


# ---- router


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_router_by_softmax(dtype: torch.dtype, tokens: int) -> None:
    check_node(router, (apart(tokens, 11).to(dtype),), SOFTMAX, tolerance=1e-5)


@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("count", [12, 32])
def test_router_of_groups(group_score: str, count: int) -> None:
    attrs = {**DEEPSEEK, "group_score": group_score, "eps": 1e-20}
    correction = Weight(apart(1, count)[0] / 4)
    check_node(
        router, (Strided(apart(3, count) / 4),), {**attrs, "correction": correction}, tolerance=1e-5
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_router(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = draw(1, 6)
    count = groups * draw(2, 7)
    top = draw(1, groups)
    attrs: dict[str, Any] = {
        "k": draw(1, top * count // groups),
        "score": data.draw(st.sampled_from(["softmax", "sigmoid"])),
        "normalize": data.draw(st.booleans()),
        "dtype": "f32",
        "groups": groups,
        "topk_groups": top,
        "group_score": data.draw(st.sampled_from(["max", "top2"])),
        "scale": data.draw(st.sampled_from([1.0, 2.5])),
        "shared": draw(0, 3),
    }
    torch.manual_seed(draw(0, 2**31))
    logits = torch.randn(draw(1, 4), count)
    if data.draw(st.booleans()):
        attrs["correction"] = Weight(torch.randn(count))
    check_node(router, (logits,), attrs, tolerance=1e-5)


def test_ties_go_to_the_first_and_none_is_chosen_twice() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0], [0.0] * 6, [-0.0, 0.0] * 3])
    (_, indices), _, _ = run_node(router, (logits,), {**SOFTMAX, "k": 5})
    assert indices.tolist() == [[1, 2, 4, 0, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_ties_between_groups_go_to_the_first() -> None:
    logits = torch.zeros(1, 8)
    (_, indices), _, _ = run_node(router, (logits,), DEEPSEEK)
    assert indices.tolist() == [[0, 1, 2, 8, 9]]


def test_what_its_group_keeps_out_comes_after_minus_infinity() -> None:
    attrs = {**SOFTMAX, "groups": 2, "topk_groups": 1, "group_score": "max"}
    correction = Weight(torch.tensor([-8.0, -8.0, 0.0, -torch.inf]))
    (_, indices), _, _ = run_node(router, (torch.zeros(1, 4),), {**attrs, "correction": correction})
    assert indices.tolist() == [[2, 3]]


@pytest.mark.parametrize("attrs", [{**SOFTMAX, "k": 3}, DEEPSEEK])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_indices_name_experts_whatever_the_logits_are(attrs: dict[str, Any], value: float) -> None:
    """What is computed for padding is thrown away, but it must not read outside the weights."""
    (_, indices), _, _ = run_node(router, (torch.full((2, 12), value),), attrs)
    chosen = indices[:, :3]
    assert bool(((chosen >= 0) & (chosen < 12)).all())
    assert all(len(set(row)) == 3 for row in chosen.tolist())


def _order(judged: np.ndarray[Any, Any], attrs: dict[str, Any]) -> list[int]:
    """Experts from the best on: NaN above all, ties by index, what its group keeps out last."""

    def best(values: Iterable[Any]) -> list[int]:
        held = list(values)
        return sorted(range(len(held)), key=lambda i: (not np.isnan(held[i]), -held[i], i))

    groups = judged.reshape(attrs["groups"], -1)
    counted = 2 if attrs["group_score"] == "top2" else 1
    scores = [sum(group[best(group)[:counted]]) for group in groups]
    kept = set(best(scores)[: attrs["topk_groups"]])
    return sorted(best(judged), key=lambda i: i // groups.shape[1] not in kept)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_choice_is_the_first_of_the_best(data: st.DataObject) -> None:
    """With ties, infinities and NaN; of so few experts that a lane has none, and so many that they
    are compared in groups, or picked."""

    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = draw(1, 5)
    size = draw(1, 9) if data.draw(st.booleans()) else draw(20, 64)
    top = draw(1, groups)
    top2 = size > 1 and data.draw(st.booleans())
    attrs: dict[str, Any] = {
        "k": draw(1, min(top * size, 12)),
        "score": data.draw(st.sampled_from(["softmax", "sigmoid"])),
        "normalize": data.draw(st.booleans()),
        "dtype": "f32",
        "groups": groups,
        "topk_groups": top,
        "group_score": "top2" if top2 else "max",
    }
    # Scores are equal, or far apart; sums of two, too: with a correction they are exact.
    values = [0.0, -0.0, np.inf, -np.inf, np.nan]
    corrected = data.draw(st.booleans()) and not (top2 and attrs["score"] == "softmax")
    if not (corrected and top2):
        values += [-3.0, -1.25, 0.5, 2.0]
    random = np.random.default_rng(draw(0, 2**31))

    def some(values: list[float]) -> np.ndarray[Any, Any]:
        few = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=len(values)))
        return random.choice(np.array(few, np.float32), groups * size)

    logits, correction = some(values), np.zeros(groups * size, np.float32)
    if corrected:
        correction = some([-8.0, 0.0, 0.25, np.inf, -np.inf])
        attrs["correction"] = Weight(torch.from_numpy(correction))
    with np.errstate(all="ignore"):
        (weights, indices), _, _ = run_node(router, (torch.from_numpy(logits)[None],), attrs)
        wide = torch.from_numpy(logits)
        scores = torch.sigmoid(wide) if attrs["score"] == "sigmoid" else wide.softmax(0)
        order = _order(scores.numpy() + correction, attrs)[: attrs["k"]]
    assert indices.tolist() == [order]
    expected = scores[order]
    if attrs["normalize"]:
        expected = expected / expected.sum()
    torch.testing.assert_close(weights[0], expected, rtol=1e-5, atol=0, equal_nan=True)


# ---- moe_gating


@dataclass(frozen=True)
class Gate:
    """Sizes and forms of a node. Its logits lie far apart: see `call`."""

    tokens: int = 3
    width: int = 70
    count: int = 12
    x: torch.dtype = torch.float32
    weight: torch.dtype = torch.float32
    logits: str = "f32"
    optional: tuple[str, ...] = ()
    strided: bool = False
    routing: str = "softmax"

    def attrs(self) -> dict[str, Any]:
        attrs = {**(SOFTMAX if self.routing == "softmax" else DEEPSEEK), "logits": self.logits}
        attrs["sum_eps"] = 1e-20
        for name, eps in (("norm", "eps"), ("post_norm", "post_eps")):
            attrs[eps] = 1e-5 if name in self.optional else None
        return attrs

    def call(self) -> tuple[list[Given], dict[str, Any]]:
        """Its operands and attributes.

        Rows are one row of ± 1, turned or halved; an expert's weight is that row times a number of
        its own, so that logits are about these numbers. They are distinct, and a quarter above
        whole ones: no sums of two sigmoids, which choose groups, are equal but for rounding.
        """
        signs = torch.randint(0, 2, (self.width,)) * 2.0 - 1
        x = signs.repeat(self.tokens, 1)
        x *= torch.tensor([1.0, -1.0, 0.5])[torch.arange(self.tokens) % 3][:, None]
        scale = (apart(1, self.count)[0] * 8 + 0.25) / self.width
        weight = (signs * scale[:, None]).to(self.weight)
        parts = torch.randint(-2, 3, x.shape) / 4.0
        given: dict[str, Given] = {
            "norm": Weight(torch.full((self.width,), 1.25)),
            "delta": self._rows(parts),
            "post_norm": Weight(torch.full((self.width,), 0.125)),
            "bias": Weight(torch.full((self.count,), 0.5)),
            # So far apart that it alone decides, by groups as well.
            "correction": Weight(4 * 2.0 ** torch.rand(self.count).argsort()),
        }
        named = {name: given[name] for name in self.optional}
        return [self._rows(x), Weight(weight)], {**named, **self.attrs()}

    def _rows(self, x: torch.Tensor) -> Given:
        x = x.to(self.x)
        return Strided(x) if self.strided else x


def check(gate: Gate, tolerance: float = 1e-5) -> Any:
    """The node equals its reference, within `tolerance` where nothing is narrow."""
    narrow = gate.x != torch.float32 or gate.logits != "f32"
    if narrow:
        tolerance = 2e-2
    return check_node(moe_gating, *gate.call(), tolerance=tolerance)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("routing", ["softmax", "deepseek"])
def test_gate(kind: str, tokens: int, routing: str) -> None:
    check(Gate(tokens, routing=routing))


@pytest.mark.parametrize("x", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("logits", ["bf16", "f32"])
def test_types_of_gates(kind: str, x: torch.dtype, weight: torch.dtype, logits: str) -> None:
    check(Gate(x=x, weight=weight, logits=logits))


def test_half_precision_gate(kind: str) -> None:
    check(Gate(x=torch.float16, weight=torch.float16, logits="f16"))


@pytest.mark.parametrize(
    "optional",
    [
        ("norm",),
        ("delta",),
        ("norm", "delta"),
        ("delta", "post_norm"),
        ("norm", "delta", "post_norm", "bias", "correction"),
    ],
)
@pytest.mark.parametrize("strided", [False, True])
def test_operands_of_gates(kind: str, optional: tuple[str, ...], strided: bool) -> None:
    check(Gate(optional=optional, strided=strided))


@pytest.mark.parametrize("routing", ["softmax", "deepseek"])
def test_a_bfloat16_gate_with_all_operands(kind: str, routing: str) -> None:
    optional = ("norm", "delta", "post_norm", "bias", "correction")
    check(Gate(x=torch.bfloat16, weight=torch.bfloat16, optional=optional, routing=routing))


def test_sizes_past_one_block(kind: str) -> None:
    count = 12 if kind == "one" else 20
    # Sums of 1,100 products in order: logits of 12 are good to 2e-5.
    check(Gate(2, 1100, count, optional=("norm", "delta")), tolerance=5e-5)


def test_tokens_past_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_TABLES", ({"moe_gating": (gating.many_tokens,)},))
    check(Gate(67, 40))


def test_templates_agree_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's gate is the same whatever template the number of tokens has chosen.

    On a GPU the weights are so to rounding: the softmax's sum is over the lanes of a product in one
    template, and over lanes as they were loaded in the others.
    """
    gate = Gate(3, 1100, x=torch.bfloat16, optional=("norm", "delta", "bias"))
    args, named = gate.call()
    args[1] = Weight(torch.randn(gate.count, gate.width))
    found = []
    for template in KINDS.values():
        monkeypatch.setattr(select, "_TABLES", ({"moe_gating": (template,)},))
        found.append(run_node(moe_gating, args, named)[0])
    for other in found[1:]:
        (weights, *rest), (same, *others) = found[0], other
        torch.testing.assert_close(same, weights, rtol=1e-6 if ON_DEVICE else 0, atol=0)
        for a, b in zip(rest, others, strict=True):
            assert torch.equal(a, b)


# ---- what is chosen, and built


@pytest.mark.parametrize(
    ("gate", "kernels"),
    [
        (Gate(1, 512, 16), ["gate_kernel"]),
        (Gate(1, 7168, 256), ["token_partials_kernel"]),
        (Gate(512, 7168, 256), ["prologue_kernel", "tile_logits_kernel", "choose_kernel"]),
    ],
)
def test_costs_choose_the_template(gate: Gate, kernels: list[str]) -> None:
    bf16 = replace(gate, x=torch.bfloat16, weight=torch.bfloat16, optional=("norm", "delta"))
    assert chosen(moe_gating, *bf16.call()) == kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gates_build_everywhere(kind: str, dtype: torch.dtype) -> None:
    count = 16 if kind == "one" else 256
    tokens = 64 if kind == "many" else 1
    gate = Gate(tokens, 2880, count, torch.bfloat16, dtype, optional=("norm", "delta"))
    routing = {"groups": 8, "topk_groups": 4, "k": 8} if count == 256 else {}
    args, named = gate.call()
    build_everywhere(moe_gating, args, {**named, **routing})
