"""Latent attention end to end: transformers' tokens and logits from a cache of the latent alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ingot.compiler.pipeline import Pass
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.passes.transforms.absorb_mla import AbsorbMla
from pass_checks import ops
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from transformers_oracle import MAX_TOKENS, PROMPTS, assert_same, served, serving_passes

pytestmark = pytest.mark.usefixtures("shared_traces")

PICO = Path(__file__).parents[2] / "examples" / "pico"
REQUIRED = ("absorb-mla", "insert-kv-cache", "gather-logits")


def absorbing_passes(absorb: AbsorbMla) -> tuple[Pass, ...]:
    """The serving passes with this absorb-mla among them."""
    return tuple(absorb if p.name == absorb.name else p for p in serving_passes())


@pytest.mark.parametrize("premultiply", ["auto", True, False])
def test_deepseek_v3_serves_what_transformers_computes(premultiply: bool) -> None:
    model = tiny_model("deepseek_v3")
    imported = import_hugging_face(model, dtype=None, max_tokens=MAX_TOKENS)
    passes = absorbing_passes(AbsorbMla(premultiply))
    graph, session = served(imported, (*REQUIRED, "fuse-mla-projections"), passes)
    found = ops(graph)
    assert found["cached_mla_attention"] == found["kv_append"] == found["mla_latent"] == 2
    assert found["cached_attention"] == found["attention"] == 0
    with session:
        print(f"max relative error {assert_same(session, model):.1e}")


@pytest.mark.parametrize("name", ["deepseek_v2", "glm4_moe_lite", "minicpm3", "youtu"])
def test_other_models(name: str) -> None:
    model = tiny_model(name)
    imported = import_hugging_face(model, dtype=None, max_tokens=MAX_TOKENS)
    _, session = served(imported, REQUIRED, absorbing_passes(AbsorbMla()))
    with session:
        assert_same(session, model, generate=False)


@pytest.mark.slow
def test_pico_serves_what_transformers_computes() -> None:
    model = AutoModelForCausalLM.from_pretrained(
        PICO, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    imported = import_hugging_face(PICO, dtype=torch.float32, max_tokens=MAX_TOKENS)
    graph, session = served(imported, REQUIRED, absorbing_passes(AbsorbMla()))
    assert ops(graph)["cached_mla_attention"] == model.config.num_hidden_layers
    with session:
        print(f"max relative error {assert_same(session, model):.1e}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_holds_the_latent_alone(dtype: torch.dtype) -> None:
    """kv_lora_rank + qk_rope_head_dim numbers a token and layer, nothing else."""
    imported = import_hugging_face(tiny_model("deepseek_v3"), dtype=dtype, max_tokens=MAX_TOKENS)
    graph, session = served(imported, REQUIRED, absorbing_passes(AbsorbMla()))
    session.close()
    config = imported.config
    tokens = len(PROMPTS) * 128  # whole pages of 64 for each of the sequences
    number = config.kv_lora_rank + config.qk_rope_head_dim
    state = sum(graph.param(name).type.nbytes for name in graph.updates)
    assert state == config.num_hidden_layers * tokens * number * dtype.itemsize
