"""Steps under way: the next is launched before the tokens of the one before are known.

A step that samples leaves its rows' next inputs on the device (see `abi`). While the same sequences
decode, the host only launches it again, LAUNCHES deep, copies the page table where a sequence got a
page, and reads tokens behind the device: what it does for one step lies beside the next. Prefill,
mixed batches, drafts and rows that the host samples are given their inputs by the host, when
nothing else is under way: who joins waits for what is, at most two steps.

What is computed for a sequence past its end is dropped (`Scheduler.expects`). Its pages may change
hands at once: steps run in the order of their launches, so that whatever such a step still writes
comes before all that the next owner writes, and nobody reads a position before writing it. No step
is launched behind one of a sequence that has ended, so none has the page table without its pages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

from ..driver import LAUNCHES, Array, Executable, Running
from ..program import STEP
from .abi import ServingAbi
from .batch import Batch
from .device_drafts import following, room
from .kv_cache import KVCache
from .row_sampling import RowSampler


@dataclass(frozen=True, eq=False)
class Step:
    """A batch that was launched in an entry, fed by the step before or by the host.

    `launched` is when its launch began.
    """

    batch: Batch
    symbols: Mapping[str, int]
    outputs: list[str]
    fed: bool
    running: Running
    launched: float


class Steps:
    """Launches steps of an executable and waits for them in turn.

    Whatever interrupts a launch, steps that are under way stay so, and the next is not fed.
    """

    def __init__(
        self,
        abi: ServingAbi,
        executable: Executable,
        cache: KVCache,
        sampler: RowSampler,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.under_way: deque[Step] = deque()
        self._abi, self._executable, self._cache, self._sampler = abi, executable, cache, sampler
        self._clock = clock
        self._last: Step | None = None  # what the device is ready to feed on
        self._table = 0  # the state of the page table that the device has

    def launch(self, batch: Batch, outputs: list[str]) -> None:
        """Launch `batch` in the smallest entry that takes it, with `outputs` by name."""
        begin = self._clock()
        symbols = self._abi.smallest(batch.tokens, len(batch.rows))
        inputs: dict[str, Array] = {
            **batch.inputs(symbols["T"], symbols["L"], self._cache.page_table),
            **self._sampler.inputs(symbols["L"], batch.rows),
        }
        if self._abi.follows:
            inputs["following"] = following(batch.chunks, symbols["T"])
        inputs |= self._room(batch, symbols)
        self._start(batch, symbols, inputs, outputs, begin, fed=False)

    @property
    def room(self) -> Batch | None:
        """The last step under way, where one behind it can be fed by it."""
        last = self._last
        sampled = self._abi.candidates is not None and last and "logits" not in last.outputs
        under_way = 0 < len(self.under_way) < LAUNCHES and self.under_way[-1] is last
        return last.batch if last and sampled and under_way else None

    def feed(self, batch: Batch) -> None:
        """Launch `batch`, the rows of `room` one position on."""
        assert self._last is not None
        moved = self._cache.changes != self._table
        last = self._last
        inputs = {"page_table": self._cache.page_table} if moved else {}
        inputs |= self._room(batch, last.symbols)
        self._start(batch, last.symbols, inputs, last.outputs, self._clock(), fed=True)

    def wait(self) -> tuple[Step, dict[str, Array]]:
        """The first step under way, and its outputs by name, its rows of each; errors as those of
        Executable.launch, and it stays under way."""
        step = self.under_way[0]
        found = step.running.wait()
        self._abi.check_outputs(step.symbols, {name: found[name] for name in step.outputs})
        self.under_way.popleft()
        return step, {name: found[name][: len(step.batch.rows)] for name in step.outputs}

    def drop(self) -> None:
        """Forget what is under way."""
        self.under_way.clear()

    def _room(self, batch: Batch, symbols: Mapping[str, int]) -> dict[str, Array]:
        """The input that says how far a step may draft, where it takes that."""
        if not self._abi.reach:
            return {}
        return {"room": room(batch.rows, symbols["L"], self._cache)}

    def _start(
        self,
        batch: Batch,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: list[str],
        begin: float,
        *,
        fed: bool,
    ) -> None:
        self._last, table = None, self._cache.changes
        running = self._executable.launch(STEP, symbols, inputs, outputs)
        step = Step(batch, symbols, outputs, fed, running, begin)
        self.under_way.append(step)
        self._last, self._table = step, table
