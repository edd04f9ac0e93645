"""Attributes of another kind than the op's are refused where a node is made, in text too."""

from __future__ import annotations

import re
from typing import Any

import pytest
from ingot.compiler.attribute_kinds import KINDS
from ingot.compiler.ir import Op
from ingot.compiler.text import parse
from ingot.compiler.types import TensorType, VerifyError, symbol
from op_cases import Case

VALUES = (True, 3, 0.5, "x", None, symbol("T"), (), (1,), (symbol("T"),), (True,), (0.5,), ((1,),))
VALUES = (*VALUES, TensorType("f32", (2,)), ("x",), (None,), 1 + 2j, {"a": 1}, [1], b"x")
TAKEN = {
    "bool": "True",
    "int": "3",
    "float": "3 0.5",
    "bool | int | float": "True 3 0.5",
    "str": "x",
    "Dim": "3 T",
    "Shape": "() (1,) (T,)",
    "tuple[int, ...]": "() (1,)",
    "tuple[bool, ...]": "() (True,)",
    "TensorType": "f32[2]",
    "Steps": "() ((1,),)",
}


@pytest.mark.parametrize("annotation", KINDS)
def test_what_a_kind_takes(annotation: str) -> None:
    plain = annotation.removesuffix(" | None")
    taken = TAKEN[plain].split(" ") + ["None"] * (plain != annotation)
    assert [str(v) for v in VALUES if KINDS[annotation].takes(v)] == [
        str(v) for v in VALUES if str(v) in taken
    ]


ATTRIBUTES = [
    pytest.param(op, name, id=f"{op.name}-{name}")
    for op in Op.registry.values()
    for name in op.attributes.kinds
    if op.samples
]


@pytest.mark.parametrize(("op", "name"), ATTRIBUTES)
def test_attributes_of_another_kind_are_refused(op: Op, name: str) -> None:
    for sample in op.samples:
        case = Case.of(op, sample)
        assert case.refuses(case.args) is None
        for value in VALUES:
            if op.attributes.kinds[name].takes(value):
                continue
            expected = f"{op.name}: expected {op.attributes.kinds[name].words} for {name}, found "
            assert case.changed(**{name: value}).refuses(case.args) == f"{expected}{value!r:.80}"


LINES = {
    "rms_norm(%x, eps='x')": "rms_norm: expected a number for eps, found 'x'",
    "rms_norm(%x, eps=T)": "rms_norm: expected a number for eps, found T",
    "rms_norm(%x, eps=True)": "rms_norm: expected a number for eps, found True",
    "rms_norm(%x)": "rms_norm: expected eps, an attribute; found none",
    "relu(%x, eps=1)": "relu: expected attributes among none; found eps=1",
    "softmax(%x, dim=[1])": "softmax: expected an integer for dim, found (1,)",
    "view(%x, shape=3)": "view: expected a list of dims for shape, found 3",
    "moe_gating(%x, %w, logits='f32', k='2', score='softmax', normalize=True, dtype='f32')": (
        "moe_gating: router: expected an integer for k, found '2'"
    ),
    "region(%x, steps=[['clamp', [0], ['min', 'a'], ['max', 1]]], outputs=[1])": (
        "region: clamp: expected a number for min, found 'a'"
    ),
    "aten.cat.default(%x, tensors='2')": (
        "aten.cat.default: expected an integer for tensors, found '2'"
    ),
    "aten.index.Tensor(%x, indices=7)": (
        "aten.index.Tensor: expected a list of True or False for indices, found 7"
    ),
    "aten.sum.default(%x, dtype=3)": (
        "aten.sum.default: expected a string, or None for dtype, found 3"
    ),
    "aten.leaky_relu.default(%x, negative_slope='x')": (
        "aten.leaky_relu.default: torch refuses (f32[211, 8]) with {'negative_slope': 'x'}: "
        "aten::leaky_relu() Expected a value of type 'number' for argument 'negative_slope' but "
        "instead found type 'str'."
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_text_with_an_attribute_of_another_kind_is_refused_with_its_line(line: str) -> None:
    text = f"graph @g(%x: f32[T, 8], %w: f32[4, 8]) T=1..64 {{\n  %0 = {line} : f32[T, 8]\n}}"
    with pytest.raises(VerifyError) as caught:
        parse(text, trusted=False)
    assert str(caught.value).splitlines()[0] == f"line 2: {LINES[line]}"


def test_a_long_value_is_shown_in_part() -> None:
    value: Any = "x" * 10_000
    with pytest.raises(VerifyError, match=re.escape(f"found a={value!r:.80}") + "$"):
        Op.registry["relu"].types((TensorType("f32", (2,)),), {"a": value})
