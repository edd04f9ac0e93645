"""What is left of a decoder layer when every pass has run: the short program, layer by layer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ingot.compiler.ir import Node
from ingot.compiler.pipeline import PassResult, run_pipeline
from ingot.frontends.cli.inspect_view import compute_nodes
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.frontends.layers import graph_sections
from ingot.passes.pipelines import causal_lm
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

PICO = Path(__file__).parents[2] / "examples" / "pico"
# No groups of experts, and one dense layer before the others: Kimi K2 is DeepSeek-V3 made so.
KIMI = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True}

# A gated unit is a linear with a gate; `+` is what its epilogue adds.
DENSE = ("project_heads", "cached_attention", "linear+", "gated", "linear+")
# Norms behind the products too: they, the sums and the norms before go into what comes next.
SANDWICH = ("project_heads", "cached_attention", "linear", "gated", "linear")
MOE = ("project_heads", "cached_attention", "linear+", "moe_gating", "experts")
LATENT = (
    "linear",  # W_DQ ‖ W_DKV ‖ W_KR of the normed input
    "project_heads",  # W_UQ of its norm, and RoPE
    "head_linear",  # W_UK
    "mla_latent",  # the row that the cache holds
    "cached_mla_attention",
    "head_linear",  # W_UV
    "linear+",  # W_O and the residual
)
LATENT_DENSE = (*LATENT, "gated", "linear+")
LATENT_MOE = (*LATENT, "moe_gating", "experts")

LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "llama": (DENSE, DENSE),
    "gemma3_text": (SANDWICH, SANDWICH),
    "qwen3_moe": (MOE, MOE),
    "gpt_oss": (MOE, MOE),
    "glm4_moe": (DENSE, MOE),
    "deepseek_v3": (LATENT_DENSE, LATENT_MOE),
    "kimi": (LATENT_DENSE, LATENT_MOE),
    "pico": (LATENT_DENSE, *[LATENT_MOE] * 4),
}


@cache
def compiled(name: str) -> tuple[PassResult, ...]:
    # Sizes of one head as in the models that are served: with a latent wider than the head the
    # products of W_UK and W_UV stay products.
    mla: dict[str, Any] = {"kv_lora_rank": 64, "hidden_size": 96}
    source: Any = PICO
    if name == "kimi":
        source = tiny_model("deepseek_v3", **KIMI, **mla)
    elif name != "pico":
        source = tiny_model(name, **(mla if name == "deepseek_v3" else {}))
    model = import_hugging_face(source, dtype=None, max_tokens=64)
    return tuple(run_pipeline(model.graph, causal_lm(max_sequences=2, max_tokens_per_sequence=64)))


def kind(node: Node) -> str:
    if node.op.name != "linear":
        return node.op.name
    return "gated" if "gate" in node.attrs else "linear+" if "residual" in node.given else "linear"


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    graph = compiled(name)[-1].graph
    plan = graph_sections(graph)
    found = [[*map(kind, compute_nodes(layer.nodes, plan.folded))] for layer in plan.layers]
    for ops, expected in zip(found, LAYERS[name], strict=True):
        assert sorted(ops) == sorted(expected)
        assert len(ops) <= (9 if "cached_mla_attention" in ops else 5)


@pytest.mark.parametrize("name", LAYERS)
def test_every_expected_match_is_found(name: str) -> None:
    counts = {r.name: (r.found, r.expected) for r in compiled(name) if r.expected is not None}
    assert all(found == expected for found, expected in counts.values()), counts
    layers = len(LAYERS[name])
    latent = any("mla" in op for ops in LAYERS[name] for op in ops)
    experts = sum("experts" in ops for ops in LAYERS[name])
    shared = experts if name in ("glm4_moe", "deepseek_v3", "kimi", "pico") else 0
    assert counts == {
        "absorb-mla": (layers * latent,) * 2,
        "insert-kv-cache": (layers,) * 2,
        "fuse-shared-experts": (shared,) * 2,
        "fuse-mla-projections": (layers * latent,) * 2,
        "fuse-qkv-rope": (layers,) * 2,
        "fuse-swiglu": (layers - experts,) * 2,
        "fuse-moe-gating": (experts,) * 2,
        "fuse-collective-norm": (0, 0),
        "fuse-linear-residual": (0 if name == "gemma3_text" else 2 * layers,) * 2,
        # Before attention and before the MLP, and the last; of MLA also the query's; of sandwiches
        # those behind both too.
        "fuse-norm-linear": (layers * (3 if latent else 4 if name == "gemma3_text" else 2) + 1,)
        * 2,
    }
