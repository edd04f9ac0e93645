"""IR out of an ingot: which operators it may name, and how long reading it takes at most."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from ingot.compiler.ir import Op
from ingot.compiler.ops.aten import aten_op, check_operator, overload_of
from ingot.compiler.text import ParseError, parse
from ingot.compiler.types import TensorType, VerifyError
from ingot.compiler.untrusted import check_exportable, check_untrusted
from ingot.compiler.verify import verify

HEAD = "graph @g(%x: f32[T, 8]) T=1..64 {"
# What wrote or read memory out of bounds, served memory that nothing wrote, or changed torch.
REFUSED = (
    "max_pool2d_with_indices_backward.default",
    "empty_like.default",
    "empty.memory_format",
    "new_empty.default",
    "as_strided.default",
    "set_grad_enabled.default",
    "_set_grad_enabled.default",
    "manual_seed.default",
    "from_file.default",
    "rand_like.default",
    "bernoulli.default",
    "dropout.default",
    "relu_.default",
    "resize.default",
    "embedding.default",
    "_embedding_bag.default",
    "one_hot.default",
    "add.int",
    "nonzero.default",
    "no_such_operator.default",
)


def graph(*body: str, head: str = HEAD) -> str:
    return "\n".join((head, *body, "}"))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("spelled", ["aten.{}", "aten . {}", "aten.\\\n", "ａten.{}", "(aten).{}"])
def test_other_operators_are_refused_before_they_run(name: str, spelled: str) -> None:
    grad, seed = torch.is_grad_enabled(), torch.initial_seed()
    text = graph(f"  %0 = {spelled.format(name)}(%x) : f32[T, 8]", "  return %0")
    with pytest.raises((ParseError, VerifyError)):
        parse(text, trusted=False)
    assert torch.is_grad_enabled() == grad and torch.initial_seed() == seed


def test_state_of_torch_is_not_reached() -> None:
    text = graph("  %0 = aten.set_grad_enabled.default(val=False) : f32[T, 8]", "  return %0")
    with pytest.raises(VerifyError, match="expected an operator that an ingot may hold"):
        parse(text, trusted=False)
    assert torch.is_grad_enabled()


def test_what_is_allowed_is_functional_deterministic_and_fills_its_results() -> None:
    unsafe = (torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view)
    seen = 0
    for full in torch._C._dispatch_get_all_op_names():
        room, _, rest = full.partition("::")
        name = f"aten.{rest}" if "." in rest else f"aten.{rest}.default"
        try:
            check_operator(name if room == "aten" else full)
        except VerifyError:
            continue
        found = overload_of(name)
        seen += 1
        assert not found._schema.is_mutable and not {*unsafe} & {*found.tags}, name
        assert "empty" not in name and "Generator" not in str(found._schema), name
    assert seen > 150


def test_ops_of_one_rank_are_refused() -> None:
    text = "graph @g(%x: f32[4]) {\n  %0 = all_reduce(%x, ranks=2) : f32[4]\n  return %0\n}"
    with pytest.raises(VerifyError, match="the part of a rank"):
        parse(text, trusted=False)
    with pytest.raises(VerifyError, match="the part of a rank"):
        check_exportable(parse(text))


def test_arguments_are_checked() -> None:
    f, b = TensorType("f32", (4,)), TensorType("bool", (4,))
    with pytest.raises(VerifyError, match="i32 or i64 indices"):
        check_untrusted("aten.index.Tensor", (f, b), {"indices": (True,)})
    with pytest.raises(VerifyError, match="expected floats"):
        check_untrusted("aten.div.Tensor_mode", (b, b), {"rounding_mode": "trunc"})
    with pytest.raises(VerifyError, match="transposed"):
        check_untrusted("aten.convolution.default", (f, f), {"transposed": True})


X, ROWS = torch.randn(64, 32), torch.arange(5)
INDEXED: dict[str, Callable[[Any], Any]] = {
    "aten.index.Tensor": lambda i: (X, i, {"indices": (True,)}),
    "aten.gather.default": lambda i: (X, i[:, None].expand(5, 32), {"dim": 0}),
    "aten.index_select.default": lambda i: (X, i, {"dim": 1}),
    "aten.scatter.value": lambda i: (X, i[:, None].expand(5, 32), {"dim": 0, "value": 1.0}),
    "aten.scatter.src": lambda i: (X, i[:, None].expand(5, 32), X, {"dim": 0}),
    "aten.scatter_add.default": lambda i: (X, i[:, None].expand(5, 32), X, {"dim": 0}),
    "gather": lambda i: (X, i[:, None].expand(5, 32), {"dim": 0}),
    "take": lambda i: (X, i, {}),
    "embedding": lambda i: (i, X, {}),
}


@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize("wild", [64, -65, 2**31, 2**40, -(2**63)])
def test_wild_indices_raise(name: str, wild: int) -> None:
    op = aten_op(name) if name.startswith("aten.") else Op.registry[name]
    *tensors, attrs = INDEXED[name](torch.full((5,), wild))
    with pytest.raises((IndexError, RuntimeError)):
        op.reference(*tensors, **attrs)


def _int(*shape: int, fill: int = 0) -> torch.Tensor:
    return torch.full(shape, fill, dtype=torch.int32)


@pytest.mark.parametrize("operand", ["slots", "positions", "page_table"])
@pytest.mark.parametrize("wild", [2**31 - 1, 64, -9])
@pytest.mark.parametrize("name", ["kv_append", "cached_attention"])
def test_wild_pages_raise(name: str, operand: str, wild: int) -> None:
    index = {"slots": _int(5), "positions": _int(5), "page_table": _int(2, 3)}
    index[operand].fill_(wild)
    caches, attrs = (torch.zeros(6, 4, 2, 8),) * 2, {"scale": 0.3}
    rows = torch.randn(5, 2, 8)
    args = (*caches, rows, rows) if name == "kv_append" else (torch.randn(5, 4, 8), *caches)
    padding = operand == "slots" and wild < 0  # which is left out
    with nullcontext() if padding else pytest.raises(IndexError):
        Op.registry[name].reference(
            *args, *index.values(), **(attrs if name == "cached_attention" else {})
        )


@pytest.mark.parametrize("wild", [4, -1, 2**40])
def test_wild_experts_raise(wild: int) -> None:
    weights = (torch.randn(4, 12, 8), torch.randn(4, 8, 6))
    chosen = torch.full((5, 2), wild)
    with pytest.raises(IndexError):
        Op.registry["experts"].reference(
            torch.randn(5, 8), torch.randn(5, 2), chosen, *weights, activation="silu"
        )


# ---- time and memory

N = 1 << 17
NODE = "  %0 = relu(%x{}) : f32[T, 8]"
SUMS = ["T+L+A+B+C+1"] * 16


def _shape(*dims: str) -> str:
    return graph(f"  %0 = view(%x, shape=[{', '.join(dims)}]) : f32[T, 8]", "  return %0")


def _nodes(count: int, line: str) -> str:
    lines = (line.format(i + 1, "x" if i == 0 else i, i) for i in range(count))
    return graph(*lines, f"  return %{count}")


SLOW: dict[str, str] = {
    "tower": _shape("((((((2**16)**16)**16)**16)**16)**16)**16"),
    "tower of symbols": _shape("((((T+1)**16)**16)**16)**16"),
    "exponent of exponents": _shape("9**9**9"),
    "product of sums": _shape("*".join(f"({s})" for s in SUMS)),
    "shape of sums": _shape(*SUMS),
    "type of sums": graph("  return %x", head=f"graph @g(%x: f32[{', '.join(SUMS)}]) T=1..64 {{"),
    "functions": _shape(f"Max({', '.join(f'T+{i}' for i in range(500))})"),
    "nested functions": _shape("Mod(" * 90 + "T" + ", 3)" * 90),
    "digits": _shape("9" * 4000, "T"),
    "dims": _shape(*("1",) * 1000, "T", "8"),
    "word for a type": graph(f"  %0 = relu(%x) : {'a' * N}", "  return %0"),
    "open brackets": graph(f"  %0 = relu(%x) : {'f32[' * (N // 4)}", "  return %0"),
    "escaped quotes": graph(NODE.format(", a='" + "\\'" * (N // 2)), "  return %0"),
    "open quotes": graph(NODE.format(", a=" + "\\'" * (N // 2) + "\\"), "  return %0"),
    "head of words": f"graph @{'a(' * (N // 2)}\n}}",
    "head of symbols": f"graph @g(%x: f32[8]){' T=1..9' * (N // 7)} x {{\n  return %x\n}}",
    "head of types": f"graph @g({'%a: f32[' * (N // 8)}) {{\n  return %x\n}}",
    "signs": graph(NODE.format(", a=" + "-" * N + "1"), "  return %0"),
    "brackets": graph(NODE.format(", a=" + "(" * N + "1"), "  return %0"),
    "sum": graph(NODE.format(", a=" + "1+" * (N // 2) + "1"), "  return %0"),
    "dots": graph(f"  %0 = {'b.' * (N // 2)}c(%x) : f32[T, 8]", "  return %0"),
    "long line": graph(f"  %0 = relu(%x) : f32[{' ' * (1 << 20)}]", "  return %0"),
    "nodes": _nodes(1 << 17, "  %{} = relu(%{}) : f32[T, 8]"),
    "blank lines": "\n" * (1 << 26),
    "doubling": _nodes(3000, "  %{0} = cat(%{1}, %{1}, dim=0) : f32[2**{2}*2*T, 8]"),
    "symbols": graph("  return %x", head="graph @g(%x: f32[T, 8])" + " T=1..9" * 17 + " {"),
}


@pytest.mark.parametrize("case", SLOW)
def test_what_would_take_for_ever_is_refused_at_once(case: str) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises((ParseError, VerifyError)) as caught:
        parse(SLOW[case], trusted=False)
    assert time.process_time() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10
    assert re.match(r"line \d+: |expected", str(caught.value)) and len(str(caught.value)) < 2000


def test_many_parameters_take_linear_time() -> None:
    names = [f"%x{i}" for i in range(8000)]
    params = ", ".join(f"{name}: f32[T, 8]" for name in names)
    updates = [f"  update {name} = {name}" for name in names]
    text = graph("  return %x0", *updates, head=f"graph @g({params}) T=1..64 {{")
    start = time.process_time()
    made = parse(text, trusted=False)
    verify(made)
    assert [made.param(name[1:]) for name in names] == [*made.params]
    assert time.process_time() - start < 6
