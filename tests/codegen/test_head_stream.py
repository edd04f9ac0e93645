"""The stream of products by head: what it sums up, statement by statement; its size; its prices."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import gluon_numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.codegen import select
from ingot.codegen.build import build_one, compiled
from ingot.codegen.kernel_backend import NoKernelError
from ingot.codegen.kernel_query import Declined
from ingot.codegen.kernel_source import PROGRAMMATIC, KernelSource
from ingot.codegen.templates.gemm import head_stream, linear
from ingot.codegen.templates.gemm.epilogue import Epilogue
from ingot.codegen.templates.gemm.product import Rows
from ingot.codegen.templates.gemm.weight import Weight as KernelWeight
from ingot.codegen.templates.moe import expert_stream
from ingot.compiler.microscaling import decode
from ingot.compiler.ops.linear import head_linear
from ingot.compiler.ops.mxfp4_fragments import mxfp4_fragments
from ingot.compiler.target import target_of
from ingot.compiler.types import TensorType
from kernel_assembly import HeldPacked, sources
from kernel_checks import ON_DEVICE, Packed, Strided, check_node

BF16 = torch.bfloat16
STREAM = "stream MXFP4 by head"
interpreted = pytest.mark.skipif(ON_DEVICE, reason="statement by statement, in the interpreter")


def drawn(heads: int, n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (heads, n, k // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(115, 135, (heads, n, k // 32), generator=generator, dtype=torch.uint8)
    return codes, scales


def launch(
    x: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor], y: torch.Tensor, **more: Any
) -> torch.Tensor:
    """`y` f32 [T, H, N], written, of x [T, H, K]; of both the heads and tokens may lie apart.
    `more` are constants of the kernel."""
    tokens, heads, k = x.shape
    n = packed[0].shape[1]
    tiles, blocks = mxfp4_fragments.reference(*packed)
    down, across = tiles.shape[1:3]
    constants = expert_stream.constants(tokens * heads, 1, down, across, multiprocessors=3)
    assert not isinstance(constants, Declined)
    weight = KernelWeight(
        tiles.flatten(), blocks.flatten(), n, k, 32, False, across, False, k, 1, n * k
    )
    args = {
        "x": Rows(x, x.stride(0), x.stride(1)),
        "indices": None,
        "weights": None,
        "weight": weight,
        "bias": None,
        "epilogue": Epilogue(y, None, None, y.stride(0), 0, None, False, 0.0, 0.0, False),
        "N": n,
        "EACH": heads,
        "Y_HEAD": y.stride(1),
        **constants,
        "AHEAD": True,
        "PROGRAMMATIC": False,
        **more,
    }
    gluon_numpy.run(expert_stream.expert_stream_kernel, (args["PROGRAMS"], 1, 1), args)
    return y


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def in_f64(x: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.einsum("thk,hnk->thn", x.double(), decode(*packed, torch.float64))


@interpreted
@settings(max_examples=20)
@given(
    tokens=st.integers(1, 8),
    heads=st.integers(1, 6),
    n=st.integers(1, 70),
    groups=st.integers(1, 20),
    apart=st.sampled_from([0, 8, 24]),
    ahead=st.booleans(),
    seed=st.integers(0, 999),
)
def test_products_are_those_of_f64(
    tokens: int, heads: int, n: int, groups: int, apart: int, ahead: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = 32 * groups
    packed = drawn(heads, n, k, seed)
    x = torch.randn(tokens, heads, k + apart, generator=generator).to(BF16)[..., :k]
    # Results lie by head, between others that stay.
    lies = torch.full((heads, tokens, n + apart), torch.nan)
    y = lies.transpose(0, 1)[..., :n]
    assert relative(launch(x, packed, y, AHEAD=ahead), in_f64(x, packed)) < 1e-6
    assert lies[..., n:].isnan().all()


@interpreted
def test_a_token_is_summed_alike_whatever_is_beside_it() -> None:
    """In one pass or several, by whatever program, with any number of steps ahead."""
    tokens, heads, k, n = 8, 3, 672, 40
    packed, x = drawn(heads, n, k), torch.randn(tokens, heads, k).to(BF16)
    together = launch(x, packed, torch.empty(tokens, heads, n), MOST=8)
    for t in (0, 5):
        for more in ({"PROGRAMS": 1, "MOST": 8}, {"PROGRAMS": 7, "DEPTH": 1}):
            alone = launch(x[t : t + 1], packed, torch.empty(1, heads, n), **more)
            assert torch.equal(alone[0], together[t])


@interpreted
def test_a_padded_tile_takes_nothing_from_the_head_beside_it() -> None:
    codes, scales = drawn(2, 24, 160)
    x = torch.randn(1, 2, 160).to(BF16)
    expected = in_f64(x, (codes, scales))
    scales[1] = 255
    y = launch(x, (codes, scales), torch.empty(1, 2, 24))
    assert relative(y[:, :1], expected[:, :1]) < 1e-6


def test_no_more_steps_ahead_than_a_warp_has() -> None:
    depths = {}
    for heads, down, across in ((16, 32, 1), (16, 8, 4), (128, 32, 1), (128, 8, 4)):
        shares = expert_stream.constants(heads, 1, down, across, multiprocessors=132)
        assert not isinstance(shares, Declined)
        depths[heads, down] = shares["DEPTH"]
    assert depths == {(16, 32): 1, (16, 8): 1, (128, 32): 4, (128, 8): 2}


# ---- the whole way of a node


@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize(("heads", "n", "k"), [(4, 96, 128), (3, 40, 352)])
@pytest.mark.parametrize("form", [torch.Tensor, Strided])
def test_head_linear(form: Any, heads: int, n: int, k: int, tokens: int) -> None:
    x = torch.randn(tokens, heads, k).to(BF16)
    w = Packed(torch.randn(heads, n, k).to(BF16))
    lowered = check_node(head_linear, (Strided(x) if form is Strided else x, w), prefer=STREAM)
    assert [k.symbol for k in lowered.program.kernels.values()] == ["expert_stream_kernel"]


@pytest.mark.parametrize(("tokens", "prefer"), [(3, "narrow MXFP4 by head"), (9, ""), (70, "")])
def test_tiles_read_the_same_weight(tokens: int, prefer: str) -> None:
    """Of which heads have rows that are no whole tiles."""
    x, w = torch.randn(tokens, 3, 160).to(BF16), Packed(torch.randn(3, 40, 160).to(BF16))
    lowered = check_node(head_linear, (x, w), prefer=prefer)
    assert [k.symbol for k in lowered.program.kernels.values()] == ["product_kernel"]


def test_one_head_is_a_product_of_rows() -> None:
    x, w = torch.randn(2, 1, 160).to(BF16), Packed(torch.randn(1, 40, 160).to(BF16))
    (kernel,) = check_node(head_linear, (x, w)).program.kernels.values()
    assert kernel.symbol in ("fragment_kernel", "stream_kernel")


# x, the weight, and why they are not streamed.
OF_EIGHTS = torch.randn(2, 3, 64).to(BF16)
DECLINED = {
    "nine tokens": (
        torch.randn(9, 3, 64).to(BF16),
        Packed(torch.randn(3, 32, 64).to(BF16)),
        "head stream: 9 tokens, expected at most 8",
    ),
    "groups of 16": (
        OF_EIGHTS,
        Packed(torch.randn(3, 32, 64).to(BF16), 16),
        "head stream: the weight does not lie in fragments",
    ),
    "numbers of f32": (
        OF_EIGHTS.float(),
        Packed(torch.randn(3, 32, 64)),
        "head stream: the weight does not lie in fragments",
    ),
    "one head": (
        OF_EIGHTS[:, :1],
        Packed(torch.randn(1, 32, 64).to(BF16)),
        "head stream: there is one weight for all rows",
    ),
    "more steps than there is room for": (
        torch.randn(1, 2, 53504).to(BF16),
        Packed(torch.randn(2, 16, 53504).to(BF16)),
        "stream: 209 steps a tile, expected at most 208",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_declines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, reason = DECLINED[name]
    monkeypatch.setattr(linear, "VARIANTS", (head_stream.variant,))
    with pytest.raises(NoKernelError, match=reason):
        check_node(head_linear, (x, w))


@pytest.mark.parametrize("by", ["strides", "start"])
def test_rows_that_do_not_begin_at_sixteen_bytes(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(query: Any) -> Any:
        x = query.args[0]
        odd = {"strides": (200, 68, 1)} if by == "strides" else {"aligned": False}
        return linear.head_linear(replace(query, args=(replace(x, **odd), *query.args[1:])))

    monkeypatch.setattr(linear, "VARIANTS", (head_stream.variant,))
    monkeypatch.setattr(select, "_TABLES", ({"head_linear": (moved,)},))
    with pytest.raises(NoKernelError, match="rows of x do not begin at multiples of 16 bytes"):
        check_node(head_linear, (OF_EIGHTS, Packed(torch.randn(3, 32, 64).to(BF16))))


# ---- what it is built to


def source_of(heads: int, n: int, k: int, tokens: int, target: str) -> KernelSource:
    args = (
        TensorType("bf16", (tokens, heads, k)),
        HeldPacked(TensorType("bf16", (heads, n, k))),
    )
    (source,) = sources(head_linear, args, {}, target)
    assert source.function.__name__ == "expert_stream_kernel"
    return source


SIZES = [(16, 512, 128), (16, 128, 512), (128, 512, 128), (128, 128, 512)]


@pytest.mark.skipif(ON_DEVICE, reason="nothing runs")
@pytest.mark.parametrize("ahead", [True, False])
def test_constants_are_read_ahead_of_the_wait_and_x_after_it(ahead: bool) -> None:
    source = source_of(128, 128, 512, 1, "cuda:sm_90")
    args = {n: a for n, a in source.arguments if n != PROGRAMMATIC}
    assert args["AHEAD"] is True
    made = KernelSource.of(
        source.function, {**args, "AHEAD": ahead}, source.num_warps, source.num_stages, True
    )
    ptx = compiled(made, target_of("cuda:sm_90")).asm["ptx"]
    text = re.sub("//.*", "", ptx[ptx.index(".entry") :])
    before, after = text.split("griddepcontrol.wait")
    launches = [t.count("griddepcontrol.launch_dependents") for t in (before, after)]
    assert launches == ([1, 0] if ahead else [0, 1])
    copies = len(re.findall(r"cp\.async\.c[ag]\.shared\.global", before))
    # Four of codes and one of scales a step; a step of x is one.
    assert copies == (5 * args["DEPTH"] if ahead else 0)
    assert not re.search(r"\bld\.(?!param)|\bst\.global|\bbra\b", before)
    assert ".volatile" not in text


@pytest.mark.skipif(ON_DEVICE, reason="nothing runs")
@pytest.mark.parametrize("target", ["cuda:sm_90", "cuda:sm_100"])
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize(("heads", "n", "k"), SIZES)
def test_two_launches_fit_on_a_multiprocessor(
    heads: int, n: int, k: int, tokens: int, target: str
) -> None:
    source = source_of(heads, n, k, tokens, target)
    facts = build_one(source, target_of(target)).facts
    assert facts["spills"] == 0 and facts["registers"] <= 128
    assert source.num_warps == 8 and 2 * (facts["shared"] + 1024) <= target_of(target).shared_bytes
