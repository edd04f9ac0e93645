"""The logits of imported models, and of the models themselves."""

from __future__ import annotations

import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.pipeline import run_pipeline
from ingot.frontends.importers.huggingface import HuggingFaceModel
from ingot.passes.pipelines import RAISING
from transformers import PreTrainedModel


def logits_of(imported: HuggingFaceModel, tokens: torch.Tensor) -> torch.Tensor:
    """What the imported graph gives, raised and interpreted: [T, vocab]."""
    graph = run_pipeline(imported.graph, RAISING)[-1].graph
    inputs = {"tokens": tokens.int(), "positions": torch.arange(len(tokens)).int()}
    return interpret(graph, inputs, imported.weights).outputs[0]


def eager(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """What the model gives in eval mode, with positions of its own: [T, vocab]."""
    with torch.no_grad():
        return model.eval()(input_ids=tokens[None], use_cache=False).logits[0]


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
