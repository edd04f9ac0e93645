"""What a device must be able to do for a session: load a program and run its functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from .program import Program

Array = NDArray[Any]
WeightLoader = Callable[[str], Any]


class DeviceFailedError(RuntimeError):
    """The device of an executable failed, or the executable was closed: nothing runs any more."""


# How many launches may be under way at once.
LAUNCHES = 2


class Running(Protocol):
    """A run that was launched."""

    def wait(self) -> dict[str, Array]:
        """Its outputs by name, once it has ended; errors as those of Executable.launch.

        They are there until LAUNCHES more runs are launched; RuntimeError after that.
        """
        ...


@dataclass(frozen=True)
class Ended:
    """A run that has ended already."""

    outputs: dict[str, Array]

    def wait(self) -> dict[str, Array]:
        """See Running."""
        return self.outputs


class Executable(Protocol):
    """A program in device memory, its state zeroed."""

    def launch(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> Running:
        """Behind what was launched before: copy `inputs` in (of the shapes that the function's
        signature has where the symbols have these values), compute, copy outputs out.

        All inputs are given, but for a function that feeds itself (`Function.fed`): where it was
        launched last, with the same symbols, any may be left out, and are what that run leaves.

        Only those called `outputs` are copied, None is all. Outputs in bf16 or f16 come back as
        float32 arrays. State buffers keep what the function wrote into them. What this returns has
        read `inputs`. Of more than LAUNCHES under way it waits for the first.

        DeviceFailedError once the device failed. Any other exception is of this call alone: state
        then has, of what the call would have written, any part, and nothing is left to be fed.
        """
        ...

    def run(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """Launch and wait."""
        ...

    def close(self) -> None:
        """Free the device memory; the executable is unusable afterwards."""
        ...


class Driver(Protocol):
    """One kind of device."""

    target: str

    def load(self, program: Program, weights: WeightLoader) -> Executable:
        """Allocate arena, state and weights; `weights(name)` gives each weight buffer's content.

        ValueError when the program was built for another target.
        """
        ...
