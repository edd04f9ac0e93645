"""MXFP4 numerics, bit by bit against ml_dtypes (elements) and torchao (blocks)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ingot.compiler import microscaling
from ingot.compiler.microscaling import (
    GROUPS,
    MAGNITUDES,
    SCALE_RULES,
    decode,
    encode,
    encode_at,
    pack,
    relative_error,
    round_elements,
    scale_values,
    unpack,
)
from safetensors.torch import load_file, save_file

RULES = tuple(rule for rule in SCALE_RULES if rule != "mse")


def random_blocks(count: int, group: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers of widely different sizes, [count, group]."""
    spread = torch.randint(-60, 60, (count, 1)).float().exp2()
    return (torch.randn(count, group) * spread).to(dtype)


def edge_blocks() -> torch.Tensor:
    """Ties between elements, largest magnitudes at every rule's threshold, zeros, tiny numbers."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    around = torch.cat([torch.nextafter(ties, torch.tensor(s)) for s in (0.0, 9.0)] + [ties])
    blocks = torch.zeros(3 * len(around) + 4, 32)
    for i, value in enumerate(around):
        for j, power in enumerate((0, -90, 90)):
            blocks[3 * i + j, : len(around)] = around * 2.0**power
            blocks[3 * i + j, -1] = value * 2.0**power
    blocks[-3, 5] = -0.0
    blocks[-2, 7] = 1e-30
    blocks[-1] = torch.linspace(-1, 1, 32) * torch.finfo(torch.float32).max
    return torch.cat((blocks, -blocks))


def test_elements_are_those_of_ml_dtypes() -> None:
    x = torch.cat((torch.randn(1 << 20) * 3, edge_blocks().flatten()))
    ours = round_elements(x)
    theirs = x.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert torch.equal(ours, torch.from_numpy(theirs))


def test_every_code_decodes_to_the_number_of_ml_dtypes() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    ours = decode(pack(codes.repeat(2)), torch.tensor([127], dtype=torch.uint8), torch.float64)
    theirs = codes.repeat(2).numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert torch.equal(ours, torch.from_numpy(theirs))
    assert ours[:8].tolist() == list(MAGNITUDES)


def test_every_scale_is_the_number_of_ml_dtypes() -> None:
    scales = torch.arange(256).to(torch.uint8)
    theirs = scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert torch.equal(scale_values(scales).nan_to_num(-1), torch.from_numpy(theirs).nan_to_num(-1))


def test_blocks_are_those_of_torchao(tmp_path: Path) -> None:
    blocks = {
        f"{rule}.{group}.{kind}": w
        for rule in RULES
        for group in GROUPS
        for kind, w in (("random", random_blocks(1 << 18, group)), ("edges", edge_blocks()))
    }
    for name, theirs in torchao_blocks(tmp_path, blocks).items():
        w, rule = blocks[name], name.partition(".")[0]
        codes, scales = encode(w, w.shape[-1], rule)
        # What torchao does at the bottom of the range (bytes 0 and 1) is its own.
        sure = (scales > 1) & (theirs["scales"] > 1)
        if rule == "rceil":  # it takes log2(amax / 6) in f32, which is off close to whole numbers
            mantissa = 2 * torch.frexp(w.abs().amax(-1, keepdim=True))[0]
            sure &= ((mantissa - 1.5).abs() > 1e-5) | (mantissa == 1.5)
        assert float(sure.float().mean()) > 0.7
        assert torch.equal(scales[sure], theirs["scales"][sure])
        # It gives negative numbers that round to zero no sign.
        ours, others = (unpack(x[sure[:, 0]]) for x in (codes, theirs["codes"]))
        assert torch.equal(_without_minus_zero(ours), _without_minus_zero(others))


def torchao_blocks(
    directory: Path, blocks: dict[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """Codes and scales of torchao, which `make test` installs beside the environment."""
    oracles = Path(__file__).parents[2] / ".venv" / "oracles"
    assert oracles.is_dir(), f"{oracles} is not there: make test installs torchao into it"
    given_, found = directory / "blocks.safetensors", directory / "torchao.safetensors"
    save_file(blocks, given_)
    script = Path(__file__).parents[1] / "helpers" / "torchao_blocks.py"
    paths = os.pathsep.join([str(oracles), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(
        [sys.executable, str(script), str(given_), str(found)],
        check=True,
        env={**os.environ, "PYTHONPATH": paths, "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1"},
    )
    results = load_file(found)
    return {
        name: {part: results[f"{name}.{part}"] for part in ("codes", "scales")} for name in blocks
    }


def _without_minus_zero(elements: torch.Tensor) -> torch.Tensor:
    return torch.where(elements == 8, 0, elements)


def bf16_blocks(group: int) -> dict[str, torch.Tensor]:
    """What a table of bf16 may get wrong: any range of exponents, ties, the ends of the range."""
    count = (1 << 20) // group
    normal = torch.randn(count, group)
    bits = torch.randint(0, 0x7F80, (count, 1)) - torch.randint(0, 1500, (count, group))
    near = bits.clamp(min=0).to(torch.int16).view(torch.bfloat16).copysign(normal)
    # Largest magnitudes around the least that the table holds, over elements down to subnormals.
    low = torch.randint(-60, -40, (count, 1)).float().exp2()
    sparse = normal.clamp(-1, 1) * (torch.rand(count, group) < 0.1)
    blocks = {
        "alike": normal * 0.02,
        "spread": normal.double() * torch.randint(-140, 120, (count, 1)).double().exp2(),
        "each": normal * torch.randint(-60, 60, (count, group)).float().exp2(),
        "near": near,
        "exact": torch.randint(-48, 49, (count, group)) / 8,
        "low": sparse * low + normal * 2.0**-130,
        "zeros": (normal * 0.0).where(torch.rand(count, 1) < 0.9, normal),
        "edges": edge_blocks().view(-1, group),
        "top": (normal * 1e38).clamp(-3.38e38, 3.38e38),
    }
    rounded = {name: w.to(torch.bfloat16) for name, w in blocks.items()}
    return {name: w.where(w.isfinite(), 0) for name, w in rounded.items()}


@pytest.mark.parametrize("group", GROUPS)
def test_bf16_is_encoded_as_the_same_numbers_in_f32(group: int) -> None:
    """The first goes by a table, the second by arithmetic."""
    for name, w in bf16_blocks(group).items():
        for rule in SCALE_RULES:
            codes, scales = encode(w, group, rule)
            by_arithmetic = encode(w.float(), group, rule)
            assert torch.equal(scales, by_arithmetic[1]), (name, rule)
            assert torch.equal(codes, by_arithmetic[0]), (name, rule)


@pytest.mark.parametrize("group", GROUPS)
def test_little_of_bf16_needs_arithmetic(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = (torch.randn(1 << 12, 4 * group) * 0.02).bfloat16()
    w[::2] = 0
    expected = encode(w, group)
    counts: list[int] = []

    def counted(x: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts.append(len(x))
        return encode_at(x, exponents)

    monkeypatch.setattr("ingot.compiler.microscaling.encode_at", counted)
    assert all(map(torch.equal, encode(w, group), expected))
    assert sum(counts) < 0.02 * w.numel() / group
    encode(w.float(), group)
    assert sum(counts) >= w.numel() / group


@pytest.mark.parametrize(
    ("dtype", "power"),
    [
        (torch.float16, 0),
        *((d, p) for d in (torch.bfloat16, torch.float32) for p in (-110, 0, 125)),
    ],
)
def test_relative_error_is_that_of_f64(dtype: torch.dtype, power: int) -> None:
    w = (torch.randn(40, 1 << 14).clamp(-3.9, 3.9) * 2.0**power).to(dtype).requires_grad_()
    codes, scales = encode(w)
    lost = w.detach().double() - decode(codes, scales, torch.float64)
    expected = float(lost.norm() / w.detach().double().norm())
    assert 0.1 < expected < 0.13
    assert relative_error(w, codes, scales) == pytest.approx(expected, rel=1e-12)
    zeros = torch.zeros(3, 64, dtype=dtype)
    assert relative_error(zeros, *encode(zeros)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_decoding_is_exact(dtype: torch.dtype) -> None:
    scales = torch.arange(1, 253, dtype=torch.uint8)[:, None]
    codes = torch.randint(0, 256, (252, 16), dtype=torch.uint8)
    exact = decode(codes, scales, torch.float64)
    assert torch.equal(decode(codes, scales, dtype).double(), exact)
    values = torch.tensor((*MAGNITUDES, *(-m for m in MAGNITUDES)), dtype=torch.float64)
    expected = values[unpack(codes).int()] * 2.0 ** (scales.double() - 127)
    assert torch.equal(exact, expected)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_encoding_what_was_decoded_changes_nothing(rule: str) -> None:
    w = decode(*encode(random_blocks(5000, 32), 32, "even"), torch.bfloat16)
    again = decode(*encode(w, 32, rule), torch.bfloat16)
    if rule in ("floor", "rceil", "mse"):  # the others widen scales that were tight
        assert torch.equal(again, w)


def test_mse_is_the_better_of_two_scales() -> None:
    w = random_blocks(20_000, 32).double()

    def error(rule: str) -> torch.Tensor:
        return (decode(*encode(w, 32, rule), torch.float64) - w).square().sum(-1)

    best = error("mse")
    scale = w.square().sum(-1)
    for rule in RULES:
        assert bool((best <= error(rule) + 1e-6 * scale).all())
    # Of all blocks alike: a sum of the errors themselves is that of the few largest blocks.
    assert (best / scale).sum() < 0.999 * (error("even") / scale).sum()


def test_relative_error_of_normal_weights() -> None:
    """Mean squared error / variance x 10³ of each rule, over groups of 32."""
    w = torch.randn(100_000, 32)
    for rule, expected in (("floor", 13.22), ("even", 12.52), ("rceil", 13.33), ("mse", 12.45)):
        error = (decode(*encode(w, 32, rule), torch.float32) - w).square().mean()
        assert float(error) * 1e3 == pytest.approx(expected, rel=0.02)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16),
    st.sampled_from(SCALE_RULES),
)
def test_any_block_is_encoded_within_its_scale(values: list[float], rule: str) -> None:
    w = torch.tensor(values, dtype=torch.float32)
    codes, scales = encode(w, 16, rule)
    error = (decode(codes, scales, torch.float64) - w.double()).abs()
    step = scale_values(scales)
    # Half the widest step (from 4 to 6), or what saturation cuts off (up to 8 by floor).
    cut = w.double().abs() - 6 * step
    assert bool((error <= torch.maximum(step.expand(16), cut)).all())


def test_chunks_do_not_show() -> None:
    w = torch.randn(3, 5, 1 << 20)
    codes, scales = encode(w)
    assert (codes.shape, scales.shape) == ((3, 5, 1 << 19), (3, 5, 1 << 15))
    part, its_scales = encode(w[1, 2])
    assert torch.equal(codes[1, 2], part) and torch.equal(scales[1, 2], its_scales)
    assert torch.equal(
        decode(codes, scales, torch.float32)[1, 2], decode(part, its_scales, w.dtype)
    )


def test_what_cannot_be_encoded_is_refused() -> None:
    for bad in (torch.nan, torch.inf, -torch.nan, -torch.inf):
        for dtype in (torch.float32, torch.bfloat16):
            w = torch.zeros(4, 32, dtype=dtype)
            w[2, 3] = bad
            for rule in SCALE_RULES:
                with pytest.raises(ValueError, match="expected finite weights"):
                    encode(w, 32, rule)
    with pytest.raises(ValueError, match="groups of 32 divide"):
        encode(torch.zeros(4, 48))
    with pytest.raises(ValueError, match="expected one of floor, even"):
        encode(torch.zeros(4, 32), scale="best")


def test_what_torch_does_meanwhile_changes_nothing() -> None:
    """Tables are the cpu's whatever the default device is, and so is how many threads torch has."""
    w = torch.randn(2**12, 256).bfloat16()
    found: dict[str, Any] = {}

    def later() -> None:
        found["threads"] = torch.get_num_threads()

    for table in (microscaling._element_table, microscaling._block_tables, microscaling._pairs):
        table.cache_clear()
    with torch.device("meta"):
        first = encode(w), relative_error(w, *encode(w)), decode(*encode(w), torch.bfloat16)
    thread = Thread(target=later)
    thread.start()
    thread.join()
    second = encode(w), relative_error(w, *encode(w)), decode(*encode(w), torch.bfloat16)
    assert found["threads"] == torch.get_num_threads()
    assert first[1] == second[1]
    for a, b in zip((*first[0], first[2]), (*second[0], second[2]), strict=True):
        assert torch.equal(a, b)
