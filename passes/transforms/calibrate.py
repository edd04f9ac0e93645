"""Encoding weights over a calibration text, for quantize-mxfp4.

The graph is run over the text node by node, every sequence before the next node, and twice: with
the weights as they are, and with what has been encoded so far. When the run comes to a weight that
is to be quantized, both its inputs are there: x, and x̂, which has gone through the quantized
weights before it. The weight is encoded for x̂·ŵᵀ to come near to x·wᵀ, and the run goes on with ŵ.
(Frantar et al. 2022, arXiv:2210.17323, §4; Li et al. 2025, arXiv:2504.02692.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ...compiler.gptq import gptq, inverse_factor, toward_exact
from ...compiler.interpret import compute, interpret
from ...compiler.ir import Graph, Node, Op, Value, walk
from ...compiler.microscaling import decode, encode
from ...compiler.ops import linear, moe
from ...compiler.ops.hadamard import hadamard
from ...compiler.ops.leaf import constant, param
from ...compiler.torch_types import torch_dtype
from ...compiler.weights import Entry, Weights
from .mxfp4_policy import (
    MXFP4,
    ROTATED,
    Encoded,
    Site,
    can_rotate,
    find_sites,
    weights_of,
)

# A tensor under a name, to where it can be read again.
Store = Callable[[str, torch.Tensor], Entry]


@dataclass(frozen=True)
class Calibrated:
    """What became of every weight that is quantized, by the names of the sites; and its tensors."""

    encoded: Mapping[str, Encoded]
    entries: Mapping[str, Entry]

    @property
    def product_error(self) -> float:
        """|x·wᵀ - x̂·ŵᵀ| / |x·wᵀ|, the mean over all weights."""
        errors = [e.product_error for e in self.encoded.values()]
        return sum(errors) / len(errors) if errors else 0.0


def count_matrices(graph: Graph, options: MXFP4) -> int:
    """How many matrices `calibrate` will encode: one a projection, one an expert."""
    return sum(s.matrices for s in find_sites(graph, options) if s.action == "quantize")


def calibrate(
    graph: Graph,
    weights: Weights,
    sequences: Sequence[Sequence[int]],
    options: MXFP4,
    rotate: bool,
    store: Store,
    advance: Callable[[], None] = lambda: None,
) -> Calibrated:
    """Encode every weight that `options` quantizes, over `sequences` of token ids.

    `graph` is over the tokens of one sequence (parameters tokens and positions). With `rotate`,
    whatever `options.hadamard` says, the weights that can be are rotated. `store` takes tensors as
    they are made; `advance` is called after each matrix. In memory are one weight and, of all
    sequences and both runs, the activations that are still to be used. ValueError names a weight
    that cannot be encoded.
    """
    sites = {s.weight: s for s in find_sites(graph, options) if s.action == "quantize"}
    return _Calibration(graph, weights, options, rotate, sites, store, advance).run(sequences)


# The rows [n, K] that matrix `part` of weight operand i of a node is multiplied by, for each op. A
# head has its part of every token, an expert the tokens that were sent to it.


def _rows_of_linear(node: Node, args: Sequence[Any], i: int, part: int) -> Any:
    return args[0].reshape(-1, args[0].shape[-1])


def _rows_of_head(node: Node, args: Sequence[Any], i: int, part: int) -> Any:
    return args[0][:, part]


def _rows_of_expert(node: Node, args: Sequence[Any], i: int, part: int) -> Any:
    named = node.op.by_name(args, node.given)
    mine = named["x"][(named["indices"] == part).any(-1)]
    if i == node.index_of("gate_up"):
        return mine
    bias = named.get("gate_up_bias")
    bias = None if bias is None else bias[part]
    return moe.expert_hidden(mine, named["gate_up"][part], bias, **node.attrs)


_ROWS: Mapping[Op, Callable[[Node, Sequence[Any], int, int], torch.Tensor]] = {
    linear.linear: _rows_of_linear,
    linear.head_linear: _rows_of_head,
    moe.experts: _rows_of_expert,
}


# The operand by which an op chooses rows: those of the quantized run are taken in both.
_CHOSEN_BY: Mapping[Op, int] = {moe.experts: 2}


@dataclass(frozen=True)
class _Inputs:
    """What one matrix is multiplied by, x̂ in the quantized run and x in the other: [K, K] each.

    `gram` is x̂ᵀ·x̂, `cross` (x - x̂)ᵀ·x̂, `apart` (x - x̂)ᵀ·(x - x̂).
    """

    gram: torch.Tensor
    cross: torch.Tensor
    apart: torch.Tensor

    @classmethod
    def of(cls, rows: Iterable[tuple[torch.Tensor, torch.Tensor]], inner: int) -> _Inputs:
        """From pairs of x̂ and x, [n, K] each."""
        inputs = cls(*(torch.zeros(inner, inner) for _ in range(3)))
        for found, exact in rows:
            x = found.float()
            missing = exact.float() - x
            inputs.gram.addmm_(x.T, x)
            inputs.cross.addmm_(missing.T, x)
            inputs.apart.addmm_(missing.T, missing)
        return inputs

    @cached_property
    def factor(self) -> torch.Tensor:
        return inverse_factor(self.gram)

    @property
    def are_none(self) -> bool:
        return not self.gram.diagonal().any()

    def errors(self, w: torch.Tensor, rounded: torch.Tensor) -> tuple[float, float]:
        """(|x·wᵀ - x̂·ŵᵀ|², |x·wᵀ|²)."""
        lost = w - rounded
        # x·wᵀ - x̂·ŵᵀ == (x - x̂)·wᵀ + x̂·(w - ŵ)ᵀ
        before = _trace(w @ self.apart, w)
        missing = before + 2 * _trace(w @ self.cross, lost) + _trace(lost @ self.gram, lost)
        whole = before + 2 * _trace(w @ self.cross, w) + _trace(w @ self.gram, w)
        return max(missing, 0.0), max(whole, 0.0)


@dataclass
class _Calibration:
    graph: Graph
    weights: Weights
    options: MXFP4
    rotate: bool
    sites: Mapping[Value, Site]
    store: Store
    advance: Callable[[], None]
    encoded: dict[str, Encoded] = field(default_factory=dict[str, Encoded])
    entries: dict[str, Entry] = field(default_factory=dict[str, Entry])
    # By the value that is multiplied, and whether it is rotated: q, k and v share one.
    shared: dict[tuple[Value, bool], _Inputs] = field(
        default_factory=dict[tuple[Value, bool], _Inputs]
    )

    def run(self, sequences: Sequence[Sequence[int]]) -> Calibrated:
        constants = self.graph.constants()
        nodes = [n for n in self.graph.nodes() if n not in constants]
        last = {a.node: i for i, n in enumerate(nodes) for a in n.args}
        (tokens,) = self.graph.param("tokens").type.shape
        # The quantized run over every sequence, then the other.
        runs = [*sequences, *sequences]
        bindings = [{str(tokens): len(ids)} for ids in runs]
        values: dict[Value, list[Any]] = {}
        for i, node in enumerate(nodes):
            if node.op is param:
                values[Value(node)] = [_input(node, ids) for ids in runs]
                continue
            rows = self._arguments(node, values, len(runs))
            results = [compute(node, tuple(r), b) for r, b in zip(rows, bindings, strict=True)]
            values.update(zip(node.results, map(list, zip(*results, strict=True)), strict=True))
            for value in (v for a in node.args if last[a.node] == i for v in a.node.results):
                values.pop(value, None)
                for rotated in (False, True):
                    self.shared.pop((value, rotated), None)
        return Calibrated(self.encoded, self.entries)

    def _arguments(
        self, node: Node, values: Mapping[Value, list[Any]], count: int
    ) -> list[list[Any]]:
        """The arguments of `node` in both runs; weights of the first half are as codes say."""
        columns = [values.get(arg) or [self._constant(arg)] * count for arg in node.args]
        rows = [list(row) for row in zip(*columns, strict=True)]
        quantized = rows[: count // 2]
        for i, x in weights_of(node).items():
            site = self.sites.get(node.args[i])
            if site is None:
                continue
            rotated = self.rotate and can_rotate(site)
            if site.name not in self.encoded:
                self._encode(site, node, i, rows, rotated)
            decoded = self._decoded(site)
            for row in quantized:
                row[i] = decoded
                if rotated:
                    assert x is not None
                    (row[x],) = hadamard.reference(row[x], block=ROTATED)
        return rows

    def _constant(self, value: Value) -> Any:
        return interpret(Graph("constant", (), (value,)), {}, self.weights).outputs[0]

    def _encode(
        self, site: Site, node: Node, i: int, rows: Sequence[Sequence[Any]], rotated: bool
    ) -> None:
        weight: torch.Tensor = rows[-1][i]
        *lead, height, inner = weight.shape
        matrices = weight.reshape(-1, height, inner)
        codes = torch.empty(len(matrices), height, inner // 2, dtype=torch.uint8)
        scales = codes.new_empty(len(matrices), height, inner // self.options.group)
        totals = torch.zeros(4, dtype=torch.float64)
        unreached = 0
        for part, matrix in enumerate(matrices):
            w = hadamard.reference(matrix.float(), block=ROTATED)[0] if rotated else matrix.float()
            inputs = self._inputs(node, i, rows, part, rotated)
            try:
                codes[part], scales[part] = self._rounded(w, inputs)
            except ValueError as error:
                raise ValueError(f"weight {site.name}: {error}") from error
            after = decode(codes[part], scales[part], torch.float32)
            lost = w - after
            totals += torch.tensor(
                [_trace(lost, lost), _trace(w, w), *inputs.errors(w, after)], dtype=torch.float64
            )
            unreached += inputs.are_none
            self.advance()
        error, product_error = (totals[::2] / totals[1::2]).nan_to_num().sqrt().tolist()
        names = self._names(site)
        for name, tensor in zip(names, (codes, scales), strict=True):
            self.entries[name] = self.store(name, tensor.view(*lead, *tensor.shape[1:]))
        self.encoded[site.name] = Encoded(
            *names,
            method=self.options.method,
            rotated=rotated,
            error=error,
            product_error=product_error,
            matrices=len(matrices),
            unreached=unreached,
        )

    def _rounded(self, w: torch.Tensor, inputs: _Inputs) -> tuple[torch.Tensor, ...]:
        group, scale = self.options.group, self.options.scale
        if self.options.method == "rtn" or inputs.are_none:
            return encode(w, group, scale)
        target = toward_exact(w, inputs.cross, inputs.factor)
        return gptq(target, inputs.factor, group, scale)

    def _inputs(
        self, node: Node, i: int, rows: Sequence[Sequence[Any]], part: int, rotated: bool
    ) -> _Inputs:
        x = weights_of(node)[i]
        key = (node.args[x or 0], rotated)
        alone = node.op is linear.linear
        if alone and key in self.shared:
            return self.shared[key]
        half = len(rows) // 2
        some = (
            self._pair(node, i, part, rotated, found, exact)
            for found, exact in zip(rows[:half], rows[half:], strict=True)
        )
        inputs = _Inputs.of(some, int(node.args[i].type.shape[-1]))
        if alone:
            self.shared[key] = inputs
        return inputs

    def _pair(
        self,
        node: Node,
        i: int,
        part: int,
        rotated: bool,
        found: Sequence[Any],
        exact: Sequence[Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x̂ and x of one sequence, for matrix `part` of operand i."""
        exact = list(exact)
        if (choice := _CHOSEN_BY.get(node.op)) is not None:
            exact[choice] = found[choice]
        x, y = (_ROWS[node.op](node, row, i, part) for row in (found, exact))
        if rotated:
            x, y = (hadamard.reference(z, block=ROTATED)[0] for z in (x, y))
        return x, y

    def _decoded(self, site: Site) -> torch.Tensor:
        done = self.encoded[site.name]
        codes, scales = (self.entries[name].load() for name in (done.codes, done.scales))
        return decode(codes, scales, torch_dtype(site.weight.type.dtype))

    def _names(self, site: Site) -> tuple[str, str]:
        """Of the constants to be: after the weight, or the first of those that it is made from."""
        name = next(n.attrs["name"] for n in walk((site.weight,)) if n.op is constant)
        if site.weight.op is not constant:
            name = f"{name}.{len(self.encoded)}"
        return f"{name}.codes", f"{name}.scales"


def _input(node: Node, ids: Sequence[int]) -> torch.Tensor:
    """One sequence as the parameter `tokens`, its `positions`, or the tokens `following` each, of
    which the last is taken for its own."""
    name = node.attrs["name"]
    content = {
        "tokens": ids,
        "positions": range(len(ids)),
        "following": (*ids[1:], ids[-1]),
    }
    if name not in content:
        raise ValueError(f"calibration runs over {', '.join(content)}, found parameter %{name}")
    return torch.tensor(list(content[name]), dtype=torch_dtype(node.types[0].dtype))


def _trace(a: torch.Tensor, b: torch.Tensor) -> float:
    """tr(a·bᵀ)."""
    return float((a * b).sum(dtype=torch.float64))
