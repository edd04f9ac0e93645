"""project_heads and moe_gating equal the chains of ops that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from ingot.compiler.ir import Op
from ingot.compiler.ops import linear, moe, norm, rope
from ingot.compiler.ops.gating import moe_gating
from ingot.compiler.ops.heads import NORM_OF, project_heads
from ingot.compiler.ops.leaf import param
from ingot.compiler.torch_types import type_of
from ingot.compiler.types import TensorType, VerifyError, symbol
from op_cases import Case

ROWS, K = 9, 24
HEADS, DIMS, HALF = (4, 2, 2), (8, 8, 12), 3  # the last part has heads of another size
N = sum(h * d for h, d in zip(HEADS, DIMS, strict=True))
EPS, POST_EPS, HEAD_EPS = 1e-3, 1e-2, 1e-1  # unlike each other, so that a mix-up shows
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
PROLOGUES = {
    (): {},
    ("norm",): {"eps": EPS},
    ("norm", "delta", "post_norm"): {"eps": EPS, "post_eps": POST_EPS},
}
prologues = pytest.mark.parametrize("prologue", list(PROLOGUES), ids="-".join)
Given = dict[str, torch.Tensor]


def drawn(sizes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Given:
    def one(i: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(i)).to(dtype)

    return {name: one(i, size) for i, (name, size) in enumerate(sizes.items())}


INPUTS = {"x": (ROWS, K), "norm": (K,), "delta": (ROWS, K), "post_norm": (K,)}


def multiplied(given: Given, prologue: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """n and s through the ops by themselves."""
    s = given["x"]
    if "delta" in prologue:
        s = s + norm.rms_norm.reference(given["delta"], weight=given["post_norm"], eps=POST_EPS)[0]
    if "norm" not in prologue:
        return s, s
    return norm.rms_norm.reference(s, weight=given["norm"], eps=EPS)[0], s


def computed(op: Op, given: Given, optional: tuple[str, ...], **attrs: Any) -> Any:
    case = Case(op, (), attrs, optional)
    args = [given[name] for name in ("x", "weight", *optional)]
    results = case.reference(args)
    assert tuple(map(type_of, results)) == case.types([*map(type_of, args)])
    return results


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= TOLERANCE[found.dtype]


# ---- project_heads


def heads_inputs(dtype: torch.dtype, norm_of: str) -> Given:
    parts = zip(HEADS, DIMS, strict=True)
    widths = [h * d if norm_of == "part" else d for h, d in parts]
    norms = {f"norm_{i}": (width,) for i, width in enumerate(widths)}
    sizes = {**INPUTS, "weight": (N, K), "bias": (N,), **norms, "cos": (ROWS, HALF)}
    return drawn({**sizes, "sin": (ROWS, HALF)}, dtype)


def heads_by_ops(
    given: Given, optional: tuple[str, ...], prologue: tuple[str, ...], attrs: dict[str, Any]
) -> list[torch.Tensor]:
    n, s = multiplied(given, prologue)
    bias = given["bias"] if "bias" in optional else None
    (y,) = linear.linear.reference(n, given["weight"], bias=bias)
    parts: list[torch.Tensor] = []
    start = 0
    for i, (heads, size) in enumerate(zip(HEADS, DIMS, strict=True)):
        part = y[:, start : (start := start + heads * size)]
        steps: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "split": lambda x, size=size: x.view(ROWS, -1, size)
        }
        if attrs.get("rotate", (False,) * 3)[i]:
            steps["turn"] = lambda x: rope.rope.reference(
                x, given["cos"], given["sin"], form=attrs["form"], start=attrs["start"]
            )[0]
        order = list(steps)
        if f"norm_{i}" in optional:
            place = {"part": 0, "head": 1, "rotated head": len(order)}[attrs["norm_of"]]
            order.insert(place, "norm")
        for step in order:
            if step == "norm":
                (part,) = norm.rms_norm.reference(part, weight=given[f"norm_{i}"], eps=HEAD_EPS)
            else:
                part = steps[step](part)
        parts.append(part)
    return [*parts, *((s,) if "delta" in prologue else ())]


@dtypes
@prologues
@pytest.mark.parametrize("norm_of", NORM_OF)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("turned", [None, *((f, s) for f in rope.FORMS for s in (0, 2))], ids=str)
def test_heads_equal_the_ops(
    dtype: torch.dtype,
    prologue: tuple[str, ...],
    norm_of: str,
    biased: bool,
    turned: tuple[str, int] | None,
) -> None:
    """Every norm of every form of RoPE, of parts 0 and 2; parts 0 and 1 are turned."""
    given = heads_inputs(dtype, norm_of)
    tables = ("cos", "sin") if turned else ()
    optional = (*prologue, *(("bias",) if biased else ()), "norm_0", "norm_2", *tables)
    attrs: dict[str, Any] = {"heads": HEADS, "dims": DIMS, "norm_of": norm_of, "head_eps": HEAD_EPS}
    if turned:
        attrs |= {"rotate": (True, True, False), "form": turned[0], "start": turned[1]}
    found = computed(project_heads, given, optional, **attrs, **PROLOGUES[prologue])
    exact = {name: x.double() for name, x in given.items()}
    expected = heads_by_ops(exact, optional, prologue, attrs)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_heads_are_rounded_once() -> None:
    """In bf16 256 + 1 is 256; a norm sees 257."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    weight = torch.tensor([[256.0], [0.0]], dtype=torch.bfloat16)
    bias = torch.tensor([1.0, 1.0], dtype=torch.bfloat16)
    gain = torch.tensor([1.0, 256.0], dtype=torch.bfloat16)
    attrs = {"heads": (1,), "dims": (2,), "head_eps": 0.0}
    (found,) = project_heads.reference(one, weight, bias=bias, norm_0=gain, **attrs)
    exact = torch.tensor([257.0, 1.0]) * (2 / (257.0**2 + 1)) ** 0.5 * gain.float()
    assert torch.equal(found.flatten(), exact.bfloat16())


@pytest.mark.parametrize("op", [project_heads, moe_gating], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_has_the_same_bits_in_every_batch(op: Op, dtype: torch.dtype) -> None:
    prologue = ("norm", "delta", "post_norm")
    attrs: dict[str, Any] = dict(PROLOGUES[prologue])
    if op is project_heads:
        given, own = heads_inputs(dtype, "head"), ("bias", "norm_0", "norm_1", "cos", "sin")
        attrs |= {"heads": HEADS, "dims": DIMS, "head_eps": HEAD_EPS}
        attrs |= {"rotate": (True, True, False), "form": "half"}
    else:
        given, own = gating_inputs(dtype, dtype), ("bias", "correction")
        attrs |= {**CHOICE, "shared": 2}
    together = computed(op, given, (*prologue, *own), **attrs)
    for start in range(ROWS):
        for stop in range(start + 1, ROWS + 1):
            rowwise = ("x", "delta", "cos", "sin")
            part = {k: v[start:stop] if k in rowwise else v for k, v in given.items()}
            found = computed(op, part, (*prologue, *own), **attrs)
            assert all(torch.equal(a, b[start:stop]) for a, b in zip(found, together, strict=True))


# ---- moe_gating

E = 12
CHOICE: dict[str, Any] = {
    "k": 3,
    "score": "sigmoid",
    "normalize": True,
    "dtype": "f32",
    "logits": "f32",
    "scale": 2.5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "softmax": {"score": "softmax", "normalize": False, "scale": 1.0},
    "sigmoid": {"sum_eps": 0.5},
    "groups": {"groups": 4, "topk_groups": 2, "group_score": "max"},
    "groups by two": {"groups": 4, "topk_groups": 2, "group_score": "top2", "sum_eps": 0.5},
}


def gating_inputs(dtype: torch.dtype, of_weight: torch.dtype) -> Given:
    given = drawn({**INPUTS, "weight": (E, K), "bias": (E,)}, dtype)
    correction = drawn({"correction": (E,)}, torch.float32)
    return {**given, "weight": given["weight"].to(of_weight), **correction}


@prologues
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logits", ["f32", "bf16"])
def test_gating_equals_the_ops(
    prologue: tuple[str, ...],
    family: str,
    dtype: torch.dtype,
    of_weight: torch.dtype,
    logits: str,
) -> None:
    given = gating_inputs(dtype, of_weight)
    optional = (*prologue, "bias", "correction")
    attrs = {**CHOICE, **FAMILIES[family], "logits": logits}
    found = computed(moe_gating, given, optional, **attrs, **PROLOGUES[prologue])
    # n and s are tested with linear: here they are what was found.
    n, s = multiplied(given, prologue)
    if "norm" in prologue:
        assert_close(found[2], n)
        n = found[2]
    if "delta" in prologue:
        assert_close(found[3], s)
    to = torch.float32 if logits == "f32" else torch.bfloat16
    (scores,) = linear.linear.reference(n.to(to), given["weight"].to(to), bias=given["bias"].to(to))
    routing = {key: v for key, v in attrs.items() if key not in ("logits", "sum_eps")}
    eps = attrs.get("sum_eps", 0.0)
    expected = moe.router.reference(scores, correction=given["correction"], **routing, eps=eps)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_router_gives_columns_for_shared_experts(dtype: str) -> None:
    scores = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    attrs: dict[str, Any] = {"k": 2, "score": "softmax", "normalize": True, "scale": 3.0}
    plain = moe.router.reference(scores, **attrs, dtype=dtype)
    weights, indices = moe.router.reference(scores, **attrs, dtype=dtype, shared=3)
    assert torch.equal(weights[:, :2], plain[0])
    assert torch.equal(indices[:, :2], plain[1])
    assert weights[:, 2:].eq(1).all()
    assert indices[:, 2:].tolist() == [[8, 9, 10]] * 5


# ---- what infer refuses

T = symbol("T")
X = TensorType("f32", (T, 8))


def t(*shape: Any, dtype: str = "f32") -> TensorType:
    return TensorType(dtype, shape)


QKV: dict[str, Any] = {"heads": (2, 1, 1), "dims": (4, 4, 4)}
TABLES = {"cos": t(T, 2), "sin": t(T, 2)}
PLACES = {
    "slots": t(T, dtype="i32"),
    "positions": t(T, dtype="i32"),
    "page_table": t(2, 3, dtype="i32"),
}
TURN: dict[str, Any] = {**TABLES, "rotate": (True, True, False), "form": "half"}
ROUTER: dict[str, Any] = {k: CHOICE[k] for k in ("k", "score", "normalize", "dtype", "logits")}
REFUSALS: dict[str, tuple[Op, tuple[TensorType, ...], dict[str, Any], str]] = {
    "parts without sizes": (project_heads, (X, t(16, 8)), {"heads": (2, 1), "dims": (4,)}, "dims"),
    "no parts": (project_heads, (X, t(16, 8)), {"heads": (), "dims": ()}, "one to three parts"),
    "no heads": (project_heads, (X, t(16, 8)), {**QKV, "heads": (4, 0, 0)}, "one to three parts"),
    "rows": (project_heads, (X, t(17, 8)), QKV, r"weight \[16, K\]"),
    "dtype": (project_heads, (X, t(16, 8, dtype="bf16")), QKV, "of its dtype"),
    "bias": (project_heads, (X, t(16, 8)), {**QKV, "bias": t(8)}, r"bias \[16\]"),
    "a cache without places": (
        project_heads,
        (X, t(16, 8)),
        {**QKV, "cache_1": t(6, 4, 1, 4)},
        "found 1 caches, 1 of results, and 0 of these three",
    ),
    "a cache of no part": (
        project_heads,
        (X, t(16, 8)),
        {"heads": (4,), "dims": (4,), "cache_1": t(6, 4, 1, 4), **PLACES},
        "found 1 caches, 0 of results, and 3 of these three",
    ),
    "a cache of other heads": (
        project_heads,
        (X, t(16, 8)),
        {**QKV, "cache_1": t(6, 4, 2, 4), **PLACES},
        "expected rows .* that fit cache",
    ),
    "head norm": (
        project_heads,
        (X, t(16, 8)),
        {**QKV, "norm_0": t(8), "head_eps": 0.1},
        r"norm_0 \[4\], found f32\[8\]",
    ),
    "part norm": (
        project_heads,
        (X, t(16, 8)),
        {**QKV, "norm_0": t(4), "head_eps": 0.1, "norm_of": "part"},
        r"norm_0 \[8\], found f32\[4\]",
    ),
    "a norm of nothing known": (
        project_heads,
        (X, t(16, 8)),
        {**QKV, "norm_0": t(4), "head_eps": 0.1, "norm_of": "token"},
        "norm_of one of",
    ),
    "a norm without eps": (
        project_heads,
        (X, t(16, 8)),
        {**QKV, "norm_0": t(4)},
        "a head_eps where",
    ),
    "eps without a norm": (project_heads, (X, t(16, 8)), {**QKV, "head_eps": 0.1}, "a head_eps"),
    "a norm of no part": (
        project_heads,
        (X, t(16, 8)),
        {"heads": (4,), "dims": (4,), "norm_1": t(4), "head_eps": 0.1},
        r"norms of parts \[1\]",
    ),
    "tables for nothing": (
        project_heads,
        (X, t(16, 8)),
        {**QKV, **TABLES},
        "one `rotate` a part",
    ),
    "no tables": (
        project_heads,
        (X, t(16, 8)),
        {**QKV, "rotate": (True, True, False), "form": "half"},
        "tables none",
    ),
    "no form": (project_heads, (X, t(16, 8)), {**QKV, **TURN, "form": ""}, "form ''"),
    "a form that is none": (
        project_heads,
        (X, t(16, 8)),
        {**QKV, **TURN, "form": "quarter"},
        "form is one of",
    ),
    "rotate of two": (
        project_heads,
        (X, t(16, 8)),
        {**QKV, **TURN, "rotate": (True, True)},
        "one `rotate` a part",
    ),
    "tables too wide": (
        project_heads,
        (X, t(16, 8)),
        {**QKV, **TURN, "cos": t(T, 3), "sin": t(T, 3)},
        "project_heads: rope: tables",
    ),
    "gating weight": (moe_gating, (X, t(6, 9)), ROUTER, r"weight \[E, K\]"),
    "gating logits": (moe_gating, (X, t(6, 8)), {**ROUTER, "logits": "i32"}, "dtype of the logits"),
    "gating bias": (
        moe_gating,
        (X, t(6, 8)),
        {**ROUTER, "bias": t(5)},
        r"float bias \[6\], found f32\[5\]",
    ),
    "correction": (
        moe_gating,
        (X, t(6, 8)),
        {**ROUTER, "correction": t(5)},
        "moe_gating: router: expected a float correction",
    ),
    "too many": (moe_gating, (X, t(2, 8)), ROUTER, "moe_gating: router: expected logits"),
    "shared": (moe_gating, (X, t(6, 8)), {**ROUTER, "shared": -1}, "at least 0 shared experts"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    op, args, attrs, message = REFUSALS[name]
    with pytest.raises(VerifyError, match=message):
        op.types(args, attrs)


def test_costs_are_those_of_the_ops() -> None:
    """A product, 4 flops a normed and 3 a turned element; every operand moved once."""
    args = (t(5, 8), t(16, 8), t(8), t(4), t(5, 2), t(5, 2))
    attrs = {**QKV, "rotate": (True, True, False), "form": "half", "eps": 0.1, "head_eps": 0.1}
    case = Case(project_heads, args, attrs, ("norm", "norm_0", "cos", "sin"))
    results = case.types(args)
    cost = case.cost(args, results)
    assert cost.flops == 2 * 5 * 16 * 8 + 4 * 5 * 8 + 4 * 5 * 8 + 3 * 5 * 12
    assert cost.bytes == sum(a.nbytes for a in (*args, *results))
    args = (t(5, 8), t(6, 8), t(8))
    case = Case(moe_gating, args, {**ROUTER, "eps": 0.1}, ("norm",))
    assert case.cost(args, case.types(args)).flops == 2 * 5 * 6 * 8 + 8 * 5 * 6 + 4 * 5 * 8


def test_rows_for_a_cache_are_priced_once() -> None:
    """The product writes them as results or into the cache; the cache itself does not move."""
    x, w = (param(name=n, type=type_) for n, type_ in (("x", X), ("w", t(16, 8))))
    plain = project_heads.node((x, w), QKV)
    places = {n: param(name=n, type=type_) for n, type_ in PLACES.items()}
    caches = {n: param(name=n, type=t(600, 64, 1, 4)) for n in ("cache_1", "cache_2")}
    node = project_heads.node((x, w), {**QKV, **caches, **places})
    assert [(a.row, node.args[a.cache], a.updated) for a in node.appends] == [
        (1, caches["cache_1"], 3),
        (2, caches["cache_2"], 4),
    ]
    index = sum(p.type.nbytes for p in places.values())
    assert sympy.simplify(node.cost.bytes - plain.cost.bytes - index) == 0
    assert node.cost.flops == plain.cost.flops
