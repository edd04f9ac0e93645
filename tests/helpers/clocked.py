"""A fake device that takes time by a clock of its own, and drafters that know what comes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fake_device import FakeDriver, FakeExecutable, FakeRun, expected_tokens, serving_program
from ingot.runtime.driver import Array
from ingot.runtime.serving.sampling import Sampling
from ingot.runtime.serving.sequence import Sequence as ServedSequence
from ingot.runtime.serving.session import Session
from ingot.runtime.serving.speculation import Drafter

VOCAB = 50
# Seconds that the host takes to launch a step whose inputs it gives; one that is fed costs none.
HOST = 0.25


@dataclass
class Clock:
    """Seconds, as far as a device took them."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class ClockedRun:
    """A run that ends at `end`."""

    run: FakeRun
    clock: Clock
    end: float

    def wait(self) -> dict[str, Array]:
        self.clock.now = max(self.clock.now, self.end)
        return self.run.wait()


@dataclass
class ClockedDevice:
    """Steps of an entry of T tokens take `cost(T)`, one after the other."""

    device: FakeExecutable
    clock: Clock
    cost: Callable[[int], float]
    sizes: list[int] = field(default_factory=list[int])
    busy: float = 0.0

    def launch(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> ClockedRun:
        run = self.device.launch(function, symbols, inputs, outputs)
        if self.device.calls[-1][0] == "launch":
            self.clock.now += HOST
        self.sizes.append(symbols["T"])
        self.busy = max(self.busy, self.clock.now) + self.cost(symbols["T"])
        return ClockedRun(run, self.clock, self.busy)

    def run(self, *given: Any) -> dict[str, Array]:
        return self.launch(*given).wait()

    def close(self) -> None:
        self.device.close()


def clocked_session(
    drafter: Drafter | None,
    cost: Callable[[int], float],
    *,
    adapt: bool = True,
    **program: Any,
) -> tuple[Session, ClockedDevice]:
    """A session with a clock on a device whose steps take `cost` of their entry's tokens."""
    shape = {"rows": 40, "max_tokens_per_sequence": 4096, "pages": 4096, **program}
    made = serving_program(vocab_size=VOCAB, **shape)
    clock = Clock()
    device = ClockedDevice(FakeDriver().load(made, lambda _name: None), clock, cost)
    session = Session(made, device, drafter=drafter, adapt=adapt, clock=clock)
    return session, device


@dataclass
class Foreseeing:
    """Drafts `k` tokens, of which the first `right` are what comes; none where that is None."""

    k: int
    right: int | None
    sampling: Sampling = field(default_factory=lambda: Sampling(seed=0))
    asked: int = 0
    _known: dict[tuple[int, ...], list[int]] = field(default_factory=dict[Any, Any])

    def draft(self, sequence: ServedSequence, most: int) -> Sequence[int]:
        self.asked += 1
        if self.right is None:
            return ()
        count = min(most, self.k)
        if sequence.prompt not in self._known:
            total = sequence.request.max_new_tokens + self.k
            tokens, _ = expected_tokens(sequence.prompt, total, self.sampling, VOCAB)
            self._known[sequence.prompt] = tokens
        coming = self._known[sequence.prompt][sequence.generated :][:count]
        return [*coming[: self.right], *((t + 1) % VOCAB for t in coming[self.right :])]
