"""linear and add_rms_norm: each combination of operands equals the chain of ops it stands for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from ingot.compiler.ir import Op
from ingot.compiler.ops import glu, moe, norm
from ingot.compiler.ops.collective import add_rms_norm
from ingot.compiler.ops.linear import linear
from ingot.compiler.ops.prologue import PROLOGUE
from ingot.compiler.ranks import Echo, run_ranks
from ingot.compiler.torch_types import type_of
from ingot.compiler.types import TensorType, VerifyError, symbol
from op_cases import Case, cost_of

GATED = (*PROLOGUE, "bias")
ROWS, K, N = 9, 24, 20
EPS, POST_EPS = 1e-3, 1e-2  # large, and unlike each other, so that a mix-up shows
TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}
dtypes = pytest.mark.parametrize("dtype", [getattr(torch, d) for d in TOLERANCE], ids=str)


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(dtype: torch.dtype, columns: int = N) -> dict[str, torch.Tensor]:
    shapes = dict(x=(ROWS, K), norm=(K,), delta=(ROWS, K), post_norm=(K,), bias=(columns,))
    shapes |= dict(residual=(ROWS, columns), weight=(columns, K))
    return {n: drawn(*s, dtype=dtype, seed=i) for i, (n, s) in enumerate(shapes.items())}


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    every = [some for size in range(len(names) + 1) for some in combinations(names, size)]
    return [some for some in every if "delta" in some or "post_norm" not in some]


def epsilons(optional: tuple[str, ...]) -> dict[str, float]:
    eps = {"eps": EPS} if "norm" in optional else {}
    return {**eps, "post_eps": POST_EPS} if "post_norm" in optional else eps


def prologue(given: dict[str, torch.Tensor], optional: tuple[str, ...]) -> Any:
    """n and s through the ops by themselves, each of which rounds."""
    s = given["x"]
    if "delta" in optional:
        delta = given["delta"]
        if "post_norm" in optional:
            (delta,) = norm.rms_norm.reference(delta, weight=given["post_norm"], eps=POST_EPS)
        s = s + delta
    if "norm" not in optional:
        return s, s
    return norm.rms_norm.reference(s, weight=given["norm"], eps=EPS)[0], s


def exactly(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers in f64: where dtypes are short, the chain rounds more often than the op."""
    return {name: x.double() for name, x in given.items()}


def product(given: dict[str, torch.Tensor], optional: tuple[str, ...]) -> Any:
    n, s = prologue(given, optional)
    y = n @ given["weight"].T
    return (y + given["bias"] if "bias" in optional else y), s


def computed(given: dict[str, torch.Tensor], optional: tuple[str, ...], **attrs: Any) -> Any:
    case = Case(linear, (), {**epsilons(optional), **attrs}, optional)
    args = [given[name] for name in ("x", "weight", *optional)]
    results = case.reference(args)
    assert tuple(map(type_of, results)) == case.types([*map(type_of, args)])
    return results


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[str(found.dtype).removeprefix("torch.")]
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance


@dtypes
@pytest.mark.parametrize("optional", subsets(linear.optional), ids="-".join)
def test_linear(optional: tuple[str, ...], dtype: torch.dtype) -> None:
    given = operands(dtype)
    y, *sums = computed(given, optional)
    given = exactly(given)
    expected, s = product(given, optional)
    assert_close(y, expected + given["residual"] if "residual" in optional else expected)
    assert len(sums) == ("delta" in optional)
    for total in sums:
        assert_close(total, s)


@dtypes
@pytest.mark.parametrize("activation", [*glu.ACTIVATIONS, glu.CLAMPED])
@pytest.mark.parametrize("optional", subsets(GATED), ids="-".join)
def test_linear_with_a_gate(optional: tuple[str, ...], activation: str, dtype: torch.dtype) -> None:
    given = operands(dtype)
    attrs = {"alpha": 1.702, "limit": 4.0} if activation == glu.CLAMPED else {}
    found, *sums = computed(given, optional, gate=activation, **attrs)
    both, s = product(exactly(given), optional)
    expected = glu.glu.reference(*both.chunk(2, -1), activation=activation, **attrs)[0]
    assert_close(found, expected)
    for total in sums:
        assert_close(total, s)


@dtypes
def test_a_sum_is_the_sum_that_others_would_compute(dtype: torch.dtype) -> None:
    """s is rounded as by `add`, and the norm reads what was rounded."""
    given = operands(dtype)
    y, s = computed(given, ("norm", "delta"))
    assert torch.equal(s, given["x"] + given["delta"])
    again = {**given, "x": s}
    assert torch.equal(y, computed(again, ("norm",))[0])


def test_a_sum_is_not_rounded_before_the_residual() -> None:
    """In bf16, 256 + 1 is 256: the product, 1, the bias, 1, and 256 come to 258 in f32 alone."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    many = torch.full((1, 1), 256, dtype=torch.bfloat16)
    (y,) = linear.reference(one, one, bias=one[0], residual=many)
    assert y.item() == 258


@dtypes
def test_add_rms_norm(dtype: torch.dtype) -> None:
    given = operands(dtype)
    total, normed = add_rms_norm.reference(given["x"], given["delta"], given["norm"], eps=EPS)
    n, s = prologue(given, ("norm", "delta"))
    assert torch.equal(total, s)
    assert_close(normed, n)


def test_add_rms_norm_over_ranks() -> None:
    given = operands(torch.float32)
    deltas = [drawn(ROWS, K, dtype=torch.float32, seed=s) for s in range(3)]

    def rank(delta: torch.Tensor) -> Callable[[Any], Any]:
        args = (given["x"], delta, given["norm"])
        return lambda line: add_rms_norm.reference(*args, eps=EPS, ranks=3, communicator=line)

    results = run_ranks([rank(d) for d in deltas])
    summed = {**given, "delta": deltas[0] + deltas[1] + deltas[2]}
    n, s = prologue(summed, ("norm", "delta"))
    for total, normed in results:
        assert_close(total, s)
        assert_close(normed, n)
    with pytest.raises(VerifyError, match="among 3 ranks runs among 1"):
        rank(deltas[0])(None)


def test_add_rms_norm_without_a_collective_exchanges_nothing() -> None:
    given = operands(torch.float32)
    args = (given["x"], given["delta"], given["norm"])
    alone = add_rms_norm.reference(*args, eps=EPS)
    among = add_rms_norm.reference(*args, eps=EPS, communicator=Echo(4))
    assert all(torch.equal(a, b) for a, b in zip(alone, among, strict=True))


@dtypes
@pytest.mark.parametrize("biased", [True, False])
def test_experts_with_a_residual(biased: bool, dtype: torch.dtype) -> None:
    shapes = ((ROWS, K), (4, 2 * N, K), (4, K, N), (4, 2 * N), (4, K), (ROWS, K))
    x, up, down, *biases, residual = (drawn(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes))
    weights = drawn(ROWS, 2, dtype=dtype, seed=9)
    indices = torch.arange(2 * ROWS).view(ROWS, 2) % 4
    args = (x, weights, indices, up, down, *(biases if biased else ()))
    given = ("gate_up_bias", "down_bias") if biased else ()
    (plain,) = Case(moe.experts, (), {"activation": "silu"}, given).reference(args)
    case = Case(moe.experts, (), {"activation": "silu"}, (*given, "residual"))
    (found,) = case.reference((*args, residual))
    assert_close(found, plain + residual)


@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_has_the_same_bits_in_every_batch(gate: str | None, dtype: torch.dtype) -> None:
    options = GATED if gate else linear.optional
    given = operands(dtype)
    together = computed(given, options, gate=gate)
    rowwise = ("x", "delta", "residual")
    for start in range(ROWS):
        for stop in range(start + 1, ROWS + 1):
            part = {k: v[start:stop] if k in rowwise else v for k, v in given.items()}
            for a, b in zip(computed(part, options, gate=gate), together, strict=True):
                assert torch.equal(a, b[start:stop])


# ---- types


T = symbol("T")
X, W = TensorType("bf16", (T, 8)), TensorType("bf16", (6, 8))
V, B, R = (TensorType("bf16", s) for s in ((8,), (6,), (T, 6)))


def refused(op: Op, *args: TensorType, **named: Any) -> str:
    with pytest.raises(VerifyError) as error:
        op.types(args, named)
    return str(error.value)


def test_types() -> None:
    wide = V.with_dtype("f32")  # norms are read in f32 anyway
    prologue = {"norm": wide, "delta": X, "post_norm": wide, "eps": 1e-6, "post_eps": 1e-6}
    assert linear.types((X, W), {**prologue, "bias": B, "residual": R}) == (R, X)
    half = R.with_shape((T, 3))
    assert linear.types((X, W), {**prologue, "bias": B, "gate": "silu"}) == (half, X)
    batched = TensorType("f32", (2, T, 8))
    assert linear.types((batched, TensorType("f32", (6, 8))), {}) == (
        batched.with_shape((2, T, 6)),
    )


@pytest.mark.parametrize(
    ("args", "named", "message"),
    [
        ((X, W, V), {}, r"expected x, weight, norm\?, .* found .*bf16\[8\]"),
        ((X, W), {"scale": B}, r"attributes among .*; found scale=TensorType\(dtype='bf16'"),
        ((X, W), {"norm": V}, "found eps None for an op with norm"),
        ((X, W), {"eps": 1e-6}, "found eps 1e-06 for an op without norm"),
        ((X, W), {"delta": X, "post_norm": V}, "eps None for an op with post_norm"),
        ((X, W), {"post_norm": V, "post_eps": 0.1}, "expected a delta"),
        ((X, W), {"norm": B, "eps": 1e-6}, r"norm bf16\[6\] must match"),
        ((X, W), {"delta": R}, r"a delta of x's type bf16\[T, 8\], found"),
        ((X, W), {"bias": V}, r"expected a bias \[6\] of x's dtype, found bf16\[8"),
        ((X, W.with_dtype("f32")), {}, "weight .* of one float dtype, found"),
        ((X, W.with_shape((8, 6))), {}, r"weight \[N, K\]"),
    ],
)
@pytest.mark.parametrize("gate", [None, "silu"])
def test_refusals(gate: str | None, args: Any, named: dict[str, Any], message: str) -> None:
    with pytest.raises(VerifyError, match=f"^linear: .*{message}"):
        linear.types(args, {**named, "gate": gate})


def test_refusals_of_one_form() -> None:
    found = refused(linear, X, W, residual=X)
    assert found == "linear: expected a residual bf16[T, 6], and none with a gate; found bf16[T, 8]"
    assert "none with a gate" in refused(linear, X, W, residual=R.with_shape((T, 3)), gate="silu")
    odd = W.with_shape((5, 8))
    assert "as many gate rows as up rows" in refused(linear, X, odd, gate="silu")
    assert "alpha 0.0" in refused(linear, X, W, gate=glu.CLAMPED)
    assert "found alpha 1.7 and limit 0.0 without a gate" in refused(linear, X, W, alpha=1.7)
    assert "found 'swish'" in refused(linear, X, W, gate="swish")
    assert "delta of x's type" in refused(add_rms_norm, X, R, V, eps=1e-6)
    assert "at least one rank" in refused(add_rms_norm, X, X, V, eps=1e-6, ranks=0)


def test_experts_refuse_another_residual() -> None:
    x, choice = TensorType("f32", (T, 8)), TensorType("f32", (T, 2))
    up, down = TensorType("f32", (4, 12, 8)), TensorType("f32", (4, 8, 6))
    args = (x, choice, choice.with_dtype("i64"), up, down)
    found = refused(moe.experts, *args, residual=choice, activation="silu")
    assert found == "experts: expected a residual f32[T, 8], found f32[T, 2]"
    assert "expected biases" in refused(moe.experts, *args, gate_up_bias=x, activation="silu")


def test_costs_are_those_of_the_ops_by_themselves() -> None:
    """The flops of the chain; the bytes of what goes in and what comes out, each once."""
    args = (X, W, V, X, V, B, R)
    cost = Case(linear, args, {}, linear.optional).cost(args, (R, X))
    one = cost_of(norm.rms_norm, (X,), (X,)).flops
    alone = cost_of(linear, (X, W), (R,)).flops
    assert cost.flops == alone + 2 * one + X.numel + R.numel
    assert alone == 2 * T * 6 * 8
    assert cost.bytes == sum(t.nbytes for t in (*args, R, X))
    half = R.with_shape((T, 3))
    cost = cost_of(linear, (X, W), (half,), gate="silu")
    assert cost.flops == alone + cost_of(glu.glu, (half, half), (half,)).flops
