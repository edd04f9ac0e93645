"""Kernels for mixtures of experts, for few and for many tokens, against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from ingot.codegen import select
from ingot.codegen.kernel_query import Template
from ingot.codegen.templates.moe import experts as templates
from ingot.compiler.ops.glu import ACTIVATIONS, CLAMPED
from ingot.compiler.ops.moe import experts
from kernel_checks import Given, Packed, Strided, Weight, build_everywhere, check_node, chosen

KINDS: dict[str, Template] = {"few": templates.few, "many": templates.many}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each template in turn, whatever it costs."""
    monkeypatch.setattr(select, "_TABLES", ({"experts": (KINDS[request.param],)},))
    return request.param


@dataclass(frozen=True)
class Case:
    """Sizes and forms of a node."""

    tokens: int = 3
    k: int = 2
    count: int = 4
    width: int = 40
    inner: int = 24
    dtype: torch.dtype = torch.float32
    gate_up: int | None = None  # the group of an MXFP4 weight
    down: int | None = None
    activation: str = "silu"
    gated: bool = True
    biased: bool = False
    residual: bool = False
    strided: bool = False
    index: torch.dtype = torch.int64
    weights: torch.dtype = torch.float32

    def attrs(self) -> dict[str, Any]:
        attrs: dict[str, Any] = {"activation": self.activation, "gated": self.gated}
        if self.activation == CLAMPED:
            attrs |= {"alpha": 1.702, "limit": 1.5}
        return attrs

    def call(self, indices: torch.Tensor | None = None) -> tuple[list[Given], dict[str, Any]]:
        """Its operands and attributes."""

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(self.dtype)

        def weight(group: int | None, *shape: int) -> Given:
            drawn = (torch.randn(shape) * shape[-1] ** -0.5).to(self.dtype)
            return Packed(drawn, group) if group else Weight(drawn)

        x = draw(self.tokens, self.width)
        if indices is None:
            indices = torch.rand(self.tokens, self.count).argsort(1)[:, : self.k]
        rows = (1 + self.gated) * self.inner
        args: list[Given] = [
            Strided(x) if self.strided else x,
            torch.rand(self.tokens, self.k).to(self.weights),
            indices.to(self.index),
            weight(self.gate_up, self.count, rows, self.width),
            weight(self.down, self.count, self.width, self.inner),
        ]
        named = self.attrs()
        if self.biased:
            named["gate_up_bias"] = Weight(draw(self.count, rows))
            named["down_bias"] = Weight(draw(self.count, self.width))
        if self.residual:
            added = draw(self.tokens, self.width)
            named["residual"] = Strided(added) if self.strided else added
        return args, named


def check(case: Case, indices: torch.Tensor | None = None, **driver: Any) -> Any:
    """The node equals its reference; `driver` as check_node takes it."""
    # A hidden value rounds once more than the reference's in f64, and so does every part.
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[case.dtype]
    return check_node(experts, *case.call(indices), tolerance=tolerance, **driver)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_dense_experts(kind: str, dtype: torch.dtype, tokens: int) -> None:
    check(Case(tokens, dtype=dtype))


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["cuda:sm_90", "hip:gfx950"])  # bits moved, and conversions
def test_packed_experts(kind: str, group: int, dtype: torch.dtype, target: str) -> None:
    case = Case(width=96, inner=32, gate_up=group, down=group, dtype=dtype)
    check(case, target=target)


@pytest.mark.parametrize(("gate_up", "down"), [(32, None), (None, 32)])
def test_one_packed_weight_beside_a_dense_one(
    kind: str, gate_up: int | None, down: int | None
) -> None:
    check(Case(width=64, inner=32, gate_up=gate_up, down=down))


@pytest.mark.parametrize("activation", [*ACTIVATIONS, CLAMPED])
def test_gated_activations(kind: str, activation: str) -> None:
    check(Case(activation=activation, biased=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_plain_activations(kind: str, activation: str) -> None:
    check(Case(activation=activation, gated=False))


def test_biases_and_a_residual(kind: str) -> None:
    case = Case(biased=True, residual=True, strided=True, dtype=torch.bfloat16)
    check(case)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_types_of_choices(kind: str, index: torch.dtype, weights: torch.dtype) -> None:
    check(Case(index=index, weights=weights))


def test_one_expert_chosen_by_all_and_others_by_nobody(kind: str) -> None:
    indices = torch.tensor([[2, 5]]).expand(7, -1)
    check(Case(7, count=6), indices)


def test_one_expert_chosen_twice_by_a_token(kind: str) -> None:
    check(Case(2), torch.tensor([[3, 3], [0, 3]]))


@pytest.mark.parametrize("k", [1, 3, 5, 9])
@pytest.mark.parametrize("down", [None, 32])
def test_any_number_of_choices(kind: str, k: int, down: int | None) -> None:
    check(Case(2, k, 12, inner=64, down=down, biased=True, residual=True))


def test_sizes_past_one_block(kind: str) -> None:
    check(Case(1, 1, 2, width=1100, inner=70))
    check(Case(1, 1, 2, width=70, inner=1100))
    check(Case(1, 1, 2, width=2112, inner=48, gate_up=32, down=16))
    check(Case(1, 1, 2, width=48, inner=2112, gate_up=16, down=32))
    check(Case(1, 1, 2, width=48, inner=2112, gate_up=16, down=32), target="hip:gfx950")


def test_costs_choose_the_template() -> None:
    small = Case(1, 4, 8, 128, 64, torch.bfloat16)
    few = ["expert_gemv_kernel", "expert_sum_kernel"]
    assert chosen(experts, *small.call()) == few
    large = replace(small, tokens=512)
    tiles = ["grouped_gemm_kernel", "grouped_gemm_kernel", "combine_kernel"]
    assert chosen(experts, *large.call()) == ["count_kernel", "place_kernel", *tiles]


@pytest.mark.parametrize(
    ("dtype", "group"), [(torch.bfloat16, None), (torch.bfloat16, 32), (torch.float32, 32)]
)
def test_experts_build_everywhere(kind: str, dtype: torch.dtype, group: int | None) -> None:
    tokens = 1 if kind == "few" else 64
    case = Case(tokens, 1, 1, 704, 352, dtype, group, group, biased=True, residual=True)
    facts = build_everywhere(experts, *case.call())
    if kind == "many" and dtype == torch.float32:  # tf32 would not be what was asked for
        for found in (*facts["cuda:sm_90"], *facts["cuda:sm_100"]):
            assert not found.keys() & {"mma", "wgmma", "tcgen05"}


@pytest.mark.parametrize("kind", ["many"], indirect=True)
def test_the_largest_tiles_build_everywhere(kind: str) -> None:
    case = Case(256, 1, 1, 704, 352, torch.bfloat16, 32, 32)
    build_everywhere(experts, *case.call())
