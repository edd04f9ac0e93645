"""Few tokens on AMD's matrix cores: dense and both ways to decode, every epilogue and edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.codegen.templates.gemm import mfma_linear
from ingot.compiler.ops.heads import project_heads
from ingot.compiler.ops.linear import linear
from kernel_checks import Packed, Strided, Weight, check_node, operands, run_node

BF16 = torch.bfloat16


@pytest.fixture(params=["hip:gfx942", "hip:gfx950"])
def target(request: pytest.FixtureRequest) -> str:
    return request.param


def drawn(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).to(BF16)


def kernels(lowered: Any) -> list[str]:
    return [k.symbol for k in lowered.program.kernels.values()]


@pytest.mark.parametrize("tokens", [1, 7, 16])
@pytest.mark.parametrize(
    ("n", "k"), [(16, 1024), (17, 32), (40, 160), (96, 2048), (33, 2080), (16, 4096)]
)
def test_linear(target: str, tokens: int, n: int, k: int) -> None:
    lowered = check_node(
        linear, (torch.randn(tokens, k).to(BF16), Packed(drawn(n, k))), target=target
    )
    assert kernels(lowered) == ["mfma_kernel"]


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("tokens", "n", "k"), [(5, 33, 8), (5, 17, 1000), (16, 16, 2048)])
def test_dense(target: str, tokens: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w = torch.randn(tokens, k).to(dtype), Weight(drawn(n, k).to(dtype))
    assert kernels(check_node(linear, (x, w), target=target)) == ["mfma_kernel"]


@pytest.mark.parametrize("names", [("bias", "residual"), linear.optional])
def test_what_stands_before_and_after(target: str, names: tuple[str, ...]) -> None:
    named = operands(names, 3, 96, 50, 50, BF16)
    x = torch.randn(3, 96).to(BF16)
    lowered = check_node(linear, (x, Packed(drawn(50, 96))), named, target)
    assert kernels(lowered)[-1] == "mfma_kernel"


@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
@pytest.mark.parametrize(("n", "k"), [(17, 96), (40, 2080), (33, 4096)])
@pytest.mark.parametrize("form", [Packed, Weight])
def test_a_norm_within_is_the_norm_before(
    target: str, tokens: int, n: int, k: int, form: type[Packed | Weight]
) -> None:
    """Rows are normed and rounded as by a launch of their own: only the order of sums differs."""
    x = (torch.randn(tokens, k) * torch.logspace(-3, 3, tokens)[:, None]).to(BF16)
    named = {"norm": Weight(torch.exp(torch.randn(k) / 2).to(BF16)), "eps": 1e-5}
    lowered = check_node(linear, (Strided(x), form(drawn(n, k))), named, target)
    if form is Packed:
        assert kernels(lowered) == ["mfma_kernel"]


@pytest.mark.parametrize(("n", "k"), [(24, 64), (9, 4096)])
@pytest.mark.parametrize("biased", [False, True])
def test_gated(target: str, n: int, k: int, biased: bool) -> None:
    named = operands(("bias",) if biased else (), 5, k, n, 2 * n, BF16)
    named["gate"] = "silu"
    x = Strided(torch.randn(5, k).to(BF16))
    check_node(linear, (x, Packed(drawn(2 * n, k))), named, target)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("form", [Packed, Weight])
def test_more_rows_a_program(
    target: str, gate: bool, form: type[Packed | Weight], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mfma_linear, "_MANY_PROGRAMS", 1)
    args = (torch.randn(3, 320).to(BF16), form(drawn(70, 320)))
    check_node(linear, args, {"gate": "silu"} if gate else {}, target)


def test_a_token_is_the_same_among_others(target: str) -> None:
    """Bit for bit: the order of summation does not depend on how many there are."""
    x, w = torch.randn(16, 1056).to(BF16), Packed(drawn(40, 1056))
    (all_,), _, _ = run_node(linear, (x, w), {}, target)
    (one,), _, _ = run_node(linear, (x[11:12].clone(), w), {}, target)
    assert torch.equal(all_[11:12], one)
    named = {"norm": Weight(torch.ones(1056).to(BF16)), "eps": 1e-5}
    (some,), _, _ = run_node(linear, (x[:4].clone(), w), named, target)
    (one,), _, _ = run_node(linear, (x[2:3].clone(), w), named, target)
    assert torch.equal(some[2:3], one)


def test_heads(target: str) -> None:
    attrs = {"heads": (2, 1, 1), "dims": (16, 16, 16)}
    args = (torch.randn(2, 64).to(BF16), Packed(drawn(64, 64)))
    lowered = check_node(project_heads, args, attrs, target)
    assert kernels(lowered)[0] == "mfma_kernel"


def test_other_groups_dtypes_and_sizes_go_elsewhere(target: str) -> None:
    for x, w in (
        (torch.randn(2, 64).to(BF16), Packed(drawn(32, 64), 16)),
        (torch.randn(2, 64), Packed(torch.randn(32, 64))),
        (torch.randn(17, 64).to(BF16), Packed(drawn(32, 64))),
        (torch.randn(2, 60).to(BF16), Weight(drawn(32, 60))),
        (torch.randn(2, 64), Weight(torch.randn(32, 64))),
    ):
        assert "mfma_kernel" not in kernels(check_node(linear, (x, w), target=target))
