"""What the mask functions of transformers say, as causality and a window that attention can take.

A model tells which tokens attend to which by the mask function that it hands to transformers'
mask interface; the arguments of attention need not repeat it (a sliding window that only the mask
knows, say). The function registered here builds no mask: it evaluates the mask function at a few
query positions and returns what they have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import _disable_current_modes

MaskFunction = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query may see: all, with `causal` none behind it, with `window` > 0 the last
    so many up to it. `problem` says why a mask is none of these.

    By its `shape` transformers knows a mask that is ready, which one model hands to another.
    """

    shape: ClassVar = (1, 1, 1, 1)
    causal: bool = True
    window: int = 0
    problem: str = ""


def mask_of(mask_function: MaskFunction, longest: int) -> AttentionMask:
    """The mask that `mask_function` describes for sequences of up to `longest` tokens."""
    longest = max(longest, 2)  # one token alone sees all there is
    # The queries around every power of two and at the end: a window shows at the last of them.
    near = {2**i + d for i in range(longest.bit_length()) for d in (-1, 0, 1)}
    queries = sorted(q for q in {*near, longest - 1} if 0 <= q < longest)
    with _disable_current_modes():
        first, key = torch.tensor(0), torch.arange(longest)
        try:
            seen = [
                mask_function(first, first, torch.tensor([q]), key).expand(longest) for q in queries
            ]
        except Exception as error:  # noqa: BLE001 the model's own, which may read what is traced
            return AttentionMask(problem=f"by more than positions ({type(error).__name__})")
        if any(type(row) is not torch.Tensor or row.is_meta for row in seen):
            return AttentionMask(problem="by more than positions")
        if all(bool(row.all()) for row in seen):
            return AttentionMask(causal=False)
        window = int(seen[-1].sum())
        within = [(key <= q) & (key > q - window) for q in queries]
        if all(map(torch.equal, seen, within)):
            return AttentionMask(window=0 if window == longest else window)
    return AttentionMask(problem="by more than causality and one sliding window")


@contextmanager
def described_masks(longest: int) -> Generator[None]:
    """Let mask functions be described, not built, for sequences of up to `longest` tokens.

    Positions that are traced say nothing of packed sequences, for which transformers would look in
    them; a token-major graph keeps sequences apart by itself. Nor do ids that are traced say which
    tokens are of one image, whose tokens would all see each other: what is traced is text, which is
    of none (its ids are -1). Models that other threads run meanwhile are asked both.
    """
    from transformers import masking_utils

    def described(mask_function: MaskFunction, **_: Any) -> AttentionMask:
        return mask_of(mask_function, longest)

    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register("ingot", described)

    packed, tracing = masking_utils.find_packed_sequence_indices, get_ident()
    blockwise = masking_utils.blockwise_overlay

    def never_packed(position_ids: torch.Tensor) -> torch.Tensor | None:
        return None if get_ident() == tracing else packed(position_ids)

    def of_no_image(block_sequence_ids: torch.Tensor) -> MaskFunction:
        if get_ident() != tracing:
            return blockwise(block_sequence_ids)
        return lambda batch, head, query, key: torch.zeros_like(key, dtype=torch.bool)

    ready: Any = (BlockMask, AttentionMask)
    with (
        patch.object(masking_utils, "find_packed_sequence_indices", never_packed),
        patch.object(masking_utils, "blockwise_overlay", of_no_image),
        patch.object(masking_utils, "BlockMask", ready),
    ):
        yield
