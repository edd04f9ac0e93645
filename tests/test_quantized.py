"""Checkpoints that other libraries quantized: weights and logits are the libraries' own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from ingot.codegen.lower import evaluate_constant
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph, Node, Value
from ingot.compiler.pipeline import run_pipeline
from ingot.frontends.huggingface import HuggingFaceModel, import_hugging_face
from ingot.passes.pipelines import module

FIXTURES = Path(__file__).parent / "fixtures" / "quantized"
KEPT_PACKED = (
    "ct_mxfp4",
    "ct_mxfp4_qwen3_moe",
    "gpt_oss_mxfp4",
    "modelopt_mxfp4",
    "quark_mxfp4",
)
MADE_DENSE = (
    "ct_int4",
    "ct_int4_qwen3_moe",
    "ct_nvfp4",
    "fp8_qwen3",
    "fp8_qwen3_moe",
    "modelopt_nvfp4",
)


def imported(directory: Path, dtype: torch.dtype | None = None) -> HuggingFaceModel:
    return import_hugging_face(directory, dtype=dtype, max_tokens=64)


def weights_by_name(model: HuggingFaceModel) -> dict[str, torch.Tensor]:
    """Every weight as the traced graph has it, before passes: in the model's own layout."""
    found: dict[str, torch.Tensor] = {}
    for node in model.graph.nodes():
        name = str(node.attrs.get("name"))
        if node.op.name != "constant" or name.endswith(".scales"):
            continue
        value = Value(node)
        if name.endswith(".codes"):
            name, value = name.removesuffix(".codes"), unpacked(model.graph, node)
        found[name] = evaluate_constant(value, model.weights)
    return found


def unpacked(graph: Graph, codes: Node) -> Value:
    """The mxfp4 of `codes`, turned into the model's layout."""
    users = graph.users()
    (packed,) = users[Value(codes)]
    after = users[Value(packed)]
    turned = [n for n in after if n.op.name == "permute" and n.source == packed.source]
    return Value(turned[0]) if len(after) == 1 and turned else Value(packed)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def logits(model: HuggingFaceModel, tokens: torch.Tensor) -> torch.Tensor:
    graph = run_pipeline(model.graph, module())[-1].graph
    inputs = {"tokens": tokens.int(), "positions": torch.arange(len(tokens)).int()}
    return interpret(graph, inputs, model.weights).outputs[0]


@pytest.mark.parametrize("name", [*KEPT_PACKED, *MADE_DENSE])
def test_weights_are_those_that_the_library_dequantizes(name: str) -> None:
    expected = json.loads((FIXTURES / name / "expected.json").read_text(encoding="utf-8"))
    found = weights_by_name(imported(FIXTURES / name))
    assert expected.keys() == found.keys() - {n for n in found if "inv_freq" in n}
    wrong = [n for n in expected if digest(found[n]) != expected[n]]
    assert wrong == []
