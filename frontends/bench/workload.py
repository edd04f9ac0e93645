"""The inputs of one step: a token of each sequence over a context, or a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...compiler.dtypes import DTYPES
from ...runtime.driver import Array
from ...runtime.program import Function
from ...runtime.serving.abi import ServingAbi, ServingMeta


@dataclass(frozen=True)
class Workload:
    """A step that is measured: `batch` sequences of `new` tokens each, behind `context` others."""

    batch: int
    new: int
    context: int

    @property
    def tokens(self) -> int:
        return self.batch * self.new

    @property
    def decodes(self) -> bool:
        return self.new == 1

    @property
    def seen(self) -> int:
        """Positions of the cache that the last token of each sequence sees."""
        return self.context + self.new

    def __str__(self) -> str:
        if self.decodes:
            return f"decode, batch {self.batch}, context {self.context}"
        return f"prefill, {self.new} tokens"


def symbols_for(abi: ServingAbi, work: Workload) -> Mapping[str, int]:
    """The symbols of the smallest entry that takes `work` in one step.

    ValueError for a workload that the program has no slots, positions or entry for.
    """
    meta, sequences = abi.meta, min(abi.meta.max_sequences, abi.rows)
    fits = work.batch <= sequences and work.seen <= meta.max_tokens_per_sequence
    if not fits or work.tokens > abi.tokens:
        raise ValueError(
            f"{work}: expected at most {sequences} sequences of {meta.max_tokens_per_sequence} "
            f"tokens, and {abi.tokens} tokens in a step"
        )
    return abi.smallest(work.tokens, work.batch)


def step_inputs(
    step: Function, meta: ServingMeta, symbols: Mapping[str, int], work: Workload
) -> dict[str, Array]:
    """What the entry of `symbols` takes (see runtime.serving.abi) for `work`; the rest is padding.

    Sequence s has slot s and pages of its own, and each is greedy.
    """
    places = symbols["T"]
    found: dict[str, Array] = {
        name: np.zeros(spec.bound(symbols), DTYPES[spec.dtype].numpy)
        for name, spec in step.inputs.items()
    }
    draw = np.random.default_rng(0)
    found["tokens"][:] = draw.integers(0, meta.vocab_size, places)
    found["slots"][:] = -1
    found["slots"][: work.tokens] = np.repeat(np.arange(work.batch), work.new)
    found["positions"][: work.tokens] = np.tile(work.context + np.arange(work.new), work.batch)
    pages = np.arange(meta.max_sequences * meta.pages_per_slot) % meta.pages
    found["page_table"][:] = pages.reshape(meta.max_sequences, meta.pages_per_slot)
    last = work.new * (1 + np.arange(work.batch)) - 1
    found["logit_rows"][: work.batch] = last[: symbols["L"]]
    for name in {"top_p", "penalty"} & found.keys():
        found[name][:] = 1.0
    return found
