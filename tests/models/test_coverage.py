"""The coverage table: every architecture that is promised, from a saved directory to tokens.

A tiny random model is saved, imported from its files, compiled and served; transformers' eager
attention in f32 says what is right.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import PassError, run_pipeline
from ingot.frontends.importers.huggingface import HuggingFaceModel, import_hugging_face
from ingot.frontends.importers.source_error import SourceError
from ingot.frontends.importers.torch_export import ImportFailure
from ingot.frontends.importers.traced_ops import UnsupportedModel
from ingot.passes.raising.canonicalize import Canonicalize
from ingot.passes.raising.raise_ops import RaiseOps
from ingot.passes.serving.insert_kv_cache import CannotCache
from tiny_models import COVERAGE, MODELS, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers_oracle import MAX_TOKENS, PROMPTS, assert_same, eager_logits, served

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


@pytest.mark.parametrize("name", MODELS[len(COVERAGE) :])
def test_serves_others(name: str) -> None:
    model = tiny_model(name)
    imported = import_hugging_face(model, dtype=None, max_tokens=MAX_TOKENS)
    assert_raised(raised(imported), expected_ops(model))
    graph, session = served(imported)
    assert_fused(graph, expected_ops(model))
    with session:
        assert_same(session, model)


# ---- every other causal language model that transformers has

# Set where a config has the option; what a config does not know it does not get.
TINY: dict[str, object] = {
    **dict(vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    **dict(hidden_size=64, n_embd=64, d_model=64, head_dim=16, max_position_embeddings=256),
    **dict(intermediate_size=96, ffn_hidden_size=96, n_inner=96, intermediate_size_mlp=96),
    **dict(dense_intermediate_size=96, shared_intermediate_size=32, expert_ffn_hidden_size=32),
    **dict(num_hidden_layers=2, n_layer=2, n_layers=2, num_layers=2, num_attention_heads=4),
    **dict(n_head=4, n_heads=4, num_key_value_heads=2, n_positions=256, rotary_dim=8),
    **dict(num_experts=8, num_local_experts=8, n_routed_experts=8, moe_num_experts=8),
    **dict(num_experts_per_tok=2, moe_k=2, moe_topk=2, moe_intermediate_size=32),
    **dict(n_shared_experts=1, num_shared_experts=1, moe_num_shared_experts=1, n_group=4),
    **dict(topk_group=2, first_k_dense_replace=1, num_dense_layers=1, zero_expert_num=2),
    **dict(shared_expert_intermediate_size=32, moe_layer_start_index=1, moe_layer_end_index=1),
    **dict(q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8),
    **dict(v_head_dim=16, sliding_window=16, num_nextn_predict_layers=0, num_mtp_layers=0),
}
MAX_PARAMETERS = 30_000_000

# These import, serve and match transformers, and must go on to do so.
KNOWN_GOOD = {
    *("ctrl", "gpt-sw3", "hrm_text", "lfm2"),  # of lfm2 the layers that have attention
    *(
        "afmoe",
        "apertus",
        "arcee",
        "aria_text",
        "axk1",
        "biogpt",
        "bitnet",
        "cohere",
        "cohere2_moe",
    ),
    *(
        "cwm",
        "ernie4_5",
        "exaone4",
        "exaone_moe",
        "flex_olmo",
        "flint",
        "gemma",
        "glm",
        "glm4_moe_lite",
    ),
    *("gpt2", "gpt_bigcode", "gpt_neox", "granite_swa", "granitemoe", "granitemoe_swa"),
    *("granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax"),
    *("internlm3", "iquestcoder", "jais2", "kolibri1", "laguna", "mellum", "mimo_v2_flash"),
    *("minimax_m2", "ministral", "ministral3", "modernbert-decoder", "moshi", "nanochat"),
    *("nemotron", "olmo", "olmo3", "opt", "persimmon", "phi", "phimoe", "qwen2_moe", "seed_oss"),
    *("solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu"),
}


def guessed_config(name: str) -> PreTrainedConfig:
    """A tiny config of a model type that nobody wrote one for."""
    known = AutoConfig.for_model(name)
    options = {key: value for key, value in TINY.items() if hasattr(known, key)}
    if hasattr(known, "kv_lora_rank"):
        options["num_key_value_heads"] = 4
        options.pop("head_dim", None)
    if getattr(known, "layer_types", None):
        kinds = list(dict.fromkeys(known.layer_types))
        options["layer_types"] = (kinds * 2)[:2]
    elif not getattr(known, "sliding_window", None):
        options.pop("sliding_window", None)
    if getattr(known, "mlp_layer_types", None):
        options["mlp_layer_types"] = ["dense", "sparse"]
    return AutoConfig.for_model(name, **options)


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of `config` in f32 with every tensor random, norms and biases too."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        for _, tensor in sorted(model.state_dict().items()):
            if tensor.is_floating_point() and tensor.unique().numel() <= 2:
                tensor.add_(torch.randn(tensor.shape), alpha=0.1)
    return model.eval()


def guessed_model(name: str) -> PreTrainedModel:
    """A tiny random model; skips where no tiny one comes of the guess, or none that runs."""
    try:
        config = guessed_config(name)
        with torch.device("meta"):
            count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if count > MAX_PARAMETERS:
            pytest.skip(f"{count / 1e6:.0f} million parameters: sizes of its own")
        model = random_model(config)
        eager_logits(model, PROMPTS[0])
    except Exception as error:  # noqa: BLE001, the code of 150 architectures under a guess
        pytest.skip(f"no tiny model: {type(error).__name__}: {str(error)[:120]}")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*MODELS}))
def test_sweep(name: str) -> None:
    """What imports must match, known or not; what does not import is refused by name."""
    known = name in KNOWN_GOOD
    model = guessed_model(name)
    refusals = (ImportFailure, SourceError, UnsupportedModel, PassError, CannotCache)
    try:
        _, session = served(import_hugging_face(model, dtype=None, max_tokens=MAX_TOKENS), ())
    except refusals as error:
        if known:
            raise
        pytest.skip(f"refused: {type(error).__name__}: {str(error)[:200]}")
    with session:
        error = assert_same(session, model, generate=False)
    print(f"{name}: max relative error {error:.1e}{'' if known else '; put it among KNOWN_GOOD'}")
