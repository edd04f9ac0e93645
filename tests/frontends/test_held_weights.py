"""Weights that a GPU program reads in place: what is written to them is seen, or refused."""

from __future__ import annotations

from typing import Any

import ingot
import pytest
import torch
from ingot.codegen.lower import lower
from ingot.frontends.held_weights import HeldWeights
from ingot.runtime.devices.check_program import BASE_ALIGNMENT
from torch import nn

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Products(nn.Module):
    """One weight that is read whole, one in part, one that is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(8, 8, bias=False)
        self.whole.weight = nn.Parameter(aligned(8, 8))
        self.part = nn.Parameter(aligned(8, 16))
        self.register_buffer("scale", aligned(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.whole(x) @ self.part[:, 4:12]) * (self.scale + 1)


def aligned(*shape: int) -> torch.Tensor:
    """Random numbers at an address as a device gives: torch aligns those of the CPU less."""
    room = torch.randn(torch.Size(shape).numel() + BASE_ALIGNMENT)
    first = -room.data_ptr() % BASE_ALIGNMENT // room.itemsize
    return room[first : first + torch.Size(shape).numel()].view(shape)


@pytest.fixture
def loaded(request: pytest.FixtureRequest) -> tuple[Products, HeldWeights]:
    """A module and its weights, of which all have been loaded, as if they lay on the device."""
    torch.manual_seed(0)
    module = Products()
    compiled = ingot.compile(module, example_inputs=(X,), target="cpu", progress=False)
    tensors = {name: t.detach() for name, t in module.state_dict(keep_vars=True).items()}
    there: Any = getattr(request, "param", True)
    held = HeldWeights(tensors, on_device=lambda tensor: there)
    lowered = lower(compiled.graph(), held.weights, compiled.target, [{}], ["out.0"])
    load = held.loader(lowered.load_weight)
    for buffer in lowered.program.buffers.values():
        if buffer.kind == "weight":
            load(buffer.name)
    return module, held


def test_what_is_read_in_place_may_be_written_to(loaded: tuple[Products, HeldWeights]) -> None:
    module, held = loaded
    held.check(building=True)
    with torch.no_grad():
        module.whole.weight.mul_(2)
    held.check(building=False)
    with pytest.raises(ValueError, match=r"whole\.weight was written to since"):
        held.check(building=True)  # another program, which might fold it


@pytest.mark.parametrize("name", ["part", "scale"])
def test_what_numbers_were_made_of_may_not(name: str, loaded: tuple[Products, HeldWeights]) -> None:
    module, held = loaded
    with torch.no_grad():
        getattr(module, name).add_(1)
    with pytest.raises(ValueError, match=f"^{name} was written to since the module was compiled"):
        held.check(building=False)


@pytest.mark.parametrize("loaded", [False], indirect=True)
def test_what_was_copied_to_the_device_is_what_it_was(
    loaded: tuple[Products, HeldWeights],
) -> None:
    module, held = loaded
    with torch.no_grad():
        module.whole.weight.mul_(2)
        module.scale.add_(1)
    held.check(building=False)
    with pytest.raises(ValueError, match="was written to since"):
        held.check(building=True)
