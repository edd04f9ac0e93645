"""Models for images and text, used with text alone: the towers are left out, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.frontends.importers.torch_export import ImportFailure
from transformers import PreTrainedModel
from zoo import RIGHT, attempt, reference
from zoo_models import random_model


@pytest.fixture(scope="module")
def llava() -> PreTrainedModel:
    return random_model("llava", 10_000_000)


def test_towers_are_unused_by_name(llava: PreTrainedModel, tmp_path: Path) -> None:
    llava.save_pretrained(tmp_path)
    towers = {
        name
        for name, _ in llava.named_parameters()
        if name.startswith(("model.vision_tower.", "model.multi_modal_projector."))
    }
    for source in (llava, tmp_path):
        found = import_hugging_face(source, dtype=None, max_tokens=96)
        assert {*found.unused} == towers
    assert attempt(tmp_path, llava, reference(llava)).verdict == RIGHT


def test_the_language_model_takes_part_as_a_whole(llava: PreTrainedModel) -> None:
    layer = llava.model.language_model.layers[1].self_attn
    layer.extra = torch.nn.Parameter(torch.ones(3))
    try:
        with pytest.raises(ImportFailure, match=r"1 parameters take no part.*1\.self_attn\.extra"):
            import_hugging_face(llava, dtype=None, max_tokens=96)
    finally:
        del layer.extra


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("qwen2_5_vl", False),
        pytest.param("qwen2_5_vl", True, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", False, marks=pytest.mark.slow),
        ("qwen3_vl", True),
    ],
)
def test_text_has_one_position_in_each_direction(name: str, saved: bool, tmp_path: Path) -> None:
    """M-RoPE, by sections and by turns; the model in memory stays as it is."""
    model = random_model(name, 10_000_000)
    expected = reference(model)
    model.save_pretrained(tmp_path)
    model.model.rope_deltas = None
    found = attempt(tmp_path if saved else model, model, expected)
    assert found.verdict == RIGHT, found
    assert model.model.rope_deltas is None


def test_a_tower_with_attention_of_its_own_is_left_out(tmp_path: Path) -> None:
    model = random_model("deepseek_ocr2", 10_000_000)
    model.save_pretrained(tmp_path)
    found = import_hugging_face(tmp_path, dtype=None, max_tokens=96)
    assert any(".sam_encoder." in name for name in found.unused)


def test_a_tensor_that_is_lost_on_the_meta_device_is_refused(tmp_path: Path) -> None:
    model = random_model("chameleon", 40_000_000)
    assert import_hugging_face(model, dtype=None, max_tokens=96).unused
    model.save_pretrained(tmp_path)
    with pytest.raises(ImportFailure, match="a tensor of Python numbers .* the model in memory"):
        import_hugging_face(tmp_path, dtype=None, max_tokens=96)
