"""The model types that zoo.py sweeps, their variants by configuration, and a random model of each.

A type of AutoModelForCausalLM, or of AutoModelForImageTextToText where text alone is given, goes by
its name; a variant is named "TYPE, what it is". Where a type has two classes, "TYPE, image-text" is
the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_configs import WINDOW, tiny_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"),
    *("roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
_CONTEXT = 46  # longrope crosses it between the prompt and the last token that is generated
_LONG_ROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0 + 0.1 * i for i in range(8)],
    long_factor=[2.0 + 0.7 * i for i in range(8)],
    original_max_position_embeddings=_CONTEXT,
)
_LONG = dict(max_position_embeddings=256, original_max_position_embeddings=_CONTEXT)
_WINDOWED = dict(
    layer_types=["full_attention", "sliding_attention"],
    sliding_window=WINDOW,
    use_sliding_window=True,
    max_window_layers=1,
)
_ATTENTION_ONLY = dict(layer_types=["full_attention"] * 2, num_hidden_layers=2)
_SHORT = dict(original_max_position_embeddings=16)
_ROPE = dict(rope_type="default", rope_theta=10000.0)
_VISION = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16
)
_GEMMA_EXPERTS = dict(num_experts=8, top_k_experts=2, moe_intermediate_size=32)
_COMPASS = dict(rope_parameters=dict(full_attention=_ROPE, sliding_attention=_ROPE))
_QWEN4 = dict(
    indexer_n_heads=4,
    indexer_kv_heads=1,
    indexer_head_dim=16,
    indexer_budget=8,
    indexer_compress_ratio=4,
)

_IMAGE_TOKENS = {"<image>": 120, "IMGIMGA": 121, "IMGIMGB": 122}
_SPLIT_MROPE = (
    *("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_omni_thinker"),
    *("qwen2_5_vl", "qwen2_vl"),
)


def _mrope(*sections: int) -> dict[str, Any]:
    return dict(text_config=dict(rope_parameters=dict(mrope_section=[*sections])))


# What a type needs beside the rules of tiny_config.
_FIXES: dict[str, dict[str, Any]] = {
    **{name: dict(is_decoder=True) for name in ENCODERS},
    **{name: dict(head_dim=16) for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{name: _mrope(2, 3, 3) for name in _SPLIT_MROPE},
    **{name: _mrope(4, 2, 2) for name in ("qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe")},
    "chameleon": dict(vocabulary_map=_IMAGE_TOKENS),
    "emu3": dict(vocabulary_map=_IMAGE_TOKENS, vq_config=dict(base_channels=32)),
    "glm4v_moe": _mrope(1, 1, 2),
    "cohere_compass": dict(text_config=_COMPASS),
    "cohere_compass_text": _COMPASS,
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0)),
    "deepseek_ocr2": dict(
        text_config=dict(mlp_layer_types=["dense", "sparse"], num_experts_per_tok=2)
    ),
    "deepseek_vl_hybrid": dict(high_res_vision_config=dict(global_attn_indexes=[1])),
    "deepseek_v2": dict(num_experts_per_tok=2, n_group=4, topk_group=2),
    "diffusion_gemma": dict(text_config=_GEMMA_EXPERTS),
    "dots1": dict(
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        layer_types=["full_attention"] * 2,
    ),
    "ernie4_5_vl_moe": _mrope(3, 3, 2),
    "gemma4": dict(vision_config=dict(model_type="gemma4_vision", **_VISION)),
    "granite4_vision": dict(deepstack_layer_map=[[0, 0], [1, 1]], downsample_rate="4/8"),
    "hrm_text": dict(num_layers_per_stack=None, num_hidden_layers=2),
    "hunyuan_vl": dict(
        text_config=dict(head_dim=16, rope_parameters=dict(mrope_section=[2, 2, 2, 2]))
    ),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=8),
    "molmo2": dict(adapter_config=dict(vision_feature_layer=[1, 0])),
    "nemotron": dict(num_key_value_heads=2),
    "qwen4_exp": dict(text_config=_QWEN4),
    "qwen4_exp_text": _QWEN4,
    "reformer": dict(is_decoder=True, axial_pos_embds=False),
    "step3p7": dict(text_config=dict(sliding_window=WINDOW)),
    "unlimited_ocr": dict(text_config=dict(num_key_value_heads=4)),
    "xmod": dict(is_decoder=True, default_language="en_XX"),
    "zamba": dict(layers_block_type=["linear_attention", "hybrid"] * 2, num_hidden_layers=4),
}
# Sizes that the rules of tiny_config give otherwise, for nested configurations too.
_RULES: dict[str, dict[str, int]] = {
    "dots3_note": dict(head_dim=40),
    "dots3_note_text": dict(head_dim=40),
    "glm5_next": dict(index_kpool=4),
    "zaya": dict(num_experts_per_tok=1),
}
# What published models, or their forks, set otherwise than the default.
_VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{name}, windows": _WINDOWED for name in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")},
    **{
        f"{name}, windows": dict(sliding_window=WINDOW)
        for name in ("mixtral", "phi3", "phimoe", "starcoder2")
    },
    "phi3, longrope": dict(rope_parameters=_LONG_ROPE, **_LONG),
    "phimoe, longrope": dict(
        rope_parameters=dict(**_LONG_ROPE, short_mscale=1.1, long_mscale=1.2), **_LONG
    ),
    **{
        f"llama, {kind} rope": dict(rope_parameters={**_ROPE, "rope_type": kind, **more})
        for kind, more in {
            "linear": dict(factor=4.0),
            "dynamic": dict(factor=4.0, **_SHORT),
            "yarn": dict(factor=4.0, **_SHORT),
            "llama3": dict(factor=4.0, **_SHORT, low_freq_factor=1.0, high_freq_factor=4.0),
        }.items()
    },
    "llama, longrope": dict(rope_parameters=_LONG_ROPE, max_position_embeddings=256),
    **{
        f"{name}, attention layers only": _ATTENTION_ONLY
        for name in ("lfm2", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
    },
    "granitemoehybrid, attention layers only": dict(layer_types=["attention"] * 2),
    "nemotron_h, attention layers only": dict(
        layers_block_type=["full_attention", "mlp", "full_attention", "moe"]
    ),
    "gemma4_text, experts": dict(enable_moe_block=True, **_GEMMA_EXPERTS),
    "gemma4_text, keys as values": dict(attention_k_eq_v=True),
    "cohere, norms of queries": dict(use_qk_norm=True),
    "deepseek_v3, queries of full rank": dict(q_lora_rank=None),
    "falcon, alibi": dict(alibi=True),
    "falcon, new decoder": dict(new_decoder_architecture=True, num_kv_heads=2),
    "gpt2, scaled by layer": dict(scale_attn_by_inverse_layer_idx=True),
    "gpt_bigcode, many heads": dict(multi_query=False),
    "gpt_neox, sequential": dict(use_parallel_residual=False),
    "opt, norms behind": dict(do_layer_norm_before=False, word_embed_proj_dim=32),
    "phi, norms of queries": dict(qk_layernorm=True),
    "stablelm, parallel": dict(use_parallel_residual=True, qk_layernorm=True),
    **{f"{name}, not a decoder": {} for name in ENCODERS if name != "reformer"},
    "xmod, not a decoder": dict(default_language="en_XX"),
}


@dataclass(frozen=True)
class Type:
    """A model type with what its configuration says beside the rules."""

    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    image_text: bool = False


def _types() -> dict[str, Type]:
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    image_text = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    found: dict[str, Type] = {}
    for name in sorted({*causal, *image_text}):
        fixes = _FIXES.get(name, {})
        found[name] = Type(name, fixes, image_text=name not in causal)
        if name in causal and image_text.get(name, causal[name]) != causal[name]:
            found[f"{name}, image-text"] = Type(name, fixes, image_text=True)
    for name, overrides in _VARIANTS.items():
        model_type = name.partition(",")[0]
        if model_type in causal:  # an older transformers has fewer
            found[name] = Type(model_type, overrides)
    return dict(sorted(found.items()))


TYPES: Mapping[str, Type] = _types()


def class_of(name: str) -> Any:
    """The automatic class of transformers that loads this type."""
    return AutoModelForImageTextToText if TYPES[name].image_text else AutoModelForCausalLM


def config_of(name: str) -> PreTrainedConfig:
    """The tiny configuration of this type."""
    found = TYPES[name]
    return tiny_config(found.model_type, found.overrides, _RULES.get(found.model_type, {}))


def random_model(name: str, max_parameters: int) -> PreTrainedModel:
    """A tiny model in f32 with eager attention on the CPU, every tensor of it random.

    Matrices are drawn from N(0, 1 / inputs), so that scores of attention are of order one. Noise is
    added to vectors (norms, biases, sinks, router corrections) and to stored buffers. ValueError
    for a model that the rules did not make small. The global generator of torch is seeded.
    """
    config = config_of(name)
    with torch.device("meta"):
        shape = class_of(name).from_config(config)
    if (count := sum(p.numel() for p in shape.parameters())) > max_parameters:
        raise ValueError(f"{count / 1e6:.0f} million parameters: the rules do not make it small")
    torch.manual_seed(0)
    model: PreTrainedModel = class_of(name).from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    model = model.float().eval()
    stored = model.state_dict()
    buffers = {n: b for n, b in model.named_buffers() if n in stored}
    with torch.no_grad():
        for _, tensor in sorted({**dict(model.named_parameters()), **buffers}.items()):
            _randomize(tensor)
    return model


def _randomize(tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    parameter = isinstance(tensor, torch.nn.Parameter)
    if parameter and not tensor.requires_grad:
        return  # a table of sinusoids
    noise = torch.randn(tensor.shape)
    if parameter and tensor.ndim > 1:
        inputs = tensor.shape[-1] if tensor.ndim < 4 else tensor[0].numel()
        tensor.copy_(noise * inputs**-0.5)
    elif tensor.ndim < 2 or tensor.unique().numel() <= 2:
        tensor.add_(noise, alpha=0.2)


__all__ = ["TYPES", "Type", "class_of", "config_of", "random_model"]
