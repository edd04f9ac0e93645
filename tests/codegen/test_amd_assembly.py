"""What AMD's assembler is given at sizes of real models: all that can be said without a device."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from ingot.codegen.build import build_one
from ingot.codegen.kernel_source import KernelSource
from ingot.compiler.ir import Op
from ingot.compiler.ops.attention import cached_attention
from ingot.compiler.ops.linear import head_linear, linear
from ingot.compiler.ops.moe import experts
from ingot.compiler.target import target_of
from ingot.compiler.types import TensorType
from kernel_assembly import Assembly, Held, HeldPacked, sources
from kernel_checks import ON_DEVICE

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="nothing runs")
TARGETS = ("hip:gfx942", "hip:gfx950")
# MFMAs with bf16 of 16 or 32 rows that take as many columns as the target has.
WIDE = {
    "hip:gfx942": r"v_mfma_f32_(16x16x16|32x32x8)_bf16",
    "hip:gfx950": r"v_mfma_f32_(16x16x32|32x32x16)_bf16",
}


def bf16(*shape: int) -> TensorType:
    return TensorType("bf16", shape)


@dataclass(frozen=True)
class Case:
    """A node, the kernels of its products, whether they use matrix cores, and read MXFP4."""

    op: Op
    args: tuple[Any, ...]
    attrs: tuple[tuple[str, Any], ...]
    kernels: tuple[str, ...]
    mfma: bool = True
    packed: bool = True


def moe(tokens: int, kernels: tuple[str, ...], mfma: bool) -> Case:
    count, width, inner, k = 128, 2048, 768, 4
    args = (
        bf16(tokens, width),
        bf16(tokens, k),
        TensorType("i32", (tokens, k)),
        HeldPacked(bf16(count, 2 * inner, width)),
        HeldPacked(bf16(count, width, inner)),
    )
    attrs = (("activation", "silu"), ("gated", True))
    return Case(experts, args, attrs, kernels, mfma)


def attending(tokens: int, size: int) -> Case:
    cache = bf16(1024, 64, 8, size)
    kernel = "decode_kernel" if tokens == 1 else "attend_kernel"
    index = [TensorType("i32", shape) for shape in ((tokens,), (tokens,), (8, 128))]
    args = (bf16(tokens, 32, size), cache, cache, *index)
    return Case(cached_attention, args, (("scale", 0.1),), (kernel,), packed=False)


FEW, MANY = ("mfma_kernel",), ("product_kernel",)
SILU = (("gate", "silu"),)
NORM = (("eps", 1e-5), ("norm", Held(bf16(4096))))
CASES = {
    "few": Case(linear, (bf16(1, 4096), HeldPacked(bf16(6144, 4096))), (), FEW),
    "few, deep": Case(linear, (bf16(16, 14336), HeldPacked(bf16(4096, 14336))), (), FEW),
    "few, gated": Case(linear, (bf16(16, 2048), HeldPacked(bf16(1536, 2048))), SILU, FEW),
    "few, gated, large": Case(linear, (bf16(1, 4096), HeldPacked(bf16(28672, 4096))), SILU, FEW),
    "few, normed": Case(linear, (bf16(1, 4096), HeldPacked(bf16(6144, 4096))), NORM, FEW),
    "few, gated, normed": Case(
        linear, (bf16(2, 4096), HeldPacked(bf16(12288, 4096))), NORM + SILU, FEW
    ),
    "few, dense": Case(linear, (bf16(8, 4096), Held(bf16(128256, 4096))), (), FEW, packed=False),
    "GEMV": Case(
        linear,
        (bf16(1, 4096), Held(bf16(128256, 4096))),
        (),
        ("gemv_kernel",),
        mfma=False,
        packed=False,
    ),
    "few, heads": Case(
        head_linear, (bf16(1, 128, 512), HeldPacked(bf16(128, 128, 512))), (), ("product_kernel",)
    ),
    "many": Case(linear, (bf16(64, 4096), HeldPacked(bf16(6144, 4096))), (), MANY),
    "attention, few": attending(1, 128),
    "attention, many": attending(2048, 128),
    "attention, many, wide": attending(2048, 256),
    "experts, few": moe(1, ("expert_gemv_kernel", "expert_sum_kernel"), False),
    "experts, many": moe(512, ("grouped_gemm_kernel", "grouped_gemm_kernel"), True),
}


@cache
def built(case: str, target: str) -> list[tuple[KernelSource, Assembly, dict[str, Any]]]:
    """The kernels of a case that multiply: source, assembly, facts."""
    this = CASES[case]
    found = [
        source
        for source in sources(this.op, this.args, dict(this.attrs), target)
        if source.function.__name__ in this.kernels
    ]
    assert [s.function.__name__ for s in found] == list(this.kernels)
    device = target_of(target)
    return [(s, Assembly.of(s, device), dict(build_one(s, device).facts)) for s in found]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_kernels(case: str, target: str) -> None:
    this, device = CASES[case], target_of(target)
    for source, assembly, facts in built(case, target):
        name = source.function.__name__
        assert "could not allocate" not in assembly.text, name
        assert "broken" not in facts
        assert facts["spills"] == 0 and facts["scalar_spills"] == 0, (name, facts)
        assert facts["shared"] <= device.shared_bytes, (name, facts)
        counts = assembly.instructions
        conversions = sum(n for i, n in counts.items() if i.startswith("v_cvt_scalef32_pk_"))
        assert facts.get("scaled_conversions", 0) == conversions
        assert (conversions > 0) == (this.packed and device.scaled_conversions), name
        # Two codes a conversion, and one scale for four of them: words of eight codes.
        assert conversions % 4 == 0
        shapes = [i for i in counts if i.startswith("v_mfma")]
        assert bool(shapes) == this.mfma and facts.get("mfma", 0) == sum(counts[i] for i in shapes)
        assert all(re.fullmatch(WIDE[target], i) for i in shapes), (name, shapes)
        loads = [i for i in counts if re.match(r"(global|buffer)_load_dwordx4", i)]
        assert loads, (name, counts)


@pytest.mark.parametrize("target", TARGETS)
def test_few_tokens_read_whole_groups_and_stay_in_registers(target: str) -> None:
    ((source, assembly, _),) = built("few, deep", target)
    loop, constants = assembly.loop, dict(source.constants)
    lane = constants["T"] * constants["R"]  # loads of 16 bytes of codes in a step
    assert loop["global_load_dwordx4"] == lane + 4 * constants["T"]  # and x's
    assert loop["global_load_ubyte"] == lane  # a scale each
    assert not [i for i in loop if i.startswith("ds_") or i == "s_barrier"]
    converted = 16 * lane if target == "hip:gfx950" else 0
    assert loop["v_cvt_scalef32_pk_bf16_fp4"] == converted


def registers(operand: str) -> set[int]:
    """Of v7 or v[4:7]; none of anything else."""
    found = re.fullmatch(r"v\[?(\d+)(?::(\d+))?\]?", operand.strip(","))
    return set(range(int(found[1]), int(found[2] or found[1]) + 1)) if found else set()


def test_conversions_keep_their_distance_from_matrix_instructions() -> None:
    """LLVM inserts no wait states around inline assembly. Required (AMD CDNA 3 and 4 ISA) are two
    between a vector instruction and an MFMA that reads what it wrote, and up to 15 between an MFMA
    and a vector instruction that writes what was added to."""
    seen = 0
    for case in ("few", "few, deep", "few, gated", "few, gated, large", "many", "experts, many"):
        for _, assembly, _ in built(case, "hip:gfx950"):
            converted: dict[int, int] = {}  # wait states since a conversion wrote a register
            added: dict[int, int] = {}  # and since an MFMA read one that it does not write
            for line in re.findall(r"^\s+((?:[vs]|ds|global|buffer)_.*)", assembly.text, re.M):
                name, *operands = line.split()
                places = [registers(operand) for operand in operands]
                if name.startswith("v_mfma"):
                    read = places[1] | places[2] | places[3]
                    assert all(converted.get(r, 2) >= 2 for r in read), line
                    seen += bool(read & converted.keys())
                if "scalef32" in name:
                    assert all(added.get(r, 15) >= 15 for r in places[0]), line
                states = int(operands[0]) + 1 if name == "s_nop" else 1
                converted = {r: n + states for r, n in converted.items()}
                added = {r: n + states for r, n in added.items()}
                if name.startswith("v_mfma"):
                    added |= dict.fromkeys(places[3] - places[0], 0)
                if name.startswith("v_"):
                    for r in places[0]:
                        converted.pop(r, None)
                        if "scalef32" in name:
                            converted[r] = 0
    assert seen


# Instructions that a wave issues for 1,000 weights in the loop over K; what there is now, and some.
@pytest.mark.parametrize(
    ("case", "target", "most"),
    [
        ("few, deep", "hip:gfx942", 105),
        ("few, deep", "hip:gfx950", 25),
        ("many", "hip:gfx942", 190),
        ("many", "hip:gfx950", 80),
        ("experts, many", "hip:gfx942", 150),
        ("experts, many", "hip:gfx950", 45),
    ],
)
def test_instructions_for_a_weight(case: str, target: str, most: int) -> None:
    source, assembly, _ = built(case, target)[0]
    constants = dict(source.constants)
    if "T" in constants:
        weights = 2048 * constants["W"] * constants["T"] * constants["R"]
    elif "BLOCK_N" in constants:
        weights = constants["BLOCK_N"] * constants["BLOCK_K"]
    else:
        weights = 2 * constants["ROWS"] * constants["BLOCK"]
    issued = source.num_warps * sum(assembly.loop.values()) * 1000 / weights
    assert 0 < issued <= most, issued
