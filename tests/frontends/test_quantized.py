"""Checkpoints that other libraries quantized: weights and logits are the libraries' own."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ingot.codegen.constants import evaluate_constant
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph, Node, Value
from ingot.compiler.microscaling import encode
from ingot.compiler.pipeline import run_pipeline
from ingot.frontends.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ingot.frontends.checkpoints.quantization_config import QuantizationScheme, quantization_scheme
from ingot.frontends.checkpoints.safetensors_files import Stored
from ingot.frontends.importers.huggingface import HuggingFaceModel, import_hugging_face
from ingot.frontends.importers.meta_model import build_meta_model, read_config
from ingot.frontends.importers.source_error import SourceError
from ingot.passes.pipelines import RAISING
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, Mxfp4Config

pytestmark = pytest.mark.usefixtures("shared_traces")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantized"
KEPT_PACKED = (
    "ct_mxfp4",
    "ct_mxfp4_qwen3_moe",
    "gpt_oss_mxfp4",
    "modelopt_mxfp4",
    "quark_mxfp4",
)
MADE_DENSE = (
    "ct_int4",
    "ct_int4_qwen3_moe",
    "ct_nvfp4",
    "fp8_qwen3",
    "fp8_qwen3_moe",
    "modelopt_nvfp4",
)


@cache
def imported(directory: Path, dtype: torch.dtype | None = None) -> HuggingFaceModel:
    return import_hugging_face(directory, dtype=dtype, max_tokens=64)


def weights_by_name(model: HuggingFaceModel) -> dict[str, torch.Tensor]:
    """Every weight as the traced graph has it, before passes: in the model's own layout."""
    found: dict[str, torch.Tensor] = {}
    for node in model.graph.nodes():
        name = str(node.attrs.get("name"))
        if node.op.name != "constant" or name.endswith(".scales"):
            continue
        value = Value(node)
        if name.endswith(".codes"):
            name, value = name.removesuffix(".codes"), unpacked(model.graph, node)
        found[name] = evaluate_constant(value, model.weights)
    return found


def unpacked(graph: Graph, codes: Node) -> Value:
    """The mxfp4 of `codes`, turned into the model's layout."""
    users = graph.users()
    (packed,) = users[Value(codes)]
    after = users[Value(packed)]
    turned = [n for n in after if n.op.name == "permute" and n.source == packed.source]
    return Value(turned[0]) if len(after) == 1 and turned else Value(packed)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def logits(model: HuggingFaceModel, tokens: torch.Tensor) -> torch.Tensor:
    graph = run_pipeline(model.graph, RAISING)[-1].graph
    inputs = {"tokens": tokens.int(), "positions": torch.arange(len(tokens)).int()}
    return interpret(graph, inputs, model.weights).outputs[0]


@pytest.mark.parametrize("name", [*KEPT_PACKED, *MADE_DENSE])
def test_weights_are_those_that_the_library_dequantizes(name: str) -> None:
    expected = json.loads((FIXTURES / name / "expected.json").read_text(encoding="utf-8"))
    found = weights_by_name(imported(FIXTURES / name))
    assert expected.keys() == found.keys() - {n for n in found if "inv_freq" in n}
    wrong = [n for n in expected if digest(found[n]) != expected[n]]
    assert wrong == []


@pytest.mark.parametrize("name", KEPT_PACKED)
def test_codes_and_scales_are_the_stored_bits(name: str) -> None:
    """Through passes, too: the weight of every product is mxfp4(...) itself, of stored bytes."""
    model = imported(FIXTURES / name)
    graph = run_pipeline(model.graph, RAISING)[-1].graph
    products = [n for n in graph.nodes() if n.op.name in ("linear", "experts")]
    weights = [a for n in products for a in n.args if a.op.name == "mxfp4"]
    stored = load_file(FIXTURES / name / "model.safetensors")
    packed = {n: t for n, t in stored.items() if t.dtype == torch.uint8}
    # Every packed tensor is used, and whole: rows are only put in another order.
    used = [evaluate_constant(part, model.weights) for w in weights for part in w.node.args]
    assert sum(t.numel() for t in used) == sum(t.numel() for t in packed.values()) > 0
    assert rows_of(used) == rows_of(packed.values())
    assert not [n for n in graph.nodes() if n.op.name == "mxfp4" and Value(n) not in weights]


def rows_of(tensors: Iterable[torch.Tensor]) -> Counter[bytes]:
    """How often each row occurs; gpt-oss stores the groups of a row as a dim of their own."""
    flat = (t.flatten(-2) if t.ndim == 4 else t for t in tensors)
    return Counter(row.numpy().tobytes() for t in flat for row in t.reshape(-1, t.shape[-1]))


@pytest.mark.parametrize("name", KEPT_PACKED)
def test_logits_are_those_of_transformers(name: str) -> None:
    expected = load_file(FIXTURES / name / "logits.safetensors")
    found = logits(imported(FIXTURES / name, torch.float32), expected["tokens"])
    wanted = expected["logits"]
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# ---- against a dequantization by hand, in f64


def dense_copy(directory: Path, into: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The checkpoint of `directory` with `weights` [N, K] in f64 for what is quantized there."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config")
    into.mkdir()
    (into / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stored = load_file(directory / "model.safetensors")
    plain = {n: t for n, t in stored.items() if t.dtype == torch.bfloat16 and "_scale" not in n}
    dense = {n: by_hand(t) for n, t in weights.items()}
    save_file(plain | dense, into / "model.safetensors")
    return into


def by_hand(exact: torch.Tensor) -> torch.Tensor:
    """f64 to bf16 to nearest, ties to even, by counting steps of the last place."""
    mantissa, exponent = torch.frexp(exact)
    steps = (mantissa * 256).round()  # f64 rounds ties to even, and this is exact
    return (steps.double() * 2.0 ** (exponent.double() - 8)).to(torch.bfloat16).contiguous()


def numbers(codes: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    table = torch.cat((table, -table))
    return table[torch.stack((codes % 16, codes // 16), -1).flatten(-2).long()]


def grouped(values: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    return values * scales.double().repeat_interleave(group, -1)


def e8m0(scales: torch.Tensor) -> torch.Tensor:
    return 2.0 ** (scales.double() - 127)


def dequantized(name: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, tensor in stored.items():
        stem = key.removesuffix("_packed")
        if key.endswith("_blocks"):
            stem = key.removesuffix("_blocks")
            values = numbers(tensor.flatten(-2))
            found[stem] = grouped(values, e8m0(stored[f"{stem}_scales"]), 32).transpose(1, 2)
        elif tensor.dtype == torch.float8_e4m3fn and f"{key}_scale_inv" in stored:
            scale = stored[f"{key}_scale_inv"].double()
            wide = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            found[key] = tensor.double() * wide
        elif tensor.dtype == torch.int32:
            shifts = torch.arange(0, 32, 4)
            values = (tensor.long()[..., None] // 2**shifts % 16 - 8).flatten(-2)
            found[stem] = grouped(values.double(), stored[f"{stem}_scale"], 32)
        elif tensor.dtype == torch.uint8 and key.endswith(("weight", "weight_packed")):
            scales = stored[f"{stem}_scale"]
            if "mxfp4" in name:
                found[stem] = grouped(numbers(tensor), e8m0(scales), 32)
            elif f"{stem}_scale_2" in stored:
                found[stem] = grouped(numbers(tensor), scales, 16) * stored[f"{stem}_scale_2"]
            else:
                whole = stored[f"{stem}_global_scale"].double()
                found[stem] = grouped(numbers(tensor), scales, 16) / whole
    return found


@pytest.mark.parametrize("name", [*KEPT_PACKED, *MADE_DENSE])
def test_weights_are_those_that_are_dequantized_by_hand(name: str, tmp_path: Path) -> None:
    stored = load_file(FIXTURES / name / "model.safetensors")
    plain = dense_copy(FIXTURES / name, tmp_path / "dense", dequantized(name, stored))
    expected, found = opened(plain).weights, weights_by_name(imported(FIXTURES / name))
    assert len(found) > 10
    wrong = [n for n in found if not torch.equal(found[n], expected.load(n))]
    assert wrong == []


@pytest.mark.parametrize("name", ["gpt_oss_mxfp4", "ct_int4_qwen3_moe", "modelopt_nvfp4"])
def test_logits_are_those_of_weights_dequantized_by_hand(name: str, tmp_path: Path) -> None:
    stored = load_file(FIXTURES / name / "model.safetensors")
    plain = dense_copy(FIXTURES / name, tmp_path / "dense", dequantized(name, stored))
    tokens = torch.arange(3, 19)
    found, expected = (logits(imported(d), tokens) for d in (FIXTURES / name, plain))
    assert torch.equal(found, expected)


def test_float4_codes_and_e8m0_scales(tmp_path: Path) -> None:
    """DeepSeek-V4's way: experts in FP4, I8 or F4, with F8_E8M0 scales, among FP8 in blocks."""
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16, hidden_size=64)
    model.save_pretrained(tmp_path / "dense")
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    config = json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [48, 40]}
    config["expert_dtype"] = "fp4"
    written: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    for key, tensor in stored.items():
        stem = key.removesuffix(".weight")
        if ".experts." in key:
            codes, scales = encode(tensor, 32)
            # F4's last dim counts elements in the file and pairs in torch.
            kind = torch.int8 if "up_proj" in key else torch.float4_e2m1fn_x2
            written[key] = codes.view(kind)
            written[f"{stem}.scale"] = scales.view(torch.float8_e8m0fnu)
            dense[key] = grouped(numbers(codes), e8m0(scales), 32)
        elif "proj" in key and tensor.ndim == 2:
            rows, columns = (-(-n // b) for n, b in zip(tensor.shape, (48, 40), strict=True))
            scales = torch.randint(118, 122, (rows, columns), dtype=torch.uint8)
            wide = e8m0(scales).repeat_interleave(48, 0).repeat_interleave(40, 1)
            wide = wide[: tensor.shape[0], : tensor.shape[1]]
            written[key] = (tensor.double() / wide).float().to(torch.float8_e4m3fn)
            written[f"{stem}.scale"] = scales.view(torch.float8_e8m0fnu)
            dense[key] = written[key].double() * wide
        else:
            written[key] = tensor
    fp4 = tmp_path / "fp4"
    fp4.mkdir()
    (fp4 / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(written, fp4 / "model.safetensors")
    save_file(
        stored | {n: by_hand(t) for n, t in dense.items()}, tmp_path / "dense/model.safetensors"
    )
    tokens = torch.arange(3, 19)
    packed, plain = imported(fp4), imported(tmp_path / "dense")
    assert torch.equal(logits(packed, tokens), logits(plain, tokens))
    assert [n for n in packed.weights if n.endswith("experts.down_proj.codes")]
    assert packed.unused == {}


def test_a_dequantized_gpt_oss_saved_again(tmp_path: Path) -> None:
    """transformers writes dense weights in its own layout, some releases under the packed names."""
    loaded = AutoModelForCausalLM.from_pretrained(
        FIXTURES / "gpt_oss_mxfp4",
        dtype=torch.bfloat16,
        quantization_config=Mxfp4Config(dequantize=True),
    )
    loaded.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = {f"model.layers.0.mlp.experts.{n}" for n in ("down_proj_blocks", "down_proj")}
    (name,) = names & stored.keys()
    assert stored[name].dtype == torch.bfloat16
    tokens = torch.arange(3, 19)
    expected = logits(imported(FIXTURES / "gpt_oss_mxfp4"), tokens)
    assert torch.equal(logits(imported(tmp_path), tokens), expected)
    # Dequantized in memory, it is a plain model.
    in_memory = import_hugging_face(loaded, dtype=None, max_tokens=64)
    assert torch.equal(logits(in_memory, tokens), expected)


def test_scales_are_read_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[object] = []
    real = Stored.read
    monkeypatch.setattr(Stored, "read", lambda self: reads.append(self) or real(self))
    for name in ("ct_mxfp4_qwen3_moe", "ct_int4_qwen3_moe", "modelopt_nvfp4", "fp8_qwen3"):
        run_pipeline(imported(FIXTURES / name).graph, RAISING)
    assert reads == []


# ---- modules that stay dense


def test_a_weight_that_is_not_on_the_list_may_be_dense(tmp_path: Path) -> None:
    def densify(stored: dict[str, torch.Tensor], _: dict) -> None:
        for name in [n for n in stored if n.startswith(f"{LAYER}.self_attn.q_proj.weight_")]:
            del stored[name]
        stored[f"{LAYER}.self_attn.q_proj.weight"] = torch.ones(64, 64, dtype=torch.bfloat16)

    checkpoint = opened(altered(tmp_path, "ct_mxfp4", densify))
    assert f"{LAYER}.self_attn.q_proj.weight" in checkpoint.weights
    assert len(checkpoint.packed) == 6


def test_scales_beside_a_dense_weight_on_the_list_are_left_over(tmp_path: Path) -> None:
    def leave(stored: dict[str, torch.Tensor], section: dict) -> None:
        stored["lm_head.weight_scale"] = torch.ones(96, 2, dtype=torch.uint8)

    checkpoint = opened(altered(tmp_path, "ct_mxfp4", leave))
    assert [*checkpoint.unused] == ["lm_head.weight_scale"]


@pytest.mark.parametrize(
    ("pattern", "module", "ignored"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("head", "lm_head", False),
        ("model.layers.1", "model.layers.1.self_attn.q_proj", True),
        ("model.layers.1", "model.layers.11.self_attn.q_proj", False),
        ("model.layers.*.self_attn", "model.layers.3.self_attn.q_proj", True),
        ("*.mlp.gate", "model.layers.3.mlp.gate_proj", False),
        ("re:.*mlp.gate$", "model.layers.3.mlp.gate", True),
        ("re:.*mlp.gate$", "model.layers.3.mlp.gate_proj", False),
        ("re:.*self_attn$", "model.layers.3.self_attn.q_proj", False),
    ],
)
def test_patterns_of_modules_to_ignore(pattern: str, module: str, ignored: bool) -> None:
    assert QuantizationScheme("fp8", ignore=("other", pattern)).ignores(module) is ignored


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        (r"re:model\.(?:(?:l|lm|m_|_)+)+(?:head)+x", "takes too long"),
        ("re:((", r"expected a regular expression, found 're:\(\('"),
        ("re:" + "a" * 5000, "at most 4096 characters"),
    ],
)
def test_patterns_are_bounded(pattern: str, error: str) -> None:
    scheme = QuantizationScheme("fp8", ignore=(pattern,))
    start = time.process_time()
    with pytest.raises(SourceError, match=error):
        scheme.ignores("model." + 40 * "lm_" + "head")
    assert time.process_time() - start < 10


@given(data=st.data())
def test_any_json_is_a_scheme_or_refused(data: st.DataObject) -> None:
    """Some value of a true config replaced, or a key added: SourceError, or a scheme."""
    name = data.draw(st.sampled_from([*KEPT_PACKED, *MADE_DENSE]))
    section = json.loads((FIXTURES / name / "config.json").read_text(encoding="utf-8"))
    section = section["quantization_config"]
    section["algo_config"] = [{"name": "rotation", "r4": True, "online_config": {}}]
    apply = [{"location": "input", "targets": ["Linear"]}]
    groups = {"R": {"type": "hadamard", "head_dim": 32, "apply": apply}}
    section["transform_config"] = {"config_groups": groups}
    places = [(section, key) for key in section]
    for inner, key in places:
        value = inner[key]
        if isinstance(value, dict | list):
            places += [
                (value, k) for k in (value if isinstance(value, dict) else range(len(value)))
            ]
    inner, key = data.draw(st.sampled_from(places))
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    value = st.recursive(plain, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=4)
    inner[key] = data.draw(value)
    config = SimpleNamespace(quantization_config=section)
    config.get_text_config = lambda: config
    try:
        message = quantization_scheme(config).method
    except SourceError as error:
        message = str(error)
    assert message.isprintable()


def test_scales_of_activations_and_of_the_cache_are_left_out(tmp_path: Path) -> None:
    """Both stay in floats, so that their scales have nothing to scale."""

    def add(stored: dict[str, torch.Tensor], section: dict) -> None:
        section["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
        (group,) = section["config_groups"].values()
        group["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True}
        for name in ("k_scale", "v_scale", "q_proj.input_global_scale"):
            stored[f"{LAYER}.self_attn.{name}"] = torch.tensor([3.0])

    tokens = torch.arange(3, 19)
    model = imported(altered(tmp_path, "ct_nvfp4", add))
    assert torch.equal(logits(model, tokens), logits(imported(FIXTURES / "ct_nvfp4"), tokens))
    reasons = {n.rpartition(".")[2]: reason for n, reason in model.unused.items()}
    assert reasons.keys() == {"k_scale", "v_scale", "input_global_scale"}
    assert "KV cache" in reasons["k_scale"] and "activations" in reasons["input_global_scale"]


def test_modelopt_by_its_own_file_alone(tmp_path: Path) -> None:
    directory = altered(tmp_path, "modelopt_nvfp4", lambda *_: None)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        SourceError, match="stored as NVFP4.*config.json has no quantization_config"
    ):
        opened(directory)
    source = FIXTURES / "modelopt_nvfp4" / "hf_quant_config.json"
    (directory / source.name).write_bytes(source.read_bytes())
    assert opened(directory).weights.load(f"{LAYER}.mlp.up_proj.weight").dtype == torch.bfloat16
    told = json.loads(source.read_text(encoding="utf-8"))
    for key, where in (("shift", told), ("quantized_layers", told["quantization"])):
        where[key] = {"x": 1}
        (directory / source.name).write_text(json.dumps(told), encoding="utf-8")
        with pytest.raises(SourceError, match=rf"{key} .*: not known"):
            opened(directory)
        del where[key]
    (directory / source.name).write_text('{"quantization": 4}', encoding="utf-8")
    with pytest.raises(SourceError, match=r"hf_quant_config\.json: expected ModelOpt's"):
        opened(directory)


# ---- what is refused


def altered(
    folder: Path, name: str, change: Callable[[dict[str, torch.Tensor], dict], None]
) -> Path:
    """A copy of a fixture whose tensors and quantization_config `change` was given."""
    config = json.loads((FIXTURES / name / "config.json").read_text(encoding="utf-8"))
    stored = load_file(FIXTURES / name / "model.safetensors")
    change(stored, config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(stored, folder / "model.safetensors")
    return folder


def opened(directory: Path) -> Checkpoint:
    config = read_config(directory)
    options = dict(attn_implementation="eager", experts_implementation="eager")
    return open_checkpoint(directory, build_meta_model(config, **options))


LAYER = "model.layers.0"
UP, DOWN = f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.down_proj"
EXPERT = f"{LAYER}.mlp.experts.1.up_proj"
GPT_OSS = f"{LAYER}.mlp.experts.down_proj"
# (fixture, tensor, what becomes of it, the error); "config" stands for the quantization_config.
DAMAGED: dict[str, tuple[str, str, Any, str]] = {
    "missing scales": (
        "ct_mxfp4",
        f"{UP}.weight_scale",
        None,
        rf"{UP}.weight_packed: no tensor '{UP}.weight_scale' is stored beside it",
    ),
    "missing scales of gpt-oss": (
        "gpt_oss_mxfp4",
        f"{GPT_OSS}_scales",
        None,
        f"{GPT_OSS}_blocks: no tensor '{GPT_OSS}_scales'",
    ),
    "missing scales of FP8": (
        "fp8_qwen3",
        f"{UP}.weight_scale_inv",
        None,
        rf"{UP}.weight: no scales .* for f8e4m3\[96, 64\]",
    ),
    "missing scale of all": (
        "ct_nvfp4",
        f"{UP}.weight_global_scale",
        None,
        f"{UP}.weight_packed: no tensor .*global_scale",
    ),
    "missing shape": ("ct_int4", f"{UP}.weight_shape", None, "no tensor .*weight_shape"),
    "missing codes": (
        "ct_mxfp4",
        f"{UP}.weight_packed",
        None,
        f"{UP}.weight_scale: no weight is stored for it",
    ),
    "an expert without codes": (
        "ct_mxfp4_qwen3_moe",
        f"{EXPERT}.weight_packed",
        None,
        f"{EXPERT}.weight_scale: no weight is stored for it",
    ),
    "codes of another shape": (
        "quark_mxfp4",
        f"{UP}.weight",
        lambda t: t[:64],
        rf"{UP}.weight: rows of 64 in groups of 32 have scales \[64, 2\], found u8\[96, 2\]",
    ),
    "codes and scales of another shape": (
        "ct_mxfp4_qwen3_moe",
        EXPERT,
        lambda t: t[:16],
        "experts.gate_up_proj: cannot be built from .* 6 tensors",
    ),
    "scale count off": (
        "ct_mxfp4",
        f"{UP}.weight_scale",
        lambda t: t[:, :1],
        r"rows of 64 in groups of 32 have scales \[96, 2\], found u8\[96, 1\]",
    ),
    "scale count of NVFP4 off": (
        "modelopt_nvfp4",
        f"{UP}.weight_scale",
        lambda t: t[:, :2],
        r"groups of 16 have scales \[96, 4\], found f8e4m3\[96, 2\]",
    ),
    "scale count of INT4 off": (
        "ct_int4",
        f"{UP}.weight_scale",
        lambda t: t[:, :1],
        r"groups of 32 have scales \[96, 2\], found bf16\[96, 1\]",
    ),
    "scale count of FP8 off": (
        "fp8_qwen3",
        f"{UP}.weight_scale_inv",
        lambda t: t[:2],
        r"f8e4m3\[96, 64\] in blocks of 32 by 32 has scales \[3, 2\], found .* f32\[2, 2\]",
    ),
    "scales of gpt-oss off": (
        "gpt_oss_mxfp4",
        f"{GPT_OSS}_scales",
        lambda t: t[..., :1],
        r"expected blocks u8 \[..., N, K/32, 16\] and scales",
    ),
    "dense under a packed name": (
        "ct_mxfp4",
        f"{UP}.weight_packed",
        lambda t: t.bfloat16(),
        rf"{UP}.weight_packed: expected packed numbers .* found bf16\[96, 32\]; config.json says",
    ),
    "dense beside scales": (
        "quark_mxfp4",
        f"{UP}.weight",
        lambda t: torch.ones(96, 64),
        f"{UP}.weight: stored dense as .* beside '{UP}.weight_scale', and {UP} is not on the list",
    ),
    "dense blocks of another rank": (
        "gpt_oss_mxfp4",
        f"{GPT_OSS}_blocks",
        lambda t: t.bfloat16(),
        rf"{GPT_OSS}_blocks: expected U8 blocks .* found bf16\[3, 64, 2, 16\]",
    ),
    "scales of another dtype": (
        "quark_mxfp4",
        f"{UP}.weight_scale",
        lambda t: t.float(),
        r"expected scales of E8M0 .* f32\[96, 2\]",
    ),
    "stored dense and packed": (
        "ct_mxfp4",
        f"{UP}.weight",
        lambda _: torch.ones(96, 64),
        f"{UP}.weight: stored dense as .* beside '{UP}.weight_scale'",
    ),
    "another format than declared": (
        "ct_nvfp4",
        "config",
        {
            "config_groups": {"g": {"weights": {"type": "float", "num_bits": 4, "group_size": 32}}},
            "format": "mxfp4-pack-quantized",
        },
        r"weight_packed: stored as NVFP4, u8\[.*\]; config.json says MXFP4 \(compressed-tensors\)",
    ),
    "another group than declared": (
        "ct_mxfp4",
        "config",
        {"config_groups": {"g": {"weights": {"type": "float", "num_bits": 4, "group_size": 16}}}},
        "in groups of 16 have scales",
    ),
    "packed though it is to be ignored": (
        "quark_mxfp4",
        "config",
        {"exclude": ["lm_head", f"{LAYER}.mlp"]},
        "stored as MXFP4, .* but config.json lists .*mlp.* among the modules to ignore",
    ),
    "unknown method": (
        "quark_mxfp4",
        "config",
        {"quant_method": "awq"},
        "expected a quant_method of mxfp4, fp8, .*; found 'awq'; use an unquantized",
    ),
    "unknown format": ("ct_mxfp4", "config", {"config_groups": {"g": {"format": "nope"}}}, "nope"),
    "no groups": ("ct_mxfp4", "config", {"config_groups": {}}, "each format with one group"),
    "asymmetric": (
        "ct_int4",
        "config",
        {
            "config_groups": {
                "g": {
                    "weights": {"type": "int", "num_bits": 4, "group_size": 32, "symmetric": False}
                }
            }
        },
        "'pack-quantized' of .* is not supported",
    ),
    "zero points": (
        "ct_int4",
        f"{UP}.weight_zero_point",
        lambda _: torch.zeros(96, 2),
        "has zero points",
    ),
    "quark in another format": (
        "quark_mxfp4",
        "config",
        {"global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}},
        "quark's weight {'dtype': 'fp8_e4m3'.* is not supported",
    ),
    "modelopt in another format": (
        "modelopt_nvfp4",
        "config",
        {"quant_algo": "W4A8_AWQ"},
        "quant_algo 'W4A8_AWQ' is not supported; known: MXFP4, NVFP4",
    ),
    "fp8 without blocks": (
        "fp8_qwen3",
        "config",
        {"weight_block_size": None},
        "fp8 with weight_block_size None",
    ),
    "fp8 a row": (
        "fp8_qwen3",
        f"{UP}.weight_scale_inv",
        "weight_scale",
        f"FP8 with '{UP}.weight_scale' .* is not supported",
    ),
    "an unknown key": ("fp8_qwen3", "config", {"shift": 2}, r"quantization_config\.shift '2': not"),
    "an unknown key of weights": (
        "ct_nvfp4",
        "config",
        {
            "config_groups": {
                "g": {
                    "format": "nvfp4-pack-quantized",
                    "weights": {"type": "float", "num_bits": 4, "group_size": 16, "bias": False},
                }
            }
        },
        r"config_groups\.g\.weights\.bias 'False': not known, and may change what the model",
    ),
    "sparse": (
        "ct_int4",
        "config",
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparsity_config with format 'sparse-24-bitmask' is not supported; known: dense",
    ),
    "modelopt that scales inputs": (
        "modelopt_nvfp4",
        "config",
        {"pre_quant_scale": True},
        "modelopt's pre_quant_scale True is not supported",
    ),
    "inputs that are scaled": (
        "modelopt_nvfp4",
        f"{UP}.pre_quant_scale",
        lambda _: torch.ones(64),
        f"{UP}.pre_quant_scale changes what its module computes",
    ),
    "inputs that are smoothed": (
        "ct_int4",
        f"{UP}.smoothing_factor",
        lambda _: torch.ones(64),
        f"{UP}.smoothing_factor changes what its module computes",
    ),
    "scales of an unknown kind": (
        "ct_mxfp4",
        f"{UP}.scales",
        lambda _: torch.ones(64),
        f"reads no {UP}.scales, for no reason that is known; unused='allow'",
    ),
    "a list that is none": ("quark_mxfp4", "config", {"exclude": "lm_head"}, "a list of names"),
    "some experts dense": (
        "ct_mxfp4_qwen3_moe",
        EXPERT,
        "dense",
        "experts.gate_up_proj: .* are partly stored in MXFP4 and partly not",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_checkpoints_are_refused_by_name(case: str, tmp_path: Path) -> None:
    fixture, tensor, becomes, error = DAMAGED[case]

    def change(stored: dict[str, torch.Tensor], section: dict) -> None:
        if tensor == "config":
            section.update(becomes)
        elif becomes is None:
            del stored[tensor]
        elif becomes == "dense":
            del stored[f"{tensor}.weight_packed"], stored[f"{tensor}.weight_scale"]
            stored[f"{tensor}.weight"] = torch.ones(32, 64, dtype=torch.bfloat16)
        elif isinstance(becomes, str):
            stored[f"{tensor.rpartition('.')[0]}.{becomes}"] = stored.pop(tensor)
        else:
            of_expert = [n for n in stored if n.startswith(f"{EXPERT}.")]
            for name in of_expert if tensor == EXPERT else [tensor]:
                old = stored.get(name, torch.empty(0))
                stored[name] = becomes(old).clone().contiguous()

    with pytest.raises(SourceError, match=error):
        opened(altered(tmp_path, fixture, change))


@pytest.mark.parametrize(
    ("fixture", "tensor", "weight"),
    [
        ("quark_mxfp4", f"{UP}.weight_scale", f"{UP}.weight"),
        ("ct_mxfp4_qwen3_moe", f"{EXPERT}.weight_scale", f"{LAYER}.mlp.experts.gate_up_proj"),
        ("gpt_oss_mxfp4", f"{GPT_OSS}_scales", GPT_OSS),
    ],
)
def test_nan_scales_are_refused(fixture: str, tensor: str, weight: str, tmp_path: Path) -> None:
    def change(stored: dict[str, torch.Tensor], _: dict) -> None:
        stored[tensor].view(-1)[1] = 255

    checkpoint = opened(altered(tmp_path, fixture, change))
    with pytest.raises(SourceError, match=rf"^{weight}: 1 of \d+ scales are NaN \(byte 255\)"):
        checkpoint.weights.load(f"{weight}.scales")


def test_a_packed_weight_that_is_tied(tmp_path: Path) -> None:
    def change(stored: dict[str, torch.Tensor], section: dict) -> None:
        codes, scales = encode(stored.pop("lm_head.weight"), 32)
        stored["lm_head.weight_packed"], stored["lm_head.weight_scale"] = codes, scales
        section["ignore"] = []

    directory = altered(tmp_path, "ct_mxfp4", change)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = True
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SourceError, match="tied in the config but stored in MXFP4"):
        opened(directory)


def test_models_quantized_in_memory_are_refused() -> None:
    model = tiny_model("llama")
    model.hf_quantizer = SimpleNamespace(  # pyright: ignore
        quantization_config=SimpleNamespace(quant_method="fp8", dequantize=False)
    )
    with pytest.raises(SourceError, match=r"LlamaForCausalLM holds quantized .*'fp8'.* directory"):
        import_hugging_face(model, dtype=None, max_tokens=64)
