"""Kernels that join, gather and reduce along one dim."""

from __future__ import annotations

import pytest
import torch
from ingot.compiler.ops.shape import cat, slice_scatter
from kernel_checks import Strided, build_everywhere, check_node

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat(dim: int) -> None:
    parts = []
    for size in (3, 1, 40):
        shape = [2, 3, 40]
        shape[dim] = size
        parts.append(torch.randn(shape).bfloat16())
    check_node(cat, parts, {"dim": dim}, tolerance=1e-9)
    check_node(cat, [Strided(p) for p in parts], {"dim": dim}, tolerance=1e-9)


@pytest.mark.parametrize(("start", "stop", "step"), [(1, 4, 1), (0, 5, 1), (1, 5, 2)])
def test_slice_scatter(start: int, stop: int, step: int) -> None:
    for dim, shape in ((0, (5, 3, 7)), (1, (3, 5, 7)), (-1, (3, 7, 5))):
        x = torch.randn(shape)
        index = [slice(None)] * 3
        index[dim] = slice(start, stop, step)
        src = torch.randn(x[tuple(index)].shape)
        attrs = {"dim": dim, "start": start, "stop": stop, "step": step}
        check_node(slice_scatter, (x, src), attrs, tolerance=1e-9)
