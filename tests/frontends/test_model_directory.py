"""What the files of a model directory say reaches the compiled model, and its ingot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ingot
import pytest
import torch
from ingot.frontends import api
from ingot.frontends.cli.main import app
from ingot.frontends.importers.meta_model import length_limits
from ingot.frontends.importers.source_error import SourceError
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model
from tiny_tokenizers import byte_level, save
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("shared_traces")

SMALL = {"max_sequences": 1, "max_tokens_per_sequence": 32}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model without tokenizer and generation config."""
    model = tiny_model("llama", vocab_size=320, num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    return tmp_path


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    content |= changes
    content = {key: value for key, value in content.items() if value is not ...}
    file.write_text(json.dumps(content), encoding="utf-8")


def test_stop_tokens_of_a_directory_without_a_tokenizer(directory: Path, tmp_path: Path) -> None:
    edit(directory / "config.json", eos_token_id=...)
    assert ingot.compile(directory, **SMALL).stop_tokens == {2}  # the default of LlamaConfig
    edit(directory / "config.json", eos_token_id=3)
    edit(directory / "generation_config.json", eos_token_id=[7, 9], temperature=0.5)
    model = ingot.compile(directory, **SMALL)
    assert model.stop_tokens == {3, 7, 9}
    model.export(tmp_path / "m.ingot")
    loaded = ingot.load(tmp_path / "m.ingot")
    assert loaded.tokenizer is None and set(loaded.stop_tokens) == {3, 7, 9}
    assert loaded.manifest.generation == {"temperature": 0.5}


def test_side_files_of_the_tokenizer_are_in_the_ingot(directory: Path, tmp_path: Path) -> None:
    config = {"chat_template": "{{ eos_token }}"}
    mapped = {"eos_token": "<|sep|>"}
    save(directory, byte_level(), tokenizer_config=config, special_tokens_map=mapped)
    edit(directory / "added_tokens.json", **{"<tool>": 300})
    ingot.compile_to(directory, tmp_path / "m.ingot", **SMALL)
    model = ingot.load(tmp_path / "m.ingot")
    assert model.tokenizer and model.tokenizer.chat_template
    assert model.tokenizer.chat_template.render([]) == "<|sep|>"
    assert set(model.stop_tokens) == {2, model.tokenizer.backend.token_to_id("<|sep|>")}
    assert len(model.tokenizer.encode("<tool>", special_tokens=False)) == 1


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_a_generation_config_asks_in_vain_is_told(directory: Path, in_memory: bool) -> None:
    file = directory / "generation_config.json"
    edit(file, suppress_tokens=[80, 62], no_repeat_ngram_size=0, num_beams=1, top_k=7, top_p=1.0)

    def departures() -> tuple[str, ...]:
        held: Any = AutoModelForCausalLM.from_pretrained(directory) if in_memory else directory
        return ingot.compile(held, **SMALL).report.departures

    unsupported = "generation_config: not supported, and not done: suppress_tokens=[80, 62]"
    assert departures() == (unsupported,)
    edit(file, suppress_tokens=..., do_sample=True, repetition_penalty=1.3)
    (told,) = departures()
    assert told.endswith("if given to generate: do_sample=True, top_k=7, repetition_penalty=1.3")


def test_run_says_what_a_generation_config_asks_in_vain(directory: Path) -> None:
    edit(directory / "generation_config.json", bad_words_ids=[[5]])
    flags = ["--ids", "5", "--max-new-tokens", "2", "--target", "cpu"]
    result = CliRunner().invoke(app, ["run", str(directory), *flags])
    assert result.exit_code == 0 and "not done: bad_words_ids=[[5]]" in result.stderr


def test_an_adapter_beside_the_model_is_refused(directory: Path) -> None:
    edit(directory / "adapter_config.json", peft_type="LORA")
    with pytest.raises(SourceError, match=r"^\S+: adapter_config.json is of .* merge it into"):
        ingot.compile(directory, **SMALL)
    (told,) = ingot.compile(directory, unused="allow", **SMALL).report.departures
    assert "left out" in told
    (directory / "config.json").unlink()
    with pytest.raises(SourceError, match=r"with config.json, found adapter_config.json.*merge it"):
        ingot.compile(directory, **SMALL)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "no model .*KeyError: 'su'"),
        ({"hidden_act": "nonsense"}, "no model of this config: KeyError: 'nonsense'"),
        ({"head_dim": 0}, "no model of this config: ZeroDivisionError"),
        ({"use_return_dict": False}, "config.json is no config .*use_return_dict"),
        ({"quantization_config": []}, "config.json is no config .*'list'"),
        ({"num_attention_heads": 5}, "config.json is no config .*not a multiple"),
    ],
)
def test_configs_without_a_model_are_refused_in_one_line(
    changes: dict[str, Any], told: str, directory: Path
) -> None:
    edit(directory / "config.json", **changes)
    with pytest.raises(SourceError, match=f"^[^\n]*{told}[^\n]*$"):
        ingot.compile(directory, **SMALL)


@pytest.mark.parametrize("eos", [-1, 320, 10**30])
def test_ids_outside_the_vocabulary_are_not_exported(eos: int, directory: Path) -> None:
    edit(directory / "generation_config.json", eos_token_id=[2, eos])
    model = ingot.compile(directory, **SMALL)
    assert model.generate([5], max_new_tokens=2).tokens
    message = f"^eos_token_id: expected ids from 0 to 319, .* found {eos}"
    for export in (model.export, lambda path: ingot.compile_to(directory, path, **SMALL)):
        with pytest.raises(ValueError, match=message):
            export(directory / "m.ingot")
    assert not (directory / "m.ingot").exists()


def test_an_id_that_is_none_is_refused(directory: Path) -> None:
    edit(directory / "generation_config.json", eos_token_id="<s>")
    with pytest.raises(SourceError, match=r"generation_config\.json: eos_token_id: expected"):
        ingot.compile(directory, **SMALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_the_stored_one_where_no_config_names_it(
    dtype: torch.dtype, directory: Path
) -> None:
    file = directory / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    edit(directory / "config.json", dtype=..., torch_dtype=...)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert theirs.dtype == dtype
    short = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]
    assert api.plan(directory, target="cpu", **SMALL).report.dtype == short
    edit(directory / "config.json", dtype="float32")
    assert api.plan(directory, target="cpu", **SMALL).report.dtype == "f32"


def test_limits_of_rotary_embeddings() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    yarn["original_max_position_embeddings"] = 256
    named = "original_max_position_embeddings of YaRN times its factor"
    for longest, expected in ((256, {named: 1024}), (1024, {"max_position_embeddings": 1024})):
        config = tiny_config("qwen2", max_position_embeddings=longest, rope_parameters=yarn)
        assert length_limits(config) == expected
    plain = tiny_config("qwen2", max_position_embeddings=256)
    assert length_limits(plain) == {"max_position_embeddings": 256}
    model = tiny_model("qwen2", max_position_embeddings=256, rope_parameters=yarn)
    made = ingot.compile(model, max_sequences=1, max_tokens_per_sequence=4096)
    assert made.session.meta.max_tokens_per_sequence == 1024
    assert f"max_tokens_per_sequence: 4096 is lowered to 1024, the {named}" in made.report.notes
    ids = torch.arange(300) % 128
    with torch.no_grad():
        theirs = model(ids[None]).logits[0, -1].numpy()
    ours = made.logits(ids.tolist())[-1]
    assert abs(ours - theirs).max() < 1e-4 * abs(theirs).max()
