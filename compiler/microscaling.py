"""MXFP4 (OCP Microscaling Formats v1.0 §5): blocks of E2M1 numbers that share one E8M0 scale.

A tensor [..., K] is held as `codes` u8 [..., K/2], two E2M1 codes a byte with the even k in the low
nibble, and `scales` u8 [..., K/group], E8M0 bytes: byte b stands for 2^(b - 127), 255 for NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, Lock
from typing import TypeVar

import torch

R = TypeVar("R")
_STARTING = Lock()

# E2M1: sign, two bits of exponent, one of mantissa. Codes 8 to 15 are these, negative.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUPS = (16, 32)
# The exponent of the largest E2M1 number, 6 = 1.5 · 2^2.
_LARGEST_EXPONENT = 2
# Elements that a thread works on at once: few enough for the caches, and so many that operations
# take far longer than Python takes to start them, which one thread at a time can do.
_CHUNK = 1 << 18
# All is computed here, whatever device a tensor comes from or torch makes new ones on.
_CPU = torch.device("cpu")
_SCALES = torch.tensor((*(2.0 ** (b - 127) for b in range(255)), math.nan), dtype=torch.float64)
_EXPONENT_BITS = 0x7F800000  # of an f32
_NOT_FINITE = "expected finite weights, found NaN or infinity"

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
    blocks = w.detach().cpu().reshape(-1, group)
    codes = blocks.new_empty(len(blocks), group // 2, dtype=torch.uint8)
    scales = blocks.new_empty(len(blocks), dtype=torch.uint8)
    unsure = blocks.new_empty(len(blocks), dtype=torch.bool)
    rest: torch.Tensor | None = None  # of all blocks

    def by_tables(parts: Iterator[slice]) -> None:
        encoder = _TableEncoder(group, scale)
        for part in parts:
            unsure[part] = encoder.encode(blocks[part], codes[part], scales[part])

    def by_arithmetic(parts: Iterator[slice]) -> None:
        for part in parts:
            some = part if rest is None else rest[part]
            codes[some], scales[some] = _encode_blocks(blocks[some].float(), scale)

    if w.dtype == torch.bfloat16 and group in GROUPS:
        _on_threads(len(blocks), group, by_tables)
        rest = unsure.nonzero().view(-1)
    _on_threads(len(blocks) if rest is None else len(rest), group, by_arithmetic)
    lead = w.shape[:-1]
    codes = codes.view(*lead, w.shape[-1] // 2).to(w.device)
    return codes, scales.view(*lead, w.shape[-1] // group).to(w.device)


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers [..., K] that `codes` and `scales` stand for; exact in bf16, f32 and f64.

    Where 6 · 2^127 leaves the range of `dtype` it is infinite; a scale of 255 gives NaN.
    """
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    group = shape[-1] // max(1, scales.shape[-1])
    pairs, flat = codes.cpu().reshape(-1, group // 2), scales.cpu().reshape(-1)
    out = pairs.new_empty(len(pairs), group, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def decode_parts(parts: Iterator[slice]) -> None:
        for part in parts:
            elements = _pairs(wide).index_select(0, pairs[part].flatten().int())
            numbers = torch.view_as_real(elements).view(-1, group)
            out[part] = numbers.mul_(scale_values(flat[part]).to(wide)[:, None])

    _on_threads(len(pairs), group, decode_parts)
    return out.view(shape).to(codes.device)


def relative_error(w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> float:
    """|w - decoded| / |w|, Frobenius norms in f64; 0 for a weight of zeros."""
    group = w.shape[-1] // scales.shape[-1]
    blocks, pairs = w.detach().cpu().reshape(-1, group), codes.cpu().reshape(-1, group // 2)
    flat = scales.cpu().reshape(-1)

    def squares(parts: Iterator[slice]) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = []
        numbers = torch.empty(_step(group), group, dtype=torch.float64, device=_CPU)
        elements = torch.empty(numbers.numel() // 2, dtype=torch.complex128, device=_CPU)
        bytes_ = torch.empty(_step(group), group // 2, dtype=torch.int32, device=_CPU)
        for part in parts:
            count = len(flat[part])
            some, taken = numbers[:count].copy_(blocks[part]), elements[: count * group // 2]
            index = bytes_[:count].copy_(pairs[part]).view(-1)
            total = torch.dot(some.view(-1), some.view(-1))
            torch.index_select(_pairs(torch.float64), 0, index, out=taken)
            decoded = torch.view_as_real(taken).view(-1, group)
            some.addcmul_(decoded, scale_values(flat[part])[:, None], value=-1)
            found.append((float(torch.dot(some.view(-1), some.view(-1))), float(total)))
        return found

    found = [pair for some in _on_threads(len(blocks), group, squares) for pair in some]
    lost, total = (math.fsum(side) for side in zip(*found, strict=True)) if found else (0.0, 0.0)
    return math.sqrt(lost / total) if total else 0.0


def _step(group: int) -> int:
    """How many blocks are a part of those that `_on_threads` gives, at most."""
    return max(1, _CHUNK // group)


def _on_threads(blocks: int, group: int, work: Callable[[Iterator[slice]], R]) -> list[R]:
    """What `work` gives on each thread, of which there is one a core, over parts of so many blocks.

    All threads draw from one iterator of parts. Each takes all steps of a part by itself, because
    many short operations, each split over all cores, would mostly wait for each other; and what it
    needs room for it allocates once, because the system gives new pages to one thread at a time.
    """
    step = _step(group)
    parts = [slice(start, start + step) for start in range(0, blocks, step)]
    if len(parts) <= 1:
        return [work(iter(parts))]
    every = iter(parts)
    with _STARTING:
        threads = torch.get_num_threads()
        workers = min(threads, len(parts))
        begun = Barrier(workers + 1)

        def begin() -> None:
            torch.set_num_threads(1)
            begun.wait()

        pool = ThreadPoolExecutor(workers, initializer=begin)
        jobs = [pool.submit(work, every) for _ in range(workers)]
        begun.wait()
        # Threads that begin later take over the last setting of any.
        torch.set_num_threads(threads)
    with pool:
        return [job.result() for job in jobs]


def _encode_blocks(blocks: torch.Tensor, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [n, group] -> codes u8 [n, group/2], scales u8 [n]."""
    codes, scales = encode_at(blocks, block_exponents(blocks, scale)[:, None])
    return codes, scales[:, 0]


# bf16 by tables. The bits of a number without its sign, less u << 7, are those of its magnitude in
# units of the scale 2^u. (But where it is subnormal: with u as here it then is below 2^-75 scales,
# rounds to zero, and its square is zero in f32.)
_LOWEST, _HIGHEST = -47, 126
# Added to the bits of a number, as an i16, less u << 7: its place in a table of 2^16 entries, first
# those of negative numbers. The largest of a block is below 8 scales, whose place is 2^16.
_START = (1 << 15) + (127 + _HIGHEST << 7)
_INFINITY = 0x7F80  # and NaNs above it
# What the table counts costs in. An element's are within 4, so that i32 has room for a block's.
_COST = 2.0**-23


@cache
def _element_table() -> torch.Tensor:
    """Of numbers in units of a scale, i32 [2^16]: what to take twice the scale costs, and codes.

    The upper 24 bits are the difference of the squared errors, in units of _COST once the other
    bits are zero; the low four are the code, the next the code at twice the scale.
    """
    bits = torch.arange(1 << 15, device=_CPU) - (_HIGHEST << 7)
    magnitudes = bits.clamp_(min=0).to(torch.int16).view(torch.bfloat16).float()
    numbers = torch.cat((-magnitudes, magnitudes))
    once, twice = (
        _squared_error(numbers[:, None], torch.full_like(numbers, u, dtype=torch.int32))
        for u in (0, 1)
    )
    costs = (4 * twice - once).div_(256 * _COST).round_().int() << 8
    return costs | round_elements(numbers / 2).int() << 4 | round_elements(numbers).int()


@cache
def _block_tables(group: int, scale: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the bits of the largest magnitude of a block, [2^15] each.

    The place i32 of zero at its scale, by "mse" at the lower one; that scale's byte u8; and by how
    much, i32, a block's sum of the other table must differ from zero for its sign to be sure.
    """
    bits = torch.arange(1 << 15, device=_CPU).clamp_(max=_INFINITY - 1)
    largest = bits.to(torch.int16).view(torch.bfloat16).float()
    exponents = block_exponents(largest[:, None], "floor" if scale == "mse" else scale)
    places = _START - (exponents.clamp(_LOWEST, _HIGHEST) + 127 << 7)
    # An entry is off by 128 because it is rounded and by 255 because of its codes. What it is
    # compared with, sums of `group` errors in f32 that are 5 together at most, is off by 5 · group
    # · 2^-24 for each, which is 80 in these units.
    margins = torch.full_like(places, 512 * group if scale == "mse" else -1)
    margins[largest < 2.0 ** (_LOWEST + _LARGEST_EXPONENT)] = torch.iinfo(torch.int32).max
    margins[largest == 0] = -1
    return places, (exponents + 127).to(torch.uint8), margins


class _TableEncoder:
    """Encodes bf16 as `_encode_blocks` does, bit for bit, with fewer and cheaper operations.

    Holds the room that these need for up to `_step(group)` blocks; `group` is one of GROUPS.
    """

    def __init__(self, group: int, scale: str) -> None:
        shape = (_step(group), group)
        self._mse = scale == "mse"
        self._entries = _element_table()
        self._places, self._scales, self._margins = _block_tables(group, scale)
        self._bits = torch.empty(shape, dtype=torch.int32, device=_CPU)
        self._index = torch.empty_like(self._bits)
        self._elements = torch.empty(shape, dtype=torch.uint8, device=_CPU)

    def encode(
        self, blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        """bf16 [n, group] into codes u8 [n, group/2] and scales u8 [n]; gives which are not sure.

        Those, bool [n], are to be encoded in the general way: blocks, but of zeros, that are too
        small for the table, and those to which both scales do almost equally well.
        """
        count = len(blocks)
        bits = self._bits[:count].copy_(blocks.view(torch.int16))
        index = self._index[:count]
        largest = torch.bitwise_and(bits, 0x7FFF, out=index).amax(-1)
        if int(largest.amax()) >= _INFINITY:
            raise ValueError(_NOT_FINITE)
        places = self._places.index_select(0, largest)[:, None]
        margins = self._margins.index_select(0, largest)
        torch.index_select(self._scales, 0, largest, out=scales)
        torch.add(bits, places, out=index)
        entries = bits  # their room
        torch.index_select(self._entries, 0, index.view(-1), out=entries.view(-1))
        if self._mse:
            cost = entries.sum(-1, dtype=torch.int32)
            raised = cost < 0
            scales.add_(raised)
            entries.bitwise_right_shift_(raised.int().mul_(4)[:, None])
            unsure = cost.abs_() <= margins
        else:
            unsure = margins > 0
        pairs = self._elements[:count].copy_(entries).view(torch.int16).bitwise_and_(0x0F0F)
        codes.copy_(pairs.bitwise_or_(pairs >> 4))  # the low bytes, where the even k are
        return unsure


@cache
def _pairs(dtype: torch.dtype) -> torch.Tensor:
    """The two numbers of each byte of codes, f32 or f64, as a complex number: [256]."""
    every = torch.arange(256, device=_CPU).to(torch.uint8)[:, None]
    return torch.view_as_complex(element_values(unpack(every)).to(dtype))


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
        raise ValueError(_NOT_FINITE)
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
