"""What a device must be able to do for a session: load a program and run its functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from .program import Program

Array = NDArray[Any]
WeightLoader = Callable[[str], Any]


class DeviceFailedError(RuntimeError):
    """The device of an executable failed, or the executable was closed: nothing runs any more."""


class Executable(Protocol):
    """A program in device memory, its state zeroed."""

    def run(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """Copy `inputs` in (all inputs of the function, of the shapes that its signature has where
        the symbols have these values), compute, copy outputs out.

        Only those called `outputs` are copied, None is all. Outputs in bf16 or f16 come back as
        float32 arrays. State buffers keep what the function wrote into them.

        An array that is read-only (numpy's `flags.writeable`) never changes again: where the very
        same object was this input the last time too, what a driver has staged of it still
        holds. What lies in the arena does not: a replay may have written over it.

        DeviceFailedError once the device failed. Any other exception is of this call alone: state
        then has, of what the call would have written, any part.
        """
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
