"""aten.* nodes: shapes by probing, arguments of every kind, refusals, equality with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ingot.compiler.interpret import interpret, random_tensor
from ingot.compiler.ir import Graph, Op, Value
from ingot.compiler.ops.aten import aten_op
from ingot.compiler.ops.leaf import param
from ingot.compiler.text import parse, same_structure
from ingot.compiler.types import TensorType, VerifyError, dim, symbol
from ingot.compiler.verify import verify

T, S = symbol("T"), symbol("S")
SYMBOLS = {"T": range(1, 65), "S": range(1, 65)}
BINDINGS = ({"T": 1, "S": 1}, {"T": 5, "S": 3}, {"T": 64, "S": 2})


def f(*shape: Any, dtype: str = "f32") -> TensorType:
    return TensorType(dtype, shape)


# name, operands, attributes, result types, the same in torch
CASES: list[tuple[str, list[TensorType], dict[str, Any], list[TensorType], Callable[..., Any]]] = [
    ("aten.relu.default", [f(T, 4)], {}, [f(T, 4)], torch.relu),
    ("aten.sum.dim_IntList", [f(T, S, 4)], {"dim": (1,)}, [f(T, 4)], lambda x: x.sum(1)),
    (
        "aten.sum.dim_IntList",
        [f(T, 4, dtype="i32")],
        {"dim": (1,), "keepdim": True, "dtype": "f32"},
        [f(T, 1)],
        lambda x: x.sum(1, True, dtype=torch.float32),
    ),
    ("aten.add.Tensor", [f(T, 1), f(1, S)], {}, [f(T, S)], torch.add),
    ("aten.add.Tensor", [f(T, 4), f(4)], {"alpha": 2}, [f(T, 4)], lambda x, y: x + 2 * y),
    ("aten.mul.Scalar", [f(T)], {"other": 2.5}, [f(T)], lambda x: x * 2.5),
    ("aten.pow.Scalar", [f(T)], {"self": 2.0}, [f(T)], lambda x: 2.0**x),
    (
        "aten.flatten.using_ints",
        [f(T, S, 4)],
        {"start_dim": 0, "end_dim": -1},
        [f(4 * T * S)],
        torch.flatten,
    ),
    (
        "aten.cat.default",
        [f(T, 4), f(S, 4), f(2, 4)],
        {"tensors": 3, "dim": 0},
        [f(T + S + 2, 4)],
        lambda *x: torch.cat(x),
    ),
    (
        "aten.constant_pad_nd.default",
        [f(T, 4)],
        {"pad": (1, 2, T, 0), "value": 7.0},
        [f(2 * T, 7)],
        lambda x: torch.nn.functional.pad(x, (1, 2, len(x), 0), value=7.0),
    ),
    ("aten.view.default", [f(T, 6)], {"size": (2 * T, 3)}, [f(2 * T, 3)], lambda x: x.view(-1, 3)),
    (
        "aten.slice.Tensor",
        [f(T, 8)],
        {"dim": 1, "start": 2, "end": None, "step": 3},
        [f(T, 2)],
        lambda x: x[:, 2::3],
    ),
    (
        "aten.index.Tensor",
        [f(T, 8), f(3, dtype="i64")],
        {"indices": (False, True)},
        [f(T, 3)],
        lambda x, i: x[:, i],
    ),
    (
        "aten.index.Tensor",
        [f(4, 8), f(T, dtype="i64"), f(T, dtype="i64")],
        {"indices": (True, True)},
        [f(T)],
        lambda x, i, j: x[i, j],
    ),
    ("aten.clamp.Tensor", [f(T), f(T)], {"min": None}, [f(T)], lambda x, y: torch.clamp(x, max=y)),
    ("aten.clamp.default", [f(T)], {"min": None, "max": 0.5}, [f(T)], lambda x: x.clamp(max=0.5)),
    (
        "aten.convolution.default",
        [f(1, 4, 8), f(6, 4, 3)],
        {
            "bias": None,
            "stride": (1,),
            "padding": (1,),
            "dilation": (1,),
            "transposed": False,
            "output_padding": (0,),
            "groups": 1,
        },
        [f(1, 6, 8)],
        lambda x, w: torch.conv1d(x, w, padding=1),
    ),
    (
        "aten.native_layer_norm.default",
        [f(T, 4), f(4), f(4)],
        {"normalized_shape": (4,), "eps": 1e-5},
        [f(T, 4), f(T, 1), f(T, 1)],
        lambda x, w, b: torch.native_layer_norm(x, (4,), w, b, 1e-5),
    ),
    (
        "aten.native_layer_norm.default",
        [f(T, 4)],
        {"normalized_shape": (4,), "weight": None, "bias": None, "eps": 1e-5},
        [f(T, 4), f(T, 1), f(T, 1)],
        lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5),
    ),
    (
        "aten.split_with_sizes.default",
        [f(T, 8)],
        {"split_sizes": (3, 5), "dim": 1},
        [f(T, 3), f(T, 5)],
        lambda x: x.split((3, 5), 1),
    ),
    ("aten.unbind.int", [f(3, T)], {"dim": 0}, [f(T)] * 3, torch.unbind),
    (
        "aten.topk.default",
        [f(T, 8)],
        {"k": 2},
        [f(T, 2), f(T, 2, dtype="i64")],
        lambda x: x.topk(2),
    ),
    ("aten.max.dim", [f(T, 8)], {"dim": 1}, [f(T), f(T, dtype="i64")], lambda x: x.max(1)),
    (
        "aten._to_copy.default",
        [f(T)],
        {"dtype": "bf16"},
        [f(T, dtype="bf16")],
        lambda x: x.bfloat16(),
    ),
    ("aten._to_copy.default", [f(T)], {"dtype": None}, [f(T)], lambda x: x),
    (
        "aten.full.default",
        [],
        {"size": (T, 3), "fill_value": 2.0, "dtype": "f64"},
        [f(T, 3, dtype="f64")],
        lambda T, S: torch.full((T, 3), 2.0, dtype=torch.float64),
    ),
    (
        "aten.arange.start_step",
        [],
        {"start": 0, "end": 2 * T, "step": 2, "dtype": "i64"},
        [f(T, dtype="i64")],
        lambda T, S: torch.arange(0, 2 * T, 2),
    ),
    (
        "aten.scalar_tensor.default",
        [],
        {"s": 1.5, "dtype": "f32"},
        [f()],
        lambda T, S: torch.tensor(1.5),
    ),
    (
        "aten.ones_like.default",
        [f(T)],
        {"dtype": "i32"},
        [f(T, dtype="i32")],
        lambda x: torch.ones_like(x, dtype=torch.int32),
    ),
    ("aten.cumsum.default", [f(T, 4)], {"dim": 0}, [f(T, 4)], lambda x: x.cumsum(0)),
    (
        "aten.view_as_complex.default",
        [f(T, 3, 2)],
        {},
        [f(T, 3, dtype="c64")],
        torch.view_as_complex,
    ),
    ("aten.outer.default", [f(T), f(T)], {}, [f(T, T)], torch.outer),
    ("aten.eq.Scalar", [f(T)], {"other": 0}, [f(T, dtype="bool")], lambda x: x == 0),
]
IDS = [f"{c[0]}-{i}" for i, c in enumerate(CASES)]


def graph_of(name: str, types: list[TensorType], attrs: dict[str, Any]) -> Graph:
    params = tuple(param(name=f"p{i}", type=t) for i, t in enumerate(types))
    sizes = param(name="sizes", type=TensorType("bool", (T, S)))  # binds both symbols
    return Graph("g", (*params, sizes), aten_op(name).all(*params, **attrs), SYMBOLS)


@pytest.mark.parametrize(("name", "types", "attrs", "results", "same"), CASES, ids=IDS)
def test_types_by_probing_and_values_as_in_torch(
    name: str, types: list[TensorType], attrs: dict[str, Any], results: list[TensorType], same: Any
) -> None:
    graph = graph_of(name, types, attrs)
    found = [o.type for o in graph.outputs]
    assert found == [TensorType(t.dtype, tuple(map(dim, t.shape))) for t in results]
    verify(graph)
    assert same_structure(parse(str(graph)), graph)
    for binding in BINDINGS:
        g = torch.Generator().manual_seed(1)
        tensors = [random_tensor(p.type.bind(binding), g) for p in graph.params]
        inputs = {p.attrs["name"]: t for p, t in zip(graph.params, tensors, strict=True)}
        got = interpret(graph, inputs).outputs
        expected = same(*tensors[:-1]) if tensors[:-1] else same(**binding)
        expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_an_op_is_made_once() -> None:
    assert aten_op("aten.relu.default") is aten_op("aten.relu.default")
    assert Op.registry["aten.relu.default"] is aten_op("aten.relu.default")


def test_two_symbols_and_their_products() -> None:
    x = param(name="x", type=f(T, 2 * S + 1, 3))
    (flat,) = aten_op("aten.reshape.default").all(x, shape=(-1,))
    assert flat.type == f(dim(6 * T * S + 3 * T))
    assert aten_op("aten.t.default")(param(name="y", type=f(T, S))).type == f(S, T)


def call(name: str, *types: TensorType, **attrs: Any) -> tuple[Value, ...]:
    return aten_op(name).all(*(param(name="x", type=t) for t in types), **attrs)


@pytest.mark.parametrize(
    ("name", "types", "attrs", "message"),
    [
        ("aten.frobnicate.default", [f(T)], {}, "has no operator 'aten.frobnicate.default'"),
        ("aten.relu.out_of", [f(T)], {}, "has no operator 'aten.relu.out_of'"),
        ("aten.relu", [f(T)], {}, "has no operator 'aten.relu'"),
        ("aten.relu_.default", [f(T)], {}, "writes into its arguments; functionalise"),
        ("aten.add.out", [f(T), f(T)], {}, "writes into its arguments"),
        ("aten.add_.Tensor", [f(T), f(T)], {}, "writes into its arguments"),
        (
            "aten.mm.default",
            [f(T, 4), f(5, 6)],
            {},
            r"torch refuses \(f32\[211, 4\], f32\[5, 6\]\)",
        ),
        ("aten.mm.default", [f(T, 4)], {}, "aten.mm.default"),
        ("aten.relu.default", [f(T), f(T)], {}, "expected tensors for .*found 1 more"),
        ("aten.relu.default", [f(T)], {"alpha": 2}, r"expected arguments of .*found \['alpha'\]"),
        ("aten.cat.default", [f(T), f(T)], {"dim": 0}, "an integer for tensors, found none"),
        ("aten.cat.default", [f(T)], {"tensors": 2}, "aten.cat.default"),
        ("aten.sum.dim_IntList", [f(T)], {"dim": (3,)}, "torch refuses"),
        ("aten.item.default", [f()], {}, "aten.item.default"),
        ("aten.size.int", [f(T)], {"dim": 0}, "expected tensors as results, found"),
        ("aten.nonzero.default", [f(T)], {}, "aten.nonzero.default"),
        ("aten._to_copy.default", [f(T)], {"dtype": "f31"}, "'f31'"),
        (
            "aten.split.Tensor",
            [f(T)],
            {"split_size": 64},
            "result shapes that are polynomials of T|number of results",
        ),
        (
            "aten.slice.Tensor",
            [f(T)],
            {"dim": 0, "start": 0, "end": 100},
            "polynomials of T; at 96 found",
        ),
        (
            "aten.slice.Tensor",
            [f(T)],
            {"dim": 0, "start": 0, "end": 900},
            "polynomials of T; at 1031 found",
        ),
        ("aten.slice.Tensor", [f(T)], {"dim": 0, "step": 2}, "polynomials of T"),
    ],
)
def test_refusals(name: str, types: list[TensorType], attrs: dict[str, Any], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        call(name, *types, **attrs)


def test_absent_optional_tensors_must_be_said() -> None:
    """Left out, an optional tensor is an operand; None says that there is none."""
    with pytest.raises(VerifyError):
        call("aten.clamp.Tensor", f(T))
    assert call("aten.clamp.Tensor", f(T), f(T), f(T))[0].type == f(T)
    assert call("aten.clamp.Tensor", f(T), f(T), max=None)[0].type == f(T)
