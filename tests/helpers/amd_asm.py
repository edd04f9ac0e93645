"""AMD's inline assembly by its documented meaning, over numpy arrays, for Triton's interpreter.

Known are the scaled conversions of FP4 (CDNA 4 ISA, V_CVT_SCALEF32_PK_{F32,F16,BF16}_FP4):

    scale = 32'U(exponent(S1.f32));
    srcbyte = OPSEL[1:0].i32 * 8;
    src = VGPR[laneId][SRC0.u32][srcbyte + 7 : srcbyte].b8;
    tmp0 = fp4_to_f32_scale(src[3:0].fp4, scale.u8);
    tmp1 = fp4_to_f32_scale(src[7:4].fp4, scale.u8);

with tmp0 in the low and tmp1 in the high half of the result, and the scale as in E8M0. In assembly
op_sel:[x,y,…] is OPSEL[0], OPSEL[1] (LLVM, MC support of these instructions for gfx950).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

_LINE = re.compile(
    r"v_cvt_scalef32_pk_(?P<to>f32|f16|bf16)_fp4 \$(?P<d>\d+), \$(?P<s0>\d+), \$(?P<s1>\d+)"
    r"(?: op_sel:\[(?P<x>[01]),(?P<y>[01]),0\])?"
)
# Of templates.arrival; assembly must give something, so it gives 0.
_RELEASE = "s_waitcnt vmcnt(0)\nbuffer_wbl2 sc1\ns_waitcnt vmcnt(0)\nv_mov_b32 $0, 0"
_NARROW = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}


def run(asm: str, constraints: str, args: Sequence[Any]) -> list[Any]:
    """The outputs of `asm`, one element of each of `args` an instance (pack=1)."""
    if asm == _RELEASE:  # one program runs after the other, and each store at once
        assert (constraints, list(args)) == ("=v,~{memory}", [])
        return [np.zeros((), np.int32)]
    kinds = constraints.split(",")
    outputs = [kind for kind in kinds if kind.startswith("=")]
    # Outputs are written before all inputs are read, and every register is a lane's.
    assert set(outputs) == {"=&v"}, constraints
    assert kinds[len(outputs) :] == ["v"] * len(args), constraints
    registers: list[Any] = [None] * len(outputs) + list(np.broadcast_arrays(*args))
    for line in filter(None, (part.strip() for part in re.split(r"[;\n]", asm))):
        if re.fullmatch(r"s_nop \d+", line):
            continue
        match = _LINE.fullmatch(line)
        assert match, f"unknown instruction {line!r}"
        place = int(match["d"])
        assert place < len(outputs) and registers[place] is None, line
        byte = int(match["x"] or 0) + 2 * int(match["y"] or 0)
        source, scale = registers[int(match["s0"])], registers[int(match["s1"])]
        registers[place] = _converted(match["to"], source, scale, byte)
    return registers[: len(outputs)]


def _converted(to: str, source: Any, scale: Any, byte: int) -> Any:
    assert source.dtype == np.int32 and scale.dtype == np.float32, (source.dtype, scale.dtype)
    found = source.view(np.uint32) >> np.uint32(8 * byte) & np.uint32(0xFF)
    exponent = (scale.view(np.uint32) >> np.uint32(23) & np.uint32(0xFF)).astype(np.uint8)
    factor = exponent.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    low, high = (
        nibble.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64) * factor
        for nibble in (found & np.uint32(15), found >> np.uint32(4))
    )
    if to == "f32":
        low, high = (x.astype(np.float32).view(np.uint32).astype(np.uint64) for x in (low, high))
        return (low | high << np.uint64(32)).view(np.int64)
    kind = _NARROW[to]
    low, high = (x.astype(kind).view(np.uint16).astype(np.uint32) for x in (low, high))
    return (low | high << np.uint32(16)).view(np.int32)
