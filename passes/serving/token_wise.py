"""Whether a node works token by token: row t of its results made of row t of its operands alone.

Used by insert-kv-cache: a graph serves tokens of many sequences, in any order, if everything but
attention is token-wise. What counts rows, shifts them or sums over them would be silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch

from ...compiler.interpret import compute, random_tensor
from ...compiler.ir import Node, Op, Value
from ...compiler.ops import (
    collective,
    fused,
    gating,
    glu,
    hadamard,
    heads,
    linear,
    mla,
    moe,
    norm,
    pointwise,
    reduce,
    rope,
    shape,
)
from ...compiler.ops.leaf import param
from ...compiler.types import TensorType, VerifyError, free_symbols

# Each row of these is made of the operands' rows, wherever those have rows at all.
_ROW_BY_ROW: frozenset[Op] = pointwise.POINTWISE | {
    *(shape.view, shape.permute, shape.expand, shape.full),
    *(linear.linear, linear.head_linear, linear.matmul, norm.rms_norm, norm.layer_norm, glu.glu),
    *(rope.rope, rope.rope_tables, mla.mla_latent, moe.router, moe.experts),
    *(fused.fused_linear, fused.gated_linear, fused.add_rms_norm),
    *(heads.project_heads, gating.moe_gating, collective.all_reduce),
    hadamard.hadamard,
}
# These work along attrs["dim"], those look up rows of their table.
_ALONG: frozenset[Op] = frozenset(
    (reduce.mean, reduce.sum_, reduce.amax, reduce.softmax, reduce.topk)
    + (shape.slice_, shape.slice_scatter, shape.cat, shape.gather, collective.all_gather)
)
_TABLE = {linear.embedding: 1, shape.take: 0}
_PROBE_TOKENS = 5


def mixes_tokens(node: Node, tokens: str) -> str | None:
    """Why `node` may mix tokens or count them, None if it works on each alone.

    `tokens` is the symbol T. A value with tokens has them as its first dim, but for unit dims; one
    without does not speak of T.
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
    if node.op in _ROW_BY_ROW:
        return None
    if node.op in _ALONG:
        along = node.attrs["dim"] % operands[0].rank
        return "it works along the tokens" if along == _axis(operands[0], tokens) else None
    if node.op in _TABLE:
        table = operands[_TABLE[node.op]]
        return "it looks tokens up in other tokens" if _has_rows(table, tokens) else None
    return _probed(node, tokens)


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
