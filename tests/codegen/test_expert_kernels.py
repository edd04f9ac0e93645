"""Kernels for mixtures of experts, for few and for many tokens, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_cases import Case, check
from ingot.codegen import select
from ingot.codegen.kernel_query import Template
from ingot.codegen.templates.moe import experts as templates
from ingot.compiler.ops.glu import ACTIVATIONS, CLAMPED
from ingot.compiler.ops.moe import experts
from kernel_checks import build_everywhere, chosen

# For few tokens: by rows, and as fragments lie.
KINDS: dict[str, tuple[Template, ...]] = {
    "few": (templates.few, templates.stream),
    "many": (templates.many,),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each template in turn, whatever it costs."""
    monkeypatch.setattr(select, "_TABLES", ({"experts": KINDS[request.param]},))
    return request.param


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


@pytest.mark.parametrize("gated", [True, False])
def test_fragments_past_one_tile(kind: str, gated: bool) -> None:
    """The last columns of both weights do not fill a tile."""
    case = Case(3, 2, 5, 288, 160, torch.bfloat16, 32, 32, gated=gated, biased=True)
    check(case)


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
