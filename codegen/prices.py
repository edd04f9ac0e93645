"""Prices of candidates in seconds: the constants by which `select` compares ways to compute an op.

A GEMM costs what was measured of its kernel on the target (`price_table`), where it was. Otherwise
a price is the larger of the traffic at a fraction of the target's bandwidth and of the arithmetic
at a rate, and a fixed cost a launch. Fractions and rates were measured on an H200 (cold weights,
graph replays) or are estimates, and said to be.
"""

from __future__ import annotations

from ..compiler.target import Target
from .price_table import Launched, table_of

# Fraction of the bandwidth at which a GEMM kernel reads its weight, by kernel and whether the
# weight is MXFP4. Measured: fragments 0.30 (9 MB) to 0.41 (53 MB); GEMV 0.71 (34 MB) to 0.95
# (1.2 GB), of one token; narrow tiles 0.72-0.95 dense, 0.28-0.40 in MXFP4, where unpacking bounds
# them; the stream 0.52 (9 MB) to 0.82 (53 MB). Products by head have many small weights: narrow
# tiles of MXFP4 0.045 (0.6 MB) to 0.063 (4.5 MB). Estimated: square tiles, the stream by head, and
# all of AMD's.
GEMM_BANDWIDTH = {
    ("fragments", True): 0.4,
    ("gemv", False): 0.85,
    ("mfma", False): 0.65,
    ("mfma", True): 0.65,
    ("narrow", False): 0.6,
    ("narrow", True): 0.35,
    ("narrow by head", True): 0.05,
    ("square", False): 0.5,
    ("square", True): 0.25,
    ("square by head", True): 0.04,
    ("stream", True): 0.7,
    ("stream by head", True): 0.6,
}
# Ends the name of a kernel, in tables of measured prices, whose product is one by head.
BY_HEAD = " by head"
# The same of the stream of few tokens' experts (estimated).
EXPERTS_BANDWIDTH = 0.6
# Ends the name of a kernel, in tables of measured prices, that norms its input itself.
NORMED = " normed"
# Bytes of a weight at which a norm within its GEMM costs as much as a launch of so many seconds
# before it: every program norms whole rows. Of an 8B in MXFP4, on an H200, one token took 2.99 ms
# with all norms in launches before, 3.02 with those of products up to 16 MiB within (36 launches
# fewer), 3.04 with all.
NORM_WITHIN_BYTES, NORM_LAUNCH_SECONDS = 16 << 20, 2e-6
# How much longer a GEMV takes for each token whose row it norms (measured on an H200).
NORM_IN_GEMV = 0.15

# Codes that a device unpacks in a second in kernels that do little else: about 20 a clock and SM;
# by scaled conversions an instruction of 64 lanes unpacks 128 (estimated).
UNPACKED_PER_SECOND = {False: 4e12, True: 12e12}
# The same of the stream of experts, or by head: 4096 codes take a warp 300 instructions
# (estimated).
STREAMED_PER_SECOND = 12e12
# Flops a second that tiles of a grouped GEMM reach, roughly.
MULTIPLIED_PER_SECOND = 3e14
# Bytes a second that one program, and that all together, get of what others read too.
PROGRAM_BYTES, SHARED_BYTES = 3e10, 6e12
# Seconds in which a program has what it loads from the L2, however much (estimated).
ROUND_TRIP_SECONDS = 5e-7
# Seconds that a program takes to look through a chunk of indices, twice, while it sorts them.
CHUNK_SECONDS = 1e-6
# Seconds that a choice takes of few experts, which are compared with each other, and that each pick
# takes of a choice of many (estimated: half a dozen exchanges between warps, and one).
RANKING_SECONDS, PICK_SECONDS = 6e-7, 1e-7


def gemm_seconds(
    target: Target,
    kernel: str,
    of: Launched,
    weight_bytes: int,
    other_bytes: int,
    *,
    packed: bool,
    programs: int = 1,
) -> float:
    """A GEMM of so many programs with its launch: as measured, or else its weight at the kernel's
    fraction of the bandwidth. What a norm within adds is estimated where it was not measured."""
    table = table_of(target.name)
    if (measured := table.seconds(of)) is not None:
        return measured
    within = 0.0
    if of.kernel.endswith(NORMED):
        within = _norm_seconds(target, kernel, of, weight_bytes, programs)
        of = of._replace(kernel=of.kernel.removesuffix(NORMED))
    if (measured := table.seconds(of)) is not None:
        return measured + within
    by_head = packed and of.kernel.endswith(BY_HEAD)
    fraction = GEMM_BANDWIDTH[kernel + BY_HEAD if by_head else kernel, packed]
    seconds = (weight_bytes / fraction + other_bytes) / target.bytes_per_second
    if by_head and kernel == "stream":
        # Each token streams the weight for itself, from the L2.
        seconds = max(seconds, of.tokens * of.rows * of.columns / STREAMED_PER_SECOND)
    return seconds + target.launch_seconds + within


def _norm_seconds(
    target: Target, kernel: str, of: Launched, weight_bytes: int, programs: int
) -> float:
    """What a norm within a GEMM adds: by the bytes of the weight; on AMD by those of the rows, of
    16 bits an element, that every program reads twice first, or as in a GEMV (estimated)."""
    if not target.mfma:
        return weight_bytes / NORM_WITHIN_BYTES * NORM_LAUNCH_SECONDS
    if kernel == "gemv":
        return NORM_IN_GEMV * of.tokens * weight_bytes / target.bytes_per_second
    return ROUND_TRIP_SECONDS + 4 * of.tokens * of.columns * programs / SHARED_BYTES


def is_measured(target: Target, of: Launched) -> bool:
    """Whether the price of a GEMM comes from measured points, be it without its norm."""
    table, plain = table_of(target.name), of._replace(kernel=of.kernel.removesuffix(NORMED))
    return table.seconds(of) is not None or table.seconds(plain) is not None


def unpacking_seconds(target: Target, elements: float) -> float:
    """What the device takes at least to unpack so many MXFP4 codes."""
    return elements / UNPACKED_PER_SECOND[target.scaled_conversions]
