"""Every op: type rule against reference, reference against f64, torch and naive loops, cost, laws.

The last part is the law of batches: the result of a token has the same bits whatever else is
computed beside it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.compiler.dtypes import FLOATS
from ingot.compiler.interpret import compute, random_tensor
from ingot.compiler.ir import Op, Value
from ingot.compiler.ops import attention, glu, linear, moe, norm, pointwise, reduce, rope, shape
from ingot.compiler.ops.leaf import is_literal, literal, param
from ingot.compiler.torch_types import TORCH_DTYPES, dtype_name, torch_dtype, type_of
from ingot.compiler.types import TensorType, VerifyError
from op_cases import Case, cost_of, sampled_ops
from op_checks import (
    COUNTS,
    SOME,
    TOKENS,
    T,
    assert_same_bits,
    both,
    error,
    parsed,
    seeded,
    tokens_of,
)
from torch.utils.flop_counter import FlopCounterMode

CASES = sampled_ops()
every_sample = pytest.mark.parametrize(
    ("op", "sample"),
    [pytest.param(*case, id=f"{case[0].name}-{i}") for i, case in enumerate(CASES)],
)
# Made of symbols and attributes alone, or needing arguments that hang together (tested below).
WITHOUT_SAMPLES = {
    *("param", "constant", "literal"),
    *("kv_append", "cached_attention", "cached_mla_attention"),
    *("project_attention", "latent_attention"),
}


def draw(sample: Case, dtype: str | None = None, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Arguments for `sample`, floats in `dtype` if given; positive where the op needs it is not."""
    generator = seeded(seed)
    tensors = [random_tensor(t, generator, sample.high) for t in sample.args]
    return tuple(
        x.to(torch_dtype(dtype)) if dtype and x.is_floating_point() else x for x in tensors
    )


def domain(op: Op, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """`args` where `op` is defined and well conditioned."""
    if op.name in ("log", "sqrt", "rsqrt", "pow"):
        return tuple(x.abs() + 0.5 if x.is_floating_point() else x for x in args)
    if op.name == "div":
        return (args[0], args[1].sgn() * (args[1].abs() + 0.5))
    return args


def in_f64(attrs: dict[str, Any]) -> dict[str, Any]:
    return {k: "f64" if k == "dtype" and v in FLOATS else v for k, v in attrs.items()}


def types_of(tensors: tuple[torch.Tensor, ...]) -> tuple[TensorType, ...]:
    return tuple(map(type_of, tensors))


# ---- all ops


def test_every_op_has_samples_or_tests_of_its_own() -> None:
    without = {n for n, op in Op.registry.items() if not op.samples}
    ours = {n for n in without if not n.startswith(("aten.", "test."))}
    assert ours == WITHOUT_SAMPLES


@every_sample
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_infer_gives_the_types_of_the_reference(op: Op, sample: Case, dtype: str) -> None:
    args = domain(op, draw(sample, dtype))
    results = sample.reference(args)
    assert types_of(results) == sample.types(types_of(args))


@every_sample
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_reference_is_close_to_itself_in_f64(op: Op, sample: Case, dtype: str) -> None:
    args = domain(op, draw(sample, dtype))
    exact = tuple(x.double() if x.is_floating_point() else x for x in args)
    found = sample.reference(args)
    expected = sample.changed(**in_f64(dict(sample.attrs))).reference(exact)
    for a, b in zip(found, expected, strict=True):
        if a.is_floating_point():
            assert error(a, b) <= op.tolerance.of(dtype_name(a.dtype))
        elif dtype == "f32":
            assert torch.equal(a, b)


@every_sample
def test_references_leave_their_arguments_alone_and_take_any_strides(op: Op, sample: Case) -> None:
    args = domain(op, draw(sample))
    kept = [x.clone() for x in args]
    expected = sample.reference(args)
    assert all(torch.equal(a, b) for a, b in zip(args, kept, strict=True))
    strided = [x.mT.contiguous().mT if x.ndim > 1 else x.repeat_interleave(2)[::2] for x in args]
    assert all(x.numel() < 2 or not x.is_contiguous() or 1 in x.shape for x in strided)
    for a, b in zip(sample.reference(strided), expected, strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(a, b)


@every_sample
def test_cost_is_bounded_by_each_operand_moved_once(op: Op, sample: Case) -> None:
    results = sample.types(sample.args)
    moved: Any = sum(t.nbytes for t in (*sample.args, *results))
    assert 0 <= sample.cost(sample.args, results).bytes <= moved


def _beside_products(sample: Case) -> int:
    """Flops that an op with a product documents beside it, by element of what it works on."""
    named = sample.op.by_name(sample.args, sample.given)
    given = {n: int(t.numel) for n, t in named.items() if isinstance(t, TensorType)}
    x, made = given.get("x", 0), [int(t.numel) for t in sample.types(sample.args)]
    count = 4 * x * ("norm" in given) + x * ("delta" in given) + 4 * x * ("post_norm" in given)
    count += made[0] * ("residual" in given) + 5 * made[0] * bool(sample.attrs.get("gate"))
    if sample.op.name == "moe_gating":
        count += 8 * sample.args[0].shape[0] * sample.args[1].shape[0]  # the router
    if sample.op.name == "project_heads":
        rotated = sample.attrs.get("rotate") or [False] * len(sample.attrs["heads"])
        for i, turned in enumerate(rotated):
            count += (4 * (f"norm_{i}" in given) + 3 * turned) * made[i]
    return int(count)


@every_sample
def test_flops_are_those_counted(op: Op, sample: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as torch counts them while the reference runs, without its padding to blocks."""
    monkeypatch.setattr(linear, "_BLOCK", 1)
    args = domain(op, draw(sample))
    with FlopCounterMode(display=False) as counter:
        sample.reference(args)
    counted = counter.get_total_flops()
    found = sample.cost(sample.args, sample.types(sample.args)).flops
    if counted:
        assert found == counted + _beside_products(sample)
    else:
        moved = sum(int(t.numel) for t in (*sample.args, *sample.types(sample.args)))
        assert 0 <= found <= 10 * moved


EXACT_BYTES = {
    "view": lambda a, r: 0,
    "slice": lambda a, r: 2 * r[0].nbytes,
    "take": lambda a, r: 2 * r[0].nbytes + a[1].nbytes,
    "embedding": lambda a, r: 2 * r[0].nbytes + a[0].nbytes,
    "feed": lambda a, r: 8 * a[6].nbytes,
    "mxfp4": lambda a, r: 0,  # its users read the packed form
    "mxfp4_tiled": lambda a, r: 0,
}


@every_sample
def test_bytes_are_those_documented(op: Op, sample: Case) -> None:
    results = sample.types(sample.args)
    everything = lambda a, r: sum(t.nbytes for t in (*a, *r))  # noqa: E731
    expected = EXACT_BYTES.get(op.name, everything)(sample.args, results)
    found = sample.cost(sample.args, results).bytes
    if op.name == "experts":  # four experts, ten choices: all four are read
        assert found == everything(sample.args, results)
    assert found == expected


# Changes of types and attributes: `infer` refuses, or the reference gives what it says.
FUZZED_DTYPES = ("bool", "i32", "i64", "f16", "bf16", "f32", "f64", "c64")


@st.composite
def changed(draw_: Any) -> Case:
    _, sample = draw_(st.sampled_from(CASES))
    args, attrs = list(sample.args), dict(sample.attrs)
    for _ in range(draw_(st.integers(1, 3))):
        what = draw_(st.sampled_from(("dtype", "dim", "rank", "count", "attr")))
        i = draw_(st.integers(0, max(len(args) - 1, 0)))
        if what == "attr" and attrs:
            key = draw_(st.sampled_from(sorted(attrs)))
            attrs[key] = draw_(changed_attribute(attrs[key]))
        elif what == "count" and args:
            args = draw_(st.sampled_from((args[:-1], args[1:], [*args, args[i]], args[::-1])))
        elif what == "dtype" and args:
            args[i] = args[i].with_dtype(draw_(st.sampled_from(FUZZED_DTYPES)))
        elif what == "rank" and args:
            shape_ = args[i].shape
            args[i] = args[i].with_shape(draw_(st.sampled_from((shape_[1:], (2, *shape_), ()))))
        elif what == "dim" and args and args[i].shape:
            axis = draw_(st.integers(0, args[i].rank - 1))
            new = draw_(st.integers(1, 12))
            args[i] = args[i].with_shape(shape.replaced(args[i].shape, axis, new))
        if not args:
            break
    return replace(sample, args=tuple(args), attrs=attrs)


def changed_attribute(value: Any) -> st.SearchStrategy[Any]:
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(-9, 9)
    if isinstance(value, float):
        return st.floats(-2, 4)
    if isinstance(value, tuple):
        return st.lists(st.integers(-2, 6), max_size=4).map(tuple)
    return st.sampled_from(
        (*FUZZED_DTYPES, "silu", "sigmoid", "softmax", "max", "top2", "half", "x")
    )


@settings(max_examples=600)
@given(changed())
def test_infer_refuses_what_the_reference_cannot_compute_as_typed(
    case: Case,
) -> None:
    if case.refuses(case.args) is not None:
        return
    if case.op.collective and case.attrs.get("ranks", 1) > 1:
        return  # nobody is there to exchange with: test_collective has several ranks
    expected = case.types(case.args)
    # Indices within every range: all fall on the first.
    tensors = domain(case.op, tuple(random_tensor(t, seeded(), high=1) for t in case.args))
    assert types_of(case.reference(tensors)) == expected


RARE = (
    Case(Op.registry["take"], (TensorType("f32", (8,)), TensorType("i64", ()))),
    Case(
        Op.registry["attention"],
        (
            TensorType("f32", (7, 4, 8)),
            *(TensorType("f32", (7, 2, 8)),) * 2,
            TensorType("f64", (4,)),
        ),
        {"scale": 0.3},
        given=("sinks",),
    ),
)


@pytest.mark.parametrize("case", RARE, ids=("one row of numbers", "sinks wider than queries"))
def test_references_compute_rare_types_that_infer_takes(case: Case) -> None:
    assert types_of(case.reference(draw(case))) == case.types(case.args)


@every_sample
def test_a_refusal_names_the_op_and_what_came(op: Op, sample: Case) -> None:
    for i, type_ in enumerate(sample.args):
        wrong = TensorType("c64", (2, 2, *type_.shape, 3))
        args = (*sample.args[:i], wrong, *sample.args[i + 1 :])
        reason = sample.refuses(args)
        if reason is not None:
            assert reason.startswith(op.name)
            assert str(wrong) in reason or str(list(wrong.shape)) in reason or "found" in reason


REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (lambda: _call("add", "f32[3]", "f32[4]"), r"add: cannot broadcast \[3\] and \[4\]"),
    (lambda: _call("add", "f32[3]", "f16[3]"), r"expected equal dtypes .*f32\[3\] and f16\[3\]"),
    (lambda: _call("div", "i64[3]", "i64[3]"), "div: expected equal dtypes of f16"),
    (lambda: _call("logical_and", "i64[3]", "i64[3]"), "logical_and: expected .* bool"),
    (lambda: _call("exp", "i64[3]"), r"exp: expected a float, found i64\[3\]"),
    (lambda: _call("clamp", "f32[3]", min=2.0, max=1.0), "expected min <= max, found 2.0 and 1.0"),
    (lambda: _call("gelu", "f32[3]", approximate="erf"), "'none' or 'tanh', found 'erf'"),
    (lambda: _call("cast", "f32[3]", dtype="f31"), "unknown dtype 'f31'"),
    (lambda: _call("where", "f32[3]", "f32[3]", "f32[3]"), "where: expected bool"),
    (lambda: _call("view", "f32[4, 6]", shape=(5, 5)), "has 24 elements, .* has 25"),
    (lambda: _call("view", "f32[4, 6]", shape=(-4, -6)), r"at least 0, found f32\[-4, -6\]"),
    (lambda: _call("view", "f32[T, 6]", shape=(6,)), r"has 6\*T elements"),
    (lambda: _call("follow", "i32[9]", "i32[]", "i32[]"), r"logit_rows with one axis, .* i32\[\]"),
    (lambda: _call("permute", "f32[4, 6]", dims=(0, 0)), "no permutation"),
    (lambda: _call("expand", "f32[4, 6]", shape=(4, 7)), "does not expand"),
    (lambda: _call("expand", "f32[1]", shape=(-1,)), "at least 0"),
    (lambda: _call("slice", "f32[4, 6]", dim=1, start=2, stop=7), r"\[2, 7\) by 1 is not within"),
    (lambda: _call("slice", "f32[4, 6]", dim=2, start=2, stop=3), "has no dim 2"),
    (lambda: _call("slice", "f32[T, 6]", dim=0, start=-1, stop=T), "is not within dim 0"),
    (lambda: _call("slice", "f32[T, 6]", dim=0, start=0, stop=T + 1), "is not within dim 0"),
    (lambda: _call("slice", "f32[T, 6]", dim=0, start=T, stop=T - 1), "is not within dim 0"),
    (
        lambda: _call("slice_scatter", "f32[4]", "f32[2]", dim=0, start=0, stop=3),
        r"source f32\[3\]",
    ),
    (lambda: _call("cat", "f32[4, 6]", "f32[5, 6]", dim=1), "differs from .* in more than dim 1"),
    (lambda: _call("cat", dim=1), "at least one operand"),
    (lambda: _call("take", "f32[4, 6]", "f32[2]"), "i32 or i64 rows"),
    (lambda: _call("scatter", "f32[4, 6]", "i64[5, 2]", dim=1, value=0), "expected i64 indices"),
    (lambda: _call("argmax", "bool[4, 6]", dim=1, keepdim=True), "expected numbers in order"),
    (lambda: _call("gather", "f32[4, 6]", "i64[5, 2]", dim=1), "expected i64 indices like"),
    (lambda: _call("topk", "f32[4, 6]", k=7, dim=1), "expected 1 <= k <= dim 1 .*found k = 7"),
    (lambda: _call("topk", "f32[4, T]", k=1, dim=1), "expected 1 <= k"),
    (lambda: _call("sum", "f32[4]", dim=1, keepdim=True), "has no dim 1"),
    (lambda: _call("linear", "f32[4, 6]", "f32[6, 4]"), r"x \[..., K\] and weight \[N, K\]"),
    (lambda: _call("linear", "i64[4, 6]", "i64[4, 6]"), "one float dtype"),
    (lambda: _call("linear", "f32[4, 6]", "f32[5, 6]", bias="f32[6]"), r"expected a bias \[5\]"),
    (
        lambda: _call("linear", "f32[4, 6]", "f32[5, 6]", "f32[5]"),
        r"linear: expected x, weight, norm\?, .* found \(f32\[4, 6\], f32\[5, 6\], f32\[5\]\)",
    ),
    (lambda: _call("matmul", "f32[4, 6]", "f32[4, 6]"), "matmul: expected"),
    (lambda: _call("embedding", "f32[4]", "f32[6, 2]"), "expected integer ids"),
    (lambda: _call("rms_norm", "f32[4, 6]", weight="f32[4]", eps=1e-6), "must match the last dim"),
    (lambda: _call("layer_norm", "f32[6]", bias="f32[5]", eps=1e-6), "must match the last dim"),
    (lambda: _call("glu", "f32[6]", "f32[6]", activation="swish"), "one of silu.*found 'swish'"),
    (lambda: _call("glu", "f32[6]", "f32[6]", activation="clamped_swiglu"), "alpha 0.0"),
    (lambda: _call("glu", "f32[6]", "f32[5]", activation="silu"), "of one float type"),
    (lambda: _router(k=9), "E >= k = 9"),
    (lambda: _router(groups=3), "3 groups of 8 experts"),
    (lambda: _router(groups=0), "router"),
    (lambda: _router(groups=8, topk_groups=4, group_score="top2"), "judged by top2"),
    (lambda: _router(groups=8, topk_groups=1), "cannot give 2"),
    (lambda: _router(score="relu"), "unknown score 'relu'"),
    (lambda: _router(dtype="i32"), "expected a float dtype of the weights, found 'i32'"),
    (lambda: _rope(form="mirrored"), "half, interleaved, deinterleaved, found 'mirrored'"),
    (lambda: _rope(start=1), "at dim 1 do not fit"),
    (lambda: _attention(heads=3), "H a multiple of G"),
    (lambda: _attention(window=-1), "window and softcap of at least 0, found -1"),
    (lambda: _attention(softcap=math.nan), "softcap of at least 0"),
    (lambda: _literal(1.5, "i64"), "expected a number of dtype i64, found 1.5"),
    (lambda: _literal(1, "bool"), "expected a number of dtype bool, found 1"),
    (lambda: _literal("1", "f32"), "found '1'"),
]


def _call(name: str, *types: str, **named: Any) -> Any:
    op = Op.registry[name]
    named = {k: parsed(v) if k in op.optional else v for k, v in named.items()}
    return op.types(tuple(map(parsed, types)), named)


def _router(**changes: Any) -> Any:
    attrs = {"k": 2, "score": "softmax", "normalize": True, "dtype": "f32", **changes}
    return _call("router", "f32[5, 8]", **attrs)


def _rope(**changes: Any) -> Any:
    return _call("rope", "f32[5, 8]", "f32[5, 4]", "f32[5, 4]", **{"form": "half", **changes})


def _attention(heads: int = 4, **changes: Any) -> Any:
    q = f"f32[7, {heads}, 8]"
    return _call("attention", q, "f32[7, 2, 8]", "f32[7, 2, 6]", **{"scale": 1.0, **changes})


def _literal(value: Any, dtype: str) -> Any:
    return Op.registry["literal"].types((), {"value": value, "dtype": dtype})


@pytest.mark.parametrize(("refused", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_refusals_say_what_was_expected_and_what_came(
    refused: Callable[[], Any], message: str
) -> None:
    with pytest.raises(VerifyError, match=message):
        refused()


# ---- literals


def run(op: Op, *args: Any, **attrs: Any) -> Any:
    """One node on tensors and numbers, as the interpreter computes it."""
    values = [
        literal(value=a[0], dtype=a[1])
        if isinstance(a, tuple)
        else param(name="x", type=type_of(a))
        for a in args
    ]
    node = op.node(tuple(values), attrs)
    (result,) = compute(node, tuple(a[0] if isinstance(a, tuple) else a for a in args), {})
    assert type_of(torch.as_tensor(result)) == node.types[0]
    return result


BINARY = ["add", "sub", "mul", "div", "pow", "maximum", "minimum", "lt", "le", "gt", "ge"]


@pytest.mark.parametrize("name", [*BINARY, "eq", "ne"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_number_may_stand_on_either_side(name: str, dtype: str) -> None:
    op = Op.registry[name]
    x = random_tensor(TensorType(dtype, (4,)), seeded()).abs() + 0.5
    full = torch.full((4,), 1.5, dtype=x.dtype)
    torch.testing.assert_close(run(op, x, (1.5, dtype)), op.reference(x, full)[0])
    torch.testing.assert_close(run(op, (1.5, dtype), x), op.reference(full, x)[0])
    both = run(op, (1.5, dtype), (0.5, dtype))
    torch.testing.assert_close(both, op.reference(full, torch.full_like(full, 0.5))[0][0])


def test_numbers_alone_keep_the_dtype_that_they_were_given() -> None:
    condition = torch.tensor([True, False])
    for dtype, a, b in (
        ("f64", 1.5, 2.5),
        ("bf16", 1.5, 2.5),
        ("i32", 1, 2),
        ("bool", True, False),
    ):
        got = run(pointwise.where, condition, (a, dtype), (b, dtype))
        assert got.tolist() == [a, b]
    assert run(pointwise.div, (1.0, "f32"), (0.0, "f32")).item() == math.inf
    assert run(pointwise.exp, (0.0, "f16")).item() == 1.0
    assert run(pointwise.cast, (2.75, "f32"), dtype="i64").item() == 2


def test_a_number_beside_a_tensor_is_not_rounded_first() -> None:
    x = torch.tensor([3.0]).bfloat16()
    by_a_third = run(pointwise.mul, x, (1 / 3, "bf16"))
    assert by_a_third.item() == torch.tensor(3.0 * (1 / 3)).bfloat16().item() == 1.0


def test_is_literal() -> None:
    one = literal(value=1.0, dtype="f32")
    assert is_literal(one)
    assert is_literal(one, 1)
    assert not is_literal(one, 2)
    assert not is_literal(param(name="x", type=TensorType("f32", ())))


# ---- against torch, complex numbers and naive loops


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_norms_agree_with_torch(dtype: str) -> None:
    x, w, b = (
        random_tensor(TensorType(dtype, s), seeded(i))
        for i, s in enumerate(((5, 16), (16,), (16,)))
    )
    functional = torch.nn.functional
    close = dict(rtol=0.0, atol=2e-2 if dtype == "bf16" else 1e-5)
    (found,) = norm.rms_norm.reference(x, weight=w, eps=1e-3)
    torch.testing.assert_close(found, functional.rms_norm(x, (16,), w, 1e-3), **close)
    (found,) = norm.rms_norm.reference(x, eps=1e-3)
    torch.testing.assert_close(found, functional.rms_norm(x, (16,), eps=1e-3), **close)
    for vectors in ({}, {"weight": w}, {"bias": b}, {"weight": w, "bias": b}):
        (found,) = norm.layer_norm.reference(x, **vectors, eps=1e-3)
        expected = functional.layer_norm(x, (16,), **vectors, eps=1e-3)
        torch.testing.assert_close(found, expected, **close)


TORCH_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("name", glu.ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_activations_agree_with_torch_also_far_out(name: str, dtype: str) -> None:
    x = torch.cat((torch.linspace(-12, 12, 97), torch.tensor([-1e4, -100, -0.0, 0.0, 100, 1e4])))
    x = x.to(torch_dtype(dtype))
    rounding = {"f32": 2e-6, "f64": 1e-14, "bf16": 1e-2}[dtype]
    expected = TORCH_ACTIVATIONS[name](x.double())
    found = glu.ACTIVATIONS[name](x)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)
    infinite = torch.tensor([math.inf, -math.inf, math.nan], dtype=x.dtype)
    if name in ("sigmoid", "tanh", "relu"):
        torch.testing.assert_close(
            glu.ACTIVATIONS[name](infinite), TORCH_ACTIVATIONS[name](infinite), equal_nan=True
        )


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_softplus_agrees_with_torch_also_far_out(dtype: str) -> None:
    x = torch.cat((torch.linspace(-25, 25, 97), torch.tensor([-80, -0.0, 100, 1e4, math.inf])))
    x = x.to(torch_dtype(dtype))
    (found,) = pointwise.softplus.reference(x)
    expected = torch.nn.functional.softplus(x.double())
    rounding = {"f32": 1e-6, "f64": 1e-9, "bf16": 1e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=0)


def test_clamped_swiglu_is_that_of_gpt_oss() -> None:
    gate, up = torch.linspace(-9, 9, 50).double(), torch.linspace(9, -9, 50).double()
    (found,) = glu.glu.reference(gate, up, activation="clamped_swiglu", alpha=1.7, limit=3.0)
    g, u = gate.clamp(max=3.0), up.clamp(-3.0, 3.0)
    torch.testing.assert_close(found, (u + 1) * (g * torch.sigmoid(1.7 * g)))


@pytest.mark.parametrize("form", rope.FORMS)
@pytest.mark.parametrize(
    ("heads", "size", "start", "half"), [((), 8, 0, 4), ((3,), 12, 2, 4), ((2,), 9, 5, 2)]
)
def test_rope_turns_pairs_as_complex_numbers(
    form: str, heads: tuple[int, ...], size: int, start: int, half: int
) -> None:
    x = torch.randn(6, *heads, size, generator=seeded(), dtype=torch.float64)
    positions = torch.tensor([0, 1, 2, 3, 40, 1000])
    frequencies = 1.0 / 10000 ** (torch.arange(half).double() / half)
    cos, sin = rope.rope_tables.reference(positions, frequencies, scale=1.0, dtype="f64")
    (found,) = rope.rope.reference(x, cos, sin, form=form, start=start)
    part = x[..., start : start + 2 * half]
    real, imaginary = part.split(half, -1) if form == "half" else (part[..., ::2], part[..., 1::2])
    angles = (positions[:, None] * frequencies).view(6, *(1,) * len(heads), half)
    turned = torch.complex(real, imaginary) * torch.exp(1j * angles)
    placed = (
        torch.view_as_real(turned).flatten(-2)
        if form == "interleaved"
        else torch.cat((turned.real, turned.imag), -1)
    )
    expected = x.clone()
    expected[..., start : start + 2 * half] = placed
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[0], placed_at_zero(x[0], form, start, half))


def placed_at_zero(x: torch.Tensor, form: str, start: int, half: int) -> torch.Tensor:
    """No turn at position 0; the deinterleaved form still moves the members of pairs."""
    if form != "deinterleaved":
        return x
    part = x[..., start : start + 2 * half]
    moved = torch.cat((part[..., ::2], part[..., 1::2]), -1)
    return torch.cat((x[..., :start], moved, x[..., start + 2 * half :]), -1)


def test_rope_tables_are_scaled() -> None:
    cos, sin = rope.rope_tables.reference(
        torch.tensor([3]), torch.tensor([0.5]), scale=2.0, dtype="f32"
    )
    torch.testing.assert_close(cos, 2 * torch.tensor([[1.5]]).cos())
    torch.testing.assert_close(sin, 2 * torch.tensor([[1.5]]).sin())


def naive_router(logits: Any, bias: Any, attrs: dict[str, Any]) -> list[dict[int, float]]:
    """Expert to weight, for each token, in plain Python."""
    rows: list[dict[int, float]] = []
    for row in logits.tolist():
        if attrs["score"] == "sigmoid":
            scores = [1 / (1 + math.exp(-v)) for v in row]
        else:
            total = sum(math.exp(v) for v in row)
            scores = [math.exp(v) / total for v in row]
        choice = [s + b for s, b in zip(scores, bias, strict=True)]
        groups, size = attrs["groups"], len(row) // attrs["groups"]
        best = 2 if attrs["group_score"] == "top2" else 1
        of = {g: choice[g * size : (g + 1) * size] for g in range(groups)}
        value = {g: sum(sorted(c)[-best:]) for g, c in of.items()}
        kept = sorted(value, key=lambda g: -value[g])[: attrs["topk_groups"]]
        allowed = [e for e in range(len(row)) if groups == 1 or e // size in kept]
        chosen = sorted(allowed, key=lambda e: -choice[e])[: attrs["k"]]
        divisor = sum(scores[e] for e in chosen) + attrs["eps"] if attrs["normalize"] else 1.0
        rows.append({e: scores[e] / divisor * attrs["scale"] for e in chosen})
    return rows


@given(
    st.fixed_dictionaries(
        {
            "k": st.integers(1, 4),
            "score": st.sampled_from(("softmax", "sigmoid")),
            "normalize": st.booleans(),
            "groups": st.sampled_from((1, 2, 4)),
            "topk_groups": st.integers(1, 4),
            "group_score": st.sampled_from(("max", "top2")),
            "scale": st.sampled_from((1.0, 2.5)),
            "eps": st.sampled_from((0.0, 1e-20, 0.1)),
        }
    ),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_router_agrees_with_a_naive_one(attrs: dict[str, Any], biased: bool, seed: int) -> None:
    attrs = {**attrs, "dtype": "f64"}
    types = (TensorType("f64", (7, 12)), *([TensorType("f64", (12,))] if biased else []))
    given = ("correction",) if biased else ()
    case = Case(moe.router, types, attrs, given)
    if case.refuses(types):
        assert attrs["topk_groups"] > attrs["groups"] or attrs["k"] > 12 // attrs["groups"]
        return
    args = [random_tensor(t, seeded(seed)) for t in types]
    weights, indices = case.reference(args)
    bias = args[1].tolist() if biased else [0.0] * 12
    for row, chosen, expected in zip(
        weights.tolist(), indices.tolist(), naive_router(args[0], bias, attrs), strict=True
    ):
        assert dict(zip(chosen, row, strict=True)) == pytest.approx(expected)


EXPERT_CASES = [
    ({"activation": "silu"}, False),
    ({"activation": "gelu_tanh"}, True),
    ({"activation": "relu", "gated": False}, False),
    ({"activation": "gelu", "gated": False}, True),
    ({"activation": "clamped_swiglu", "alpha": 1.702, "limit": 1.0}, True),
]


def expert_arguments(attrs: dict[str, Any], biased: bool, dtype: str, tokens: int) -> list[Any]:
    experts, width, hidden, k = 5, 24, 10, 3
    rows = hidden * (2 if attrs.get("gated", True) else 1)
    shapes = [(tokens, width), (tokens, k), (experts, rows, width), (experts, width, hidden)]
    shapes += [(experts, rows), (experts, width)] if biased else []
    x, weights, *rest = (
        random_tensor(TensorType(dtype, s), seeded(i)) for i, s in enumerate(shapes)
    )
    # Expert 4 is never chosen, and a token may choose one expert twice.
    indices = torch.randint(0, experts - 1, (tokens, k), generator=seeded(9))
    return [x, weights, indices, *rest]


@pytest.mark.parametrize(("attrs", "biased"), EXPERT_CASES)
def test_experts_agree_with_a_loop_over_tokens(attrs: dict[str, Any], biased: bool) -> None:
    args = expert_arguments(attrs, biased, "f64", 9)
    x, weights, indices, gate_up, down, *biases = args
    expected = torch.zeros_like(x)
    for t, j in itertools.product(range(9), range(3)):
        e = int(indices[t, j])
        h = gate_up[e] @ x[t] + (biases[0][e] if biased else 0)
        if attrs.get("gated", True):
            gate, up = h.chunk(2)
            options = {k: v for k, v in attrs.items() if k in ("activation", "alpha", "limit")}
            (h,) = glu.glu.reference(gate, up, **options)
        else:
            h = TORCH_ACTIVATIONS[attrs["activation"]](h)
        expected[t] += weights[t, j] * (down[e] @ h + (biases[1][e] if biased else 0))
    given = ("gate_up_bias", "down_bias") if biased else ()
    case = Case(moe.experts, (), attrs, given)
    (found,) = case.reference(args)
    torch.testing.assert_close(found, expected)
    in_f32 = [a.float() if a.is_floating_point() else a for a in args]
    (single,) = case.reference(in_f32)
    assert error(single, expected) < 1e-5


def test_experts_read_no_more_than_there_are_or_are_chosen() -> None:
    gate_up, down = TensorType("bf16", (64, 32, 16)), TensorType("bf16", (64, 16, 16))
    one: Any = gate_up.nbytes // 64 + down.nbytes // 64

    def weight_bytes(tokens: Any) -> Any:
        x = TensorType("bf16", (tokens, 16))
        args = (x, TensorType("f32", (tokens, 2)), TensorType("i64", (tokens, 2)), gate_up, down)
        cost = cost_of(moe.experts, args, (x,), activation="silu")
        return cost.bytes - sum(t.nbytes for t in (*args[:3], x))

    assert weight_bytes(1) == 2 * one
    assert weight_bytes(1000) == 64 * one
    symbolic = weight_bytes(T)
    assert [int(symbolic.xreplace({T: n})) for n in (1, 1000)] == [2 * one, 64 * one]


def naive_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any = None, **attrs: Any
) -> torch.Tensor:
    """One query, one head, one key at a time, in f64."""
    tokens, heads, _ = q.shape
    out = torch.zeros(tokens, heads, v.shape[-1], dtype=torch.float64)
    offset, group = k.shape[0] - tokens, heads // k.shape[1]
    for t, h in itertools.product(range(tokens), range(heads)):
        at = t + offset
        first = max(0, at - attrs["window"] + 1) if attrs.get("window") else 0
        last = at + 1 if attrs.get("causal", True) else k.shape[0]
        keys, values = (x[first:last, h // group].double() for x in (k, v))
        scores = keys @ q[t, h].double() * attrs["scale"]
        if attrs.get("softcap"):
            scores = torch.tanh(scores / attrs["softcap"]) * attrs["softcap"]
        weights = torch.exp(scores)
        total = weights.sum() + (0 if sinks is None else torch.exp(sinks[h].double()))
        out[t, h] = (weights / total) @ values
    return out


ATTENTION_ATTRS = [
    {},
    {"window": 1},
    {"window": 5},
    {"softcap": 0.7},
    {"window": 4, "softcap": 2.0},
]


@pytest.mark.parametrize("attrs", [*ATTENTION_ATTRS, {"causal": False}])
@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("before", [0, 3])
def test_attention_agrees_with_a_naive_one(attrs: dict[str, Any], sunk: bool, before: int) -> None:
    g = seeded()
    q = torch.randn(7, 4, 8, generator=g)
    k, v = torch.randn(7 + before, 2, 8, generator=g), torch.randn(7 + before, 2, 6, generator=g)
    sinks = torch.randn(4, generator=g) if sunk else None
    (found,) = attention.attention.reference(q, k, v, sinks=sinks, scale=0.4, **attrs)
    assert error(found, naive_attention(q, k, v, sinks, scale=0.4, **attrs)) < 1e-5


def test_attention_in_blocks_of_queries_is_attention() -> None:
    q, k, v = (torch.randn(600, 1, 4, generator=seeded(i)) for i in range(3))
    (found,) = attention.attention.reference(q, k, v, scale=0.5, window=70)
    for t in (0, 255, 256, 599):
        (alone,) = attention.attention.reference(
            q[t : t + 1], k[: t + 1], v[: t + 1], scale=0.5, window=70
        )
        torch.testing.assert_close(found[t], alone[0])


# ---- the paged cache


@dataclass(frozen=True)
class Layout:
    """A cache and the sequences in it; `steps` are the (slot, count) of tokens fed together."""

    dtype: torch.dtype = torch.float32
    heads: int = 4
    groups: int = 2
    size: int = 8
    value_size: int = 6
    page_size: int = 4
    lengths: tuple[int, ...] = (13, 1, 9)

    @property
    def pages_per_slot(self) -> int:
        return -(-max(self.lengths) // self.page_size) + 1

    def sequences(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        made = []
        for i, n in enumerate(self.lengths):
            g = seeded(100 + i)
            shapes = (
                (n, self.heads, self.size),
                (n, self.groups, self.size),
                (n, self.groups, self.value_size),
            )
            made.append(tuple(torch.randn(*s, generator=g).to(self.dtype) for s in shapes))
        return made

    def caches(self) -> list[torch.Tensor]:
        pages = len(self.lengths) * self.pages_per_slot + 1
        shapes = (self.groups, self.size), (self.groups, self.value_size)
        return [torch.full((pages, self.page_size, *s), math.nan, dtype=self.dtype) for s in shapes]

    def page_table(self) -> torch.Tensor:
        slots = len(self.lengths)
        order = torch.randperm(slots * self.pages_per_slot, generator=seeded(5)) + 1
        return order.view(slots, self.pages_per_slot).int()


Step = list[tuple[int, int]]  # (slot, tokens) in the order they are fed; slot -1 is padding


def serve(layout: Layout, steps: list[Step], sinks: Any = None, **attrs: Any) -> list[torch.Tensor]:
    """The output of every token of every slot, fed in `steps` through the paged cache."""
    sequences, caches, table = layout.sequences(), layout.caches(), layout.page_table()
    done = [0] * len(layout.lengths)
    out: list[list[torch.Tensor]] = [[] for _ in layout.lengths]
    for step in steps:
        rows: list[tuple[int, int]] = []
        for slot, count in step:
            start = done[slot] if slot >= 0 else 0
            rows += [(slot, start + i) for i in range(count)]
            if slot >= 0:
                done[slot] += count
        slots, positions = (torch.tensor([r[i] for r in rows], dtype=torch.int32) for i in (0, 1))
        q, k, v = (
            torch.stack(
                [
                    sequences[s][j][p] if s >= 0 else torch.full_like(sequences[0][j][0], math.nan)
                    for s, p in rows
                ]
            )
            for j in range(3)
        )
        caches = attention.kv_append.reference(*caches, k, v, slots, positions, table)
        (result,) = attention.cached_attention.reference(
            q, *caches, slots, positions, table, sinks=sinks, scale=0.4, **attrs
        )
        for (slot, _), row in zip(rows, result, strict=True):
            if slot >= 0:
                out[slot].append(row)
            else:
                assert not row.any(), "padding attends to nothing"
    assert done == list(layout.lengths)
    return [torch.stack(rows) for rows in out]


def at_once(layout: Layout) -> list[Step]:
    return [[(slot, n) for slot, n in enumerate(layout.lengths)]]


def one_by_one(layout: Layout) -> list[Step]:
    return [[(slot, 1)] for slot, n in enumerate(layout.lengths) for _ in range(n)]


def mixed(layout: Layout) -> list[Step]:
    """Padding first and last, slots in changing order, tokens of a slot in several steps."""
    left, steps, i = list(layout.lengths), [], 0
    while any(left):
        step: Step = [(-1, 1)]
        for slot in sorted(range(len(left)), key=lambda s: (s + i) % len(left)):
            count = min(left[slot], 1 + (slot + i) % 3)
            if count:
                step.append((slot, count))
                left[slot] -= count
        steps.append([*step, (-1, i % 3)])
        i += 1
    return steps


LAYOUTS = [
    Layout(),
    Layout(page_size=1),
    Layout(page_size=7, heads=6, groups=1),
    Layout(page_size=64, heads=2, groups=2, lengths=(70, 3)),
    Layout(page_size=16, heads=3, groups=3, size=5, value_size=5, lengths=(33, 16, 17, 1)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("attrs", ATTENTION_ATTRS)
@pytest.mark.parametrize("sunk", [False, True])
def test_cached_attention_is_attention_over_each_sequence(
    layout: Layout, attrs: dict[str, Any], sunk: bool
) -> None:
    sinks = torch.randn(layout.heads, generator=seeded(3)) if sunk else None
    results = [serve(layout, f(layout), sinks, **attrs) for f in (at_once, one_by_one, mixed)]
    for slot, (q, k, v) in enumerate(layout.sequences()):
        (expected,) = attention.attention.reference(q, k, v, sinks=sinks, scale=0.4, **attrs)
        for result in results:
            assert error(result[slot], expected) < 2e-6
        assert torch.equal(results[0][slot], results[1][slot])
        assert torch.equal(results[0][slot], results[2][slot])


def test_cached_attention_in_blocks_of_queries() -> None:
    layout = Layout(lengths=(300, 5), page_size=64, heads=2, groups=1)
    for attrs in ({}, {"window": 40}):
        results = [
            serve(layout, f, None, **attrs)
            for f in (at_once(layout), [[(0, 299)], [(1, 5), (0, 1)]])
        ]
        for slot, (q, k, v) in enumerate(layout.sequences()):
            (expected,) = attention.attention.reference(q, k, v, scale=0.4, **attrs)
            assert error(results[0][slot], expected) < 2e-6
            assert torch.equal(results[0][slot], results[1][slot])


@pytest.mark.parametrize("sink", [-1e4, 0.0, 200.0, 1e4])
def test_sinks_of_any_size_stay_finite(sink: float) -> None:
    """exp(200) is no f32: a sink above all scores takes nearly all of the weight."""
    layout = Layout(lengths=(9, 2))
    sinks = torch.full((layout.heads,), sink)
    for slot, result in enumerate(serve(layout, at_once(layout), sinks)):
        q, k, v = layout.sequences()[slot]
        (expected,) = attention.attention.reference(q, k, v, sinks=sinks, scale=0.4)
        assert result.isfinite().all()
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("count", [1, 2])
def test_kv_append_writes_rows_at_their_positions_and_nothing_else(count: int) -> None:
    caches = [torch.full((6, 4, 2, 3), math.nan) for _ in range(count)]
    rows = [torch.randn(5, 2, 3, generator=seeded(i)) for i in range(count)]
    slots = torch.tensor([1, -1, 0, 1, -1], dtype=torch.int32)
    positions = torch.tensor([5, 99, 0, 6, 0], dtype=torch.int32)
    table = torch.tensor([[3, 0], [5, 2]], dtype=torch.int32)
    args = (*rows, slots, positions, table)
    results = attention.kv_append.reference(*caches, *args)
    assert types_of(results) == attention.kv_append.types(types_of((*caches, *args)), {})
    for cache, row, result in zip(caches, rows, results, strict=True):
        assert cache.isnan().all(), "the reference is functional"
        expected = cache.clone()
        expected[2, 1], expected[3, 0], expected[2, 2] = row[0], row[2], row[3]
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert attention.kv_append.inplace
    assert attention.kv_append.inplace(*caches, *args) is None
    for cache, result in zip(caches, results, strict=True):
        torch.testing.assert_close(cache, result, rtol=0, atol=0, equal_nan=True)


def test_only_padding_appends_and_attends_to_nothing() -> None:
    none = torch.full((3,), -1, dtype=torch.int32)
    table = torch.zeros(2, 2, dtype=torch.int32)
    cache, rows = torch.randn(4, 4, 2, 8), torch.randn(3, 2, 8)
    k, v = attention.kv_append.reference(cache, cache, rows, rows, none, none, table)
    assert torch.equal(k, cache)
    assert torch.equal(v, cache)
    q = torch.full((3, 4, 8), math.nan)
    (out,) = attention.cached_attention.reference(q, k, v, none, none, table, scale=1.0)
    assert torch.equal(out, torch.zeros(3, 4, 8))


def test_latent_rows_without_heads_can_be_appended() -> None:
    cache, rows = TensorType("bf16", (6, 4, 8)), TensorType("bf16", (T, 8))
    index = (TensorType("i32", (T,)),) * 2 + (TensorType("i32", (2, 3)),)
    assert attention.kv_append.types((cache, rows, *index), {}) == (cache,)
    assert cost_of(attention.kv_append, (cache, rows, *index), (cache,)).bytes == 2 * 16 * T


INDEX = ("i32[7]", "i32[7]", "i32[2, 3]")
CACHE, ROWS = "f32[6, 4, 2, 8]", "f32[7, 2, 8]"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((CACHE, ROWS, *INDEX[:2]), "as many caches as rows"),
        (INDEX, "as many caches as rows"),
        ((CACHE, "f32[7, 2, 9]", *INDEX), r"fit cache f32\[6, 4, 2, 8\], found f32\[7, 2, 9\]"),
        ((CACHE, "bf16[7, 2, 8]", *INDEX), "fit cache"),
        ((CACHE, CACHE, ROWS, "f32[6, 2, 8]", *INDEX), "fit cache"),
        ((CACHE, "f32[6, 5, 2, 8]", ROWS, ROWS, *INDEX), "caches of equal pages"),
        ((CACHE, ROWS, "i64[7]", *INDEX[1:]), r"slots and positions i32\[7\]"),
        ((CACHE, ROWS, "i32[6]", *INDEX[1:]), r"slots and positions i32\[7\]"),
        ((CACHE, ROWS, *INDEX[:2], "i32[6]"), "an i32 page table"),
    ],
)
def test_kv_append_refuses(args: tuple[str, ...], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        _call("kv_append", *args)


@pytest.mark.parametrize(
    ("args", "attrs", "message"),
    [
        (("f32[7, 3, 8]", CACHE, CACHE, *INDEX), {}, "H a multiple of G"),
        (("f32[7, 4, 9]", CACHE, CACHE, *INDEX), {}, "expected q"),
        (("f32[7, 4, 8]", "f32[6, 2, 8]", CACHE, *INDEX), {}, "expected caches"),
        (("f32[7, 4, 8]", CACHE, "f32[5, 4, 2, 8]", *INDEX), {}, "expected caches"),
        (("f32[7, 4, 8]", "f32[8]", CACHE, *INDEX), {}, "static heads"),
        (("f32[7, 4, 8]", CACHE, CACHE, *INDEX[1:], "i32[3]"), {}, "page table"),
        (
            ("f32[7, 4, 8]", CACHE, CACHE, *INDEX),
            {"sinks": "f32[2]"},
            "a float sink for each head",
        ),
        (("f32[7, 4, 8]", CACHE, CACHE, *INDEX), {"window": -2}, "at least 0, found -2"),
    ],
)
def test_cached_attention_refuses(args: tuple[str, ...], attrs: Any, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        _call("cached_attention", *args, scale=1.0, **attrs)


def test_costs_of_the_paged_cache() -> None:
    types = tuple(map(parsed, ("bf16[7, 4, 8]", "bf16[6, 4, 2, 8]", "bf16[6, 4, 2, 6]", *INDEX)))
    results = attention.cached_attention.types(types, {"scale": 1.0})
    cost = cost_of(attention.cached_attention, types, results, scale=1.0)
    context = 3 * 4  # pages a slot · tokens a page
    assert cost.flops == 2 * 7 * 4 * (8 + 6) * context
    pages = 2 * 3 * (4 * 2 * 8 + 4 * 2 * 6) * 2
    assert cost.bytes == 2 * (7 * 4 * 8 + 7 * 4 * 6) + pages


# ---- the law of batches: the same bits whatever stands beside a token


@both
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("k", "n"),
    [
        (8, 1),
        (1, 8),
        (8, 5),
        (37, 3),
        (33, 40),
        (64, 1),
        (64, 2),
        (64, 64),
        (96, 300),
        (1000, 17),
        (512, 256),
    ],
)
def test_linear_gives_each_token_the_same_bits(
    dtype: torch.dtype, threads: int, k: int, n: int
) -> None:
    w, b = (torch.randn(*s, generator=seeded(1)).to(dtype) for s in ((n, k), (n,)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for bias in (None, b):
            assert_same_bits(
                lambda x, bias=bias: linear.linear.reference(x, w, bias=bias)[0],
                tokens_of(k, dtype=dtype),
                counts=SOME,
            )
    finally:
        torch.set_num_threads(before)


@both
def test_strides_do_not_change_the_bits(dtype: torch.dtype) -> None:
    w = torch.randn(40, 24, generator=seeded(1)).to(dtype)
    x = tokens_of(24, dtype=dtype)
    (expected,) = linear.linear.reference(x, w)
    for n in SOME:
        for strided in (x[:n].t().contiguous().t(), x[:n].repeat_interleave(2, 0)[::2]):
            assert torch.equal(linear.linear.reference(strided, w)[0], expected[:n])


@both
def test_linear_of_every_count_of_tokens(dtype: torch.dtype) -> None:
    w = torch.randn(48, 64, generator=seeded(1)).to(dtype)
    assert_same_bits(lambda x: linear.linear.reference(x, w)[0], tokens_of(64, dtype=dtype))


@both
@pytest.mark.parametrize(("k", "n"), [(16, 8), (5, 7), (64, 64), (24, 1)])
def test_matmul_per_head_gives_each_token_the_same_bits(dtype: torch.dtype, k: int, n: int) -> None:
    per_head = torch.randn(3, k, n, generator=seeded(1)).to(dtype)

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return linear.matmul.reference(x.transpose(0, 1), per_head)[0].transpose(0, 1)

    assert_same_bits(by_head, tokens_of(3, k, dtype=dtype), counts=SOME)


ROWWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{
        op.name: (lambda x, op=op: op.reference(x)[0])
        for op in pointwise.UNARY
        if op.name not in ("log", "sqrt", "rsqrt")
    },
    **{
        name: (lambda x, name=name: Op.registry[name].reference(x.abs() + 0.1)[0])
        for name in ("log", "sqrt", "rsqrt")
    },
    "gelu": lambda x: pointwise.gelu.reference(x, approximate="none")[0],
    "gelu_tanh": lambda x: pointwise.gelu.reference(x, approximate="tanh")[0],
    "pow 2": lambda x: pointwise.pow_.reference(x, 2)[0],
    "div": lambda x: pointwise.div.reference(x, x.abs() + 1)[0],
    "softmax": lambda x: reduce.softmax.reference(x, dim=-1)[0],
    "sum": lambda x: reduce.sum_.reference(x, dim=-1, keepdim=True)[0],
    "mean": lambda x: reduce.mean.reference(x, dim=-1, keepdim=True)[0],
    "rms_norm": lambda x: norm.rms_norm.reference(x, weight=x[0] * 0 + 1, eps=1e-6)[0],
    "layer_norm": lambda x: norm.layer_norm.reference(x, eps=1e-5)[0],
    **{
        f"glu {a}": (lambda x, a=a: glu.glu.reference(x, x + 1, activation=a)[0])
        for a in glu.ACTIVATIONS
    },
    "glu clamped": lambda x: glu.glu.reference(
        x, x + 1, activation="clamped_swiglu", alpha=1.702, limit=1.0
    )[0],
}


@both
@pytest.mark.parametrize("name", ROWWISE)
def test_token_wise_ops_give_each_token_the_same_bits(dtype: torch.dtype, name: str) -> None:
    for width in (1, 3, 8, 37):
        assert_same_bits(ROWWISE[name], tokens_of(width, dtype=dtype))


@both
@pytest.mark.parametrize("half", [1, 4, 5])
def test_rope_gives_each_token_the_same_bits(dtype: torch.dtype, half: int) -> None:
    frequencies = 1.0 / 10000 ** (torch.arange(half) / half)

    def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        tables = rope.rope_tables.reference(
            positions, frequencies, scale=1.1, dtype=dtype_name(dtype)
        )
        return rope.rope.reference(x, *tables, form="half", start=1)[0]

    positions = torch.randint(0, 4000, (TOKENS,), generator=seeded(2))
    assert_same_bits(turned, tokens_of(3, 2 * half + 1, dtype=dtype), positions)


@both
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("experts", [6, 64])
def test_router_gives_each_token_the_same_bits(
    dtype: torch.dtype, score: str, experts: int
) -> None:
    def weights(x: torch.Tensor) -> torch.Tensor:
        found = moe.router.reference(x, k=4, score=score, normalize=True, dtype="f32", scale=2.5)
        return torch.cat(found, -1)

    assert_same_bits(weights, tokens_of(experts, dtype=dtype))


@both
@pytest.mark.parametrize(("attrs", "biased"), EXPERT_CASES)
def test_experts_give_each_token_the_same_bits(
    dtype: torch.dtype, attrs: dict[str, Any], biased: bool
) -> None:
    x, weights, indices, *rest = expert_arguments(attrs, biased, dtype_name(dtype), TOKENS)

    given = ("gate_up_bias", "down_bias") if biased else ()

    def mixed_experts(*rows: torch.Tensor) -> torch.Tensor:
        return Case(moe.experts, (), attrs, given).reference((*rows, *rest))[0]

    assert_same_bits(mixed_experts, x, weights, indices, counts=SOME)


@both
@pytest.mark.parametrize(
    ("heads", "groups", "size", "page_size"), [(4, 2, 8, 4), (2, 2, 16, 64), (5, 1, 7, 3)]
)
@pytest.mark.parametrize("attrs", [{}, {"window": 9, "softcap": 2.0}])
def test_cached_attention_gives_each_token_the_same_bits(
    dtype: torch.dtype, heads: int, groups: int, size: int, page_size: int, attrs: dict[str, Any]
) -> None:
    layout = Layout(dtype, heads, groups, size, size, page_size, (TOKENS, 5))
    together = serve(layout, [[(0, TOKENS), (1, 5)]], **attrs)
    for n in COUNTS:
        steps: list[Step] = [[(0, n), (1, n % 6)], [(1, 5 - n % 6), (-1, 2), (0, TOKENS - n)]]
        for a, b in zip(serve(layout, steps, **attrs), together, strict=True):
            assert torch.equal(a, b), f"{n} tokens first"


@both
def test_cached_attention_does_not_see_what_other_slots_hold(dtype: torch.dtype) -> None:
    alone = serve(Layout(dtype, lengths=(40, 1), page_size=8), [[(0, 40)], [(1, 1)]])[0]
    for others in ((1,), (33,), (64, 2)):
        layout = Layout(dtype, lengths=(40, *others), page_size=8)
        for steps in (at_once(layout), mixed(layout)):
            assert torch.equal(serve(layout, steps)[0], alone)


# ---- dtypes


def test_dtype_names_go_both_ways() -> None:
    for name, dtype in TORCH_DTYPES.items():
        assert dtype_name(dtype) == name
    with pytest.raises(TypeError, match=re.escape("torch.quint8 has no name")):
        dtype_name(torch.quint8)
    with pytest.raises(KeyError):
        torch_dtype("f31")


def test_value_of_a_multi_result_op_needs_its_index() -> None:
    x = param(name="x", type=TensorType("f32", (4, 6)))
    values, indices = reduce.topk.all(x, k=2, dim=-1)
    assert (values.type.dtype, indices.type.dtype) == ("f32", "i64")
    assert Value(values.node, 1) == indices
