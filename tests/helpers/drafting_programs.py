"""Programs for the CPU whose steps draft, and what their sessions are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from ingot.codegen.cpu import CpuDriver
from ingot.codegen.lower import Lowered, lower, serving_bindings
from ingot.compiler.pipeline import PassContext, run_pipeline
from ingot.compiler.target import CPU
from ingot.frontends.importers.huggingface import HuggingFaceModel
from ingot.passes.pipelines import STAGES, causal_lm
from ingot.passes.serving.insert_kv_cache import InsertKvCache
from ingot.passes.serving.sample_on_device import output_names
from ingot.passes.transforms.mxfp4_policy import MXFP4
from ingot.passes.transforms.quantize_mxfp4 import QuantizeMxfp4
from ingot.runtime.serving.abi import ServingAbi
from ingot.runtime.serving.device_drafts import DeviceDrafter
from ingot.runtime.serving.sequence import Sequence
from ingot.runtime.serving.session import Session

# Of so few tokens what has random weights drafts one right now and then.
VOCAB, SEQUENCES, LENGTH, NEW = 8, 3, 96, 40
PROMPTS = ([5, 6, 7], [3, 4, 5, 6, 7] * 4, [7])
# Of cases that are like a faster one.
SWEPT = [pytest.mark.slow, pytest.mark.sweep]


def drafting_program(
    model: HuggingFaceModel, tokens: int, group: int = 0
) -> tuple[Lowered, set[str]]:
    """A program that drafts `tokens` tokens behind each, and the names of the weights in MXFP4,
    which they are with `group`."""
    passes = causal_lm(
        max_sequences=SEQUENCES,
        max_tokens_per_sequence=LENGTH,
        quantize=MXFP4(group=group, method="rtn") if group else None,
        draft=tokens,
    )
    context = PassContext(CPU, model.weights)
    graph = run_pipeline(model.graph, passes, context, stages=STAGES)[-1].graph
    bindings = serving_bindings(SEQUENCES, LENGTH, rows=SEQUENCES * (tokens + 1))
    meta = context.facts[InsertKvCache.name]
    packings = context.facts.get(QuantizeMxfp4.name, ())
    packed = {p.site.name for p in packings if p.site.action == "quantize"}
    assert context.weights is not None
    return lower(graph, context.weights, CPU, bindings, output_names(graph), meta), packed


@dataclass
class Recorded(DeviceDrafter):
    """What was drafted behind which sequence of how many tokens, in order."""

    drafted: list[tuple[Sequence, int, list[int]]] = field(default_factory=list[Any])

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        found = super().draft(sequence, most)
        if found:
            self.drafted.append((sequence, sequence.length, found))
        return found


def opened(lowered: Lowered, drafter: DeviceDrafter | None = None, **options: Any) -> Session:
    """A session that drafts what the program does, by default all of it."""
    drafts = ServingAbi(lowered.program).drafts
    if drafter is None and drafts:
        drafter = DeviceDrafter(drafts)
    executable = CpuDriver().load(lowered.program, lowered.load_weight)
    return Session(lowered.program, executable, drafter=drafter, **options)
