"""The last program to arrive: one launch whose programs make parts, and whose last joins them.

Programs of a group store their parts and arrive at the group's counter; the last to arrive, which
may be any of them, reads all parts. What it computes must not depend on which it is: it takes the
parts in a fixed order, as a launch of its own would.

- Parts are visible to the last. The stores of all threads come before a barrier of the program, and
  that before the addition, which releases them to the device. The addition of the last acquires
  them; a second barrier brings its result to all threads, and they load behind it, past the cache
  of their own multiprocessor (cache_modifier=".cg").
- On AMD a wave's stores may still be on their way when it comes to a barrier, and an XCD has an L2
  of its own. So each wave waits for its stores, writes the L2 back (buffer_wbl2 sc1), and waits for
  that: LLVM, which does so before the addition for the wave that adds, leaves its second wait out
  where it sees no store of its own. The addition invalidates what is held of others (buffer_inv
  sc1).
- Counters are zero whenever a launch begins: a program is loaded with zeros, and the last of a
  group sets its counter back. They are of one launch alone (kernel_query.Counter), and replays run
  in the full order of their stream. A launch that fails may leave others; it is a failure of the
  device, which ends the executable.
- No program waits for another, so they may run in any order, or one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...compiler.target import Target
from ..kernel_query import Counter


class Arrivals(NamedTuple):
    """A counter a group. BY_WAVE says that each wave releases its own stores (AMD)."""

    counters: Any
    BY_WAVE: Any


def arrivals_of(target: Target, name: str) -> Arrivals:
    """The Counter `name`, for kernels of `target`."""
    return Arrivals(Counter(name), target.name.startswith("hip"))


@triton.jit
def last_to_arrive(arrivals, group, count):
    """Whether this program is the last of `count` (i32) of a group to arrive; all that they stored
    is then visible to it, by loads past the first cache."""
    if arrivals.BY_WAVE:
        release: tl.constexpr = (
            "s_waitcnt vmcnt(0)\nbuffer_wbl2 sc1\ns_waitcnt vmcnt(0)\nv_mov_b32 $0, 0"
        )
        tl.inline_asm_elementwise(release, "=v,~{memory}", [], tl.int32, False, 1)
    tl.debug_barrier()
    counter = arrivals.counters + group
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter, 0)
    return last
