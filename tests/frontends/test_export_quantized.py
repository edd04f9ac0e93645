"""Directories written in MXFP4: read back bit for bit, by transformers too, and never by halves."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from full_disk import files_of_at_most
from ingot.compiler.microscaling import decode, encode
from ingot.frontends.checkpoints import export_quantized, safetensors_files
from ingot.frontends.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ingot.frontends.checkpoints.export_quantized import Exported, quantize_directory
from ingot.frontends.cli.main import app
from ingot.frontends.importers.meta_model import build_meta_model, read_config
from ingot.frontends.importers.source_error import SourceError
from ingot.passes.transforms.mxfp4_policy import MXFP4
from ingot.runtime.artifact import atomic_write
from ingot.runtime.artifact.atomic_write import AtomicWrite
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedModel
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("shared_traces")


@cache
def model(name: str) -> PreTrainedModel:
    return tiny_model(name, dtype=torch.bfloat16)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(name: str) -> Path:
        model(name).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def opened(directory: Path) -> Checkpoint:
    options = dict(attn_implementation="eager", experts_implementation="eager")
    return open_checkpoint(directory, build_meta_model(read_config(directory), **options))


def assert_read_back(exported: Exported, name: str, scale: str = "mse") -> int:
    """Codes and scales are those of the model's own weights, everything else is the model's.

    How many of the model's weights are packed.
    """
    checkpoint, count = opened(exported.directory), 0
    for key, tensor in model(name).state_dict().items():
        if key not in checkpoint.packed:
            assert torch.equal(checkpoint.weights.load(key), tensor), key
            continue
        turned = checkpoint.packed[key] != tuple(range(tensor.ndim))
        rows = tensor.transpose(-1, -2) if turned else tensor
        codes, scales = encode(rows, 32, scale)
        assert torch.equal(checkpoint.weights.load(f"{key}.codes"), codes), key
        assert torch.equal(checkpoint.weights.load(f"{key}.scales"), scales), key
        count += 1
    assert checkpoint.unused == {}
    return count


@pytest.mark.parametrize(
    ("name", "packed", "reasons"),
    [
        ("llama", 14, {"gives an output of the model", "rows are looked up"}),
        ("mixtral", 12, {"scores experts for the router"}),
        ("deepseek_v3", 16, {"groups of 32 do not divide K = 24"}),
        ("gpt_oss", 4, {"gpt-oss's format holds experts only"}),
    ],
)
def test_every_weight_is_read_back(
    name: str, packed: int, reasons: set[str], saved: Callable[..., Path], tmp_path: Path
) -> None:
    exported = quantize_directory(saved(name), tmp_path / "out", MXFP4())
    assert assert_read_back(exported, name) == packed
    assert reasons <= set(exported.kept.values())
    held = sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert exported.bytes_after == held < exported.bytes_before
    assert {p.name for p in tmp_path.iterdir()} == {name, "out"}


def test_transformers_reads_gpt_oss(saved: Callable[..., Path], tmp_path: Path) -> None:
    exported = quantize_directory(saved("gpt_oss"), tmp_path / "out", MXFP4())
    loaded = AutoModelForCausalLM.from_pretrained(
        exported.directory,
        dtype=torch.bfloat16,
        quantization_config=Mxfp4Config(dequantize=True),
        experts_implementation="eager",
    )
    checkpoint = opened(exported.directory)
    expected = model("gpt_oss").state_dict()
    for key, tensor in loaded.state_dict().items():
        if key in checkpoint.packed:
            parts = (checkpoint.weights.load(f"{key}.{part}") for part in ("codes", "scales"))
            assert torch.equal(tensor, decode(*parts, torch.bfloat16).transpose(1, 2))
        else:
            assert torch.equal(tensor, expected[key])


def test_config_of_compressed_tensors(saved: Callable[..., Path], tmp_path: Path) -> None:
    """What transformers with compressed-tensors reads (tests/fixtures/quantized/ct_mxfp4)."""
    exported = quantize_directory(saved("deepseek_v3"), tmp_path / "out", MXFP4())
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    fixture = Path(__file__).parents[1] / "fixtures" / "quantized" / "ct_mxfp4" / "config.json"
    theirs = json.loads(fixture.read_text(encoding="utf-8"))["quantization_config"]
    ours, group = (c["config_groups"]["group_0"] for c in (section, theirs))
    assert ours["weights"].items() <= group["weights"].items()
    assert {k: ours[k] for k in ("format", "targets")} == {
        k: group[k] for k in ("format", "targets")
    }
    assert section["format"] == theirs["format"]
    assert section["ignore"] == [
        "lm_head",
        "model.layers.0.self_attn.q_b_proj",
        "model.layers.1.self_attn.q_b_proj",
    ]
    stored = load_file(exported.directory / "model.safetensors")
    expert = "model.layers.1.mlp.experts.3.up_proj"
    assert stored[f"{expert}.weight_packed"].shape == (32, 32)
    assert stored[f"{expert}.weight_scale"].shape == (32, 2)


def test_options(saved: Callable[..., Path], tmp_path: Path) -> None:
    options = MXFP4(scale="even", keep=("*.layers.0.*", "*o_proj*"))
    exported = quantize_directory(saved("llama"), tmp_path / "out", options)
    assert assert_read_back(exported, "llama", "even") == 6
    assert exported.kept["model.layers.1.self_attn.o_proj.weight"] == "matches keep='*o_proj*'"


def test_shards_and_other_files(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = saved("mixtral")
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    (source / "pytorch_model.bin").write_bytes(b"never")
    (source / "original").mkdir()
    steps: list[tuple[int, int]] = []
    exported = quantize_directory(
        source,
        tmp_path / "out",
        MXFP4(),
        shard_bytes=60_000,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert assert_read_back(exported, "mixtral") == 12
    files = {p.name: p.stat().st_size for p in exported.directory.iterdir()}
    shards = [n for n in files if n.endswith(".safetensors")]
    assert len(shards) > 3 and all(files[n] < 70_000 for n in shards)
    assert files.keys() - {*shards} == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    assert steps == sorted(steps) and steps[-1] == (exported.bytes_after,) * 2
    index = json.loads((exported.directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == exported.bytes_after
    held = {n: f for f in shards for n in load_file(exported.directory / f)}
    assert held == index["weight_map"]


def test_fp8_becomes_mxfp4(tmp_path: Path) -> None:
    """What another format holds is dequantized, and encoded from that."""
    fixture = Path(__file__).parents[1] / "fixtures" / "quantized" / "fp8_qwen3_moe"
    exported = quantize_directory(fixture, tmp_path / "out", MXFP4(keep=("*q_proj*",)))
    before, after = opened(fixture), opened(exported.directory)
    assert len(after.packed) == 5
    for name in before.weights:
        dense = before.weights.load(name)
        if name in after.packed:
            parts = (after.weights.load(f"{name}.{part}") for part in ("codes", "scales"))
            error = (decode(*parts, torch.float32) - dense.float()).abs().max()
            assert 0 < error < 0.2 * dense.abs().max()
        else:
            assert torch.equal(after.weights.load(name), dense)


def test_nothing_is_left_behind(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = saved("llama")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(SourceError, match=f"{name}: expected finite weights"):
        quantize_directory(source, tmp_path / "out", MXFP4())
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_what_came_meanwhile_is_kept(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sync = saved("llama"), atomic_write._sync_below

    def late(path: Path) -> None:
        sync(path)
        (tmp_path / "out").mkdir(exist_ok=True)

    monkeypatch.setattr(atomic_write, "_sync_below", late)
    with pytest.raises(FileExistsError, match="out came to be there meanwhile, and is kept"):
        quantize_directory(source, tmp_path / "out", MXFP4())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "out"]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("nbytes", [0, 2000, 20_000])
def test_a_full_disk_names_the_path(
    saved: Callable[..., Path], tmp_path: Path, nbytes: int
) -> None:
    source = saved("llama")
    with (
        files_of_at_most(nbytes),
        pytest.raises(OSError, match=f"File too large: '{tmp_path}/out'"),
    ):
        quantize_directory(source, tmp_path / "out", MXFP4())
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_the_next_removes_what_a_killed_one_left(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    source, child = saved("llama"), os.fork()
    if child == 0:
        AtomicWrite(tmp_path / "out").__enter__().content.mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    quantize_directory(source, tmp_path / "out", MXFP4())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "out"]


def test_what_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = saved("llama")
    (tmp_path / "there").mkdir()
    for target, options, kind, error in (
        ("there", MXFP4(), FileExistsError, "is there already: expected a new path"),
        ("no/where", MXFP4(), FileNotFoundError, "no such directory"),
        ("out", MXFP4(group=16), ValueError, "compressed-tensors has groups of 32, found 16"),
    ):
        with pytest.raises(kind, match=error):
            quantize_directory(source, tmp_path / target, options)
    fixture = Path(__file__).parents[1] / "fixtures" / "quantized" / "quark_mxfp4"
    with pytest.raises(SourceError, match="is in MXFP4 already"):
        quantize_directory(fixture, tmp_path / "out", MXFP4())
    assert {p.name for p in tmp_path.iterdir()} == {"llama", "there"}


def test_one_tensor_at_a_time(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor is encoded when its turn to be written has come."""
    events: list[str] = []

    def noted(owner: ModuleType, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a: events.append(name) or real(*a))

    noted(export_quantized, "_encoded")
    noted(safetensors_files, "type_of")
    quantize_directory(saved("llama"), tmp_path / "out", MXFP4())
    packed = "".join("E" if e == "_encoded" else "w" for e in events).lstrip("w")
    assert packed == "Eww" * 14


def test_command(saved: Callable[..., Path], tmp_path: Path) -> None:
    source, out = saved("llama"), tmp_path / "out"
    run = CliRunner().invoke
    arguments = ["quantize", str(source), "-o", str(out)]
    result = run(app, [*arguments, "--keep", "*q_proj*", "--keep", "*k_proj*"])
    assert result.exit_code == 0, result.output
    assert "10 weights in MXFP4 (compressed-tensors)" in result.output
    assert "matches keep='*k_proj*'" in result.output
    again = run(app, arguments)
    assert again.exit_code == 2 and "is there already" in again.output
    wrong = run(app, [*arguments, "--scale", "nearest"])
    assert wrong.exit_code == 2 and "scale: expected one of" in wrong.output
    as_json = run(app, ["quantize", str(source), "-o", str(tmp_path / "two"), "--json"])
    assert len(json.loads(as_json.stdout)["quantized"]) == 14
