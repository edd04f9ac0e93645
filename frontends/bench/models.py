"""Configs of published models by name, at full size, and of stacks of few layers as wide.

Only what a published config says beside transformers' defaults stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..importers.meta_model import read_config

MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen3-8b": dict(
        model_type="qwen3",
        intermediate_size=12288,
        num_hidden_layers=36,
        num_key_value_heads=8,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe",
        head_dim=128,
        num_hidden_layers=48,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "deepseek-v2-lite": dict(
        model_type="deepseek_v2",
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        max_position_embeddings=163840,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    ),
    "gpt-oss-20b": dict(model_type="gpt_oss", num_hidden_layers=24, num_local_experts=32),
    # One dense layer and two with experts, as wide as the models are.
    "deepseek-v3-wide": dict(
        model_type="deepseek_v3",
        num_hidden_layers=3,
        first_k_dense_replace=1,
        max_position_embeddings=163840,
    ),
    "kimi-k2.5-wide": dict(
        model_type="deepseek_v3",
        vocab_size=163840,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=64,
        num_key_value_heads=64,
        n_routed_experts=384,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        max_position_embeddings=262144,
    ),
    # Without its indexer, which chooses what attention sees.
    "glm-5-wide": dict(
        model_type="deepseek_v3",
        vocab_size=154880,
        hidden_size=6144,
        intermediate_size=12288,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=64,
        num_key_value_heads=64,
        q_lora_rank=2048,
        qk_nope_head_dim=192,
        v_head_dim=256,
        n_group=1,
        topk_group=1,
        rms_norm_eps=1e-5,
        max_position_embeddings=202752,
    ),
}


def config_of(model: str, layers: int | None = None, tokens: int = 0) -> PreTrainedConfig:
    """The config of one of MODELS, in bf16, or of the directory `model`; `layers` cuts it short.

    Its limit of positions is raised to `tokens`: no speed depends on what a model was trained for.

    ValueError lists the names where `model` is neither; SourceError as read_config.
    """
    if model in MODELS:
        config = AutoConfig.for_model(**MODELS[model], dtype="bfloat16")
    elif Path(model, "config.json").is_file():
        config = read_config(model)
    else:
        known = ", ".join(MODELS)
        raise ValueError(
            f"expected a directory with a config.json, or one of {known}; got {model!r}"
        )
    text = config.get_text_config()
    if (limit := getattr(text, "max_position_embeddings", None)) is not None:
        text.max_position_embeddings = max(limit, tokens)
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config
