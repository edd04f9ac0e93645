"""region: a body of element-wise steps, what it computes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from ingot.compiler.interpret import compute
from ingot.compiler.ops.leaf import literal, param
from ingot.compiler.ops.pointwise import add, cast, mul
from ingot.compiler.ops.region import region, region_of
from ingot.compiler.types import TensorType, VerifyError, symbol

X = param(name="x", type=TensorType("bf16", (symbol("T"), 4)))


def test_steps_round_and_take_numbers_as_their_ops_do() -> None:
    """A number beside a tensor of its dtype is not rounded; one beside others is a tensor."""
    scaled = mul(X, literal(value=0.3, dtype="bf16"))
    numbers = [cast(literal(value=0.3, dtype=d), dtype="bf16") for d in ("bf16", "f64")]
    with_both = add(mul(scaled, numbers[0]), numbers[1])
    alone = (*(n.node for n in numbers), scaled.node, with_both.node.args[0].node, with_both.node)
    assert len({n.types[0].shape for n in alone}) > 1
    node = region_of(alone[2:], (scaled, with_both))
    assert node.args == (X, *numbers)
    x = torch.randn(5, 4).bfloat16()
    args = (x, *(compute(n.node, (0.3,), {})[0] for n in numbers))
    first, second = compute(node, args, {"T": 5})
    assert torch.equal(first, x * 0.3)
    assert torch.equal(second, x * 0.3 * args[1] + args[2])


def test_only_what_enters_and_leaves_is_moved() -> None:
    steps = [mul(X, X)]
    for _ in range(3):
        steps.append(add(steps[-1], X))
    node = region_of([s.node for s in steps], steps[-1:])
    assert node.cost.flops == 4 * X.type.numel
    assert node.cost.bytes == 2 * X.type.nbytes


REFUSALS = {
    "no element-wise op": ((("softmax", (0,), ("dim", -1)),), (1,), "found softmax of"),
    "an op that is none": ((("no such op", (0,)),), (1,), "found no such op of"),
    "a later step": ((("neg", (2,)), ("neg", (1,))), (2,), r"found neg of \[2\] after 1 values"),
    "no steps": ((), (0,), "among those of 0 steps"),
    "no outputs": ((("neg", (0,)),), (), "among those of 1 steps"),
    "an operand as an output": ((("neg", (0,)),), (0,), r"found \[-1\]"),
    "two shapes": (
        (("neg", (0,)), ("full", (), ("value", 1.0), ("shape", (4,)), ("dtype", "bf16"))),
        (1,),
        "expected steps over one shape",
    ),
    "other dtypes": ((("add", (0, ("f32", 1.0))),), (1,), "region: add: expected"),
    "a number of no dtype": ((("add", (0, (1.0,))),), (1,), "region: cannot take"),
    "a number that is none": ((("add", (0, ("bf16", "1"))),), (1,), "region: literal: "),
    "a step that is none": ((("neg",),), (1,), "region: cannot take"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    steps, outputs, message = REFUSALS[name]
    with pytest.raises(VerifyError, match=message):
        region.node((X,), {"steps": steps, "outputs": outputs})
