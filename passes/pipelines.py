"""The passes in their order."""

from __future__ import annotations

from ..compiler.pipeline import Pass
from .canonicalize import Canonicalize
from .gather_logits import GatherLogits
from .insert_kv_cache import InsertKvCache
from .quantize_mxfp4 import MXFP4, QuantizeMxfp4
from .raise_ops import RaiseOps


def causal_lm(
    *,
    max_sequences: int,
    max_tokens_per_sequence: int,
    pages: int | None = None,
    quantize: MXFP4 | None = None,
) -> tuple[Pass, ...]:
    """From a traced causal language model to one that serves from a paged cache."""
    return (
        Canonicalize(),
        RaiseOps(),
        *(() if quantize is None else (QuantizeMxfp4(quantize),)),
        InsertKvCache(max_sequences, max_tokens_per_sequence, pages=pages),
        GatherLogits(),
    )


def module() -> tuple[Pass, ...]:
    """For a module that is no language model: the same cleaning, no cache."""
    return (Canonicalize(), RaiseOps())
