"""Norms and the prologue of products: a program a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.codegen.kernel_backend import NoKernelError
from ingot.codegen.kernel_query import Arg, Call, Declined, KernelQuery, Operand, Ref, Result
from ingot.codegen.select import select
from ingot.codegen.templates.rowwise.norms import prologue_call, row_step
from ingot.compiler.ops.collective import add_rms_norm
from ingot.compiler.ops.linear import linear
from ingot.compiler.ops.norm import layer_norm, rms_norm
from ingot.compiler.ops.prologue import PROLOGUE, run_prologue
from ingot.compiler.target import target_of
from ingot.compiler.torch_types import type_of
from ingot.compiler.types import TensorType
from interpreted import run_call
from kernel_checks import TOLERANCE, Strided, Weight, build_everywhere, check_node, run_node

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 7, 80, 1000)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape) + 0.1).to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm(dtype: torch.dtype, width: int) -> None:
    x = draw(3, 2, width, dtype=dtype)
    check_node(rms_norm, (x,), {"weight": Weight(draw(width)), "eps": 1e-6})
    check_node(rms_norm, (x,), {"weight": Weight(draw(width, dtype=dtype)), "eps": 1e-6})
    check_node(rms_norm, (x,), {"eps": 1e-2})


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_add_rms_norm(dtype: torch.dtype, width: int) -> None:
    x, delta = draw(5, width, dtype=dtype), draw(5, width, dtype=dtype)
    check_node(add_rms_norm, (x, delta, Weight(draw(width))), {"eps": 1e-6})


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm(dtype: torch.dtype, width: int) -> None:
    x = draw(5, width, dtype=dtype) + 3
    affine = {"weight": Weight(draw(width)), "bias": Weight(draw(width))}
    for names in ((), ("weight",), ("bias",), ("weight", "bias")):
        check_node(layer_norm, (x,), {**{name: affine[name] for name in names}, "eps": 1e-5})


def test_long_rows_are_read_in_blocks() -> None:
    x, delta, w = draw(2, 9001).bfloat16(), draw(2, 9001).bfloat16(), Weight(draw(9001))
    check_node(rms_norm, (x,), {"weight": w, "eps": 1e-6})
    check_node(add_rms_norm, (x, delta, w), {"eps": 1e-6})
    check_node(layer_norm, (x,), {"weight": w, "bias": w, "eps": 1e-6})


@pytest.mark.parametrize("op", [rms_norm, layer_norm], ids=lambda op: op.name)
def test_rows_that_lie_apart_are_read_where_they_are(op: Any) -> None:
    lowered = check_node(op, (Strided(draw(4, 40)),), {"weight": Weight(draw(40)), "eps": 1e-6})
    (entry,) = lowered.program.entries
    assert [launch.label.split()[0] for launch in entry.launches] == [op.name]


def test_the_sum_is_rounded_before_its_norm_reads_it() -> None:
    """Almost every bit is the reference's; the norm of the unrounded sum differs in many places."""
    x, delta, w = (draw(*shape).bfloat16() for shape in ((4, 1000), (4, 1000), (1000,)))
    found, plain, _ = run_node(add_rms_norm, (x, delta, Weight(w)), {"eps": 1e-6})
    total, n = plain.reference()
    (unrounded,) = rms_norm.reference(x.float() + delta.float(), weight=w, eps=1e-6)
    assert torch.equal(found[0], total.float())
    assert (found[1] == n.float()).float().mean() > 0.99
    assert (found[1] == unrounded.bfloat16().float()).float().mean() < 0.95


PROLOGUES = [(), ("norm",), ("delta",), ("norm", "delta"), ("norm", "delta", "post_norm")]


@pytest.mark.parametrize("width", [40, 8200])
@pytest.mark.parametrize("names", [*PROLOGUES, ("delta", "post_norm")], ids="-".join)
def test_prologue(names: tuple[str, ...], width: int) -> None:
    """n and s of every form, from a row step of x, as a linear's template asks for them."""
    wide_x = draw(3, width + 24).bfloat16()
    x = wide_x[:, :width]
    weights = {"norm": draw(width), "post_norm": draw(width).bfloat16()}
    given = {**weights, "delta": draw(3, width).bfloat16()}
    tensors = [x, draw(6, width).bfloat16(), *(given[name] for name in names)]
    query = KernelQuery(
        linear,
        {},
        tuple(Operand(type_of(t), t.stride()) for t in tensors),
        (),
        target_of("cuda:sm_90"),
        given=names,
    )
    eps = 1e-6 if "norm" in names else None
    post_eps = 1e-5 if "post_norm" in names else None
    call = prologue_call(query, Result(0), Result(1), eps, post_eps)
    assert isinstance(call, Call)
    n, s = torch.full((2, 3, width), torch.nan).bfloat16()
    memory: dict[Ref, torch.Tensor] = {Arg(i): t for i, t in enumerate(tensors)}
    run_call(call, {**memory, Result(0): n, Result(1): s})
    exact = (given[name].double() if name in names else None for name in PROLOGUE)
    expected_n, sums = run_prologue(x.double(), *exact, eps, post_eps)
    expected_s = sums[0] if sums else x.double()
    for found, expected in ((n, expected_n), (s, expected_s)):
        allowed = TOLERANCE["bf16"] * expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=allowed)


def test_row_step() -> None:
    def step(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
        return row_step(Operand(TensorType("f32", shape), strides))

    assert step((3, 8), (8, 1)) == 8
    assert step((2, 3, 8), (48, 16, 1)) == 16
    assert step((2, 1, 8), (48, 5, 1)) == 48
    assert step((8,), (1,)) == 8
    assert step((2, 3, 8), (50, 16, 1)) is None
    assert step((3, 8), (8, 2)) is None


@pytest.mark.parametrize("op", [rms_norm, layer_norm], ids=lambda op: op.name)
def test_f64_is_refused(op: Any) -> None:
    with pytest.raises(NoKernelError, match=r"expected operands of f16, bf16, f32; found f64"):
        run_node(op, (torch.ones(2, 8).double(),), {"eps": 1e-6})


@pytest.mark.parametrize("op", [rms_norm, layer_norm], ids=lambda op: op.name)
def test_a_row_does_not_depend_on_the_others(op: Any) -> None:
    x, w = draw(7, 1000).bfloat16(), Weight(draw(1000))
    (whole,), _, _ = run_node(op, (x,), {"weight": w, "eps": 1e-6})
    for rows in (slice(0, 1), slice(3, 5)):
        (part,), _, _ = run_node(op, (x[rows].clone(),), {"weight": w, "eps": 1e-6})
        assert torch.equal(part, whole[rows])


def test_what_ranks_sum_is_not_theirs() -> None:
    operand = Operand(TensorType("f32", (2, 8)), (8, 1))
    query = KernelQuery(
        add_rms_norm, {"eps": 1e-6, "ranks": 2}, (operand,) * 3, (), target_of("cuda:sm_90")
    )
    assert isinstance(found := select(query), Declined)
    assert "over 2 ranks" in found.reason


def test_they_build_for_every_target() -> None:
    x, w = draw(4, 4096).bfloat16(), Weight(draw(4096).bfloat16())
    build_everywhere(rms_norm, (x,), {"weight": w, "eps": 1e-6})
    build_everywhere(add_rms_norm, (x, x.clone(), w), {"eps": 1e-6})
    build_everywhere(layer_norm, (x,), {"weight": w, "bias": w, "eps": 1e-6})
    build_everywhere(rms_norm, (draw(2, 12288).bfloat16(),), {"eps": 1e-6})
