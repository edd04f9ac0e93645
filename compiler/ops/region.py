"""region: element-wise ops over one shape as one node, with a body of steps.

Attribute `steps` is the body: a step is (op, operands, (name, value) of each attribute ...). Its
operands are numbers of values - the operands of the region count from 0, then come the results of
the steps - or literals, (dtype, number). `outputs` are the numbers of what the region gives:

    %2 = region(%0, %1, steps=[['mul', [0, 1]], ['add', [2, ['f32', 1.0]]]], outputs=[3])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ir import Cost, Node, Op, Operands, Sample, Value, moved
from ..torch_types import dtype_name, literals_as_tensors
from ..types import TensorType, Types, VerifyError, dim
from .glu import glu
from .leaf import literal
from .pointwise import POINTWISE
from .shape import arange, full

# What a step may be: element-wise ops, and tensors out of nothing.
STEP_OPS: Mapping[str, Op] = {op.name: op for op in (*POINTWISE, glu, full, arange)}
Steps = tuple[tuple[Any, ...], ...]


def step_types(operands: Sequence[TensorType], steps: Steps) -> Types:
    """The type of each step's result; VerifyError for a body that is none."""
    types = list(operands)
    for name, inputs, *named in steps:
        known = all(isinstance(i, tuple) or 0 <= i < len(types) for i in inputs)
        if name not in STEP_OPS or not known:
            raise VerifyError(
                f"region: expected element-wise ops of operands and earlier steps, found {name} of "
                f"{list(inputs)} after {len(types)} values"
            )
        try:
            args = tuple(_number(*i) if isinstance(i, tuple) else types[i] for i in inputs)
            types += STEP_OPS[name].types(args, dict(named))
        except VerifyError as error:
            raise VerifyError(f"region: {error}") from error
    return tuple(types[len(operands) :])


def _number(dtype: str, value: Any) -> TensorType:
    (type_,) = literal.types((), {"value": value, "dtype": dtype})
    return type_


def _infer(*operands: TensorType, steps: Steps, outputs: tuple[int, ...]) -> Types:
    made = step_types(operands, steps)
    numbers = [i - len(operands) for i in outputs]
    if not made or not numbers or not all(0 <= i < len(made) for i in numbers):
        raise VerifyError(
            f"region: expected results among those of {len(made)} steps, found {list(numbers)}"
        )
    if len({t.shape for t in made}) > 1:
        raise VerifyError(
            f"region: expected steps over one shape, found {', '.join(map(str, made))}"
        )
    return tuple(made[i] for i in numbers)


def _reference(
    *operands: torch.Tensor, steps: Steps, outputs: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    values: list[torch.Tensor] = [*operands]
    for name, inputs, *named in steps:
        args = [i[1] if isinstance(i, tuple) else values[i] for i in inputs]
        dtypes = [i[0] if isinstance(i, tuple) else dtype_name(values[i].dtype) for i in inputs]
        values += STEP_OPS[name].reference(*literals_as_tensors(args, dtypes), **dict(named))
    return tuple(values[i] for i in outputs)


def _cost(operands: Operands, results: Types, *, steps: Steps, **attrs: Any) -> Cost:
    """The arithmetic of every step; operands and results are moved once, and nothing between."""
    costs = (STEP_OPS[name].cost({}, results[:1], **dict(named)) for name, _, *named in steps)
    return Cost(dim(sum(cost.flops for cost in costs)), moved(operands, results))


_X = TensorType("f32", (3, 4))
region = Op(
    "region",
    _infer,
    _reference,
    _cost,
    (
        Sample(
            (_X, _X),
            {
                "steps": (
                    ("cast", (0,), ("dtype", "f32")),
                    ("cast", (1,), ("dtype", "f32")),
                    ("mul", (2, 3)),
                    ("add", (4, ("f32", 0.5))),
                    ("where", (("bool", True), 5, 4)),
                ),
                "outputs": (6, 4),
            },
        ),
        Sample(
            (TensorType("bf16", (3, 4)),),
            {
                "steps": (
                    ("cast", (0,), ("dtype", "f32")),
                    ("glu", (1, 1), ("activation", "silu")),
                    ("cast", (2,), ("dtype", "bf16")),
                ),
                "outputs": (3,),
            },
        ),
    ),
)


def region_of(nodes: Sequence[Node], outputs: Sequence[Value]) -> Node:
    """`nodes`, arguments before users, as one node that gives `outputs`."""
    inside = set(nodes)
    operands = tuple(
        dict.fromkeys(
            a for n in nodes for a in n.args if a.node not in inside and a.op is not literal
        )
    )
    at = {value: i for i, value in enumerate((*operands, *map(Value, nodes)))}

    def number(value: Value) -> int | tuple[str, Any]:
        return (value.type.dtype, value.attrs["value"]) if value.op is literal else at[value]

    steps = tuple((n.op.name, tuple(map(number, n.args)), *n.attrs.items()) for n in nodes)
    attrs = {"steps": steps, "outputs": tuple(at[output] for output in outputs)}
    return region.node(operands, attrs, nodes[-1].source)
