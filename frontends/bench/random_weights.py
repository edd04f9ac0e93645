"""Random weights for the buffers of a program, made where they will lie."""

from __future__ import annotations

import torch

from ...compiler.dtypes import DTYPES
from ...compiler.torch_types import torch_dtype
from ...runtime.program import Buffer, Program

# As trained weights are, roughly: activations neither vanish nor overflow.
_SPREAD = 0.02
# Bytes of MXFP4 weights: any code, and shared exponents of 2^-11 to 2^-4 where they are scales.
_LEAST_BYTE, _BYTES = 116, 8


class RandomWeights:
    """A weight loader (runtime.driver.WeightLoader) of random tensors, drawn on `device`.

    Floats are from N(0, 0.02), bytes from 116 to 123, other integers are 0: indices of whatever
    there is. Speed does not depend on what they are, but for which experts a router chooses.
    """

    def __init__(self, program: Program, device: str, seed: int = 0) -> None:
        self._buffers = program.buffers
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, name: str) -> torch.Tensor:
        buffer: Buffer = self._buffers[name]
        dtype = torch_dtype(buffer.dtype)
        made = torch.zeros(buffer.shape, dtype=dtype, device=self._device)
        if dtype.is_floating_point and DTYPES[buffer.dtype].bits >= 16:
            made.normal_(0.0, _SPREAD, generator=self._generator)
        elif DTYPES[buffer.dtype].bits == 8:
            made.view(torch.uint8).random_(
                _LEAST_BYTE, _LEAST_BYTE + _BYTES, generator=self._generator
            )
        return made
