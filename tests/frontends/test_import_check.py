"""The gate at the end of an import: it passes what is right, and names what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ingot
import pytest
import torch
from ingot.frontends import import_check
from ingot.frontends.import_check import ImportMismatch, check_import
from ingot.frontends.importers import attention_masks, huggingface, traced_ops
from ingot.frontends.importers.attention_masks import AttentionMask
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.frontends.importers.meta_model import build_meta_model
from tiny_models import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# More layers than structures: dense and MoE, windows and none.
_DEEP = {
    "llama": dict(num_hidden_layers=3),
    "deepseek_v3": dict(num_hidden_layers=4, first_k_dense_replace=2),
    "gpt_oss": dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2),
    "gemma3_text": dict(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2
    ),
}


def drawn(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with weights under which every layer counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models count as large: layers of a structure that was seen are left out."""
    monkeypatch.setattr(import_check, "_SMALL", 0)


# The default run has each model once, each dtype from files and in memory.
_DEFAULT = {
    ("llama", torch.float32, False),
    ("deepseek_v3", torch.bfloat16, True),
    ("gpt_oss", torch.bfloat16, False),
    ("gemma3_text", torch.float32, True),
}
_WAYS = [
    pytest.param(*way, marks=() if way in _DEFAULT else pytest.mark.slow)
    for name in _DEEP
    for dtype in (torch.float32, torch.bfloat16)
    for saved in (False, True)
    for way in [(name, dtype, saved)]
]


@pytest.mark.parametrize(("name", "dtype", "saved"), _WAYS)
def test_a_layer_of_each_structure_is_compared(
    name: str, dtype: torch.dtype, saved: bool, large: None, tmp_path: Path
) -> None:
    model = drawn(tiny_model(name, **_DEEP[name]))
    source = tmp_path if saved else model
    model.save_pretrained(tmp_path)
    check = check_import(import_hugging_face(source, dtype=dtype, max_tokens=96), source)
    # The first layer is of its own structure by what it is given.
    assert len(check.layers) in (2, 3) and not check.reason
    assert len(check.layers) < model.config.num_hidden_layers
    assert check.error < 1e-5 or dtype == torch.bfloat16
    assert check.tokens == (32 if "sliding" not in str(_DEEP[name]) else 40)


@pytest.mark.parametrize("place", ["model.layers.3", "the logits"])
def test_a_wrong_weight_is_found_where_it_first_counts(place: str) -> None:
    model = drawn(tiny_model("llama", num_hidden_layers=5))
    imported = import_hugging_face(model, dtype=None, max_tokens=96)
    wrong = model.lm_head if place == "the logits" else model.model.layers[3].mlp.down_proj
    wrong.weight = nn.Parameter(wrong.weight * 1.5)
    with pytest.raises(ImportMismatch, match=f"llama: .*: {place} differs by .* at 32 of 32"):
        check_import(imported, model)


def test_ids_of_other_kinds_in_a_config() -> None:
    """Lists of lists, ids beyond the vocabulary and nothing are no ids to avoid."""
    model = tiny_model("llama")
    model.config.bad_words_ids = [[1, 2], [3]]
    model.config.image_token_id = 10**9
    model.config.other_token_id = None
    assert check_import(import_hugging_face(model, dtype=None, max_tokens=96), model).layers


def test_what_is_too_large_or_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    imported = import_hugging_face(model, dtype=None, max_tokens=96)
    monkeypatch.setattr(import_check, "LARGEST", 1000)
    assert str(check_import(imported, model)).startswith("import not checked: its distinct layers")
    monkeypatch.undo()
    model.model.forward = lambda *args, **kwargs: 1 / 0  # pyright: ignore
    assert "the model itself does not run: ZeroDivisionError" in str(check_import(imported, model))


# ---- each kind of misunderstanding, with its mend taken out


def test_a_model_that_is_rebuilt_from_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def rebuilt(model: PreTrainedModel, dtype: Any) -> Any:
        return build_meta_model(model.config, model.dtype)

    monkeypatch.setattr(huggingface, "traceable_model", rebuilt)
    model = drawn(tiny_model("llama"))
    model.model.layers[1].mlp.act_fn = nn.GELU()
    with pytest.raises(ImportMismatch, match=r"model\.layers\.1 differs"):
        ingot.compile(model, target="cpu", max_tokens_per_sequence=96)
    with ingot.compile(
        model, target="cpu", max_tokens_per_sequence=96, check_import=False
    ) as compiled:
        assert not any("import" in note for note in compiled.report.notes)


def test_a_mask_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_masks, "mask_of", lambda *_: AttentionMask())
    model = drawn(tiny_model("mistral", sliding_window=8))
    with pytest.raises(ImportMismatch, match=r"mistral: .*: model\.layers\.0 differs"):
        ingot.compile(model, target="cpu", max_tokens_per_sequence=96)


def test_positions_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "default_position_offset", lambda *_: 0)
    config = AutoConfig.for_model(
        "roberta",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=80,
        is_decoder=True,
    )
    model = drawn(AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(ImportMismatch, match="roberta: .* differs"):
        ingot.compile(model, target="cpu", max_tokens_per_sequence=64)


def test_experts_whose_activation_is_taken_from_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced_ops, "_activation_of", lambda *_: ("silu", 0.0, 0.0))
    model = drawn(tiny_model("mixtral"))
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = nn.GELU()
    with pytest.raises(ImportMismatch, match=r"mixtral: .*: model\.layers\.0 differs"):
        ingot.compile(model, target="cpu", max_tokens_per_sequence=96)
