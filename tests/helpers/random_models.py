"""Random graphs made of what transformers are made of, with joints where passes do not expect them.

Every piece that a pass looks for can occur, in either order of its operands, with and without its
options; and any value may be used once more elsewhere, be an output, or lie between.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from hypothesis import strategies as st
from ingot.compiler.ir import Graph, Value
from ingot.compiler.ops import attention, glu, linear, moe, norm, pointwise, rope, shape
from ingot.compiler.ops.leaf import constant, literal, param
from ingot.compiler.types import TensorType, symbol

T = symbol("T")
WIDTH, HEADS, GROUPS, DIM, HIDDEN, EXPERTS = 16, 4, 2, 8, 12, 8
DTYPE = "f64"


class Builder:
    """Draws the nodes of one graph. Weights get fresh names; `values` are those of [T, WIDTH]."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self.draw = draw
        self.numbers = count()
        self.positions = param(name="positions", type=TensorType("i32", (T,)))
        tokens = param(name="tokens", type=TensorType("i32", (T,)))
        self.params = (tokens, self.positions)
        self.values = [linear.embedding(tokens, self.weight(32, WIDTH))]
        frequencies = self.weight(DIM // 2)
        self.tables = rope.rope_tables.all(self.positions, frequencies, scale=1.0, dtype=DTYPE)

    def weight(self, *size: int) -> Value:
        return constant(name=f"w{next(self.numbers)}", type=TensorType(DTYPE, size))

    def chance(self) -> bool:
        return self.draw(st.booleans())

    def any(self) -> Value:
        """Some value so far; mostly the newest, as in a model."""
        return self.values[-1] if self.chance() else self.draw(st.sampled_from(self.values))

    def linear(self, x: Value, rows: int) -> Value:
        size: Any = x.type.shape[-1]
        bias = self.weight(rows) if self.chance() else None
        return linear.linear(x, self.weight(rows, size), bias=bias)

    def added(self, x: Value, y: Value) -> Value:
        return pointwise.add(x, y) if self.chance() else pointwise.add(y, x)

    def normed(self, x: Value) -> Value:
        kind = self.draw(st.sampled_from(("rms", "rms", "rms", "bare", "layer")))
        size: Any = x.type.shape[-1]
        if kind == "layer":
            return norm.layer_norm(x, weight=self.weight(size), eps=1e-5)
        weight = self.weight(size) if kind == "rms" else None
        return norm.rms_norm(x, weight=weight, eps=1e-6)

    def residual(self, x: Value, delta: Value) -> Value:
        return self.added(x, self.normed(delta) if self.draw(st.integers(0, 3)) == 0 else delta)

    def product(self) -> Value:
        return self.linear(self.any(), WIDTH)

    def norm(self) -> Value:
        return self.normed(self.any())

    def sum(self) -> Value:
        return self.residual(self.any(), self.any())

    def scaled(self) -> Value:
        return pointwise.mul(self.any(), literal(value=0.5, dtype=DTYPE))

    def mlp(self, x: Value | None = None, hidden: int = HIDDEN) -> Value:
        """Gate and up as two products or as the halves of one."""
        x = x or self.any()
        if self.chance():
            both = self.linear(x, 2 * hidden)
            gate, up = (
                shape.slice_(both, dim=1, start=i * hidden, stop=(i + 1) * hidden) for i in (0, 1)
            )
        else:
            gate, up = self.linear(x, hidden), self.linear(x, hidden)
        activation = self.draw(st.sampled_from(("silu", "gelu_tanh", "relu")))
        return self.linear(glu.glu(gate, up, activation=activation), WIDTH)

    def heads(self, x: Value, heads: int, kind: str) -> Value:
        rows = shape.view(self.linear(x, heads * DIM), shape=(T, heads, DIM))
        if kind == "norm":
            rows = norm.rms_norm(rows, weight=self.weight(DIM), eps=1e-6)
        return rows

    def attention(self) -> Value:
        x = self.any()
        kind = self.draw(st.sampled_from(("plain", "norm")))
        q, k = self.heads(x, HEADS, kind), self.heads(x, GROUPS, kind)
        v = self.heads(self.any() if self.draw(st.integers(0, 5)) == 0 else x, GROUPS, "plain")
        form = self.draw(st.sampled_from((*rope.FORMS, "")))
        if form:
            q, k = (rope.rope(y, *self.tables, form=form) for y in (q, k))
        sinks = self.weight(HEADS) if self.chance() else None
        attrs = {"scale": 0.4, "window": self.draw(st.sampled_from((0, 3)))}
        out = attention.attention(q, k, v, sinks=sinks, **attrs)
        return self.linear(shape.view(out, shape=(T, HEADS * DIM)), WIDTH)

    def latent_attention(self) -> Value:
        """As DeepSeek-V2 has it: keys and values from one narrow product."""
        x, rank, nope = self.any(), 12, 4
        q = shape.view(self.linear(x, HEADS * (nope + DIM)), shape=(T, HEADS, nope + DIM))
        q = rope.rope(q, *self.tables, form="half", start=nope)
        down = self.linear(x, rank + DIM)
        c_kv = self.normed(shape.slice_(down, dim=1, start=0, stop=rank))
        k_pe = shape.slice_(down, dim=1, start=rank, stop=rank + DIM)
        k_pe = shape.view(rope.rope(k_pe, *self.tables, form="half"), shape=(T, 1, DIM))
        k_pe = shape.expand(k_pe, shape=(T, HEADS, DIM))
        weight = self.weight(HEADS * (nope + DIM), rank)
        up = shape.view(linear.linear(c_kv, weight), shape=(T, HEADS, nope + DIM))
        k = shape.cat(shape.slice_(up, dim=2, start=0, stop=nope), k_pe, dim=2)
        v = shape.slice_(up, dim=2, start=nope, stop=nope + DIM)
        out = attention.attention(q, k, v, scale=0.3)
        return self.linear(shape.view(out, shape=(T, HEADS * DIM)), WIDTH)

    def mixture(self) -> Value:
        x = self.normed(self.any())
        correction = self.weight(EXPERTS) if self.chance() else None
        logits = linear.linear(x, self.weight(EXPERTS, WIDTH))
        attrs = self.draw(
            st.sampled_from(
                (
                    {"score": "softmax", "normalize": True},
                    {"score": "sigmoid", "normalize": True, "scale": 2.5, "eps": 1e-20},
                    {"score": "sigmoid", "normalize": False, "groups": 4, "topk_groups": 2},
                )
            )
        )
        weights, indices = moe.router.all(logits, correction=correction, k=2, dtype=DTYPE, **attrs)
        hidden = 6
        out = moe.experts(
            x,
            weights,
            indices,
            self.weight(EXPERTS, 2 * hidden, WIDTH),
            self.weight(EXPERTS, WIDTH, hidden),
            activation="silu",
        )
        return self.added(out, self.mlp(x, 2 * hidden)) if self.chance() else out


PIECES = (
    *("product", "norm", "sum", "scaled", "mlp", "attention", "latent_attention", "mixture"),
    *("mlp", "attention", "mixture", "sum"),
)


@st.composite
def models(draw: Any, most: int = 5) -> Graph:
    """logits [T, 24] and perhaps inner values, of up to `most` pieces and the sums between them."""
    b = Builder(draw)
    for piece in draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=most)):
        x = b.any()
        before = len(b.values)
        if draw(st.integers(0, 3)):
            b.values.append(b.normed(x))
        b.values.append(getattr(b, piece)())
        if draw(st.integers(0, 3)):
            b.values.append(b.residual(x, b.values[-1]))
        assert len(b.values) > before
    inner = draw(st.lists(st.sampled_from(b.values), max_size=2))
    logits = linear.linear(b.normed(b.values[-1]), b.weight(24, WIDTH))
    return Graph("random", b.params, (logits, *inner), {"T": range(1, 33)})
