"""The coverage table: every architecture that is promised, from a saved directory to tokens.

A tiny random model is saved, imported from its files, compiled and served; transformers' eager
attention in f32 says what is right. Every other model type is tried by test_zoo.py.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import run_pipeline
from ingot.frontends.importers.huggingface import HuggingFaceModel, import_hugging_face
from ingot.passes.raising.canonicalize import Canonicalize
from ingot.passes.raising.raise_ops import RaiseOps
from tiny_models import COVERAGE, MODELS, tiny_model
from transformers import PreTrainedModel
from transformers_oracle import MAX_TOKENS, assert_same, served

# What raise-ops is there to replace: nothing of these may be left in a raised graph.
SPELLED_OUT = {
    *("rsqrt", "sqrt", "pow", "mean", "sum", "amax", "softmax", "topk", "gather"),
    *("cos", "sin", "sigmoid", "silu", "gelu", "relu", "neg", "slice_scatter"),
}


def expected_ops(model: PreTrainedModel) -> Counter[str]:
    """How often each raised op must occur, from the modules that the model is made of."""
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    kinds = [(type(m).__name__, m) for m in model.modules()]
    norms = Counter(
        "rms_norm" if "RMSNorm" in name else "layer_norm"
        for name, _ in kinds
        if re.search(r"Norm$", name)
    )
    stacks = sum(
        isinstance(down := getattr(m, "down_proj", None), torch.nn.Parameter) and down.ndim == 3
        for _, m in kinds
    )
    dense = sum(name.endswith("MLP") and not hasattr(m, "experts") for name, m in kinds)
    rotated = sum(getattr(config, "no_rope_layers", None) or [1] * layers)
    if config.model_type == "cohere2":  # full attention knows no positions
        rotated = config.layer_types.count("sliding_attention")
    return norms + Counter(
        attention=layers,
        rope=2 * rotated,
        router=stacks,
        experts=stacks,
        glu=dense,
    )


def assert_raised(graph: Graph, expected: Counter[str]) -> None:
    """Everything that has an op of its own became that op, and nothing of it is left over."""
    found = Counter(node.op.name for node in graph.nodes())
    assert {op: found[op] for op in expected} == dict(expected)
    left = {op for op in found if op in SPELLED_OUT or op.startswith("aten.")}
    assert not left, f"left over: {left}\n{graph}"


def raised(model: HuggingFaceModel) -> Graph:
    """The graph of `model` after raise-ops."""
    return run_pipeline(model.graph, (Canonicalize(), RaiseOps()))[-1].graph


def assert_fused(graph: Graph, expected: Counter[str]) -> None:
    """Each attention and each stack of experts is there once, behind fused products."""
    found = Counter(node.op.name for node in graph.nodes())
    cached = found["cached_attention"] + found["cached_mla_attention"]
    assert (cached, found["experts"]) == (expected["attention"], expected["experts"])
    assert found["attention"] == found["router"] == found["rope"] == found["glu"] == 0
    assert found["moe_gating"] == expected["router"]


@pytest.mark.parametrize("name", COVERAGE)
def test_serves_what_transformers_computes(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    sharded = MODELS.index(name) % 2 == 1
    model.save_pretrained(tmp_path, max_shard_size="100KB" if sharded else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    imported = import_hugging_face(tmp_path, dtype=None, max_tokens=MAX_TOKENS)
    assert_raised(raised(imported), expected_ops(model))
    graph, session = served(imported)
    assert_fused(graph, expected_ops(model))
    with session:
        print(f"{name}: max relative error {assert_same(session, model):.1e}")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS[len(COVERAGE) :])
def test_serves_others(name: str) -> None:
    model = tiny_model(name)
    imported = import_hugging_face(model, dtype=None, max_tokens=MAX_TOKENS)
    assert_raised(raised(imported), expected_ops(model))
    graph, session = served(imported)
    assert_fused(graph, expected_ops(model))
    with session:
        assert_same(session, model)
