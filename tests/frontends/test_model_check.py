"""`ingot verify`: what agrees passes, and what was broken is found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ingot.frontends import api
from ingot.frontends.cli import model_check, references
from ingot.frontends.cli.main import app
from ingot.frontends.cli.model_check import (
    Check,
    PromptCheck,
    check_model,
    compare_tokens,
    prompt_ids,
    relative_error,
)
from ingot.frontends.cli.references import TransformersReference
from ingot.frontends.importers import attention_masks
from ingot.frontends.importers.attention_masks import AttentionMask
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_tokenizers import byte_level
from tiny_tokenizers import save as save_tokenizer
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"vocab_size": 320, "num_hidden_layers": 3, "layer_types": kinds}
    tiny_model("gemma2", **sizes).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return api.compile(directory, progress=False, max_tokens_per_sequence=128)


def checked(directory: Path, model: Any, **options: Any) -> Check:
    prompts = prompt_ids(None, 320, 100)
    options = {"steps": 8, "top": 5, "tolerance": 1e-4, **options}
    return check_model(model, TransformersReference(directory, model), prompts, **options)


def test_agreement(directory: Path, model: Any) -> None:
    check = checked(directory, model)
    assert check.ok and [p.agreed for p in check.prompts] == [8] * 4
    assert [p.length for p in check.prompts] == [1, 7, 40, 70]
    assert (check.target, check.dtype, check.reference) == ("cpu", "f32", "transformers")
    assert 0 < check.logits_error < 1e-5 and 0 < check.logprob_error < 1e-5
    assert [layer.path for layer in check.layers] == [f"model.layers.{i}" for i in range(3)]
    assert all(0 < layer.error < 1e-5 for layer in check.layers)


def test_a_broken_layer_is_found_where_it_is(directory: Path, model: Any, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= -20
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    # Weights of the interpreted layers are read from the directory: they are the sound ones here.
    sound = references._weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            references, "_weights", lambda _, graph, dtype: sound(directory, graph, dtype)
        )
        check = checked(tmp_path, model, top=1)
    assert not check.ok and "is not among the top 1 there" in check.failures[0]
    assert "is not among our top 1" in check.failures[0]
    for what in ("logits", "log-probabilities"):
        assert any(line.startswith(f"{what} differ by") for line in check.failures)
    assert "model.layers.1 differs by" in check.failures[-2] and "2 differs" in check.failures[-1]
    errors = [layer.error for layer in check.layers]
    assert errors[0] < 1e-5 < 1e-2 < errors[1]


def test_top_n_rule() -> None:
    theirs, their_tops = [1, 0, 0], [[1, 2], [0, 1], [0, 1]]
    our_tops = [[1, 2], [1, 0], [3, 2]]

    def compare(ours: list[int], our_tops: list[list[int]] = our_tops) -> Any:
        return compare_tokens(ours, our_tops, theirs, their_tops)

    assert (compare([1, 0, 0]).agreed, compare([1, 0, 0]).near) == (3, True)
    near = compare([1, 1, 3])
    assert (near.agreed, near.ours, near.theirs, near.near) == (1, 1, 0, True)
    far = compare([1, 2, 0])
    assert (far.ours_ranked, far.theirs_ranked, far.near) == (False, True, False)
    far = compare([1, 1, 0], [[1, 2], [1, 3], [3, 2]])
    assert (far.ours_ranked, far.theirs_ranked, far.near) == (True, False, False)
    with pytest.raises(ValueError, match="zip"):
        compare([1, 0])


def test_tolerance_and_nan() -> None:
    def check(error: float, tolerance: float | None, scored: float = 0.0) -> Check:
        prompt = PromptCheck(1, 1, length=1, logits_error=error, logprob_error=scored)
        return Check("x", "cpu", "f32", "y", 5, tolerance, (prompt,), ())

    assert not Check("x", "cpu", "f32", "y", 5, None, (), ()).ok  # nothing was compared
    assert check(1e-4, 1e-3).ok and check(1.0, None).ok
    assert not check(1e-2, 1e-3).ok and not check(math.nan, 1e-3).ok
    assert not check(1e-4, 1e-3, 1e-2).ok and not check(1e-4, 1e-3, math.nan).ok
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 4.0]])) == 0.5


def test_prompts_of_different_lengths() -> None:
    assert [len(p) for p in prompt_ids(None, 50, 30)] == [1, 7, 30, 30]
    assert all(0 <= i < 50 for p in prompt_ids(None, 50, 30) for i in p)


def test_verify_command(directory: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def verify(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["verify", str(directory), *arguments])

    result = verify("--prompts", __file__)
    assert result.exit_code == 2 and "no tokenizer.json" in result.stderr

    save_tokenizer(directory, byte_level())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the\n\na longer prompt, é\n", encoding="utf-8")
    result = verify("--tokens", "4", "--prompts", str(prompts), "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["ok"] and [p["agreed"] for p in data["prompts"]] == [4, 4]
    assert data["tolerance"] == model_check.F32_TOLERANCE and len(data["layers"]) == 3

    result = verify("--tokens", "2", "--tolerance", "0")
    assert (
        result.exit_code == 1 and "DISAGREES" in result.stdout and "logits differ" in result.stdout
    )


def test_verify_streamed(directory: Path, monkeypatch: Any) -> None:
    def verify(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["verify", str(directory), "--streamed", *arguments])

    result = verify("--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["ok"] and len(data["layers"]) == 4 and max(data["layers"].values()) < 1e-5

    monkeypatch.setattr(attention_masks, "mask_of", lambda *_: AttentionMask())
    result = verify()
    assert result.exit_code == 1 and "DISAGREES" in result.stdout
    assert "model.layers.0 differs by" in result.stdout
