"""quantize-mxfp4: weights of products become MXFP4, by ops on constants.

Two things make the rounding cost less: weights that `calibrate` has encoded over a text (GPTQ)
stand in the graph as constants, and blocks may be rotated by a Hadamard matrix, the weight's on
constants and the activation's where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ...compiler.ir import Graph, Node, Value
from ...compiler.ops import moe
from ...compiler.ops.hadamard import hadamard
from ...compiler.ops.leaf import constant
from ...compiler.ops.mxfp4 import mxfp4, mxfp4_encode
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Applied, rebuild
from ...compiler.types import TensorType
from .calibrate import Calibrated, calibrate, count_matrices
from .mxfp4_policy import (
    MXFP4,
    ROTATED,
    Encoded,
    Packing,
    Site,
    can_rotate,
    find_sites,
    operands_of,
    weights_of,
)

# What rounding its weights may change a product by (root mean squares): of random values 0.11 for a
# linear and 0.2 for gated experts, and about 1.4 with another weight in its place.
_PRODUCT_ERROR = 0.6


@dataclass(frozen=True)
class QuantizeMxfp4:
    """Weights of products, by policy, to mxfp4(mxfp4_encode(w)), or to mxfp4 of the constants that
    `encoded` names for a site.

    The new nodes' sources are the names of the weights: what is loaded is reported, and refused, by
    them. Options that ask for calibration encode the weights over their texts, unless `encoded` is
    given. The context's facts get a Packing for each weight. ValueError where nothing is packed.
    """

    name: ClassVar[str] = "quantize-mxfp4"
    options: MXFP4 = field(default_factory=MXFP4)
    encoded: Mapping[str, Encoded] = field(default_factory=dict[str, Encoded], hash=False)

    def expected(self, graph: Graph) -> int:
        """Weights that the policy packs."""
        return sum(s.action == "quantize" for s in find_sites(graph, self.options))

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        encoded = self.encoded
        if self.options.calibrated and not encoded:
            encoded = self._calibrated(graph, context)
        swap: dict[tuple[Node, int], Value] = {}
        turned: dict[Value, Value] = {}
        packings: list[Packing] = []
        rounded: list[Applied] = []
        for site in find_sites(graph, self.options):
            if site.action == "keep":
                context.log.decline(self.name, site.users[0], f"{site.name}: {site.reason}")
            if site.action != "quantize":
                packings.append(Packing(site))
                continue
            done = encoded.get(site.name)
            if done is None and self.options.calibrated:
                raise ValueError(f"{site.name}: expected it among the encoded weights")
            rotated = done.rotated if done else self.rotates(site)
            packings.append(Packing(site, self.options.group, rotated, done))
            packed = _given(site, done, self.options) if done else self._packed(site, rotated)
            for node in site.users:
                for i in operands_of(node, site.weight):
                    swap[node, i] = packed
                    if rotated:
                        x = weights_of(node)[i]
                        assert x is not None
                        swap[node, x] = turned.setdefault(node.args[x], _turned(node.args[x]))
            rule = _rule(site, rotated)
            if done:
                context.log.counts[rule] += 1
            else:
                after = _turned(packed) if rotated else packed
                rounded.append(Applied(rule, (site.weight,), (site.weight,), (after,)))
        for node in graph.nodes():
            if {"norm", "delta"} & {*node.given} and node.operands["weight"].op is not mxfp4:
                context.log.decline(self.name, node, "it has a norm or a sum inside")
        if not swap and not any(n.op is mxfp4 for n in graph.nodes()):
            reasons = "\n  ".join(context.log.declined[:5]) or "no product has a weight"
            raise ValueError(f"packed nothing:\n  {reasons}")
        context.facts[self.name] = tuple(packings)
        context.log.applied += rounded
        users = _with_operands(swap)
        products = [
            Applied(f"{self.name}-product", old.args, old.results, new.results, {}, _PRODUCT_ERROR)
            for old, new in users.items()
        ]
        after = rebuild(
            graph, {o: n for p in products for o, n in zip(p.before, p.after, strict=True)}
        )
        # Codes that calibration chose are those of one weight, and of no sampled one.
        claims = [] if encoded else [*rounded, *products]
        return context.log.declare(graph, after, "weights are rounded", claims=claims)

    def _calibrated(self, graph: Graph, context: PassContext) -> Mapping[str, Encoded]:
        """What calibration makes of the weights; their tensors join the weights of `context`.

        With hadamard="auto" the whole model is encoded both ways, and the way of the smaller error
        of the products is taken.
        """
        options, calibration = self.options, context.calibration
        if calibration is None or context.weights is None:
            raise ValueError(
                f"method={options.method!r}, hadamard={options.hadamard!r} need the weights and a "
                "model that can be run over a text: compile does that"
            )
        vocab = int(graph.outputs[0].type.shape[-1])
        sequences = calibration.sequences(options.calibrate, vocab)
        choices = (False, True) if options.hadamard == "auto" else (bool(options.hadamard),)
        calibration.expect(len(choices) * count_matrices(graph, options))
        weights = context.weights
        runs: dict[bool, Calibrated] = {}
        for rotate in choices:
            args = (graph, weights, sequences, options, rotate)
            runs[rotate] = calibrate(*args, calibration.spool(), calibration.advance)
        best = min(runs, key=lambda rotate: runs[rotate].product_error)
        found = runs[best]
        tokens = sum(map(len, sequences))
        note = (
            f"{self.name}: {options.method} over {tokens} tokens: "
            f"products are off by {found.product_error:.2%} on average"
        )
        if len(runs) > 1:
            without, rotated = (runs[rotate].product_error for rotate in choices)
            word = "rotated" if best else "not rotated"
            note += f"; {word}, of {rotated:.2%} with Hadamard rotations and {without:.2%} without"
        context.log.notes.append(note)
        context.weights = weights.merged(found.entries)
        return found.encoded

    def rotates(self, site: Site) -> bool:
        """Whether a weight that is not encoded yet is rotated before."""
        return self.options.hadamard is True and can_rotate(site)

    def _packed(self, site: Site, rotated: bool) -> Value:
        # (x·H)·(W·H)ᵀ == x·Wᵀ
        weight = _turned(site.weight) if rotated else site.weight
        attrs = {"group": self.options.group, "scale": self.options.scale}
        parts = mxfp4_encode.node((weight,), attrs, site.name).results
        return Value(mxfp4.node(parts, {"dtype": site.weight.type.dtype}, site.name))


def _turned(value: Value) -> Value:
    return Value(hadamard.node((value,), {"block": ROTATED}, value.node.source))


def _given(site: Site, done: Encoded, options: MXFP4) -> Value:
    """The packed weight of constants that the store of weights has."""
    *lead, inner = site.weight.type.shape
    parts = tuple(
        constant(name=name, type=TensorType("u8", (*lead, inner // elements)))
        for name, elements in ((done.codes, 2), (done.scales, options.group))
    )
    return Value(mxfp4.node(parts, {"dtype": site.weight.type.dtype}, site.name))


def _rule(site: Site, rotated: bool) -> str:
    kind = "experts" if site.users[0].op is moe.experts else "projection"
    return f"mxfp4-{kind}{'-rotated' if rotated else ''}"


def _with_operands(swap: Mapping[tuple[Node, int], Value]) -> dict[Node, Node]:
    """Each node of `swap` with operand i replaced, for every (node, i)."""
    changed: dict[Node, list[Value]] = {}
    for (node, i), value in swap.items():
        changed.setdefault(node, list(node.args))[i] = value
    return {node: node.rebuilt(args) for node, args in changed.items()}
