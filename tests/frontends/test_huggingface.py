"""Importing Hugging Face models: what is refused and how, what is read, long rotary embeddings."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from imported import assert_close, eager, logits_of
from ingot.compiler.pipeline import run_pipeline
from ingot.frontends.importers import huggingface
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.frontends.importers.source_error import SourceError, UnsupportedModel
from ingot.frontends.importers.torch_export import ImportFailure
from ingot.passes.pipelines import RAISING, causal_lm
from ingot.passes.serving.insert_kv_cache import CannotCache
from pass_checks import ops
from tiny_models import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SMALL = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
# Models that reach attention otherwise than through transformers' attention interface.
BYPASSING = {
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "codegen": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, n_ctx=64),
    "gptj": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
}


def small_model(name: str, **options: object) -> PreTrainedModel:
    config = AutoConfig.for_model(name, **{**_SMALL, **options})
    return AutoModelForCausalLM.from_config(config).eval()


@cache
def llama() -> PreTrainedModel:
    return tiny_model("llama")


# ---- what is refused


@pytest.mark.parametrize("name", BYPASSING)
def test_attention_that_bypasses_the_interface_is_refused(name: str) -> None:
    """Some know no name but their own, some take the name and do not use it."""
    with pytest.raises((ImportFailure, SourceError), match=f"^{name}: .*attention interface"):
        import_hugging_face(small_model(name, **BYPASSING[name]), dtype=None, max_tokens=64)


def test_encoders_cannot_be_cached() -> None:
    model = small_model(
        "bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    imported = import_hugging_face(model, dtype=None, max_tokens=64)
    with pytest.raises(CannotCache, match=r"bert\.\w+"):
        run_pipeline(imported.graph, causal_lm(max_sequences=2, max_tokens_per_sequence=64))


def test_chunked_attention_is_refused() -> None:
    model = small_model(
        "llama4_text",
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        moe_layers=[],
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
    )
    with pytest.raises(UnsupportedModel, match=r"layer 0\) uses chunked attention"):
        import_hugging_face(model, dtype=None, max_tokens=64)


class Broken(nn.Module):
    """A feed-forward layer whose code depends on the values that it sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class WithMore(nn.Module):
    """A feed-forward layer with a parameter that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def with_mlp(layer: nn.Module) -> PreTrainedModel:
    """A model with `layer` in place of its first MLP."""
    model = tiny_model("llama")
    model.model.layers[0].mlp = layer
    return model


def test_code_that_cannot_be_traced_is_named() -> None:
    with pytest.raises(
        ImportFailure, match=r"llama: the code at test_huggingface\.py:\d+ branches on the values"
    ):
        import_hugging_face(with_mlp(Broken()), dtype=None, max_tokens=64)


def test_unused_parameters_are_named() -> None:
    with pytest.raises(ImportFailure, match=r"1 parameters take no part .*layers.0.mlp.spare"):
        import_hugging_face(with_mlp(WithMore()), dtype=None, max_tokens=64)


def test_experts_that_bypass_the_interface_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "_count_expert_modules", lambda model: 3)
    with pytest.raises(ImportFailure, match="one experts node for each of 3 MoE layers, found 2"):
        import_hugging_face(tiny_model("mixtral"), dtype=None, max_tokens=64)


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such directory"):
        import_hugging_face(tmp_path / "nothing", dtype=None, max_tokens=64)


# ---- what is made


def test_no_weight_is_read_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama().save_pretrained(tmp_path)
    imported = import_hugging_face(tmp_path, dtype=None, max_tokens=64)
    loads: list[str] = []
    real = type(imported.weights).load

    def load(self: object, name: str) -> torch.Tensor:
        loads.append(name)
        return real(self, name)  # pyright: ignore

    monkeypatch.setattr(type(imported.weights), "load", load)
    again = import_hugging_face(tmp_path, dtype=None, max_tokens=64)
    run_pipeline(again.graph, causal_lm(max_sequences=2, max_tokens_per_sequence=64))
    assert loads == []
    tokens = torch.tensor([3, 5, 7])
    assert_close(logits_of(again, tokens), eager(llama(), tokens))
    constants = {n.attrs["name"] for n in again.graph.nodes() if n.op.name == "constant"}
    assert sorted(loads) == sorted(constants)


def test_the_model_in_memory_is_left_alone() -> None:
    before = {n: t.clone() for n, t in llama().state_dict().items()}
    implementation = llama().config._attn_implementation
    import_hugging_face(llama(), dtype=torch.bfloat16, max_tokens=64)
    assert llama().config._attn_implementation == implementation
    for name, tensor in llama().state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_dtype_of_import() -> None:
    imported = import_hugging_face(llama(), dtype=torch.bfloat16, max_tokens=64)
    tokens = torch.arange(3, 30)
    found = logits_of(imported, tokens)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), eager(llama(), tokens), 3e-2)


# Raised in bf16 as in f32: casts stand around norms and rotary embeddings there.
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "deepseek_v2", "deepseek_v3", "cohere2"])
def test_bf16_models_are_raised(name: str) -> None:
    imported = import_hugging_face(tiny_model(name), dtype=torch.bfloat16, max_tokens=64)
    found = ops(run_pipeline(imported.graph, RAISING)[-1].graph)
    left = {"rsqrt", "mean", "cos", "sin", "neg", "sigmoid", "silu", "gelu", "gather", "topk"}
    assert not found.keys() & left
    assert not [op for op in found if op.startswith("aten.")]


# ---- rotary embeddings with frequencies for short and for long sequences

LONG = dict(
    original_max_position_embeddings=64,
    rope_parameters=dict(
        rope_type="longrope",
        rope_theta=10000.0,
        factor=4.0,
        short_factor=[1.0 + 0.1 * i for i in range(8)],
        long_factor=[3.0 + 0.5 * i for i in range(8)],
        original_max_position_embeddings=64,
    ),
)


def test_long_rope_lowers_the_limit_to_where_its_frequencies_change() -> None:
    """Behind it transformers computes every token of a sequence with others, before it too."""
    model = tiny_model("phi3", **LONG)
    eager(model, torch.arange(80))  # leaves the frequencies of a long sequence behind
    imported = import_hugging_face(model, dtype=None, max_tokens=96)
    assert imported.max_tokens == 64
    ids = torch.randint(3, 128, (64,), generator=torch.Generator().manual_seed(0))
    assert_close(logits_of(imported, ids), eager(model, ids))
    assert_close(logits_of(imported, ids[:9]), eager(model, ids[:9]))
    found = ops(run_pipeline(imported.graph, RAISING)[-1].graph)
    assert found["rope"] == 4 and found["rope_tables"] == 1


def test_a_scale_of_the_length_is_that_of_short_sequences() -> None:
    """Phi-3.5-MoE scales cosines and sines by the length, beside their frequencies."""
    scales = {"short_mscale": 1.3, "long_mscale": 1.7}
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=128)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    long = {**LONG, "rope_parameters": {**LONG["rope_parameters"], **scales}}
    model = small_model("phimoe", **sizes, **heads, max_position_embeddings=256, **long)
    ids = torch.randint(3, 128, (64,), generator=torch.Generator().manual_seed(0))
    expected = eager(model, ids)
    imported = import_hugging_face(model, dtype=None, max_tokens=96)
    assert imported.max_tokens == 64 and "longrope" in imported.notes[0]
    assert_close(logits_of(imported, ids), expected)
    assert_close(logits_of(imported, ids[:9]), expected[:9])
    assert model.model.rotary_emb.config.rope_parameters["rope_type"] == "longrope"
    assert torch.equal(eager(model, ids), expected), "the model itself is as before"


# ---- positions that a model makes itself


_COUNTING = (
    *("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm"),
    "data2vec-text",
)


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        pytest.param(name, padding, marks=() if i % 3 == j or not i else pytest.mark.slow)
        for i, name in enumerate(_COUNTING)
        for j, padding in enumerate((0, 1, 7))
    ],
)
def test_positions_count_from_where_the_model_begins(name: str, padding: int) -> None:
    model = small_model(
        name,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=80,
        pad_token_id=padding,
        is_decoder=True,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    ids = torch.randint(8, 64, (40,), generator=torch.Generator().manual_seed(0))
    imported = import_hugging_face(model, dtype=None, max_tokens=64)
    assert_close(logits_of(imported, ids), eager(model, ids))


def test_positions_of_another_kind_are_refused() -> None:
    model = small_model("gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=128)

    def by_twos(self: Any, input_ids: Any, position_ids: Any = None, **rest: Any) -> Any:
        if position_ids is None:
            position_ids = 2 * torch.arange(input_ids.shape[1])[None]
        return type(self).forward(self, input_ids=input_ids, position_ids=position_ids, **rest)

    model.transformer.forward = MethodType(by_twos, model.transformer)
    with pytest.raises(UnsupportedModel, match=r"gpt2: .* are not 0, 1, 2, .*\[0, 2, 4, 6"):
        import_hugging_face(model, dtype=None, max_tokens=64)
