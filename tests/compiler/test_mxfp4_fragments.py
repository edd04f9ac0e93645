"""The order of tensor cores: every code and scale is where it was, and back."""

from __future__ import annotations

import pytest
import torch
from ingot.compiler.ops.mxfp4_fragments import mxfp4_fragments, unpacked
from ingot.compiler.types import TensorType, VerifyError


@pytest.mark.parametrize(
    ("n", "k", "gated"), [(16, 128, False), (19, 96, False), (64, 160, True), (32, 512, True)]
)
def test_back_and_forth(n: int, k: int, gated: bool) -> None:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales = torch.randint(0, 256, (n, k // 32), dtype=torch.uint8)
    ordered = mxfp4_fragments.reference(codes, scales, gated=gated)
    types = [TensorType("u8", tuple(t.shape)) for t in (codes, scales)]
    given = [tuple(t.shape) for t in mxfp4_fragments.types(types, {"gated": gated})]
    assert given == [tuple(t.shape) for t in ordered]
    back = unpacked(*ordered, n, k, gated)
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scales)


@pytest.mark.parametrize("gated", [True, False])
def test_every_expert_lies_by_itself(gated: bool) -> None:
    codes = torch.randint(0, 256, (3, 32, 80), dtype=torch.uint8)
    scales = torch.randint(0, 256, (3, 32, 5), dtype=torch.uint8)
    ordered = mxfp4_fragments.reference(codes, scales, gated=gated)
    for e in range(3):
        alone = mxfp4_fragments.reference(codes[e], scales[e], gated=gated)
        assert all(torch.equal(a[e], b) for a, b in zip(ordered, alone, strict=True))
    back = unpacked(*ordered, 32, 160, gated)
    assert torch.equal(back[0], codes) and torch.equal(back[1], scales)


def test_a_lane_holds_whole_groups() -> None:
    """Word g of lane 4r + q: columns 32g + 8q and on of row r, then of row r + 8."""
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    row, column = 11, 77  # r = 3, rh = 1; g = 2, q = 1, the 5th column of the word
    codes[row, column // 2] = 0b1111 << 4 * (column % 2)
    ordered, _ = mxfp4_fragments.reference(codes, torch.zeros(16, 4, dtype=torch.uint8))
    (place,) = ordered.view(2, 8, 4, 4, 4).any(-1).nonzero().tolist()
    assert place == [1, 3, 1, 2]
    # Column 5 is the third of the odd ones: sign at bit 9, the rest at 2 … 0 of the high half.
    assert ordered.view(2, 8, 4, 4, 4)[1, 3, 1, 2].tolist() == [0, 0, 0b111, 0b10]


def test_groups_of_16_stay_as_they_are() -> None:
    with pytest.raises(VerifyError, match="K/32"):
        mxfp4_fragments.types((TensorType("u8", (16, 64)), TensorType("u8", (16, 8))), {})
