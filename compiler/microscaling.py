"""MXFP4 (OCP Microscaling Formats v1.0 §5): blocks of E2M1 numbers that share one E8M0 scale.

A tensor [..., K] is held as `codes` u8 [..., K/2], two E2M1 codes a byte with the even k in the low
nibble, and `scales` u8 [..., K/group], E8M0 bytes: byte b stands for 2^(b - 127), 255 for NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

R = TypeVar("R")

# E2M1: sign, two bits of exponent, one of mantissa. Codes 8 to 15 are these, negative.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUPS = (16, 32)
# The exponent of the largest E2M1 number, 6 = 1.5 · 2^2.
_LARGEST_EXPONENT = 2
# Elements that a thread works on at once: small enough for the cache of a core.
_CHUNK = 1 << 18
_SCALES = torch.tensor((*(2.0 ** (b - 127) for b in range(255)), math.nan), dtype=torch.float64)
_EXPONENT_BITS = 0x7F800000  # of an f32

# How the scale 2^u of a block follows from its largest magnitude m · 2^e, 1 <= m < 2: u = e - 2,
# and one more where the rule says so.
#   floor  never (OCP v1.0 §6.3)     even   m rounds up to 2 in E2M1 (m >= 1.75)
#   rceil  6 · 2^u would be too small (m > 1.5)     ceil   m > 1
#   mse    whichever of the two has the smaller squared error over the block
_RULES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "floor": lambda m: torch.zeros_like(m, dtype=torch.bool),
    "even": lambda m: m >= 1.75,
    "rceil": lambda m: m > 1.5,
    "ceil": lambda m: m > 1.0,
}
SCALE_RULES = (*_RULES, "mse")


def encode(w: torch.Tensor, group: int = 32, scale: str = "mse") -> tuple[torch.Tensor, ...]:
    """Floats [..., K], K a multiple of `group` -> codes u8 [..., K/2], scales u8 [..., K/group].

    Elements round to nearest, ties to the even code, and saturate. ValueError for NaN or infinite
    elements, an unknown rule, or a K that the group does not divide.
    """
    if scale not in SCALE_RULES:
        raise ValueError(f"scale: expected one of {', '.join(SCALE_RULES)}; found {scale!r}")
    if group < 2 or w.shape[-1] % group:
        raise ValueError(f"expected a last dim that groups of {group} divide, found {[*w.shape]}")
    blocks = w.reshape(-1, group)
    codes = blocks.new_empty(len(blocks), group // 2, dtype=torch.uint8)
    scales = blocks.new_empty(len(blocks), dtype=torch.uint8)

    def encode_part(part: slice) -> None:
        some = blocks[part].float()
        exponents = block_exponents(some, scale)
        codes[part] = pack(round_elements(scaled(some, -exponents[:, None])))
        scales[part] = (exponents + 127).to(torch.uint8)

    _each_part(len(blocks), group, encode_part)
    lead = w.shape[:-1]
    return codes.view(*lead, w.shape[-1] // 2), scales.view(*lead, w.shape[-1] // group)


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers [..., K] that `codes` and `scales` stand for; exact in bf16, f32 and f64.

    Where 6 · 2^127 leaves the range of `dtype` it is infinite; a scale of 255 gives NaN.
    """
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    group = shape[-1] // max(1, scales.shape[-1])
    pairs, flat = codes.reshape(-1, group // 2), scales.reshape(-1)
    out = codes.new_empty(len(pairs), group, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def decode_part(part: slice) -> None:
        elements = element_values(unpack(pairs[part])).to(wide)
        out[part] = (elements * scale_values(flat[part]).to(wide)[:, None]).to(dtype)

    _each_part(len(pairs), group, decode_part)
    return out.view(shape)


def relative_error(w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> float:
    """|w - decoded| / |w|, Frobenius norms in f64; 0 for a weight of zeros."""
    group = w.shape[-1] // scales.shape[-1]
    blocks, pairs, flat = w.reshape(-1, group), codes.reshape(-1, group // 2), scales.reshape(-1)

    def squares(part: slice) -> tuple[float, float]:
        some = blocks[part].double()
        error = some - decode(pairs[part], flat[part, None], torch.float64)
        return float(error.square().sum()), float(some.square().sum())

    found = _each_part(len(blocks), group, squares)
    lost, total = (math.fsum(side) for side in zip(*found, strict=True)) if found else (0.0, 0.0)
    return math.sqrt(lost / total) if total else 0.0


def _each_part(blocks: int, group: int, work: Callable[[slice], R]) -> list[R]:
    """What `work` gives for every part of so many blocks, in order; a thread a core.

    Each thread takes all steps of its part by itself: many short operations, each split over all
    cores, would mostly wait for each other.
    """
    step = max(1, _CHUNK // group)
    parts = [slice(start, start + step) for start in range(0, blocks, step)]
    if len(parts) <= 1:
        return [work(part) for part in parts]
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)  # threads that begin later would take over the last setting


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes as f64 numbers."""
    return _SCALES[scales.int()]


def element_values(elements: torch.Tensor) -> torch.Tensor:
    """E2M1 codes u8 as f32 numbers."""
    bits = elements.int()
    # As the top bits of an f32 the exponent and mantissa are the number, 2^126 times too small.
    return ((bits & 7) << 22 | bits >> 3 << 31).view(torch.float32) * 2.0**126


def block_exponents(blocks: torch.Tensor, scale: str) -> torch.Tensor:
    """f32 [..., group] -> i32 [...]: the exponents u of the scales, by the rule called `scale`."""
    largest = blocks.abs().amax(-1)
    if not bool(largest.isfinite().all()):
        raise ValueError("expected finite weights, found NaN or infinity")
    mantissa, exponent = torch.frexp(largest)  # mantissa in [0.5, 1)
    floor = exponent - 1 - _LARGEST_EXPONENT
    if scale == "mse":  # errors are in units of the scales, one of which is twice the other
        raised = 4 * _squared_error(blocks, floor + 1) < _squared_error(blocks, floor)
    else:
        raised = _RULES[scale](2 * mantissa)
    return (floor + raised).clamp(-127, 127).masked_fill(largest == 0, -127)


def _squared_error(blocks: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """What rounding at the scales 2^exponents costs each block, in units of their squares."""
    magnitudes = scaled(blocks, -exponents.clamp(-127, 127)[..., None]).abs_()
    steps, halves = _steps(magnitudes)
    return (steps.mul_(halves).clamp_(max=MAGNITUDES[-1]).sub_(magnitudes)).square_().sum(-1)


def scaled(x: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """x · 2^exponents, in two exact steps: one factor alone may leave the range of f32."""
    half = exponents >> 1
    return x * _power_of_two(half) * _power_of_two(exponents - half)


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """i32 in -126 to 127 -> 2^exponents, f32, exact (a vectorised pow need not be)."""
    return (exponents + 127 << 23).view(torch.float32)


def _steps(magnitudes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 to (whole steps, to nearest and ties to even; the step): 0.5 below 2, 1 below 4, else 2.

    A number of steps is even where its E2M1 code is.
    """
    halves = magnitudes.clamp(1.0, 4.0).view(torch.int32).bitwise_and_(_EXPONENT_BITS)
    halves = halves.view(torch.float32).mul_(0.5)
    return (magnitudes / halves).round_(), halves


def round_elements(x: torch.Tensor) -> torch.Tensor:
    """Floats to E2M1 codes u8: to nearest, ties to the even code, saturating; -0 keeps its sign."""
    x = x.float()
    steps, halves = _steps(x.abs().clamp_(max=8.0))
    # Steps of 0.5 count from code 0, those of 1 from 2 (2.0 is 2 steps and code 4), those of 2
    # from 4; the exponent field of a step of 0.5 is 126.
    code = steps.int().add_((halves.view(torch.int32) >> 23).sub_(126).mul_(2)).clamp_(max=7)
    return code.bitwise_or_((x.view(torch.int32) >> 28).bitwise_and_(8)).to(torch.uint8)


def nearest(x: torch.Tensor) -> torch.Tensor:
    """The E2M1 numbers nearest to f32 `x`: ties to the even code, saturating."""
    steps, halves = _steps(x.abs())
    return steps.mul_(halves).clamp_(max=MAGNITUDES[-1]).copysign_(x)


def encode_at(x: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [..., K] at the scales 2^exponents i32 [..., K/group] -> codes and scales."""
    blocks = x.unflatten(-1, (exponents.shape[-1], -1))
    codes = round_elements(scaled(blocks, -exponents[..., None]))
    return pack(codes.flatten(-2)), (exponents + 127).to(torch.uint8)


def pack(elements: torch.Tensor) -> torch.Tensor:
    """Codes [..., K] to bytes [..., K/2]: the even k in the low nibble."""
    return elements[..., ::2] | (elements[..., 1::2] << 4)


def unpack(codes: torch.Tensor) -> torch.Tensor:
    """Bytes [..., K/2] to codes [..., K]."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
