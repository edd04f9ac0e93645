"""The tensors of a module as the weights of a GPU program: read in place, or as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from ..compiler.torch_types import type_of
from ..compiler.weights import Bounds, Entry, Weights, within
from ..runtime.devices.check_program import BASE_ALIGNMENT


class HeldWeights:
    """What a program reads of `tensors`, as they are when this is made.

    One that lies on the device, whole, is read where it is: who writes into it changes what is
    computed. What is folded, cut or copied to the device stays what it was when the program was
    built. After a write to a tensor of which that was made, a program would compute with its old
    and its new numbers: `check` refuses that.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        on_device: Callable[[torch.Tensor], bool] = lambda tensor: tensor.is_cuda,
    ) -> None:
        self._tensors, self._on_device = dict(tensors), on_device
        self._versions = {name: _version(tensor) for name, tensor in self._tensors.items()}
        self._reading: set[str] = set()
        self._kept: set[str] = set()
        entries = {n: Entry(type_of(t), *self._loads(n)) for n, t in self._tensors.items()}
        self.weights = Weights(entries)

    def loader(self, load_weight: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
        """`load_weight` of a program lowered over `weights`, which notes what is read in place."""

        def load(name: str) -> torch.Tensor:
            self._reading.clear()
            made = load_weight(name)
            self._kept |= {n for n in self._reading if not self._is_read_in_place(n, made)}
            return made

        return load

    def check(self, *, building: bool) -> None:
        """ValueError for a tensor that was written to, and not only read in place.

        Of a program that is built only those on the device count: others were copied to it.
        """
        for name, version in self._versions.items():
            matters = building or (name in self._kept and self._on_device(self._tensors[name]))
            if matters and _version(self._tensors[name]) != version:
                raise ValueError(
                    f"{name} was written to since the module was compiled, and the program holds "
                    "numbers that were made of it before: compile the module again"
                )

    def _loads(
        self, name: str
    ) -> tuple[Callable[[], torch.Tensor], str, Callable[[Bounds], torch.Tensor]]:
        def load() -> torch.Tensor:
            self._reading.add(name)
            return self._tensors[name]

        return load, "the module", partial(self._part, name)

    def _part(self, name: str, bounds: Bounds) -> torch.Tensor:
        self._reading.add(name)
        return within(self._tensors[name], bounds)

    def _is_read_in_place(self, name: str, made: torch.Tensor) -> bool:
        held = self._tensors[name]
        whole = made.data_ptr() == held.data_ptr() and made.nbytes == held.nbytes
        aligned = made.is_contiguous() and made.data_ptr() % BASE_ALIGNMENT == 0
        return self._on_device(held) and whole and aligned


def _version(tensor: torch.Tensor) -> int:
    """How often it was written to; what torch.inference_mode made does not count."""
    return 0 if tensor.is_inference() else tensor._version
