"""The stream of few tokens' experts: what its launches sum up, statement by statement; its size."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import gluon_numpy
import ptx_asm
import pytest
import torch
from expert_cases import Case, check
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.codegen import select
from ingot.codegen.build import build_one, compiled
from ingot.codegen.kernel_backend import NoKernelError, operand
from ingot.codegen.kernel_query import Declined, Template
from ingot.codegen.templates.gemm.epilogue import Epilogue
from ingot.codegen.templates.gemm.product import Rows
from ingot.codegen.templates.gemm.weight import Weight as KernelWeight
from ingot.codegen.templates.moe import expert_stream
from ingot.codegen.templates.moe import experts as templates
from ingot.compiler.microscaling import decode
from ingot.compiler.ops.glu import CLAMPED
from ingot.compiler.ops.moe import experts
from ingot.compiler.ops.mxfp4_fragments import mxfp4_fragments
from ingot.compiler.target import target_of
from ingot.compiler.types import TensorType
from ingot.runtime.program import Slice
from kernel_assembly import HeldPacked, sources
from kernel_checks import ON_DEVICE

BF16 = torch.bfloat16
interpreted = pytest.mark.skipif(ON_DEVICE, reason="statement by statement, in the interpreter")


def drawn(count: int, n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (count, n, k // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(115, 135, (count, n, k // 32), generator=generator, dtype=torch.uint8)
    return codes, scales


def launch(
    x: torch.Tensor,
    indices: torch.Tensor,
    packed: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    **more: Any,
) -> torch.Tensor:
    """y f32 of one launch: [T·k, N] of x [T, K], or with `weights` [T, N] of x [T·k, K]; `more` are
    constants of the kernel."""
    (tokens, k), n = indices.shape, packed[0].shape[1]
    tiles, blocks = mxfp4_fragments.reference(*packed)
    down, across = tiles.shape[1:3]
    results, joined = (tokens * k, 1) if weights is None else (tokens, k)
    constants = expert_stream.constants(results, joined, down, across, multiprocessors=2)
    assert not isinstance(constants, Declined)
    each = k if weights is None else 1
    y = torch.full((results, n), torch.nan)
    width = x.shape[1]
    args = {
        "x": Rows(x, width, 0),
        "indices": indices,
        "weights": weights,
        "weight": KernelWeight(
            tiles.flatten(), blocks.flatten(), n, width, 32, False, across, False, width, 1, 0
        ),
        "bias": bias,
        "epilogue": Epilogue(y, None, residual, each * n, n, None, False, 0.0, 0.0, False),
        "N": n,
        "EACH": each,
        "Y_HEAD": n,
        **constants,
        "AHEAD": weights is not None,
        "PROGRAMMATIC": False,
        **more,
    }
    gluon_numpy.run(expert_stream.expert_stream_kernel, (args["PROGRAMS"], 1, 1), args)
    return y


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


shapes = given(
    tokens=st.integers(1, 8),
    k=st.integers(1, 5),
    tiles=st.integers(1, 6),
    groups=st.integers(1, 40),
    seed=st.integers(0, 999),
)


@interpreted
@settings(max_examples=20)
@shapes
def test_hidden_rows_are_those_of_f64(
    tokens: int, k: int, tiles: int, groups: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = drawn(7, 16 * tiles, 32 * groups, seed)
    x = torch.randn(tokens, 32 * groups, generator=generator).to(BF16)
    indices = torch.randint(0, 7, (tokens, k), generator=generator)
    w = decode(*packed, torch.float64)
    expected = torch.einsum("tc,tjnc->tjn", x.double(), w[indices]).flatten(0, 1)
    assert relative(launch(x, indices, packed), expected) < 1e-6


@interpreted
@settings(max_examples=20)
@shapes
def test_sums_of_choices_are_those_of_f64(
    tokens: int, k: int, tiles: int, groups: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, width = 16 * tiles, 32 * groups
    packed = drawn(7, n, width, seed)
    h = torch.randn(tokens * k, width, generator=generator).to(BF16)
    indices = torch.randint(0, 7, (tokens, k), generator=generator)
    weights = torch.rand(tokens, k, generator=generator)
    bias = torch.randn(7, n, generator=generator).to(BF16)
    residual = torch.randn(tokens, n, generator=generator).to(BF16)
    w = decode(*packed, torch.float64)
    parts = torch.einsum("tjc,tjnc->tjn", h.double().view(tokens, k, -1), w[indices])
    expected = ((parts + bias.double()[indices]) * weights.double()[..., None]).sum(1)
    found = launch(h, indices, packed, weights, bias, residual)
    assert relative(found, expected + residual.double()) < 1e-6


@interpreted
@pytest.mark.parametrize("summed", [False, True])
def test_a_token_is_summed_alike_whatever_is_beside_it(summed: bool) -> None:
    """In one pass or several, by whatever program."""
    tokens, k, width = 8, 3, 672
    packed = drawn(5, 48, width)
    indices = torch.randint(0, 5, (tokens, k))
    x = torch.randn(tokens * (k if summed else 1), width).to(BF16)
    weights = torch.rand(tokens, k) if summed else None
    together = launch(x, indices, packed, weights, MOST=8).view(tokens, -1)
    for t in (0, 5):
        rows = slice(t * k, (t + 1) * k) if summed else slice(t, t + 1)
        own = None if weights is None else weights[t : t + 1]
        alone = launch(x[rows], indices[t : t + 1], packed, own, PROGRAMS=1)
        assert torch.equal(alone.flatten(), together[t])


@interpreted
def test_passes_of_as_many_steps_for_every_warp() -> None:
    """Nine choices of six steps do not come out even: a tile has two steps that are none."""
    shares = expert_stream.constants(8, 9, 256, 11, multiprocessors=132)
    assert not isinstance(shares, Declined) and (shares["STEPS"], shares["MOST"]) == (56, 3)
    packed, indices = drawn(5, 48, 672), torch.randint(0, 5, (2, 3))
    h, weights = torch.randn(6, 672).to(BF16), torch.rand(2, 3)
    expected = launch(h, indices, packed, weights)
    assert torch.equal(launch(h, indices, packed, weights, STEPS=16, MOST=1), expected)


@interpreted
def test_the_ends_of_the_scales() -> None:
    codes, scales = drawn(2, 32, 256)
    scales[:] = 0  # 2^-127
    x, indices = torch.full((1, 256), 2.0**62).to(BF16), torch.tensor([[1, 0]])
    expected = decode(codes, scales, torch.float64)[indices[0]] @ x[0].double()
    assert relative(launch(x, indices, (codes, scales)), expected) < 1e-6
    scales[:] = 127
    scales[1, 3, 5] = 255  # NaN
    codes[1, 3] |= 0x11
    y = launch(x / 2**62, indices, (codes, scales))
    bad = torch.zeros(2, 32, dtype=torch.bool)
    bad[0, 3] = True
    assert torch.equal(~y.isfinite(), bad)


@interpreted
def test_a_padded_tile_takes_nothing_from_the_expert_beside_it() -> None:
    codes, scales = drawn(2, 16, 384)
    scales[1] = 255
    x, indices = torch.randn(1, 384).to(BF16), torch.tensor([[0]])
    expected = decode(codes[:1], scales[:1], torch.float64)[0] @ x[0].double()
    assert relative(launch(x, indices, (codes, scales)), expected) < 1e-6


@interpreted
def test_a_wait_that_is_too_short_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = drawn(2, 96, 2048), torch.ones(1, 2048).to(BF16)
    indices = torch.tensor([[0, 1]])
    expected = decode(*packed, torch.float64).sum(2).view(2, -1)
    assert relative(launch(x, indices, packed), expected) < 1e-6
    short = lambda steps: f"cp.async.wait_group {steps + 1}; mov.b32 $0, 0;"  # noqa: E731
    monkeypatch.setattr(expert_stream, "on_their_way", short)
    assert not relative(launch(x, indices, packed), expected) < 0.1


@interpreted
def test_a_missing_barrier_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx_asm.Machine, "barrier", lambda self: None)
    with pytest.raises(AssertionError, match="read before a barrier"):
        launch(torch.ones(1, 2048).to(BF16), torch.tensor([[0, 1]]), drawn(2, 96, 2048))


PACKED = Case(1, 4, 6, 192, 160, BF16, 32, 32)
CASES = {
    "one token": PACKED,
    "eight": replace(PACKED, tokens=8),
    "biases and a residual": replace(PACKED, tokens=3, biased=True, residual=True, strided=True),
    "clamped": replace(PACKED, activation=CLAMPED, biased=True),
    "no gate": replace(PACKED, gated=False, activation="gelu_tanh", biased=True),
    "narrow choices": replace(PACKED, tokens=2, index=torch.int32, weights=BF16),
    "ragged": replace(PACKED, k=3, width=416, inner=96, residual=True),
}


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_TABLES", ({"experts": (templates.stream,)},))


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("name", CASES)
def test_experts(name: str) -> None:
    lowered = check(CASES[name])
    assert [k.symbol for k in lowered.program.kernels.values()] == ["expert_stream_kernel"] * 2


DECLINED: dict[str, tuple[Template, str]] = {
    "rows": (templates.few, "few: a weight does not lie by rows"),
    "x not aligned": (
        lambda q: templates.stream(
            replace(q, args=(replace(q.args[0], aligned=False), *q.args[1:]))
        ),
        "the rows of x do not begin at multiples of 16 bytes",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_declines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, reason = DECLINED[name]
    monkeypatch.setattr(select, "_TABLES", ({"experts": (template,)},))
    with pytest.raises(NoKernelError, match=reason):
        check(PACKED)


def test_sums_that_fit_nowhere() -> None:
    assert isinstance(expert_stream.constants(8, 9, 64, 61, 132), Declined)


def test_what_begins_at_sixteen_bytes() -> None:
    assert operand(Slice("x", "bf16", (2, 32), 32)).aligned
    assert not operand(Slice("x", "bf16", (2, 32), 8)).aligned


@pytest.mark.usefixtures("streams")
def test_dense_weights_are_not_streamed() -> None:
    with pytest.raises(NoKernelError, match="does not lie in fragments"):
        check(replace(PACKED, down=None))


def held(case: Case) -> tuple[list[Any], dict[str, Any]]:
    """Its operands by type alone, and attributes."""

    def of(*shape: int) -> TensorType:
        return TensorType("bf16", shape)

    choice = (case.tokens, case.k)
    rows = (1 + case.gated) * case.inner
    args = [
        of(case.tokens, case.width),
        TensorType("f32", choice),
        TensorType("i64", choice),
        HeldPacked(of(case.count, rows, case.width)),
        HeldPacked(of(case.count, case.width, case.inner)),
    ]
    return args, case.attrs()


REAL = {
    "Qwen3-30B-A3B": Case(1, 8, 128, 2048, 768),
    "gpt-oss-20b": Case(1, 4, 32, 2880, 2880, activation=CLAMPED),
    "DeepSeek-V2-Lite": Case(1, 6, 64, 2048, 1408),
    "DeepSeek-V3": Case(1, 8, 256, 7168, 2048),
}


@pytest.mark.skipif(ON_DEVICE, reason="nothing runs")
def test_the_second_launch_begins_when_the_experts_are_known() -> None:
    """The first waits, then lets the second begin; the second reads experts and weights, and waits
    before it reads anything else."""
    target = target_of("cuda:sm_90")
    case = replace(REAL["gpt-oss-20b"], count=4, width=1152, inner=1152)
    made = sources(experts, *held(case), target.name)
    texts = [compiled(s, target).asm["ptx"] for s in made]
    hidden, summed = (re.sub("//.*", "", t[t.index(".entry") :]) for t in texts)
    before, after = hidden.split("griddepcontrol.wait")
    assert not re.search(r"launch_dependents|\bld\.(?!param)|\bcp\.|\bst\.global", before)
    early, _ = after.split("griddepcontrol.launch_dependents")
    assert not re.search(r"\bld\.(?!param)|\bcp\.|\bbra\b", early)
    before, after = summed.split("griddepcontrol.wait")
    assert before.count("griddepcontrol.launch_dependents") == 1
    assert set(re.findall(r"\bld\.(?!param)[\w.]+", before)) == {"ld.volatile.global.b64"}
    depth = dict(made[1].constants)["DEPTH"]
    assert depth > 1
    copies = r"cp\.async\.c[ag]\.shared\.global"
    assert len(re.findall(copies, before)) == 5 * depth
    assert not re.search(r"\bst\.global|\bbra\b", before)
    assert "ld.volatile" not in after and "ld.volatile" not in hidden


@pytest.mark.skipif(ON_DEVICE, reason="nothing runs")
@pytest.mark.parametrize("target", ["cuda:sm_90", "cuda:sm_100"])
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("name", REAL)
def test_two_launches_fit_on_a_multiprocessor(name: str, tokens: int, target: str) -> None:
    made = sources(experts, *held(replace(REAL[name], tokens=tokens)), target)
    assert [s.function.__name__ for s in made] == ["expert_stream_kernel"] * 2
    built = [build_one(source, target_of(target)).facts for source in made]
    assert all(f["spills"] == 0 and f["registers"] * 512 <= 65536 for f in built)
    # Each beside the other, and the second beside itself.
    whole = target_of(target).shared_bytes - 1024
    hidden, summed = (f["shared"] for f in built)
    assert max(hidden, summed) + summed <= whole < 2 * hidden
