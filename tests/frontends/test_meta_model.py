"""Meta models against models that transformers constructs and loads in full."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from ingot.frontends.importers.meta_model import (
    MetaModel,
    build_meta_model,
    named_tensors,
    read_config,
)
from ingot.frontends.importers.source_error import SourceError
from tiny_models import MODELS, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

ROPES = {
    "linear": dict(rope_type="linear", factor=4.0),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    "longrope": dict(
        rope_type="longrope",
        factor=4.0,
        short_factor=[1.0 + 0.1 * i for i in range(8)],
        long_factor=[2.0 + 0.3 * i for i in range(8)],
        original_max_position_embeddings=64,
    ),
}


def meta_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> MetaModel:
    """A meta model under transformers' own attention: these tests trace nothing."""
    return build_meta_model(
        config, dtype, attn_implementation="eager", experts_implementation="eager"
    )


def assert_same_buffers(meta: MetaModel, model: torch.nn.Module) -> None:
    """`meta.buffers` are the non-persistent buffers of `model`, bit for bit."""
    expected = dict(model.named_non_persistent_buffers(remove_duplicate=False))
    assert meta.buffers.keys() == expected.keys()
    for name, buffer in meta.buffers.items():
        assert buffer.device.type == "cpu"
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in MODELS for dtype in (torch.float32, torch.bfloat16)]
    + [(name, torch.float16) for name in ("gemma2", "gpt_oss", "deepseek_v3")],
    ids=str,
)
def test_is_what_from_pretrained_gives(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    meta = meta_model(read_config(tmp_path), dtype)
    found = {name: (t.dtype, t.shape) for name, t in named_tensors(meta.model)}
    assert found == {name: (t.dtype, t.shape) for name, t in named_tensors(loaded)}
    assert_same_buffers(meta, loaded)


@pytest.mark.parametrize("name", MODELS)
def test_is_on_meta_in_eval_mode(name: str) -> None:
    meta = meta_model(tiny_config(name))
    assert not any(module.training for module in meta.model.modules())
    assert all(t.is_meta and not t.requires_grad for _, t in named_tensors(meta.model))
    assert meta.buffers
    assert set(meta.stored_names()) <= set(meta.types())


@pytest.mark.parametrize(
    ("name", "rope"),
    [(n, r) for n in ("llama", "deepseek_v3", "gpt_oss") for r in ROPES] + [("phi3", "longrope")],
)
def test_scaled_rope_has_the_frequencies_of_a_real_model(name: str, rope: str) -> None:
    parameters = deepcopy(ROPES[rope])
    half = 4 if name == "deepseek_v3" else 8  # qk_rope_head_dim 8, others head_dim 16
    for key in {"short_factor", "long_factor"} & parameters.keys():
        parameters[key] = parameters[key][:half]
    model = tiny_model(name, rope_parameters={"rope_theta": 10000.0, **parameters})
    plain = tiny_model(name, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})
    meta = meta_model(model.config)
    assert_same_buffers(meta, model)
    frequencies = "model.rotary_emb.inv_freq"
    assert rope == "longrope" or not torch.equal(
        meta.buffers[frequencies], plain.get_buffer(frequencies)
    )


def test_each_kind_of_layer_has_its_own_frequencies() -> None:
    ropes = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    model = tiny_model("gemma3_text", rope_parameters=ropes)
    meta = meta_model(model.config)
    assert_same_buffers(meta, model)
    full, sliding = (meta.buffers[f"model.rotary_emb.{kind}_inv_freq"] for kind in ropes)
    assert full[0] == pytest.approx(1 / 8)
    assert sliding[0] == 1


def test_embedding_scale_is_rounded_as_the_model_rounds_it() -> None:
    config = tiny_config("gemma2", hidden_size=96)
    scale = meta_model(config, torch.bfloat16).buffers["model.embed_tokens.embed_scale"]
    assert scale.dtype == torch.bfloat16
    assert scale == torch.tensor(96**0.5, dtype=torch.bfloat16)


def test_dynamic_rope_is_refused() -> None:
    config = tiny_config(
        "llama", rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    )
    with pytest.raises(SourceError, match=r"rotary_emb has rope_type 'dynamic'.*length of the"):
        meta_model(config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_router_correction_stays_in_float32(dtype: torch.dtype) -> None:
    types = meta_model(tiny_config("deepseek_v3"), dtype).types()
    narrow = {name for name, t in types.items() if t.dtype != "f32" and "inv_freq" not in name}
    assert "model.layers.1.mlp.gate.weight" in narrow
    assert types["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == "f32"


def test_dtype_defaults_to_the_configs() -> None:
    config = tiny_config("llama", dtype="bfloat16")
    assert meta_model(config).types()["model.norm.weight"].dtype == "bf16"
    config.dtype = None
    assert meta_model(config).types()["model.norm.weight"].dtype == "f32"


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
def test_config_and_generator_are_left_alone(name: str) -> None:
    config = tiny_config(name, dtype="bfloat16")
    before, state = deepcopy(config.__dict__), torch.get_rng_state()
    meta = meta_model(config, torch.float16)
    assert config.__dict__ == before
    assert meta.model.config is not config
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("tie", [True, False])
def test_tied_names(tie: bool) -> None:
    meta = meta_model(tiny_config("llama", tie_word_embeddings=tie))
    expected = {"lm_head.weight": "model.embed_tokens.weight"} if tie else {}
    assert meta.tied == expected
    assert ("lm_head.weight" in meta.stored_names()) is not tie
    assert "lm_head.weight" in meta.types()


def test_a_buffer_that_nothing_fills_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    construct = LlamaRotaryEmbedding.__init__

    def with_table(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        self.register_buffer("table", torch.arange(3), persistent=False)

    monkeypatch.setattr(LlamaRotaryEmbedding, "__init__", with_table)
    with pytest.raises(SourceError, match=r"LlamaForCausalLM: .*rotary_emb\.table \(1 of 3"):
        meta_model(tiny_config("llama"))


def test_layers_are_the_plain_ones_whatever_the_weights_are_stored_in() -> None:
    section = {"quant_method": "mxfp4"}
    config = tiny_config("gpt_oss", quantization_config=section)
    meta, plain = meta_model(config), meta_model(tiny_config("gpt_oss"))
    assert meta.types() == plain.types()
    assert not hasattr(meta.model.config, "quantization_config")
    assert config.quantization_config == section


def test_a_directory_without_config_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such directory"):
        read_config(tmp_path / "absent")
    (tmp_path / "README.md").touch()
    with pytest.raises(SourceError, match=r"config\.json, found README\.md"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"model_type": "no_such_model"}',
        '{"model_type": "llama", "hidden_size": "wide"}',
    ],
)
def test_bad_configs(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(
        SourceError, match=r"config\.json( is no config that|: expected (JSON|an object))"
    ):
        read_config(tmp_path)


def test_code_beside_the_config_is_never_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')", encoding="utf-8")
    (tmp_path / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}', encoding="utf-8"
    )
    with pytest.raises(SourceError, match="never run"):
        read_config(tmp_path)
    config = tiny_config("llama", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    config.save_pretrained(tmp_path)
    assert type(meta_model(read_config(tmp_path)).model).__module__.startswith("transformers.")
    assert not ran.exists()


def test_without_transformers_the_mend_is_named() -> None:
    module = "ingot.frontends.importers.meta_model"
    code = f"import sys; sys.modules['transformers'] = None; import {module}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'ingot[hf]'" in run.stderr.splitlines()[-1]
