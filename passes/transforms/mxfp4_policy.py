"""Which weights are quantized to MXFP4, and how: the policy of quantize-mxfp4.

A weight is found by what it does, not by its name: the second operand of a product that depends on
weights alone. What stays in its own dtype is found in the same way: the product that scores experts
for a router, the one that gives an output (lm_head), embeddings, and weights that are packed
already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any, Literal

from ...compiler.dtypes import STORED_BITS
from ...compiler.ir import Graph, Node, Value, walk
from ...compiler.microscaling import GROUPS, SCALE_RULES
from ...compiler.ops import linear, moe, pointwise, shape
from ...compiler.ops.collective import all_gather, all_reduce
from ...compiler.ops.leaf import constant
from ...compiler.ops.mxfp4 import mxfp4
from ..serving.sample_on_device import FOLLOWING

# Elements that are rotated together.
ROTATED = 32
# Weights of fewer rows than this (a gate, say) are too small for their bytes to matter.
_FEWEST_ROWS = 16
# Between a product and the router or output that it is for.
_PASSING = frozenset(
    {*pointwise.POINTWISE, shape.view, shape.take, shape.slice_, all_gather, all_reduce}
)


@dataclass(frozen=True)
class MXFP4:
    """How weights are quantized to MXFP4 (OCP Microscaling Formats v1.0).

    `group` elements share a scale: 32 as the specification says, or 16. `scale` is the rule by
    which it is chosen (microscaling.SCALE_RULES). Weights whose names match a glob of `keep` stay
    in their dtype; those that match one of `also` are quantized even where they would not be.

    `method` "rtn" rounds each element to nearest; "gptq" chooses codes that together keep the error
    of the products small, over the texts (or lists of token ids) of `calibrate`. `hadamard` rotates
    blocks of weights and activations, which spreads outliers; "auto" does so where that measured
    better over `calibrate`.
    """

    group: int = 32
    scale: str = "mse"
    keep: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    method: Literal["rtn", "gptq"] = "rtn"
    hadamard: bool | Literal["auto"] = False
    calibrate: Sequence[str | Sequence[int]] = ()

    @property
    def calibrated(self) -> bool:
        """Whether what becomes of weights depends on texts."""
        return self.method == "gptq" or self.hadamard == "auto"

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"group: expected one of {GROUPS}, found {self.group!r}")
        if self.scale not in SCALE_RULES:
            known = ", ".join(SCALE_RULES)
            raise ValueError(f"scale: expected one of {known}; found {self.scale!r}")
        for name in ("keep", "also"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise ValueError(f"{name}: expected a list of patterns, found the text {given!r}")
            object.__setattr__(self, name, tuple(given))
        if self.method not in ("rtn", "gptq"):
            raise ValueError(f"method: expected 'rtn' or 'gptq', found {self.method!r}")
        if not isinstance(self.hadamard, bool) and self.hadamard != "auto":
            raise ValueError(f"hadamard: expected False, True or 'auto', found {self.hadamard!r}")
        object.__setattr__(self, "calibrate", _calibration_texts(self.calibrate))
        if self.calibrated and not self.calibrate:
            wants = "method='gptq'" if self.method == "gptq" else "hadamard='auto'"
            raise ValueError(f"calibrate: expected texts or lists of token ids, for {wants}")
        if self.calibrate and not self.calibrated:
            raise ValueError(
                "calibrate: expected none for method='rtn' without hadamard='auto', which reads no "
                f"text; found {len(self.calibrate)}"
            )


def _calibration_texts(given: Any) -> tuple[str | tuple[int, ...], ...]:
    """`calibrate` with lists as tuples; ValueError where it is no list of texts or id lists."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(
            f"calibrate: expected a list of texts or of lists of token ids, found {given!r:.80}"
        )
    texts: list[str | tuple[int, ...]] = []
    for one in given:
        if isinstance(one, str):
            texts.append(one)
            continue
        ids: tuple[Any, ...] = tuple(one) if isinstance(one, Iterable) else ()
        if not ids or any(isinstance(i, bool) or not isinstance(i, Integral) for i in ids):
            raise ValueError(
                f"calibrate: expected each to be a text or a list of token ids, found {one!r:.80}"
            )
        texts.append(tuple(map(int, ids)))
    return tuple(texts)


@dataclass(frozen=True)
class Site:
    """One weight of the graph, and what becomes of it.

    `name` is that of the constant behind it, with what is done to it where that is not nothing.
    `action` is "quantize", "keep", or "packed" for a weight that the checkpoint holds in MXFP4.
    """

    name: str
    weight: Value
    users: tuple[Node, ...]
    action: Literal["quantize", "keep", "packed"]
    reason: str

    @property
    def matrices(self) -> int:
        """How many matrices [N, K] the weight is a stack of: one, or one an expert."""
        return math.prod(map(int, self.weight.type.shape[:-2]))

    @property
    def bits(self) -> float:
        """Bits of one element, its share of the scales included, as the weight is now."""
        stored = self.weight.stored
        packed = STORED_BITS.get(stored.dtype)
        elements: int = self.weight.type.numel  # pyright: ignore[reportAssignmentType]
        return float(packed) if packed else 8 * int(stored.nbytes) / elements


def find_sites(graph: Graph, options: MXFP4) -> list[Site]:
    """Every weight of a product or an embedding, in order of use, and what becomes of it."""
    folded = graph.constants()
    users: dict[Value, dict[Node, None]] = {}
    for node in graph.nodes():
        if node in folded:
            continue
        for i in (1,) if node.op is linear.embedding else weights_of(node):
            if node.args[i].node in folded:
                users.setdefault(node.args[i], {})[node] = None
    routers = [n.args[0] for n in graph.nodes() if n.op is moe.router]
    # What further tokens are drafted from is no output of the model.
    drafts = any(p.attrs["name"] == FOLLOWING for p in graph.params)
    given = graph.outputs[:1] if drafts else graph.outputs
    kept = {
        **dict.fromkeys(_products_behind(given), "gives an output of the model"),
        **dict.fromkeys(_products_behind(routers), "scores experts for the router"),
    }
    return [_site(weight, tuple(nodes), kept, options) for weight, nodes in users.items()]


def _products_behind(values: Iterable[Value]) -> Iterator[Node]:
    """The linears that `values` come from through element-wise ops, views and collectives."""
    stack, seen = [v.node for v in values], set[Node]()
    while stack:
        node = stack.pop()
        if node.op is linear.linear:
            yield node
        elif node.op in _PASSING and node not in seen:
            seen.add(node)
            stack.extend(a.node for a in node.args)


def _site(weight: Value, users: tuple[Node, ...], kept: Mapping[Node, str], options: MXFP4) -> Site:
    action, reason = _decision(weight, users, kept, options)
    return Site(_name(weight), weight, users, action, reason)


def _decision(
    weight: Value, users: tuple[Node, ...], kept: Mapping[Node, str], options: MXFP4
) -> tuple[Literal["quantize", "keep", "packed"], str]:
    behind = list(walk((weight,)))
    names = [n.attrs["name"] for n in behind if n.op is constant]
    rows, inner = weight.type.shape[-2:]
    if weight.op is mxfp4:
        return "packed", "stored as MXFP4"
    if any(n.op is mxfp4 for n in behind):
        return "keep", "made from MXFP4: to round it again would lose more"
    if any(n.op is linear.embedding for n in users):
        return "keep", "rows are looked up"
    if not isinstance(inner, int) or inner % options.group:
        return "keep", f"groups of {options.group} do not divide K = {inner}"
    if pattern := _matching(names, options.keep):
        return "keep", f"matches keep={pattern!r}"
    if pattern := _matching(names, options.also):
        return "quantize", f"matches also={pattern!r}"
    if reason := next((kept[n] for n in users if n in kept), None):
        return "keep", reason
    if not isinstance(rows, int) or rows < _FEWEST_ROWS:
        return "keep", f"has only {rows} rows"
    return "quantize", "experts" if users[0].op is moe.experts else "a projection"


def _matching(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    return next((p for p in patterns if any(fnmatchcase(n, p) for n in names)), None)


def _name(value: Value) -> str:
    """`model.q_proj.weight`, or `slice(model.kv_b_proj.weight, start=0, stop=32)`."""
    if value.op is constant:
        return value.attrs["name"]
    args = ", ".join(_name(a) for a in value.node.args)
    attrs = "".join(f", {k}={v}" for k, v in value.attrs.items())
    return f"{value.op.name}({args}{attrs})"


@dataclass(frozen=True)
class Encoded:
    """A weight that calibration encoded: the names of its constants, and what the rounding cost.

    `error` is |w - ŵ| / |w|. `product_error` is |x·wᵀ - x̂·ŵᵀ| / |x·wᵀ| over the calibration text,
    where x̂ has gone through the quantized weights before this one. Of `matrices` (one an expert)
    `unreached` saw no token, and were rounded to nearest.
    """

    codes: str
    scales: str
    method: str
    rotated: bool
    error: float
    product_error: float
    matrices: int
    unreached: int

    def __str__(self) -> str:
        text = f"{self.method}, rotated" if self.rotated else self.method
        if not self.unreached or self.method == "rtn":
            return text
        return (
            f"{text}; {self.unreached} of {self.matrices} matrices, which no token of the "
            "calibration text reached, by rtn"
        )


@dataclass(frozen=True)
class Packing:
    """What the pass did at a site: `group` None keeps the weight as it is.

    `encoded` is set where calibration chose the codes, `rotated` where blocks are.
    """

    site: Site
    group: int | None = None
    rotated: bool = False
    encoded: Encoded | None = None


def can_rotate(site: Site) -> bool:
    """Whether blocks divide the weight, and its activation is an operand as well."""
    inner = site.weight.type.shape[-1]
    inputs = [weights_of(n)[i] for n in site.users for i in operands_of(n, site.weight)]
    return isinstance(inner, int) and inner % ROTATED == 0 and None not in inputs


def weights_of(node: Node) -> dict[int, int | None]:
    """The operands [..., N, K] of a product that sums over K.

    For each the operand [..., K] that it is multiplied by, None where that is computed inside.
    """
    axes, found = node.axes, dict[int, int | None]()
    if axes is None:
        return found
    for i, dims in enumerate(axes.operands):
        last = dims[-1] if len(dims) > 1 else ()
        others = [d for d in axes.operands if d is not dims and last in d[:-1]]
        if last and not others and (axes.sums | axes.dots) - {axes.along} >= {*last}:
            found[i] = next(
                (j for j, d in enumerate(axes.operands) if j != i and d[-1:] == (last,)), None
            )
    return found


def operands_of(node: Node, weight: Value) -> list[int]:
    """Where `node` takes `weight` as a weight of its product."""
    return [i for i in weights_of(node) if node.args[i] == weight]
