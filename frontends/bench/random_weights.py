"""Random weights for the buffers of a program, made where they will lie."""

from __future__ import annotations

import torch

from ...compiler.dtypes import DTYPES
from ...compiler.torch_types import torch_dtype
from ...runtime.program import Buffer, Program

# As trained weights are, roughly: activations neither vanish nor overflow.
_SPREAD = 0.02
# Bytes of MXFP4 weights. As scales (E8M0) they are 2^-11 to 2^-4; as codes any would do.
_LEAST_BYTE, _BYTES = 116, 8


class RandomWeights:
    """A weight loader (runtime.driver.WeightLoader) of random tensors, on the GPU if torch has one.

    Floats are from N(0, 0.02), bytes from 116 to 123; other integers are 0, which is an index into
    anything. Speed does not depend on what they are, but for which experts a router chooses.
    """

    def __init__(self, program: Program) -> None:
        self._buffers = program.buffers
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._generator = torch.Generator(self._device).manual_seed(0)

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
