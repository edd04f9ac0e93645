"""What a stage of the pipeline must have done away with: real models pass, what is left is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import Pass, PassContext, PassError, run_pipeline
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.passes.pipelines import STAGES, causal_lm
from tiny_models import MODELS, tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")


def traced(model: str) -> Graph:
    return import_hugging_face(tiny_model(model), dtype=None, max_tokens=64).graph


@dataclass(frozen=True)
class Idle:
    """A pass in the place of another, which does nothing."""

    name: ClassVar[str] = ""

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        return graph


def idle(name: str) -> Pass:
    return type("Idle", (Idle,), {"name": name})()


@pytest.mark.parametrize("model", MODELS)
def test_models_leave_nothing(model: str) -> None:
    run_pipeline(
        traced(model), causal_lm(max_sequences=2, max_tokens_per_sequence=64), stages=STAGES
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("canonicalize", "after canonicalize, stage canonical form: view at .* is left"),
        ("insert-kv-cache", "after insert-kv-cache, stage serving: (mla_)?attention at .* is left"),
        ("fuse-moe-gating", "after fuse-moe-gating, stage gating: router at .* is left"),
    ],
)
def test_what_is_left_is_told_by_op_and_stage(name: str, message: str) -> None:
    passes = causal_lm(max_sequences=2, max_tokens_per_sequence=64)
    stop = [p.name for p in passes].index(name)
    with pytest.raises(PassError, match=message):
        run_pipeline(traced("deepseek_v3"), (*passes[:stop], idle(name)), stages=STAGES)
