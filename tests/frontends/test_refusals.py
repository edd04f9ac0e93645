"""What cannot be compiled is refused in one line that names the module or the code at fault."""

from __future__ import annotations

import pytest
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.frontends.importers.source_error import SourceError, UnsupportedModel
from ingot.frontends.importers.torch_export import ImportFailure
from zoo_models import random_model

REFUSED = {
    "deepseek_v32": "deepseek_v32: model.layers.0.self_attn.indexer .* by an indexer .* sparse",
    "falcon_mamba": r"falcon_mamba: backbone.layers.0.mixer .*Mixer\) keeps a recurrent state",
    "qwen3_next": r"qwen3_next: model.layers.0.linear_attn .*DeltaNet\) keeps a recurrent state",
    "minimax": r"minimax: .*LightningAttention\) keeps a recurrent state",
    "rwkv": r"rwkv: .*Rwkv\w+\) keeps a recurrent state",
    "dbrx": r"dbrx: the code at modeling_dbrx.py:\d+ branches on the values of tensors",
    "jetmoe": r"the code at .*modeling_jetmoe.py:\d+ makes tensors whose sizes depend",
    "florence2": "florence2: the model has an encoder and a decoder",
    "cpmant": "cpmant: the model knows only attention of its own",
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_named(name: str) -> None:
    with pytest.raises((ImportFailure, SourceError, UnsupportedModel), match=REFUSED[name]) as told:
        import_hugging_face(random_model(name, 100_000_000), dtype=None, max_tokens=96)
    assert "\n" not in str(told.value)
