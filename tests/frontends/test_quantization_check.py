"""The gate tells what a loader dropped of a quantized checkpoint: each with its mend taken out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ingot.frontends.checkpoints import checkpoint, quantization_config
from ingot.frontends.checkpoints.config_section import Section
from ingot.frontends.checkpoints.rotations import rotated_modules
from ingot.frontends.import_check import check_import
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.frontends.importers.torch_export import ImportMismatch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantized"
LAYER = "model.layers.0"
UP = f"{LAYER}.mlp.up_proj"


def altered(
    folder: Path, fixture: str, section: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> Path:
    """A copy of a fixture with more in its quantization config and more tensors."""
    folder.mkdir()
    for file in (FIXTURES / fixture).glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        content.get("quantization_config", {}).update(section)
        (folder / file.name).write_text(json.dumps(content), encoding="utf-8")
    stored = load_file(FIXTURES / fixture / "model.safetensors")
    save_file(stored | tensors, folder / "model.safetensors")
    return folder


def checked(directory: Path) -> str:
    imported = import_hugging_face(directory, dtype=torch.float32, max_tokens=64)
    return str(check_import(imported, directory))


@pytest.mark.parametrize(
    "fixture", sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
)
def test_sound_checkpoints_pass(fixture: str) -> None:
    assert checked(FIXTURES / fixture).startswith("import checked against the model")


def _turn(location: str, targets: list[str]) -> dict[str, Any]:
    apply = [{"location": location, "targets": targets, "inverse": False, "ignore": ["lm_head"]}]
    group = {"type": "hadamard", "head_dim": 32, "randomize": False, "apply": apply}
    return {"transform_config": {"config_groups": {"R": group}}}


def _quark(**said: Any) -> dict[str, Any]:
    return {"algo_config": [{"name": "rotation", "r1": True, "r2": True, **said}]}


MATRIX = {f"{UP}.input_rotation": torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)}
SOUND = {
    "at inputs": ("ct_mxfp4", _turn("input", ["Linear"]), {}),
    "at outputs": ("ct_mxfp4", _turn("output", ["re:.*mlp.down_proj$"]), {}),
    "merged": ("ct_mxfp4", _turn("weight_input", ["Linear"]), {}),
    "quark, merged": ("quark_mxfp4", _quark(), {}),
    "quark, online": ("quark_mxfp4", _quark(r4=True), MATRIX),
    "scales of activations": ("modelopt_nvfp4", {}, {f"{UP}.input_scale": torch.ones(1)}),
}


@pytest.mark.parametrize("case", SOUND)
def test_what_is_taken_up_passes(case: str, tmp_path: Path) -> None:
    assert checked(altered(tmp_path / "m", *SOUND[case])).startswith("import checked")


def _nothing(*_: Any, **__: Any) -> Any:
    return ()


def _no_reasons(*_: Any, **__: Any) -> dict[str, str]:
    return {}


def _less(*given: Any) -> Any:
    found, matrices = rotated_modules(*given)
    return found[:-1], matrices


Mends = list[tuple[Any, str, Callable[..., Any]]]
# The functions of the loader that would have read or refused it do nothing.
DEAF: Mends = [(Section, "refuse_unread", _nothing), (checkpoint, "reasons", _no_reasons)]
DROPPED: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor], Mends, str]] = {
    "rotations at inputs": (
        "ct_mxfp4",
        _turn("input", ["Linear"]),
        {},
        [(quantization_config, "transform_rotations", _nothing)],
        "wants [0-9]+ activations to be turned online, and the imported graph turns 0",
    ),
    "one rotation of two": (
        "ct_mxfp4",
        _turn("input", ["re:.*(up|gate)_proj$"]),
        {},
        [(checkpoint, "rotated_modules", _less)],
        "wants 2 activations to be turned online, and the imported graph turns 1",
    ),
    "quark's rotations": (
        "quark_mxfp4",
        _quark(r4=True),
        MATRIX,
        [(quantization_config, "_quark_rotations", _nothing)],
        "wants 1 activations to be turned online, and the imported graph turns 0",
    ),
    "a key": ("ct_mxfp4", {"smoothing": {"alpha": 0.5}}, {}, [], r"\.smoothing .* is not known"),
    "a key of weights": (
        "ct_int4",
        {
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "group_size": 32,
                        "strategy": "group",
                        "scale_shift": 2,
                    },
                }
            }
        },
        {},
        [],
        r"config_groups\.weights\.scale_shift '2' is not known",
    ),
    "an algorithm's key": (
        "quark_mxfp4",
        _quark(use_input_prescale=True),
        {},
        [],
        r"algo_config\.use_input_prescale 'True' is not known",
    ),
    "scaled inputs": (
        "modelopt_nvfp4",
        {},
        {f"{UP}.pre_quant_scale": torch.ones(64)},
        [],
        r"up_proj\.pre_quant_scale lies beside a quantized weight, and nobody reads it",
    ),
    "smoothed inputs": (
        "ct_int4",
        {},
        {f"{UP}.smoothing_factor": torch.ones(64)},
        [],
        r"up_proj\.smoothing_factor lies beside",
    ),
}


@pytest.mark.parametrize("case", DROPPED)
def test_what_a_loader_drops_is_told(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture, section, tensors, mends, words = DROPPED[case]
    directory = altered(tmp_path / "m", fixture, section, tensors)
    for holder, name, instead in [*DEAF, *mends]:
        monkeypatch.setattr(holder, name, instead)
    with pytest.raises(ImportMismatch, match=words):
        checked(directory)
