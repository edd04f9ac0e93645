"""Tiny random causal language models of every architecture that tests cover."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

_COMMON = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
_MLA = dict(
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)
_GROUPED = dict(
    **_EXPERTS,
    n_routed_experts=8,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
)
_SLIDING = dict(head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"])

# What each architecture sets beside _COMMON: two layers, one of each kind where there are two.
_CONFIGS: dict[str, dict] = {
    "llama": {},
    "mistral": dict(sliding_window=16, head_dim=16),
    "qwen2": {},
    "qwen3": dict(head_dim=16),
    "phi3": {},
    "olmo2": {},
    "gemma2": dict(**_SLIDING, query_pre_attn_scalar=16),
    "gemma3_text": dict(**_SLIDING, query_pre_attn_scalar=16),
    "qwen3_moe": dict(
        **_EXPERTS, num_experts=8, head_dim=16, decoder_sparse_step=1, norm_topk_prob=True
    ),
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "gpt_oss": dict(
        **_SLIDING, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=131072
    ),
    "deepseek_v2": dict(
        **_MLA, **{**_GROUPED, "norm_topk_prob": False}, topk_method="group_limited_greedy"
    ),
    "deepseek_v3": dict(**_MLA, **_GROUPED),
    "glm4_moe": dict(**_GROUPED, head_dim=16, partial_rotary_factor=0.5),
    "minicpm3": dict(**_MLA),
    "ernie4_5_moe": dict(
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=32,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=1,
    ),
    "granite": dict(
        attention_multiplier=0.2,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
    ),
    "glm4": dict(head_dim=16),
    "cohere2": dict(**_SLIDING),
    "dots1": dict(**_GROUPED, head_dim=16, layer_types=["full_attention"] * 2),
    "olmoe": dict(num_experts=8, num_experts_per_tok=2),
    "smollm3": {},
    "glm4_moe_lite": dict(**_MLA, **_GROUPED),
    "youtu": dict(**_MLA),
}
MODELS = tuple(_CONFIGS)
COVERAGE = MODELS[:17]  # what the importer promises; the others are tried beside them


def tiny_config(name: str, **overrides) -> PreTrainedConfig:
    """The config of a tiny `name` model (a model_type of transformers): about 10⁵ parameters."""
    return AutoConfig.for_model(name, **{**_COMMON, **_CONFIGS[name], **overrides})


def tiny_model(
    name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "eager",
    experts_implementation: str | None = None,
    **overrides,
) -> PreTrainedModel:
    """A tiny `name` model on the CPU in eval mode, every tensor random (no zeros, no plain ones).

    Norm weights, biases, sinks and router corrections are spread too, so that a test sees when one
    is dropped or misplaced. The same seed gives the same model; the global generator is not moved.
    """
    config = tiny_config(name, **overrides)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            experts_implementation=experts_implementation,
        )
        stored = model.state_dict()
        for key in sorted(stored):
            tensor = stored[key]
            if tensor.is_floating_point() and tensor.unique().numel() <= 2:
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype), alpha=0.1)
    return model.eval()
