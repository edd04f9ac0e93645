"""The importer: small modules, rule by rule, against the modules themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.text import parse, same_structure
from ingot.compiler.verify import verify
from ingot.compiler.weights import Weights
from ingot.frontends.importers.torch_export import ImportFailure, import_program
from pass_checks import ops
from torch import Tensor, nn
from torch.export import Dim, export


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def imported(
    module: nn.Module, inputs: Sequence[Tensor], dynamic: bool = True
) -> tuple[Graph, Weights]:
    """The graph of `module`, with the first dim of every input dynamic, and its weights."""
    shapes = {0: Dim("T", min=4, max=64)} if dynamic else None
    with torch.no_grad():
        program = export(
            module,
            tuple(inputs),
            dynamic_shapes={"args": tuple(shapes if x.ndim else None for x in inputs)}
            if isinstance(module, Call)
            else tuple(shapes for _ in inputs),
        ).run_decompositions({})
    symbols = {"T": range(4, 65)} if dynamic else {}
    result = import_program(program, "module", symbols=symbols)
    weights = Weights.of(module.state_dict()).merged(result.constants)
    verify(result.graph)
    return result.graph, weights


def assert_imports(
    function: Callable[..., Any] | nn.Module,
    *inputs: Tensor,
    dynamic: bool = True,
    sizes: Sequence[int] = (4, 5, 17),
) -> Graph:
    """The graph computes what the function does, at several sizes, and survives its own text."""
    module = function if isinstance(function, nn.Module) else Call(function)
    module.eval()
    graph, weights = imported(module, inputs, dynamic)
    assert_computes(graph, weights, module, inputs, sizes if dynamic else (None,))
    return graph


def assert_computes(
    graph: Graph,
    weights: Weights,
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    sizes: Sequence[int | None] = (4, 5, 17),
) -> None:
    """`graph` computes what `function` does; a size None takes the inputs as they are."""
    assert same_structure(parse(str(graph)), graph)
    names = [p.attrs["name"] for p in graph.params]
    for size in sizes:
        given = [_resized(x, size) if size else x for x in inputs]
        with torch.no_grad():
            expected = function(*(x.clone() for x in given))
        expected = expected if isinstance(expected, tuple) else (expected,)
        found = interpret(graph, dict(zip(names, given, strict=True)), weights).outputs
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True, eq=False)
class Table:
    """Functions of the same inputs, by name: traced as one module, for a trace takes long.

    One that cannot be traced or imported fails all, with its line of this file.
    """

    functions: Mapping[str, Callable[..., Any]]
    inputs: tuple[Tensor, ...]

    @cached_property
    def _imported(self) -> tuple[dict[str, Graph], Weights]:
        """What each function became, and the weights of all."""
        results = {n: f(*(x.clone() for x in self.inputs)) for n, f in self.functions.items()}
        together = Call(lambda *args: [f(*args) for f in self.functions.values()])
        graph, weights = imported(together, self.inputs)
        outputs = iter(graph.outputs)
        graphs: dict[str, Graph] = {}
        for name, result in results.items():
            own = tuple(next(outputs) for _ in (result if isinstance(result, tuple) else [result]))
            graphs[name] = Graph(name.replace(" ", "_"), graph.params, own, graph.symbols)
            verify(graphs[name])
        assert not list(outputs)
        return graphs, weights

    def assert_imports(self, name: str) -> Graph:
        """See assert_imports, of one function."""
        graphs, weights = self._imported
        assert_computes(graphs[name], weights, self.functions[name], self.inputs)
        return graphs[name]


def _resized(x: Tensor, size: int) -> Tensor:
    """Random content with `size` rows."""
    generator = torch.Generator().manual_seed(size)
    if x.dtype == torch.bool:
        return torch.randint(0, 2, (size, *x.shape[1:]), generator=generator).bool()
    if not x.is_floating_point():
        return torch.randint(0, 4, (size, *x.shape[1:]), generator=generator).to(x.dtype)
    return torch.randn(size, *x.shape[1:], generator=generator).to(x.dtype)


X = torch.randn(5, 4, 6)
IDS = torch.randint(0, 4, (5, 6))
M = torch.randn(5, 6)

VIEWS = Table(
    {
        "view": lambda x: x.view(x.shape[0], 24),
        "view with a guessed dim": lambda x: x.view(-1, 6),
        "reshape after transpose": lambda x: x.transpose(1, 2).reshape(x.shape[0], 24),
        "flatten": lambda x: x.flatten(1),
        "unflatten": lambda x: x.unflatten(-1, (2, 3)),
        "unsqueeze and squeeze": lambda x: x.unsqueeze(-2).squeeze(2),
        "squeeze of several": lambda x: x[:, None, :, None].squeeze((1, 3)),
        "permute": lambda x: x.permute(-1, 0, 1),
        "transpose from the end": lambda x: x.transpose(-1, -3),
        "t": lambda x: x[0].t(),
        "mT": lambda x: x.mT,
        "expand": lambda x: x[:, :1].expand(-1, 4, -1),
        "expand with a new dim": lambda x: x[0, 0].expand(x.shape[0], 3, 6),
        "expand_as": lambda x: x[:, :, :1].expand_as(x),
        "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
        "repeat_interleave of the last": lambda x: x.repeat_interleave(2, -1),
        "repeat": lambda x: x.repeat(1, 2, 1),
        "slice": lambda x: x[:, 1:3],
        "slice from the end": lambda x: x[..., -2:],
        "slice up to the end": lambda x: x[..., :-1],
        "slice with a step": lambda x: x[:, :, 1::2],
        "slice beyond the end": lambda x: x[:, 2:100],
        "slice of everything": lambda x: x[:, 0 : 2**62],
        "slice before the start": lambda x: x[:, -100:2],
        "slice of nothing": lambda x: x[:, 3:3],
        "slice of rows": lambda x: x[1:],
        "slice but the last row": lambda x: x[:-1],
        "slice of the last row": lambda x: x[-1:],
        "slice up to a symbolic bound": lambda x: x[: x.shape[0] - 1],
        "narrow": lambda x: x.narrow(2, 1, 3),
        "select": lambda x: x[:, 1],
        "select from the end": lambda x: x[..., -1],
        "select the last row": lambda x: x[-1],
        "split": lambda x: x.split(2, dim=-1),
        "split unevenly": lambda x: x.split(4, 2),
        "split with sizes": lambda x: x.split([1, 2, 3], -1),
        "chunk": lambda x: x.chunk(3, -1),
        "chunk unevenly": lambda x: x.chunk(4, -1),
        "unbind": lambda x: x.unbind(1),
        "stack": lambda x: torch.stack((x, -x), -1),
        "stack in front": lambda x: torch.stack([x, x], 0),
        "cat": lambda x: torch.cat((x, x[:, :1]), 1),
        "cat from the end": lambda x: torch.cat([x, x], -2),
        "cat of two dtypes": lambda x: torch.cat((x, x.double()), 1),
        "cat of one": lambda x: torch.cat((x,), 1),
        "cat of rows": lambda x: torch.cat((x, x), 0),
        "rotate half": lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1),
        "clone": lambda x: x.clone().contiguous().detach(),
    },
    (X,),
)


@pytest.mark.parametrize("name", VIEWS.functions)
def test_views(name: str) -> None:
    found = ops(VIEWS.assert_imports(name))
    assert not [op for op in found if op.startswith("aten.") and name != "repeat"]


ARITHMETIC = Table(
    {
        "add": lambda m, i: m + i,
        "add with alpha": lambda m, i: torch.add(m, i, alpha=2),
        "add of a number": lambda m, i: i + 1.5,
        "add of ints": lambda m, i: i + 1,
        "sub with alpha": lambda m, i: torch.sub(m, m * m, alpha=3),
        "rsub": lambda m, i: 2 - m,
        "rsub with alpha": lambda m, i: torch.rsub(m, i, alpha=2),
        "mul by a double": lambda m, i: m * m.double(),
        "div of ints": lambda m, i: i / 2,
        "reciprocal": lambda m, i: (m * m + 1).reciprocal(),
        "one over": lambda m, i: 1 / (m * m + 1),
        "square": lambda m, i: m.pow(2),
        "square itself": lambda m, i: m.square() + i.square(),
        "cube": lambda m, i: m**3,
        "power of a number": lambda m, i: 2.0**m,
        "power of a tensor": lambda m, i: (m * m + 1) ** i,
        "root": lambda m, i: (m * m + 0.5).pow(-0.5),
        "rsqrt": lambda m, i: torch.rsqrt(m * m + 0.5),
        "unary": lambda m, i: m.exp().log().sin().cos().tanh().sigmoid().neg().abs().sqrt().relu(),
        "unary of ints": lambda m, i: i.sqrt() + i.cos(),
        "activations": lambda m, i: (
            nn.functional.silu(m),
            nn.functional.gelu(m),
            nn.functional.gelu(m, approximate="tanh"),
        ),
        "maximum": lambda m, i: torch.maximum(m, -m) + torch.minimum(m, m * m),
        "compare with a number": lambda m, i: (m > 0.5, m <= 0, i == 2, i != 1),
        "compare ints with a fraction": lambda m, i: (i > 1.5, i < 0.5),
        "compare two dtypes": lambda m, i: (m < i, m.double() >= m, i.int() == i),
        "cast": lambda m, i: (m.double(), i.float(), m.to(torch.bfloat16), i.bool()),
        "type_as": lambda m, i: i.type_as(m),
        "clamp": lambda m, i: m.clamp(-0.5, 0.5),
        "clamp from below": lambda m, i: m.clamp(min=0.1),
        "clamp from above": lambda m, i: m.clamp(max=0.1),
        "clamp_min": lambda m, i: m.clamp_min(0.2),
        "clamp_max": lambda m, i: torch.clamp_max(m, 0.2),
        "clamp by numbers in place": lambda m, i: torch.clip(m, -1, 1),
        "clamp of ints": lambda m, i: (i.clamp(1, 2), i.clamp(min=2)),
        "clamp by tensors": lambda m, i: (m.clamp(-m * m, m * m), i.clamp(max=m), m.clamp(min=i)),
        "clamp_min by a tensor": lambda m, i: torch.clamp_min(m, i).clamp_max(i + m),
        "max and min of two": lambda m, i: (torch.max(m, -m), torch.min(m, i)),
        "floor": lambda m, i: torch.floor(m * 3) + (i // 2),
        "softplus": lambda m, i: (nn.functional.softplus(m), nn.functional.softplus(m, 2, 40)),
        "softplus with a near threshold": lambda m, i: nn.functional.softplus(m, 1, 0.5),
        "expm1": lambda m, i: m.expm1() + i.expm1(),
        "where": lambda m, i: torch.where(m > 0, m, -m),
        "where with numbers": lambda m, i: torch.where(m > 0, m, 0.5) + torch.where(m > 0, 1, m),
        "masked_fill": lambda m, i: m.masked_fill(i > 1, float("-inf")),
        "a number where a mask says": lambda m, i: torch.index_put(m, [m > 0.5], torch.tensor(2.0)),
        "masked_fill by a tensor": lambda m, i: m.masked_fill(i > 1, torch.tensor(2.0)),
        "bools": lambda m, i: ((m > 0) & (i > 1), (m > 0) | (i > 1), ~(m > 0)),
        "bits": lambda m, i: (i & 1, i | 2, ~i),
        "logical_not of floats": lambda m, i: torch.logical_not(m),
    },
    (M, IDS),
)


@pytest.mark.parametrize("name", ARITHMETIC.functions)
def test_arithmetic(name: str) -> None:
    ARITHMETIC.assert_imports(name)


ALONG = Table(
    {
        "mean": lambda x: x.mean(-1, keepdim=True),
        "mean of two dims": lambda x: x.mean((1, 2)),
        "mean of ints as floats": lambda x: (x > 0).long().float().mean(-1),
        "mean with a dtype": lambda x: x.mean(-1, dtype=torch.float64),
        "sum": lambda x: x.sum(1),
        "sum of bools": lambda x: (x > 0).sum(-1),
        "sum of all": lambda x: x.sum(),
        "amax": lambda x: x.amax(-1),
        "max.dim": lambda x: tuple(x.max(-1)),
        "max.dim of ints": lambda x: tuple((x * 9).long().max(1)),
        "concat": lambda x: torch.concat((x, torch.concatenate([x, -x], 1)), 1),
        "values of max.dim": lambda x: x.max(1, keepdim=True)[0],
        "softmax": lambda x: x.softmax(-1),
        "softmax to a dtype": lambda x: torch.softmax(x, 1, dtype=torch.float64),
        "topk": lambda x: tuple(x.topk(3, dim=-1)),
        "topk unsorted": lambda x: x.topk(2, dim=1, sorted=False)[0].sum(1),
        "the smallest": lambda x: tuple(x.topk(2, dim=-1, largest=False)),
        "cumsum": lambda x: x.cumsum(-1),
        "argmax": lambda x: x.argmax(-1, keepdim=True),
        "argmax of all": lambda x: x.argmax(),
        "gather": lambda x: x.gather(-1, x.topk(2, -1)[1]),
        "group limit": lambda x: torch.zeros_like(x[:, 0]).scatter_(1, x[:, 0].topk(2, -1)[1], 1),
    },
    (X,),
)


TABLE = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(0))
INDEXED = Table(
    {
        "rows": lambda x, i: TABLE[i],
        "rows from the end": lambda x, i: TABLE[i - 4],
        "rows by indices of topk": lambda x, i: TABLE[x[:, :4, 0].topk(2, -1)[1]],
        "elements of a vector": lambda x, i: TABLE[:, 0, 0][i],
        "a middle dim": lambda x, i: x[:, i],
        "the last dim": lambda x, i: x[..., i],
        "by 32 bits": lambda x, i: TABLE[i.to(torch.int32)],
        "of ints": lambda x, i: (TABLE * 9).long()[i],
        "two dims": lambda x, i: TABLE[i, i[:, :1] * 0 - 2],
        "two dims behind": lambda x, i: TABLE[:, i, i],
        "two dims apart": lambda x, i: TABLE[i, :, i],
    },
    (X, IDS[:, :2]),
)
UNCHANGED = Table(
    {
        "a number scattered into a part": lambda x: x.scatter(1, x[:2, :, :2].long() * 0 + 1, 7),
        "of tokens": lambda x: x[x[:, 0, 0].long() * 0],
    },
    (X,),
)


@pytest.mark.parametrize("name", INDEXED.functions)
def test_indices_that_are_tensors(name: str) -> None:
    found = ops(INDEXED.assert_imports(name))
    assert found["take"] and not [op for op in found if op.startswith("aten.")]


@pytest.mark.parametrize("name", UNCHANGED.functions)
def test_indices_that_stay_as_they_are(name: str) -> None:
    found = ops(UNCHANGED.assert_imports(name))
    assert [op for op in found if op.startswith("aten.")]


@pytest.mark.parametrize("name", ALONG.functions)
def test_along_a_dim(name: str) -> None:
    ALONG.assert_imports(name)


def test_the_smallest_is_an_aten_node() -> None:
    found = ops(ALONG.assert_imports("the smallest"))
    assert found == {"aten.topk.default": 1}


def test_unknown_operators_are_aten_nodes() -> None:
    found = ops(assert_imports(lambda x: x.cumsum(1).erf(), X))
    assert found == {"aten.cumsum.default": 1, "aten.erf.default": 1}


MADE = Table(
    {
        "arange": lambda x: torch.arange(x.shape[0]) + x[:, 0, 0].long(),
        "arange from": lambda x: torch.arange(2, x.shape[0] + 2) * 2,
        "arange with a step": lambda x: torch.arange(0, 8, 2) + x[:, :, 0],
        "arange of floats": lambda x: torch.arange(0, 1, 0.25) + x[:, :, 0],
        "zeros": lambda x: torch.zeros(x.shape[0], 3) + x[:, 0, :3],
        "ones_like": lambda x: torch.ones_like(x) + x,
        "full": lambda x: torch.full((x.shape[0], 2), 2.5) + x[:, 0, :2],
        "full_like of another dtype": lambda x: torch.full_like(x, 3, dtype=torch.long),
        "new_zeros": lambda x: x.new_zeros(x.shape[0], 2),
        "new_full": lambda x: x.new_full((2, x.shape[0]), -1.0),
        "a number": lambda x: x + torch.tensor(2.0),
        "a table": lambda x: x * torch.tensor([1.0, 2, 3, 4, 5, 6]),
    },
    (X,),
)


@pytest.mark.parametrize("name", MADE.functions)
def test_made_of_nothing(name: str) -> None:
    MADE.assert_imports(name)


def _filled(x: Tensor) -> Tensor:
    y = torch.empty(x.shape[0], 8)
    y[:, :6] = x[:, 0]
    y[:, 6:] = 1
    return y


def _every_second(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., ::2] = x[..., 3:]
    y[..., 1::2] = -x[..., :3]
    return y


def _in_place(x: Tensor) -> Tensor:
    y = x * 2
    y += 1
    y.mul_(x).clamp_(min=0)
    y[:, 1].fill_(3)
    y[:, -1] -= x[:, 0]
    return y


def _copied(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 4, 6, dtype=torch.float64)
    y.copy_(x[:, :1])
    return y


IN_PLACE = Table({f.__name__: f for f in (_filled, _every_second, _in_place, _copied)}, (X,))


@pytest.mark.parametrize("name", IN_PLACE.functions)
def test_in_place(name: str) -> None:
    IN_PLACE.assert_imports(name)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.norm = nn.LayerNorm(6)
        self.plain = nn.LayerNorm(6, elementwise_affine=False)
        self.unbiased = nn.LayerNorm(6, bias=False)
        self.rms = nn.RMSNorm(6, eps=1e-5)
        self.rms_of_default = nn.RMSNorm(6, elementwise_affine=False)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.norm(x) + self.plain(x) * self.unbiased(x)
        x = self.rms(x) - self.rms_of_default(x)
        return self.dropout(x + self.down(self.up(x))) @ self.embed.weight.T


def test_layers(golden: Callable[[str], None]) -> None:
    module = Layers()
    graph = assert_imports(module, IDS[:, 0])
    found = ops(graph)
    assert (found["layer_norm"], found["rms_norm"], found["linear"]) == (3, 2, 2)
    golden(str(graph))


def test_scaled_dot_product_attention_is_an_aten_node() -> None:
    def attend(x: Tensor) -> Tensor:
        q = x.permute(1, 0, 2)[None]
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    found = ops(assert_imports(attend, X))
    assert found["aten.scaled_dot_product_attention.default"] == 1


PRODUCTS = Table(
    {
        "batched": lambda x: x @ x.mT,
        "by a matrix": lambda x: torch.matmul(x, torch.ones(6, 2)),
        "of rows": lambda x: torch.mm(x[:, 0], x[:, 1].T),
        "and a bias": lambda x: torch.addmm(x[0, 0, :2], x[:, 0], x[0, 1, :, None] * x[0, :2].T),
        "and a scaled bias": lambda x: torch.addmm(x[0, 0], x[:, 0], x[0, :, :].T @ x[0], beta=2),
        "bmm": lambda x: torch.bmm(x, x.transpose(1, 2)),
        "by a vector": lambda x: x[:, 0] @ torch.ones(6),
        "einsum": lambda x: torch.einsum("tij,tkj->tik", x, x),
    },
    (X,),
)


@pytest.mark.parametrize("name", PRODUCTS.functions)
def test_products(name: str) -> None:
    found = ops(PRODUCTS.assert_imports(name))
    assert found["linear"] == 1 or name != "and a bias"


def test_static_shapes() -> None:
    graph = assert_imports(lambda x: x[-2:].sum(0), X, dynamic=False)
    assert graph.symbols == {}


def test_unused_results_do_not_matter() -> None:
    graph = assert_imports(lambda x: (x.topk(2, -1)[0], x.max(-1)[0]), X)
    assert not [op for op in ops(graph) if op.startswith("aten.")]


def test_sources_say_where() -> None:
    graph = assert_imports(lambda x: x.cumsum(1), X)
    (node,) = (n for n in graph.nodes() if n.op.name.startswith("aten."))
    assert "test_torch_export.py:" in node.source


@torch.library.custom_op("ingot_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x.clone()


@opaque.register_fake
def _(x: Any) -> Any:
    return torch.empty_like(x)


def test_unknown_custom_operators_are_refused_with_their_place() -> None:
    with pytest.raises(
        ImportFailure, match=r"operator ingot_tests.opaque.default at .*:\d+ is unknown"
    ):
        imported(Call(opaque), [X])


def test_more_dynamic_dims_than_declared() -> None:
    with torch.no_grad():
        program = export(
            Call(lambda x: x + 1),
            (X,),
            dynamic_shapes={"args": ({0: Dim("T", min=2), 1: Dim("S", min=2)},)},
        ).run_decompositions({})
    with pytest.raises(ImportFailure, match=r"more dynamic dims than \['T'\]"):
        import_program(program, "m", symbols={"T": range(2, 65)})
