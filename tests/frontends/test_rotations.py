"""Online rotations of quantized checkpoints: logits are those of weights that undo them by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ingot
import pytest
import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.pipeline import run_pipeline
from ingot.frontends.checkpoints.export_quantized import quantize_directory
from ingot.frontends.cli.references import TransformersReference
from ingot.frontends.importers.huggingface import HuggingFaceModel, import_hugging_face
from ingot.frontends.importers.source_error import SourceError
from ingot.passes.pipelines import RAISING
from ingot.passes.transforms.mxfp4_policy import MXFP4
from pass_checks import ops
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("shared_traces")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantized"
LAYER = "model.layers.0"
TOKENS = torch.arange(3, 19)


def sylvester(size: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def turned(x: torch.Tensor, block: int) -> torch.Tensor:
    """The last dim in blocks times H / sqrt(block)."""
    return (x.unflatten(-1, (-1, block)) @ (sylvester(block) / block**0.5)).flatten(-2)


def imported(directory: Path) -> HuggingFaceModel:
    return import_hugging_face(directory, dtype=torch.float32, max_tokens=64)


def logits(model: HuggingFaceModel) -> torch.Tensor:
    graph = run_pipeline(model.graph, RAISING)[-1].graph
    inputs = {"tokens": TOKENS.int(), "positions": torch.arange(len(TOKENS)).int()}
    return interpret(graph, inputs, model.weights).outputs[0]


def by_hand(folder: Path, fixture: str, turn: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """The dense model of a fixture in MXFP4 in f32, its linear weights [N, K] as `turn` gives."""
    config = json.loads((FIXTURES / fixture / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    config["dtype"] = "float32"
    dense: dict[str, torch.Tensor] = {}
    stored = load_file(FIXTURES / fixture / "model.safetensors")
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    numbers = torch.cat((numbers, -numbers))
    for name, tensor in stored.items():
        weight = name.removesuffix("_packed")
        if tensor.dtype != torch.uint8:
            dense[name] = tensor.float()
        elif f"{weight}_scale" in stored:
            codes = torch.stack((tensor % 16, tensor // 16), -1).flatten(-2).long()
            scales = 2.0 ** (stored[f"{weight}_scale"].double() - 127)
            exact = numbers[codes] * scales.repeat_interleave(32, -1)
            dense[weight] = turn(weight.removesuffix(".weight"), exact).float().contiguous()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(dense, folder / "model.safetensors")
    return folder


def altered(
    folder: Path, fixture: str, section: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> Path:
    """A copy of a fixture with more in its quantization_config and more tensors."""
    config = json.loads((FIXTURES / fixture / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"].update(section)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stored = load_file(FIXTURES / fixture / "model.safetensors")
    save_file(stored | tensors, folder / "model.safetensors")
    return folder


def transform(*places: tuple[str, list[str]], **more: Any) -> dict[str, Any]:
    """A transform_config of one group R, at these locations of these targets."""
    apply = [
        {"location": at, "targets": targets, "inverse": False, "ignore": ["lm_head"]}
        for at, targets in places
    ]
    usual = {"type": "hadamard", "head_dim": 32, "randomize": False, "requires_grad": False}
    group = {**usual, "precision": "torch.float32", "apply": apply, **more}
    return {"transform_config": {"config_groups": {"R": group}}}


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("matrix", [None, 1.0, 32**-0.5])
def test_inputs_that_compressed_tensors_rotates(matrix: float | None, tmp_path: Path) -> None:
    """x·H·Wᵀ == x·(W·H)ᵀ for each linear layer but the last, in blocks of 32."""
    stored = {}
    if matrix is not None:
        stored = {f"{LAYER}.mlp.up_proj.R_input.weight": matrix * sylvester(32).float()}
    section = transform(("input", ["Linear"]), ("weight_input", ["Linear"]))
    model = imported(altered(tmp_path / "r", "ct_mxfp4", section, stored))
    assert ops(run_pipeline(model.graph, RAISING)[-1].graph)["hadamard"] >= 4
    assert model.unused == {}
    plain = imported(by_hand(tmp_path / "plain", "ct_mxfp4", lambda _, w: turned(w, 32)))
    assert_equal(logits(model), logits(plain))


def test_outputs_and_whole_widths(tmp_path: Path) -> None:
    """y·H == x·(H·W)ᵀ, here over the whole width of one layer's outputs."""
    section = transform(("output", ["re:.*mlp.down_proj$"]), head_dim=None)
    model = imported(altered(tmp_path / "r", "ct_mxfp4", section, {}))

    def turn(name: str, weight: torch.Tensor) -> torch.Tensor:
        return turned(weight.T, 64).T if name.endswith("down_proj") else weight

    assert_equal(logits(model), logits(imported(by_hand(tmp_path / "plain", "ct_mxfp4", turn))))


@pytest.mark.parametrize(
    "section",
    [
        transform(("weight_input", ["Linear"]), ("weight_output", ["Linear"]), randomize=True),
        transform(("q_attn", ["re:.*self_attn$"]), ("k_cache", ["re:.*self_attn$"])),
    ],
    ids=["merged", "queries and keys alike"],
)
def test_rotations_that_need_nothing(section: dict[str, Any], tmp_path: Path) -> None:
    name = f"{LAYER}.self_attn.R_q_attn.weight"
    stored = {name: sylvester(32).float()} if "q_attn" in str(section) else {}
    model = imported(altered(tmp_path / "r", "ct_mxfp4", section, stored))
    plain = imported(FIXTURES / "ct_mxfp4")
    assert torch.equal(logits(model), logits(plain))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "random": (
        transform(("input", ["Linear"]), type="random-hadamard"),
        "R: the online rotation at 'input' of type 'random-hadamard' is not supported",
    ),
    "permuted": (transform(("output", ["Linear"]), randomize=True), "'randomized hadamard'"),
    "keys alone": (transform(("k_cache", ["re:.*self_attn$"])), "rotated differently"),
    "an unknown key": (transform(("input", ["Linear"]), shift=3), "config_groups.R.shift '3': not"),
    "an unknown place": (transform(("residual", ["Linear"])), "online rotation at 'residual'"),
    "an embedding": (transform(("output", ["Embedding"])), "it is Embedding: only linear"),
    "not a power of two": (
        transform(("input", ["re:.*down_proj"]), head_dim=None),
        "in blocks of 96 over 96: expected a power of two",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_rotations_are_refused_by_name(case: str, tmp_path: Path) -> None:
    section, error = REFUSED[case]
    with pytest.raises(SourceError, match=error):
        imported(altered(tmp_path / "r", "ct_mxfp4", section, {}))


def test_rotations_of_experts_are_refused(tmp_path: Path) -> None:
    section = transform(("input", ["re:.*down_proj"]))
    with pytest.raises(SourceError, match=r"experts\.0\.down_proj: .*'R'.* no module of the model"):
        imported(altered(tmp_path / "r", "ct_mxfp4_qwen3_moe", section, {}))


def test_a_stored_matrix_that_is_another(tmp_path: Path) -> None:
    name, matrix = f"{LAYER}.mlp.up_proj.R_input.weight", sylvester(32).float()
    matrix[5] *= -1
    directory = altered(
        tmp_path / "r", "ct_mxfp4", transform(("input", ["Linear"])), {name: matrix}
    )
    with pytest.raises(SourceError, match=r"R_input\.weight: f32\[32, 32\] is not Sylvester's"):
        imported(directory)


def test_what_cannot_be_done_with_rotated_models(tmp_path: Path) -> None:
    """No written config would say it, and transformers does not compute it."""
    directory = altered(tmp_path / "r", "ct_int4", transform(("input", ["Linear"])), {})
    with pytest.raises(SourceError, match="rotated online .*which the written config would not"):
        quantize_directory(directory, tmp_path / "written", MXFP4())
    compiled: Any = SimpleNamespace(report=SimpleNamespace(dtype="f32"))
    with pytest.raises(SourceError, match="transformers does not compute its online rotations"):
        TransformersReference(directory, compiled)


def test_rotated_models_through_all_passes(tmp_path: Path) -> None:
    """Tokens are those of weights that undo the rotation; every rewrite is checked."""
    section = transform(("input", ["Linear"]), ("output", ["re:.*[kv]_proj$"]))
    rotated = altered(tmp_path / "r", "ct_mxfp4", section, {})

    def turn(name: str, weight: torch.Tensor) -> torch.Tensor:
        weight = turned(weight, 32)
        return turned(weight.T, 32).T if name.endswith(("k_proj", "v_proj")) else weight

    plain = by_hand(tmp_path / "plain", "ct_mxfp4", turn)
    options: Any = dict(target="cpu", dtype="f32", max_tokens_per_sequence=64, progress=False)
    found, expected = (ingot.compile(d, verify=d is rotated, **options) for d in (rotated, plain))
    prompt = TOKENS.tolist()
    assert_equal(torch.from_numpy(found.logits(prompt)), torch.from_numpy(expected.logits(prompt)))
    tokens = [m.generate(prompt, max_new_tokens=20).tokens for m in (found, expected)]
    assert tokens[0] == tokens[1]


# ---- AMD Quark


def rotation(**said: Any) -> dict[str, Any]:
    """An algo_config as Quark writes it: R1 and R2 merged into weights, unless `said` otherwise."""
    usual = {"r1": True, "r2": True, "r3": False, "r4": False, "online_r1_rotation": False}
    paths = {"backbone": "model", "model_decoder_layers": "model.layers", "mlp": "mlp"}
    paths |= {"self_attn": "self_attn", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj"}
    more = {"rotation_size": None, "random_r1": False, "random_r2": False, "trainable": False}
    layers = {"scaling_layers": {"first_layer": [{"next_modules": ["model.layers.0.x"]}]}}
    return {"algo_config": [{"name": "rotation", **usual, **paths, **more, **layers, **said}]}


@pytest.mark.parametrize(
    "section",
    [
        rotation(),
        rotation(r3=True),
        {"algo_config": [{"name": "awq", "scaling_layers": [{"prev_op": "input_layernorm"}]}]},
        {"algo_config": [{"name": "gptq", "desc_act": True, "static_groups": True}]},
    ],
    ids=["merged", "queries and keys alike", "awq", "gptq"],
)
def test_algorithms_of_quark_that_need_nothing(section: dict[str, Any], tmp_path: Path) -> None:
    model = imported(altered(tmp_path / "r", "quark_mxfp4", section, {}))
    assert torch.equal(logits(model), logits(imported(FIXTURES / "quark_mxfp4")))


def test_inputs_that_quark_rotates(tmp_path: Path) -> None:
    """R4 and online R1, whose matrices are stored beside the weights."""
    down, up = f"{LAYER}.mlp.down_proj", f"{LAYER}.mlp.up_proj"
    section = rotation(
        r4=True,
        online_r1_rotation=True,
        online_config={"shared_parallel": False, "online_rotation_layers": [down, up]},
    )
    stored = {f"{name}.input_rotation": sylvester(32).to(torch.int8) for name in (down, up)}
    model = imported(altered(tmp_path / "r", "quark_mxfp4", section, stored))

    def turn(name: str, weight: torch.Tensor) -> torch.Tensor:
        return turned(weight, 32) if name in (down, up) else weight

    assert_equal(logits(model), logits(imported(by_hand(tmp_path / "p", "quark_mxfp4", turn))))


@pytest.mark.parametrize(
    ("section", "stored", "error"),
    [
        (rotation(r4=True), {}, r"'r4' turns inputs online, but no matrix \*\.input_rotation"),
        (
            rotation(r4=True, online_config={"online_rotation_layers": [f"{LAYER}.mlp.down_proj"]}),
            {},
            r"down_proj: rotation 'r4' .* no matrix .*down_proj\.input_rotation is stored",
        ),
        (
            rotation(r4=True),
            {f"{LAYER}.mlp.down_proj.input_rotation": torch.eye(96)},
            r"down_proj: rotation 'r4' in blocks of 96 over 96: expected a power of two",
        ),
        (
            rotation(r4=True),
            {f"{LAYER}.mlp.down_proj.input_rotation": torch.eye(32)},
            r"input_rotation: f32\[32, 32\] is not Sylvester's",
        ),
        (
            rotation(),
            {f"{LAYER}.mlp.up_proj.input_rotation": sylvester(32)},
            "input_rotation changes",
        ),
        (rotation(online_config={"use_input_prescale": True}), {}, "online_config.use_input_presc"),
        ({"algo_config": [{"name": "svdquant"}]}, {}, "algorithm 'svdquant' is not supported"),
        ({"algo_config": [{"name": "gptq", "static_groups": False}]}, {}, "static_groups False"),
    ],
)
def test_what_quark_does_otherwise_is_refused(
    section: dict[str, Any], stored: dict[str, torch.Tensor], error: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=error):
        imported(altered(tmp_path / "r", "quark_mxfp4", section, stored))
