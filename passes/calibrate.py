"""Encoding weights over a calibration text, for quantize-mxfp4.

The graph is run over the text node by node, every sequence before the next node. When the run comes
to a weight that is to be quantized, its inputs have gone through the quantized weights before it:
their Gram matrix says what rounding costs, the weight is encoded, and the run goes on with what the
codes stand for (Frantar et al. 2022, arXiv:2210.17323, §4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..compiler.gptq import compensated, inverse_factor
from ..compiler.interpret import compute, interpret
from ..compiler.ir import Graph, Node, Op, Value, walk
from ..compiler.microscaling import decode, encode
from ..compiler.ops import linear, moe
from ..compiler.ops.hadamard import hadamard
from ..compiler.ops.leaf import constant, param
from ..compiler.torch_types import torch_dtype
from ..compiler.weights import Entry, Weights
from .quantize_mxfp4 import (
    INPUT_OF,
    MXFP4,
    ROTATED,
    WEIGHTS_OF,
    Encoded,
    Site,
    can_rotate,
    find_sites,
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
        """|x·(w - ŵ)ᵀ| / |x·wᵀ|, the mean over all weights."""
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
    they are made; `advance` is called after each matrix. In memory are one weight and the
    activations, of all sequences, that are still to be used. ValueError names a weight that cannot
    be encoded.
    """
    sites = {s.weight: s for s in find_sites(graph, options) if s.action == "quantize"}
    return _Calibration(graph, weights, options, rotate, sites, store, advance).run(sequences)


# The rows [n, K] that matrix `part` of weight operand i is multiplied by, for each op. A head has
# its part of every token, an expert the tokens that were sent to it.


def _rows_of_linear(args: Sequence[Any], attrs: Mapping[str, Any], i: int, part: int) -> Any:
    return args[0].reshape(-1, args[0].shape[-1])


def _rows_of_head(args: Sequence[Any], attrs: Mapping[str, Any], i: int, part: int) -> Any:
    return args[0][:, part]


def _rows_of_expert(args: Sequence[Any], attrs: Mapping[str, Any], i: int, part: int) -> Any:
    x, _, indices, gate_up, _, *biases = args
    mine = x[(indices == part).any(-1)]
    if i == 3:
        return mine
    return moe.expert_hidden(mine, gate_up[part], biases[0][part] if biases else None, attrs)


_ROWS: Mapping[Op, Callable[[Sequence[Any], Mapping[str, Any], int, int], torch.Tensor]] = {
    linear.linear: _rows_of_linear,
    linear.head_linear: _rows_of_head,
    moe.experts: _rows_of_expert,
}


@dataclass(frozen=True)
class _Inputs:
    """What one matrix is multiplied by: the Gram matrix [K, K], and what GPTQ makes of it."""

    gram: torch.Tensor

    @classmethod
    def of(cls, rows: Iterable[torch.Tensor], inner: int) -> _Inputs:
        gram = torch.zeros(inner, inner)
        for some in rows:
            wide = some.float()
            gram.addmm_(wide.T, wide)
        return cls(gram)

    @cached_property
    def factor(self) -> torch.Tensor:
        return inverse_factor(self.gram)

    @property
    def are_none(self) -> bool:
        return not self.gram.diagonal().any()


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
        bindings = [{str(tokens): len(ids)} for ids in sequences]
        values: dict[Value, list[Any]] = {}
        for i, node in enumerate(nodes):
            if node.op is param:
                values[Value(node)] = [_input(node, ids) for ids in sequences]
                continue
            rows = self._arguments(node, values, len(sequences))
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
        """The arguments of `node` for each sequence, with weights as their codes say."""
        packed = [i for i in WEIGHTS_OF.get(node.op, ()) if node.args[i] in self.sites]
        columns: list[list[Any]] = []
        for i, arg in enumerate(node.args):
            if arg in values:
                columns.append(values[arg])
            else:
                columns.append([None if i in packed else self._constant(arg)] * count)
        rows = [list(row) for row in zip(*columns, strict=True)]
        for i in packed:
            site = self.sites[node.args[i]]
            rotated = self.rotate and can_rotate(site)
            for row in rows if rotated else ():
                x = INPUT_OF[node.op][i]
                (row[x],) = hadamard.reference(row[x], block=ROTATED)
            if site.name not in self.encoded:
                self._encode(site, node, i, rows, rotated)
            decoded = self._decoded(site)
            for row in rows:
                row[i] = decoded
        return rows

    def _constant(self, value: Value) -> Any:
        return interpret(Graph("constant", (), (value,)), {}, self.weights).outputs[0]

    def _encode(
        self, site: Site, node: Node, i: int, rows: Sequence[Sequence[Any]], rotated: bool
    ) -> None:
        weight: torch.Tensor = self._constant(site.weight)
        *lead, height, inner = weight.shape
        matrices = weight.reshape(-1, height, inner)
        codes = torch.empty(len(matrices), height, inner // 2, dtype=torch.uint8)
        scales = codes.new_empty(len(matrices), height, inner // self.options.group)
        lost, whole, product_lost, product = 0.0, 0.0, 0.0, 0.0
        unreached = 0
        for part, matrix in enumerate(matrices):
            w = hadamard.reference(matrix.float(), block=ROTATED)[0] if rotated else matrix.float()
            inputs = self._inputs(node, i, rows, part, rotated)
            try:
                codes[part], scales[part] = self._rounded(w, inputs)
            except ValueError as error:
                raise ValueError(f"weight {site.name}: {error}") from error
            missing = w - decode(codes[part], scales[part], torch.float32)
            lost, whole = lost + _square(missing), whole + _square(w)
            product_lost += _square(missing, inputs.gram)
            product += _square(w, inputs.gram)
            unreached += inputs.are_none
            self.advance()
        names = self._names(site)
        for name, tensor in zip(names, (codes, scales), strict=True):
            self.entries[name] = self.store(name, tensor.view(*lead, *tensor.shape[1:]))
        self.encoded[site.name] = Encoded(
            *names,
            method=self.options.method,
            rotated=rotated,
            error=math.sqrt(lost / whole) if whole else 0.0,
            product_error=math.sqrt(product_lost / product) if product else 0.0,
            matrices=len(matrices),
            unreached=unreached,
        )

    def _rounded(self, w: torch.Tensor, inputs: _Inputs) -> tuple[torch.Tensor, ...]:
        group, scale = self.options.group, self.options.scale
        if self.options.method == "rtn" or inputs.are_none:
            return encode(w, group, scale)
        return compensated(w, inputs.factor, group, scale)

    def _inputs(
        self, node: Node, i: int, rows: Sequence[Sequence[Any]], part: int, rotated: bool
    ) -> _Inputs:
        x = INPUT_OF.get(node.op, {}).get(i)
        key = (node.args[x or 0], rotated)
        alone = node.op is linear.linear
        if alone and key in self.shared:
            return self.shared[key]
        some = (_ROWS[node.op](row, node.attrs, i, part) for row in rows)
        inputs = _Inputs.of(some, int(node.args[i].type.shape[-1]))
        if alone:
            self.shared[key] = inputs
        return inputs

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
    """One sequence as the parameter `tokens`, or its `positions`."""
    name = node.attrs["name"]
    if name not in ("tokens", "positions"):
        raise ValueError(f"calibration runs over tokens and positions, found parameter %{name}")
    content = ids if name == "tokens" else range(len(ids))
    return torch.tensor(list(content), dtype=torch_dtype(node.types[0].dtype))


def _square(m: torch.Tensor, gram: torch.Tensor | None = None) -> float:
    """|m|², or |x·mᵀ|² with the Gram matrix of x."""
    return float(((m if gram is None else m @ gram) * m).sum(dtype=torch.float64))
