"""How many launches a decoder layer takes for one token, in MXFP4: graph nodes are not free."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from ingot.codegen.lower import lower
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.target import target_of
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.passes.pipelines import causal_lm
from ingot.passes.transforms.mxfp4_policy import MXFP4
from interpreted import InterpretedBackend
from pass_checks import for_target
from tiny_models import tiny_model

# Heads and rows of a latent are made where they attend.
ATTENTION = {"decode": 1}
EXPERTS = {"gate": 1, "expert_gemv": 1, "expert_sum": 1}
# What NVIDIA has for the last two.
STREAMED = {"expert_stream": 2}
# A layer's launches by kernel; products are "fragment", "mfma" or "product", those "by head" too
# but for NVIDIA, which streams them as it does experts.
LAYERS: dict[str, dict[str, int]] = {
    "llama": {**ATTENTION, "products": 4},
    "qwen3_moe": {**ATTENTION, **EXPERTS, "products": 2},
    "gpt_oss": {**ATTENTION, **EXPERTS, "products": 2},
    "deepseek_v3": {**ATTENTION, **EXPERTS, "products": 3, "by head": 1},
}


@cache
def launches(name: str, layers: int, target: str) -> Counter[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_layers: dict[str, Any] = {"num_hidden_layers": layers}
        if name == "qwen3_moe":
            of_layers["head_dim"] = 128  # of fewer, norms would add up in another order on AMD
        if name == "gpt_oss":
            of_layers["layer_types"] = ["sliding_attention"] * layers
        model = tiny_model(name, dtype=torch.bfloat16, **of_layers)
        imported = import_hugging_face(model, dtype=torch.bfloat16, max_tokens=256)
    passes = causal_lm(max_sequences=2, max_tokens_per_sequence=192, quantize=MXFP4())
    backend = InterpretedBackend(target_of(target))
    graph = for_target(run_pipeline(imported.graph, passes)[-1].graph, backend.target)
    binding = [{"T": 1, "L": 1}]
    lowered = lower(graph, imported.weights, backend.target, binding, ["logits"], backend=backend)
    (entry,) = lowered.program.entries
    names = (backend.sources[launch.kernel].function.__name__ for launch in entry.launches)
    kinds = (name.removesuffix("_kernel").removeprefix("register_") for name in names)
    return Counter("products" if k in ("fragment", "gemv", "mfma", "product") else k for k in kinds)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("target", ["cuda:sm_90", "hip:gfx942"])
def test_a_layer_of_one_token(name: str, target: str) -> None:
    """What one layer more adds: one like all but the first."""
    added = launches(name, 3, target) - launches(name, 2, target)
    expected, nvidia = Counter(LAYERS[name]), target.startswith("cuda")
    if nvidia and EXPERTS.keys() <= expected.keys():
        expected = expected - Counter(EXPERTS) + Counter({"gate": 1, **STREAMED})
    by_head = expected.pop("by head", 0)
    expected["expert_stream" if nvidia else "products"] += by_head
    assert added == expected
