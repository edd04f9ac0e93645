"""Programmatic dependent launch (PDL) on NVIDIA: a kernel lets later launches begin, and waits for
earlier ones.

The runtime joins two kernels that both do so by a programmatic edge of the graph: the later one is
brought onto the device while the earlier one still works, which hides most of what a launch costs.
What is computed is what launches one after the other compute:

- griddepcontrol.wait returns when every grid that a programmatic edge comes from is complete and
  its memory is visible (PTX ISA, griddepcontrol). A full edge was waited for before the launch, and
  a kernel may have some of each. Without programmatic edges the instruction returns at once.
- No program touches memory that launches write before it has waited, and each one waits: so a
  kernel is complete only after all that it has edges from, and by induction after all from which a
  path leads to it. So order is transitive, as it is with full edges, and the edges may stay a
  transitive reduction: it holds for reading what an earlier launch wrote and for overwriting what
  it reads. If all programs of a kernel returned without waiting, it would be complete too soon and
  let the next one in: `pdl_wait` is therefore the first statement, under no condition.
- Only what no launch before writes may be read earlier. Constants first of all: products of few
  tokens and gates read their first weights between `pdl_launch` and `pdl_join`, or in Gluon between
  statements of their own.
- An input that no earlier launch of the entry writes (kernel_query.Operand.early) is what it was
  when the replay began, and its memory nothing else's: decode_kernel and combine_kernel read which
  slots, positions and pages there are. A later launch that overwrites it, as the feed of the next
  step does, has waited for this one. Keys and values decode_kernel asks for into the L2 alone,
  which sees what is written.
- So is a cache (`early`, too) that no earlier launch writes: register_decode_kernel reads keys and
  values. It writes at the position of its one token; what it reads lies before, of earlier replays.
- What launches before the last one wrote may be read, past the L1, where the last
  one lets this one begin only after its own wait, which says that they are complete. So the
  second launch of expert_stream reads which experts were chosen.
- A kernel that does not wait has full edges alone, on both sides.
- launch_dependents orders nothing, so it may come first. Later programs start when all of this
  kernel's have started, so those that wait never hold the room of one that they wait for.
- Tiles for many tokens do without (Call.overlaps): they fill the device, and there is nothing to
  hide. On an H200 a step of DeepSeek-V2-Lite whose experts were in tiles took 5.0 ms with it, 2.7
  without.
- A replay as a whole begins and ends in the full order of its stream.

Launches of few tokens overlap well where each has one program on every multiprocessor, which takes
half of it: the next one's come beside those that work, and read ahead. Two programs of one launch
on a multiprocessor, beside another that has none, keep the whole launch waiting, and so it stays:
the launches that follow come where those before them leave. Therefore

- a launch of fewer programs than there are multiprocessors is filled up with some that only wait
  (`spread`), and takes its half even where it needs less (Call.resident);
- now and then a launch is spread by force: of a gated product, or the experts' first, which are
  long enough for the next one to come beside them, a second program does not fit on a
  multiprocessor (Call.spreads; what that brings has not been timed yet);
- all these kernels want one division of the multiprocessor's memory (CudaApi.allow_shared): for
  another it would have to be idle.

On an H200 the four products of a layer of Qwen3-8B took 46 µs with the divisions that the driver
chooses and 32 µs with one for all, and 48 µs again with a launch of six programs among them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...compiler.target import Target

# Programs of launches after each other that a multiprocessor holds at once.
RESIDENT = 2


def spread(target: Target, programs: int) -> tuple[int, int | None]:
    """How many programs a launch of few tokens has where it needs `programs`, and Call.resident."""
    if target.name.startswith("cuda") and programs <= target.multiprocessors:
        return target.multiprocessors, RESIDENT
    return programs, None


@triton.jit
def pdl_wait(PROGRAMMATIC: tl.constexpr):
    """Let the launches that follow begin, wait for those before.

    PROGRAMMATIC is set by what builds the kernel: False where launches do not overlap.
    """
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def pdl_launch(PROGRAMMATIC: tl.constexpr):
    """The first half of `pdl_wait`: let the launches that follow begin."""
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def pdl_join(PROGRAMMATIC: tl.constexpr):
    """The second half: wait for those before. Until then only what they do not write is read."""
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_wait()
