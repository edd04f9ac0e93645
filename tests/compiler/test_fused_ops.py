"""Fused ops: each combination of operands equals the chain of ops that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from ingot.compiler.ir import Op
from ingot.compiler.ops import fused, glu, linear, moe, norm
from ingot.compiler.ops.prologue import named_operands
from ingot.compiler.ranks import Echo, run_ranks
from ingot.compiler.torch_types import type_of
from ingot.compiler.types import TensorType, VerifyError, symbol

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
            (delta,) = norm.rms_norm.reference(delta, given["post_norm"], eps=POST_EPS)
        s = s + delta
    if "norm" not in optional:
        return s, s
    return norm.rms_norm.reference(s, given["norm"], eps=EPS)[0], s


def exactly(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers in f64: where dtypes are short, the chain rounds more often than the op."""
    return {name: x.double() for name, x in given.items()}


def product(given: dict[str, torch.Tensor], optional: tuple[str, ...]) -> Any:
    n, s = prologue(given, optional)
    bias = (given["bias"],) if "bias" in optional else ()
    return linear.linear.reference(n, given["weight"], *bias)[0], s


def computed(
    op: Op, given: dict[str, torch.Tensor], optional: tuple[str, ...], **attrs: Any
) -> Any:
    args = (given["x"], given["weight"], *(given[name] for name in optional))
    attrs = {"optional": optional, **epsilons(optional), **attrs}
    results = op.reference(*args, **attrs)
    assert tuple(map(type_of, results)) == op.types(tuple(map(type_of, args)), attrs)
    return results


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[str(found.dtype).removeprefix("torch.")]
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance


@dtypes
@pytest.mark.parametrize("optional", subsets(fused.LINEAR_OPTIONS), ids="-".join)
def test_fused_linear(optional: tuple[str, ...], dtype: torch.dtype) -> None:
    given = operands(dtype)
    y, *sums = computed(fused.fused_linear, given, optional)
    given = exactly(given)
    expected, s = product(given, optional)
    assert_close(y, expected + given["residual"] if "residual" in optional else expected)
    assert len(sums) == ("delta" in optional)
    for total in sums:
        assert_close(total, s)


@dtypes
@pytest.mark.parametrize("activation", [*glu.ACTIVATIONS, glu.CLAMPED])
@pytest.mark.parametrize("optional", subsets(fused.GATED_OPTIONS), ids="-".join)
def test_gated_linear(optional: tuple[str, ...], activation: str, dtype: torch.dtype) -> None:
    given = operands(dtype)
    attrs = {"activation": activation}
    if activation == glu.CLAMPED:
        attrs |= {"alpha": 1.702, "limit": 4.0}
    found, *sums = computed(fused.gated_linear, given, optional, **attrs)
    both, s = product(exactly(given), optional)
    expected = glu.glu.reference(*both.chunk(2, -1), **attrs)[0]
    assert_close(found, expected)
    for total in sums:
        assert_close(total, s)


@dtypes
def test_a_sum_is_the_sum_that_others_would_compute(dtype: torch.dtype) -> None:
    """s is rounded as by `add`, and the norm reads what was rounded."""
    given = operands(dtype)
    y, s = computed(fused.fused_linear, given, ("norm", "delta"))
    assert torch.equal(s, given["x"] + given["delta"])
    again = {**given, "x": s}
    assert torch.equal(y, computed(fused.fused_linear, again, ("norm",))[0])


def test_a_sum_is_not_rounded_before_the_residual() -> None:
    """In bf16, 256 + 1 is 256: the product, 1, the bias, 1, and 256 come to 258 in f32 alone."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    many = torch.full((1, 1), 256, dtype=torch.bfloat16)
    optional = ("bias", "residual")
    (y,) = fused.fused_linear.reference(one, one, one[0], many, optional=optional)
    assert y.item() == 258


@dtypes
def test_add_rms_norm(dtype: torch.dtype) -> None:
    given = operands(dtype)
    total, normed = fused.add_rms_norm.reference(given["x"], given["delta"], given["norm"], eps=EPS)
    n, s = prologue(given, ("norm", "delta"))
    assert torch.equal(total, s)
    assert_close(normed, n)


def test_add_rms_norm_over_ranks() -> None:
    given = operands(torch.float32)
    deltas = [drawn(ROWS, K, dtype=torch.float32, seed=s) for s in range(3)]

    def rank(delta: torch.Tensor) -> Callable[[Any], Any]:
        args = (given["x"], delta, given["norm"])
        return lambda line: fused.add_rms_norm.reference(*args, eps=EPS, ranks=3, communicator=line)

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
    alone = fused.add_rms_norm.reference(*args, eps=EPS)
    among = fused.add_rms_norm.reference(*args, eps=EPS, communicator=Echo(4))
    assert all(torch.equal(a, b) for a, b in zip(alone, among, strict=True))


@dtypes
@pytest.mark.parametrize("biased", [True, False])
def test_experts_with_a_residual(biased: bool, dtype: torch.dtype) -> None:
    shapes = ((ROWS, K), (4, 2 * N, K), (4, K, N), (4, 2 * N), (4, K), (ROWS, K))
    x, up, down, *biases, residual = (drawn(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes))
    weights = drawn(ROWS, 2, dtype=dtype, seed=9)
    indices = torch.arange(2 * ROWS).view(ROWS, 2) % 4
    args = (x, weights, indices, up, down, *(biases if biased else ()))
    (plain,) = moe.experts.reference(*args, activation="silu")
    (found,) = moe.experts.reference(*args, residual, activation="silu", residual=True)
    assert_close(found, plain + residual)


@pytest.mark.parametrize("name", ["fused_linear", "gated_linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_has_the_same_bits_in_every_batch(name: str, dtype: torch.dtype) -> None:
    op = Op.registry[name]
    options = fused.LINEAR_OPTIONS if name == "fused_linear" else fused.GATED_OPTIONS
    attrs = {} if name == "fused_linear" else {"activation": "silu"}
    given = operands(dtype)
    together = computed(op, given, options, **attrs)
    rowwise = ("x", "delta", "residual")
    for start in range(ROWS):
        for stop in range(start + 1, ROWS + 1):
            part = {k: v[start:stop] if k in rowwise else v for k, v in given.items()}
            for a, b in zip(computed(op, part, options, **attrs), together, strict=True):
                assert torch.equal(a, b[start:stop])


# ---- types


T = symbol("T")
X, W = TensorType("bf16", (T, 8)), TensorType("bf16", (6, 8))
V, B, R = (TensorType("bf16", s) for s in ((8,), (6,), (T, 6)))


def refused(op: Op, *args: TensorType, **attrs: Any) -> str:
    with pytest.raises(VerifyError) as error:
        op.types(args, attrs)
    return str(error.value)


def test_types() -> None:
    optional = ("norm", "delta", "post_norm", "bias", "residual")
    attrs = {"optional": optional, "eps": 1e-6, "post_eps": 1e-6}
    wide = V.with_dtype("f32")  # norms are read in f32 anyway
    assert fused.fused_linear.types((X, W, wide, X, V, B, R), attrs) == (R, X)
    attrs = {"optional": optional[:4], "eps": 1e-6, "post_eps": 1e-6, "activation": "silu"}
    half = R.with_shape((T, 3))
    assert fused.gated_linear.types((X, W, V, X, wide, B), attrs) == (half, X)
    batched = TensorType("f32", (2, T, 8))
    assert fused.fused_linear.types((batched, TensorType("f32", (6, 8))), {}) == (
        batched.with_shape((2, T, 6)),
    )


@pytest.mark.parametrize(
    ("args", "attrs", "message"),
    [
        ((X, W, B, V), {"optional": ("bias", "norm"), "eps": 1e-6}, "in this order; found"),
        ((X, W, B), {"optional": ("scale",)}, r"optional is of norm, .*found \['scale'\]"),
        ((X, W, B, B), {"optional": ("bias", "bias")}, "in this order"),
        ((X, W), {"optional": ("bias",)}, r"an operand for each of \['bias'\], found none"),
        ((X, W, V), {}, r"an operand for each of \[\], found bf16\[8\]"),
        ((X, W, V), {"optional": ("norm",)}, "found eps None for an op with norm"),
        ((X, W), {"eps": 1e-6}, "found eps 1e-06 for an op without norm"),
        ((X, W, X, V), {"optional": ("delta", "post_norm")}, "eps None for an op with post_norm"),
        ((X, W, V), {"optional": ("post_norm",), "post_eps": 0.1}, "expected a delta"),
        ((X, W, B), {"optional": ("norm",), "eps": 1e-6}, r"norm bf16\[6\] must match"),
        ((X, W, R), {"optional": ("delta",)}, r"a delta of x's type bf16\[T, 8\], found"),
        ((X, W, V), {"optional": ("bias",)}, r"expected a bias \[6\] of x's dtype, found bf16\[8"),
        ((X, W.with_dtype("f32")), {}, "weight .* of one float dtype, found"),
        ((X, W.with_shape((8, 6))), {}, r"weight \[2?[IN], K\]"),
    ],
)
@pytest.mark.parametrize("name", ["fused_linear", "gated_linear"])
def test_refusals(name: str, args: Any, attrs: dict[str, Any], message: str) -> None:
    extra = {"activation": "silu"} if name == "gated_linear" else {}
    with pytest.raises(VerifyError, match=f"^{name}: .*{message}"):
        Op.registry[name].types(args, {**attrs, **extra})


def test_refusals_of_one_op() -> None:
    found = refused(fused.fused_linear, X, W, X, optional=("residual",))
    assert found == "fused_linear: expected a residual bf16[T, 6], found bf16[T, 8]"
    odd = W.with_shape((5, 8))
    assert "as many gate rows as up rows" in refused(fused.gated_linear, X, odd, activation="silu")
    assert "alpha 0.0" in refused(fused.gated_linear, X, W, activation=glu.CLAMPED)
    assert "found 'swish'" in refused(fused.gated_linear, X, W, activation="swish")
    assert "residual is of" not in refused(fused.gated_linear, X, W, R, optional=("residual",))
    assert "delta of x's type" in refused(fused.add_rms_norm, X, R, V, eps=1e-6)
    assert "at least one rank" in refused(fused.add_rms_norm, X, X, V, eps=1e-6, ranks=0)


def test_experts_refuse_another_residual() -> None:
    x, choice = TensorType("f32", (T, 8)), TensorType("f32", (T, 2))
    up, down = TensorType("f32", (4, 12, 8)), TensorType("f32", (4, 8, 6))
    args = (x, choice, choice.with_dtype("i64"), up, down)
    attrs = {"activation": "silu", "residual": True}
    for more in ((), (choice,)):
        found = refused(moe.experts, *args, *more, **attrs)
        assert found.startswith("experts: expected a residual f32[T, 8] as last operand, found")
    assert "expected biases" in refused(moe.experts, *args, x, activation="silu")


def test_operands_by_name() -> None:
    assert named_operands("op", ("a", "c"), ("a", "b", "c"), (1, 3)) == {"a": 1, "c": 3}


def test_costs_are_those_of_the_ops_by_themselves() -> None:
    """The flops of the chain; the bytes of what goes in and what comes out, each once."""
    optional = ("norm", "delta", "post_norm", "bias", "residual")
    args = (X, W, V, X, V, B, R)
    cost = fused.fused_linear.cost(args, (R, X), optional=optional)
    one = norm.rms_norm.cost((X, V), (X,)).flops
    alone = linear.linear.cost((X, W, B), (R,)).flops
    assert cost.flops == alone + 2 * one + X.numel + R.numel
    assert cost.bytes == sum(t.nbytes for t in (*args, R, X))
    half = R.with_shape((T, 3))
    cost = fused.gated_linear.cost((X, W), (half,), activation="silu")
    alone = linear.linear.cost((X, W), (R,)).flops
    assert cost.flops == alone + glu.glu.cost((half, half), (half,)).flops
