"""Tiny configurations of any model type of transformers, made by the names of its fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

VOCABULARY = 128
ORDINARY_TOKENS = range(4, 96)  # what prompts are drawn from: no image or control token is there
WINDOW = 16
MAX_LAYERS = 4

_Fields = dict[str, Any]

_LAYERS = re.compile(
    "(num_(hidden_|decoder_)?|encoder_|decoder_|conf_num_hidden_|n_)?layers?|depth|num_blocks"
    "|num_layers_per_stack"
)
# What a whole number becomes, by the name of its field: the first expression that matches.
_SIZES: tuple[tuple[str, int], ...] = (
    ("(decoder_|unpadded_|text_)?vocab_size(_per_layer_input)?", VOCABULARY),
    ("encoder_hash_byte_group_vocab", VOCABULARY),
    ("attention_hidden_size", 128),  # of zamba, twice the hidden size
    ("hidden_size_per_layer_input|ple_embed_dim", 16),
    ("ngram_vocab_size_base", 512),
    ("split_ngram_parts|make_ngram_vocab_size_divisible_by", 8),
    (
        "hidden_size(_global)?|n_embd|d_model|dim|emb(ed)?_dim|word_embed_proj_dim|embedding_size",
        64,
    ),
    ("(out|encoder|text|patch_embed|backbone|image_text|projector)_hidden_size", 64),
    (
        "proj(ection|ector)_(hidden_)?(dim|size)|output_dim|adapter_(in|out)_dim|(adapter_)?input_size",
        64,
    ),
    ("moe_intermediate_size|expert_ffn_hidden_size|moe_shared_expert_intermediate_size", 32),
    ("shared_(experts?_)?intermediate_size|shared_experts_intermediate_size", 32),
    (".*intermediate_size(_mlp)?|ffn_hidden_size|.*ffn_dim|d_ff|dff|dim_ff|n_inner|mlp_dim", 96),
    ("(num_|conf_num_|encoder_|decoder_|swa_num_)?(attention_)?heads|n_heads?", 4),
    ("(num_|swa_num_)key_value_heads|num_kv_heads|kv_n_heads", 2),
    ("(swa_)?head_dim|dim_head|d_kv|kv_channels|attention_head_dim", 16),
    ("global_head_dim", 32),
    ("qk_rope_head_dim|rotary_dim", 8),
    ("qk_nope_head_dim|v_head_dim|index_head_dim", 16),
    ("qk_head_dim|q_lora_rank|o_lora_rank", 24),
    ("kv_lora_rank", 32),
    ("laurel_rank|gated_norm_rank|hc_lowrank|d_rel", 8),
    ("index_n_heads", 4),
    ("index_topk", 8),
    ("index_block_size", 4),
    ("index_topk_blocks", 2),
    ("(moe_)?num_(local_)?experts|n_routed_experts", 8),
    ("num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k_experts", 2),
    ("n_shared_experts|(moe_)?num_shared_experts|num_dense_layers|first_k_dense_replace", 1),
    ("moe_layer_(start|end)_index", 1),
    ("n_group|num_expert_group", 4),
    ("topk_group", 2),
    ("o_groups|zero_expert_num", 2),
    ("(sliding_)?window(_size)?|sliding_window_size|attention_chunk_size|keep_window_size", WINDOW),
    ("local_attention_window_len|floor_scale|log_scaling_n_floor|rel_extent", WINDOW),
    ("num_nextn_predict_layers|num_mtp_layers", 0),
    ("(linear_)?num_key_heads|linear_num_(key|value)_heads|linear_num_heads", 4),
    ("linear_(key_|value_)?head_dim", 16),
    ("mamba_(n_heads|num_heads)", 8),
    ("mamba_(d_head|head_dim)", 16),
    ("mamba_d_state|ssm_state_size|state_size", 16),
    ("mamba_d_ssm", 128),
    ("mamba_dt_rank|time_step_rank", 8),
    ("mamba_n_groups|n_groups", 1),
    ("(mamba_)?chunk_size", 16),
    ("attn_layer_period|expert_layer_period", 2),
    ("attn_layer_offset|expert_layer_offset", 1),
    ("(.*_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length", 256),
)
_SIZE_OF = tuple((re.compile(name), size) for name, size in _SIZES)
_ORDINARY_IDS = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 2}
_NO_IDS = ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id", "suppress_tokens")
_SPECIAL_ID = re.compile("_?[a-z_]*(token_id|token_index|_id)")
# Not sizes, or for the classes of transformers only.
_KEPT = ("transformers_version", "id2label", "label2id", "label_names", "architectures")


def tiny_config(
    model_type: str, overrides: Mapping[str, Any], rules: Mapping[str, int]
) -> PreTrainedConfig:
    """The default configuration of `model_type` with every size made small.

    Two to four layers, chosen so that every kind of layer occurs; hidden size 64, 4 heads, 8
    experts, windows of 16, original contexts of 16. Nested configurations are made small alike.
    `overrides` are set last; a dict among them joins the dict of that name. `rules` replace what a
    field of that name becomes.
    """
    default = AutoConfig.for_model(model_type)
    fields = default.to_dict()
    ids = _special_ids(fields)
    options = _shrunk(fields, ids, rules)
    changed = {k: v for k, v in options.items() if k != "model_type" and v != fields[k]}
    return AutoConfig.for_model(model_type, **_joined(changed, overrides, options))


def _joined(changed: _Fields, overrides: Mapping[str, Any], small: Mapping[str, Any]) -> _Fields:
    """`changed` with `overrides`; a dict among them joins the one that is made `small`."""
    for name, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(small.get(name), dict)
        changed[name] = _joined({**small[name]}, value, small[name]) if both else value
    return changed


def _special_ids(fields: _Fields) -> dict[str, int]:
    """An id of its own, above those of prompts, for every control token of any nested config."""
    names: dict[str, None] = {}

    def walk(values: _Fields) -> None:
        for name, value in values.items():
            if isinstance(value, dict) and "model_type" in value:
                walk(value)
            elif _is_number(value) and _SPECIAL_ID.fullmatch(name):
                names[name] = None

    walk(fields)
    above = range(ORDINARY_TOKENS.stop, VOCABULARY)
    return {name: above[i % len(above)] for i, name in enumerate(names)} | _ORDINARY_IDS


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shrunk(fields: _Fields, ids: Mapping[str, int], rules: Mapping[str, int]) -> _Fields:
    """The fields of one configuration, made small."""
    layers = _layer_count(fields)
    kept = _kept_layers(fields, layers)
    found: _Fields = {}
    for name, value in fields.items():
        if name in _KEPT:
            continue
        if isinstance(value, dict) and "model_type" in value:
            found[name] = _shrunk(value, ids, rules)
        elif name == "per_layer_config" and isinstance(value, dict):
            found[name] = _per_layer(value, kept, rules)
        elif isinstance(value, list) and layers and len(value) == layers and layers > 1:
            found[name] = [_number(name, value[i], rules) for i in kept]
        elif isinstance(value, list) and re.search("(layers|indexes|idxs|indices)$", name):
            found[name] = [v for v in value if not _is_number(v) or v < len(kept)]
        elif name in _NO_IDS:
            found[name] = None
        elif _is_number(value) and _SPECIAL_ID.fullmatch(name):
            found[name] = ids[name]
        elif _is_number(value) and value > 0 and layers and _LAYERS.fullmatch(name):
            found[name] = len(kept)
        else:
            found[name] = _number(name, value, rules)
    if found.get("num_kv_shared_layers"):
        found["num_kv_shared_layers"] = len(kept) // 2
    if found.get("kv_lora_rank") and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found.get("num_attention_heads", 4)
        if fields.get("head_dim") == fields.get("qk_rope_head_dim") is not None:
            found["head_dim"] = found["qk_rope_head_dim"]
    return _with_short_rope(found, fields)


def _number(name: str, value: Any, rules: Mapping[str, int]) -> Any:
    """What `value` becomes: a size by its name; anything else stays."""
    if name in rules and _is_number(value):
        return rules[name]
    if not _is_number(value) or value <= 0:
        return value
    return next((size for pattern, size in _SIZE_OF if pattern.fullmatch(name)), value)


def _layer_count(fields: _Fields) -> int:
    """How many layers the configuration has, by the first field that says it; 0 for none."""
    known = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
    return next((fields[name] for name in known if _is_number(fields.get(name))), 0)


def _kept_layers(fields: _Fields, layers: int) -> list[int]:
    """Which layers stay: those that are of a kind that none before them is, at least two."""
    lists = [v for v in fields.values() if isinstance(v, list) and len(v) == layers > 1]
    own: dict[str, Any] = fields.get("per_layer_config") or {}
    lists.append([str(own.get(f"{i:02}", "")) for i in range(layers)])
    if not layers:
        return [0, 1]
    kept: list[int] = []
    for values in lists:
        for kind in dict.fromkeys(map(str, values)):
            found = [i for i, value in enumerate(values) if str(value) == kind]
            if not any(i in kept for i in found) and len(kept) < MAX_LAYERS:
                kept.append(found[0])
    shared = 2 * len(kept) if fields.get("num_kv_shared_layers") else 2
    kept += [i for i in range(layers - 1, -1, -1) if i not in kept][: max(0, shared - len(kept))]
    return sorted(kept) if len(kept) > 1 else [0, *kept]


def _per_layer(
    own: Mapping[str, Mapping[str, Any]], kept: list[int], rules: Mapping[str, int]
) -> _Fields:
    """What single layers say of themselves, under the numbers that they have now; twice as much."""
    found: _Fields = {}
    for now, before in enumerate(kept):
        if said := own.get(f"{before:02}"):
            small = {k: _number(k, v, rules) for k, v in said.items()}
            small |= {k: 2 * v for k, v in small.items() if k.endswith("head_dim")}
            if "kv_lora_rank" in small and "num_attention_heads" in small:
                small["num_key_value_heads"] = small["num_attention_heads"]
            found[f"{now:02}"] = small
    return found


def _with_short_rope(found: _Fields, fields: _Fields) -> _Fields:
    """`found` with rotary sections and factors of its width, and an original context of 16."""
    parameters = fields.get("rope_parameters")
    if not isinstance(parameters, dict):
        return found
    width = found.get("qk_rope_head_dim") or found.get("head_dim") or 16

    def short(said: _Fields) -> _Fields:
        said = {k: short(v) if isinstance(v, dict) else v for k, v in said.items()}
        half = int(width * (said.get("partial_rotary_factor") or 1)) // 2
        if sections := said.get("mrope_section"):
            rest = [half * s // sum(sections) for s in sections[1:]]
            said["mrope_section"] = [half - sum(rest), *rest]
        for name in ("short_factor", "long_factor"):
            if name in said:
                said[name] = [float(v) for v in said[name][:half]]
        if said.get("original_max_position_embeddings"):
            said["original_max_position_embeddings"] = WINDOW
            longest = max(256, int(WINDOW * said.get("factor", 1)))
            if "max_position_embeddings" in said:
                said["max_position_embeddings"] = longest
            found["max_position_embeddings"] = longest
        return said

    found["rope_parameters"] = short(parameters)
    return found


__all__ = ["MAX_LAYERS", "ORDINARY_TOKENS", "VOCABULARY", "WINDOW", "tiny_config"]
