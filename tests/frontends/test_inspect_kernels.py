"""What a step launches, layer by layer, and what its kernels take: without a GPU or weights."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ingot.codegen import build as build_module
from ingot.codegen.build import BuildError
from ingot.codegen.entries import Choice
from ingot.codegen.kernel_backend import KernelBackend
from ingot.codegen.lower import lower
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.target import target_of
from ingot.compiler.weights import Weights
from ingot.frontends import api
from ingot.frontends.cli.main import app
from ingot.frontends.importers.huggingface import HuggingFaceModel, import_hugging_face
from ingot.frontends.importers.source_error import SourceError
from ingot.frontends.launches import PlannedEntry, sections, static_report
from ingot.passes.pipelines import causal_lm
from ingot.passes.serving.sample_on_device import output_names
from ingot.passes.transforms.mxfp4_policy import MXFP4
from ingot.runtime.devices.check_program import ProgramError, check_program
from ingot.runtime.program import Program
from interpreted import InterpretedBackend
from kernel_checks import ON_DEVICE
from msgspec.structs import replace
from pass_checks import for_target
from tiny_ingot import GFX950, program, write
from tiny_models import tiny_config, tiny_model
from transformers import AutoConfig
from typer.testing import CliRunner

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="nothing runs")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantized"
MODELS = ("llama", "qwen3_moe", "deepseek_v3", "gpt_oss")
ONE, EIGHT = {"T": 1, "L": 1}, {"T": 8, "L": 4}

# The sizes of models that are served, of as many layers as there are kinds, and one more.
_BF16 = dict(dtype="bfloat16")
REAL: dict[str, dict[str, Any]] = {
    "Llama-3-8B": dict(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        **_BF16,
    ),
    "Qwen3-30B-A3B": dict(
        model_type="qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        **_BF16,
    ),
    # These two have their sizes from transformers' own defaults.
    "DeepSeek-V3": dict(
        model_type="deepseek_v3", num_hidden_layers=3, first_k_dense_replace=1, **_BF16
    ),
    "gpt-oss-20b": dict(model_type="gpt_oss", num_hidden_layers=3, num_local_experts=32, **_BF16),
}
# A layer of each like most that it has, and how many launches it may have for one token.
MOST = {
    "Llama-3-8B": (0, 5),
    "Qwen3-30B-A3B": (0, 7),
    "DeepSeek-V3": (1, 10),
    "gpt-oss-20b": (0, 7),
}


def bare(directory: Path, config: Any) -> Path:
    """A directory with config.json alone."""
    config.save_pretrained(directory)
    assert [p.name for p in directory.iterdir()] == ["config.json"]
    return directory


def imported(directory: Path, tokens: int = 256, weightless: bool = True) -> HuggingFaceModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_hugging_face(directory, dtype=None, max_tokens=tokens, weightless=weightless)


def final(model: HuggingFaceModel, sequences: int, quantize: bool = True) -> Graph:
    passes = causal_lm(
        max_sequences=sequences,
        max_tokens_per_sequence=model.max_tokens,
        quantize=MXFP4() if quantize else None,
        sample=True,
    )
    return run_pipeline(model.graph, passes)[-1].graph


def planned(
    graph: Graph, weights: Weights, backend: KernelBackend, *bindings: dict[str, int]
) -> tuple[Program, Any]:
    target, names = backend.target, output_names(graph)
    graph = for_target(graph, target)
    lowered = lower(graph, weights, target, bindings, names, backend=backend)
    return lowered.program, lowered.choices


def shown(step: PlannedEntry) -> str:
    lines = [f"{step.program.target} {step.entry.name}: {len(step.entry.launches)} launches"]
    for section in sections(step):
        lines.append(f"  {section.title}: {len(section.launches)} launches")
        for line in section.launches:
            why = "" if line.seconds is None else f"  # {line.why}"
            lines.append(f"    {line.op} {line.place}: {line.kernel}{why}".replace(" :", ":"))
    return "\n".join(lines)


@pytest.mark.parametrize("name", MODELS)
def test_launches_a_layer(name: str, tmp_path: Path, golden: Callable[[str], None]) -> None:
    """Five layers: the first of another kind in deepseek_v3, every second in gpt_oss, and the
    last of every model computes only the rows whose logits are wanted."""
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    more = {"layer_types": kinds} if name == "gpt_oss" else {}
    config = tiny_config(name, num_hidden_layers=5, dtype="bfloat16", **more)
    model = imported(bare(tmp_path, config))
    graph = final(model, 4)
    texts: list[str] = []
    for target in ("cuda:sm_90", "hip:gfx942"):
        backend = InterpretedBackend(target_of(target))
        made, choices = planned(graph, model.weights, backend, ONE, EIGHT)
        steps = [PlannedEntry.of(made, name, choices) for name in (None, "8")]
        for step in steps:
            found = sections(step)
            counted = sum(len(s.launches) * max(len(s.layers), 1) for s in found)
            assert counted == len(step.entry.launches)
            assert sorted(n for s in found for n in s.layers) == [0, 1, 2, 3, 4]
            assert all(line.why for s in found for line in s.launches)
            assert any(line.runner_up for s in found for line in s.launches)
            total = sum(line.seconds or 0.0 for s in found for line in s.launches)
            assert total > 0
        texts.append(shown(steps[0]))
    golden("\n".join(texts))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss_mxfp4"])
def test_weights_are_not_needed_to_look(name: str, tmp_path: Path) -> None:
    """The same graph and the same types, and weights that say that they are not there."""
    full, bare = tmp_path / "full", tmp_path / "bare"
    if name != "gpt_oss_mxfp4":
        tiny_model(name).save_pretrained(full)
    else:
        full = FIXTURES / name
    bare.mkdir()
    shutil.copy(full / "config.json", bare)
    mine, theirs = imported(bare), imported(full)
    assert str(mine.graph) == str(theirs.graph)
    types = [{n: e.type for n, e in m.weights.items()} for m in (mine, theirs)]
    assert types[0] == types[1]
    with pytest.raises(SourceError, match=r"bare: holds no weights: .* only be inspected"):
        mine.weights.load(next(n for n in types[0] if "down_proj" in n))
    with pytest.raises(SourceError, match=r"found config\.json; a model without weights can only"):
        imported(bare, weightless=False)


def test_packed_weights_that_a_config_does_not_name_are_refused(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "quark_mxfp4" / "config.json", tmp_path)
    with pytest.raises(SourceError, match="config.json says MXFP4 .*expected them, found none"):
        imported(tmp_path)


def test_half_a_checkpoint_is_no_bare_config(tmp_path: Path) -> None:
    bare(tmp_path, tiny_config("llama"))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match=r"expected model\.safetensors or .*found config\.json"):
        imported(tmp_path)


# ---- kernels as they are built


@cache
def real(name: str, directory: Path) -> tuple[Graph, Weights]:
    config = dict(REAL[name])
    bare(directory, AutoConfig.for_model(config.pop("model_type"), **config))
    model = imported(directory, 4096)
    return final(model, 8), model.weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["hip:gfx942", "hip:gfx950"])
@pytest.mark.parametrize("name", REAL)
def test_decoding_at_real_sizes_spills_nothing(name: str, target: str, folder: Path) -> None:
    """Every kernel of a step of one token of the models in MXFP4, within the target's limits."""
    graph, weights = real(name, folder / name)
    made, choices = planned(graph, weights, KernelBackend(target_of(target)), ONE)
    report = static_report(made, made.entries)
    assert report.ok and report.verdict.startswith("0 spills; at most "), report.verdict
    assert sum(k.launches for k in report.kernels) == len(made.entries[0].launches)
    # Registers of a lane, accumulators among them; a block of 8 warps has half of them each.
    assert all(0 < (k.registers or 0) <= 512 * 4 // max(4, k.num_warps) for k in report.kernels)
    products = [k for k in report.kernels if k.symbol in ("mfma_kernel", "product_kernel")]
    assert products and all(k.matrix["mfma"] > 0 for k in products)
    parts = sections(PlannedEntry.of(made, None, choices))
    assert sum(len(s.layers) for s in parts) == REAL[name]["num_hidden_layers"]
    layer, most = MOST[name]
    (launches,) = (s.launches for s in parts if layer in s.layers)
    assert len(launches) <= most, [(line.op, line.kernel) for line in launches]


def with_facts(**facts: Any) -> Program:
    made = program("hip:gfx950", GFX950)
    kernels = {
        id_: replace(k, facts={"registers": 32, "spills": 0, "scalar_spills": 0, **facts})
        for id_, k in made.kernels.items()
    }
    return replace(made, kernels=kernels)


def test_what_spills_is_said() -> None:
    good = static_report(with_facts(), with_facts().entries)
    assert good.ok
    assert good.verdict == (
        "0 spills; at most 1,024 of 163,840 bytes of LDS; at most 32 registers a thread"
    )
    for facts, said in (
        ({"spills": 3}, "SPILLS: gather_kernel 3 registers, head_kernel 3 registers; at most"),
        ({"scalar_spills": 2}, "SPILLS: gather_kernel 2 scalars, head_kernel 2 scalars; at most"),
        ({"spills": None}, "spills unknown of gather_kernel, head_kernel; at most"),
        ({"spills": "0"}, "spills unknown of gather_kernel, head_kernel; at most"),
    ):
        made = with_facts(**facts)
        report = static_report(made, made.entries)
        assert not report.ok and report.verdict.startswith(said), report.verdict


def test_too_much_shared_memory_is_refused() -> None:
    made = with_facts()
    kernels = {id_: replace(k, shared=163_841) for id_, k in made.kernels.items()}
    made = replace(made, kernels=kernels)
    report = static_report(made, made.entries)
    assert not report.ok and "OVER THE LIMIT: gather_kernel, head_kernel: at most" in report.verdict
    with pytest.raises(ProgramError, match="bytes shared on hip:gfx950: expected .* to 163840"):
        check_program(made)
    metadata = SimpleNamespace(shared=65_537)
    with pytest.raises(BuildError, match="expected at most 65536 bytes of shared memory, found"):
        build_module._check("k", target_of("hip:gfx942"), metadata, {})


# ---- the command


def ingot(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def done(*arguments: str | Path) -> str:
    result = ingot(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_inspect_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of a bare config; built once, and the second time all out of the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = bare(tmp_path / "model", tiny_config("llama", num_hidden_layers=2))
    options = ("--target", "hip:gfx942", "--kernels", "--max-tokens", "64", "--max-sequences", "2")
    data = json.loads(done("inspect", source, *options, "--json"))
    kernels = data["step"]["static"]["kernels"]
    assert data["kernel_count"] == {"built": len(kernels), "from_cache": 0}
    assert {k["registers"] > 0 for k in kernels} == {True}
    assert sum(k["launches"] for k in kernels) == data["step"]["launches"]
    counts = {e["name"]: e["launches"] for e in data["entries"]}
    assert counts == {"T=1,L=1": data["step"]["launches"], **data["step"]["other_entries"]}
    whys = {c["why"] for c in data["kernels"] if c["entry"] == "T=1,L=1"}
    lines = [line for s in data["step"]["sections"] for line in s["launches"]]
    assert {line["why"] for line in lines} == whys
    assert sum(line["seconds"] or 0.0 for line in lines) > 0
    assert any(" µs)" in (line["runner_up"] or "") for line in lines)

    text = done("inspect", source, *options)
    assert f"0 kernels built, {len(kernels)} from the cache" in text
    for part in ("layer 0: ", "layer 1: ", "after the layers: ", "GEMV for very few tokens"):
        assert part in text
    verdict, note = text.splitlines()[-2:]
    assert verdict.startswith("hip:gfx942: 0 spills; at most ") and "of 65,536 bytes of" in verdict
    assert "has been executed on AMD hardware" in note
    other = json.loads(done("inspect", source, *options, "--entry", "8", "--json"))
    assert other["step"]["entry"] == "T=8,L=2" and "T=1,L=1" in other["step"]["other_entries"]

    # What needs no weights works without them, and what needs them says so.
    assert "graph @llama after final" in done("inspect", source, "--max-tokens", "64")
    refused = ingot("run", source, "--prompt", "a")
    assert refused.exit_code == 1 and "without weights can only be inspected" in refused.stderr
    refused = ingot("compile", source, "--target", "hip:gfx942", "-o", tmp_path / "out")
    assert refused.exit_code == 1 and "without weights can only be inspected" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_inspect_kernels_of_an_ingot(tmp_path: Path) -> None:
    """The same report out of the artifact; what is not in it is not made up."""
    path = write(tmp_path / "tiny.ingot", replace(with_facts(spills=5), target="hip:gfx950"))
    text = done("inspect", path, "--kernels", "--entry", "T=4")
    for part in ("launches of t=4,l=2", "gather_kernel", "5 registers", "lm_head"):
        assert part in text.lower()
    assert "SPILLS: gather_kernel 5 registers" in text
    assert "the reasons for each kernel are known when a model is compiled" in text
    data = json.loads(done("inspect", path, "--json"))
    assert data["static"]["ok"] is False and "step" not in data
    gather, head = data["static"]["kernels"]
    assert (gather["symbol"], gather["launches"], gather["shared"]) == ("gather_kernel", 2, 1024)
    assert head["code_bytes"] == gather["code_bytes"] + 4
    step = json.loads(done("inspect", path, "--kernels", "--json"))["step"]
    assert step["launches"] == 2 and step["other_entries"] == {"T=4,L=2": 2}
    assert [(s["title"], s["layers"]) for s in step["sections"]] == [("all launches", [])]
    assert {line["why"] for s in step["sections"] for line in s["launches"]} == {None}


ERRORS: dict[str, tuple[tuple[str, ...], str]] = {
    "entry": (("--entry", "3"), "entry '3': expected one of T=1,L=1, T=2,L=2"),
    "alone": (("--entry", "1", "no --kernels"), "--entry belongs to --kernels"),
    "cpu": (("--target", "cpu"), "the cpu target has no kernels; give --target, one of cuda:sm_90"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, tmp_path: Path) -> None:
    bare(tmp_path, tiny_config("llama"))
    given, expected = ERRORS[case]
    kernels = () if "no --kernels" in given else ("--kernels",)
    options = [a for a in given if a != "no --kernels"]
    base = ("--target", "hip:gfx942") if "--target" not in given else ()
    result = ingot("inspect", tmp_path, *base, *kernels, *options, "--max-tokens", "64")
    assert result.exit_code == 2 and expected in result.stderr


def test_choices_must_fit_the_launches() -> None:
    made = program()
    choice = Choice("linear", made.entries[0].name, ("k",) * 3, "why", 1e-6)
    with pytest.raises(ValueError, match="expected a choice for each of 2 launches, found 3"):
        PlannedEntry.of(made, None, [choice])


def test_a_module_is_not_planned() -> None:
    with pytest.raises(api.NotYetError, match="only language models are planned"):
        api.plan(torch.nn.Linear(2, 2), target="hip:gfx942")
