"""The layer of multi-token prediction: its import against transformers' own, and its refusals."""

from __future__ import annotations

import re
from pathlib import Path

import ingot
import pytest
import torch
from ingot.compiler.interpret import interpret
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.frontends.importers.prediction_layer import predicts
from ingot.frontends.importers.source_error import SourceError
from mtp_checkpoints import write_mtp
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model
from transformers.cache_utils import MtpCache

TOKENS = 17


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_it_is_transformers_own(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Where transformers counts its positions from 1, as it does, RoPE sees the same distances."""
    model, layer = write_mtp(tmp_path, name, dtype=dtype)
    imported = import_hugging_face(tmp_path, dtype=None, max_tokens=64, predict=ingot.MTP())
    assert imported.dtype == dtype
    ids = torch.randint(3, 128, (TOKENS,), generator=torch.Generator().manual_seed(1))
    following = torch.cat([ids[1:], ids[:1]])
    positions = torch.arange(TOKENS)
    inputs = {"tokens": ids, "positions": positions, "following": following}
    with torch.no_grad():
        ours = interpret(
            imported.graph, {n: x.int() for n, x in inputs.items()}, imported.weights
        ).outputs
        output = model(ids[None], output_hidden_states=True, use_cache=False)
        hidden = output.hidden_states[-1]
        cache = MtpCache(config=model.config.get_mtp_config())
        state = layer.forward_layer(
            0, hidden, positions[None] + 1, cache, input_ids=following[None]
        )
        logits = layer._project_to_logits(state)
        theirs = (output.logits, hidden, logits, state)
    drafted = ours[2].long()[:, None]
    # In bf16 a rounding may give a token other experts.
    limit, others = (2e-6, 0) if dtype is torch.float32 else (4e-2, 2)
    for found, expected in zip(ours, theirs, strict=True):
        if expected is logits:  # what is drafted are the likeliest tokens
            apart = expected[0].float().amax(-1) - expected[0].float().gather(1, drafted)[:, 0]
        else:
            apart = (found.float() - expected[0].float()).abs().amax(-1)
        assert int((apart >= limit * expected.float().abs().max()).sum()) <= others


def test_without_it_nothing_changes(tmp_path: Path) -> None:
    write_mtp(tmp_path, "glm4_moe")
    imported = import_hugging_face(tmp_path, dtype=None, max_tokens=64)
    assert [p.attrs["name"] for p in imported.graph.params] == ["tokens", "positions"]
    assert len(imported.graph.outputs) == 1
    assert not any(name.startswith("mtp.") for name in imported.weights)
    assert set(imported.unused.values()) == {"multi-token prediction, which is not served"}


def test_what_it_shares_and_further_layers_are_not_read(tmp_path: Path) -> None:
    write_mtp(tmp_path, "glm4_moe", layers=2)
    unused = import_hugging_face(tmp_path, dtype=None, max_tokens=64, predict=ingot.MTP()).unused
    for leaf in ("embed_tokens.weight", "shared_head.head.weight"):
        assert "copy of the model's own" in unused[f"model.layers.2.{leaf}"]
    assert "one layer drafts" in unused["model.layers.3.eh_proj.weight"]
    assert not any(name.startswith("model.layers.2.self_attn") for name in unused)


def test_refuses_a_checkpoint_without_it(tmp_path: Path) -> None:
    tiny_model("glm4_moe").save_pretrained(tmp_path)
    expected = re.escape(
        f"{tmp_path}: speculate=MTP(...) needs a layer of multi-token prediction, and the "
        "checkpoint has none behind the 2 layers of the model"
    )
    with pytest.raises(SourceError, match=f"^{expected}$"):
        import_hugging_face(tmp_path, dtype=None, max_tokens=64, predict=ingot.MTP())


def test_refuses_a_layer_of_which_a_tensor_is_missing(tmp_path: Path) -> None:
    write_mtp(tmp_path, "glm4_moe")
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    del held["model.layers.2.eh_proj.weight"]
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"no tensor for layers\.0\.eh_proj\.weight of the layer"):
        import_hugging_face(tmp_path, dtype=None, max_tokens=64, predict=ingot.MTP())


def test_refuses_a_model_in_memory() -> None:
    with pytest.raises(SourceError, match="a model in memory has no layer of multi-token"):
        import_hugging_face(tiny_model("glm4_moe"), dtype=None, max_tokens=64, predict=ingot.MTP())


def test_told_by_the_layout() -> None:
    names = [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.enorm.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "model.mtp.layers.0.mlp.up_proj.weight",
        "mtp_block.fc.weight",
        "lm_head.weight",
    ]
    config = tiny_config("llama")
    assert predicts(names, config) == {*names[1:3], *names[4:6]}
    config.num_nextn_predict_layers = 2
    assert predicts(names, config) == {*names[1:6]}
