"""Positions that a model gives its tokens by itself, wherever in its code it makes them."""

from __future__ import annotations

import pytest
from ingot.frontends.importers.default_positions import default_position_offset
from ingot.frontends.importers.huggingface import register
from ingot.frontends.importers.meta_model import build_meta_model
from zoo_models import config_of


@pytest.mark.parametrize("name", ["llama", "roberta", "kosmos-2.5", "qwen2_5_vl"])
def test_the_offset_is_found(name: str) -> None:
    """Kosmos-2.5 makes them where it looks up sinusoids, and gives them to no module."""
    register()
    config = config_of(name)
    meta = build_meta_model(config)
    padding = config.get_text_config().pad_token_id
    behind_padding = name in ("roberta", "kosmos-2.5")
    expected = padding + 1 if behind_padding else 0
    assert default_position_offset(meta.model, meta.buffers) == expected
