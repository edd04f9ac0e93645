"""Whether a node works token by token: row t of its results made of row t of its operands alone.

Used by insert-kv-cache: a graph serves tokens of many sequences, in any order, if everything but
attention is token-wise. What counts rows, shifts them or sums over them would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...compiler.axes import Dims
from ...compiler.interpret import compute, random_tensor
from ...compiler.ir import Node, Value
from ...compiler.ops.leaf import param
from ...compiler.types import TensorType, VerifyError, free_symbols

_PROBE_TOKENS = 5


def mixes_tokens(node: Node, tokens: str) -> str | None:
    """Why `node` may mix tokens or count them, None if it works on each alone.

    `tokens` is the symbol T. A value with tokens has them as its first dim, but for unit dims; one
    without does not speak of T. An op without an axis rule is tried on numbers.
    """
    if node.op is param:
        return None
    operands, results = [a.type for a in node.args], list(node.types)
    for type_ in (*operands, *results):
        if _has_rows(type_, tokens) and _axis(type_, tokens) is None:
            return f"{type_} has tokens elsewhere than as its first dim"
    if not any(_has_rows(t, tokens) for t in (*operands, *results)):
        return None
    if not all(_has_rows(t, tokens) for t in results):
        return "its result is over all tokens"
    axes = node.axes
    if axes is None:
        return _probed(node, tokens)
    read = _labels(operands, axes.operands, tokens)
    made = _labels(results, axes.results, tokens)
    if read & axes.by.keys():
        return "it looks tokens up in other tokens"
    if read & (axes.whole | axes.sums):
        return "it works along the tokens"
    alone = len(made) == 1 and made >= read and all(map(axes.is_plain, made))
    return None if alone else "its rows depend on one another or on their number"


def _labels(types: Sequence[TensorType], dims: Sequence[Dims], tokens: str) -> set[str]:
    """The labels of the dims that count the tokens."""
    axes = ((d, _axis(t, tokens)) for t, d in zip(types, dims, strict=True) if _has_rows(t, tokens))
    return {label for d, axis in axes if axis is not None for label in d[axis]}


def _has_rows(type_: TensorType, tokens: str) -> bool:
    return tokens in free_symbols(type_.shape)


def _axis(type_: TensorType, tokens: str) -> int | None:
    """Which dim of `type_` counts the tokens: T alone, with nothing but unit dims before it."""
    axis = next((i for i, d in enumerate(type_.shape) if d != 1), 0)
    alone = str(type_.shape[axis]) == tokens and tokens not in free_symbols(type_.shape[axis + 1 :])
    return axis if type_.rank and alone else None


def _probed(node: Node, tokens: str) -> str | None:
    """The same rows in another order must give the same results in that order."""
    binding = {tokens: _PROBE_TOKENS}
    generator = torch.Generator().manual_seed(0)
    order = torch.tensor([3, 0, 4, 1, 2])

    def turned(x: Any, value: Value) -> Any:
        axis = _axis(value.type, tokens) if _has_rows(value.type, tokens) else None
        return x if axis is None else x.index_select(axis, order)

    try:
        given = tuple(
            a.attrs["value"]
            if a.op.name == "literal"
            else random_tensor(a.type.bind(binding), generator)
            for a in node.args
        )
        straight = compute(node, given, binding)
        mixed = compute(node, tuple(map(turned, given, node.args)), binding)
    except (RuntimeError, ValueError, IndexError, VerifyError) as error:
        return f"it cannot be tried: {error}"
    same = all(
        torch.allclose(turned(a, v), b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b, v in zip(straight, mixed, node.results, strict=True)
    )
    return None if same else "its rows depend on one another or on their number"
