"""Whole models on a GPU beside transformers in bf16 and, in MXFP4, beside the cpu target.

The top-n rule: where the greedy tokens first differ, each is among the other's n most likely.
Random models have near-ties all over, and routers that stand between two experts: numbers are held
in f32 elsewhere (test_gpu_plans), here it is tokens. The same checks run through interpreters and
on the cpu target where there is no GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import INTERPRETED_TARGET, ON_CPU, ON_GPU, backend, compiled, entries_of
from ingot.compiler.ops.moe import experts
from ingot.frontends.cli.main import app
from ingot.frontends.cli.model_check import Reference, check_model, prompt_ids
from ingot.frontends.cli.references import CpuReference, TransformersReference
from ingot.runtime.driver import WeightLoader
from ingot.runtime.program import Program
from interpreted import InterpretedDriver, InterpretedExecutable
from tiny_models import COVERAGE, tiny_model
from tiny_tokenizers import byte_level
from tiny_tokenizers import save as save_tokenizer
from typer.testing import CliRunner
from zoo_models import random_model

pytestmark = pytest.mark.usefixtures("shared_traces")

PICO = Path(__file__).parents[2] / "examples" / "pico"
TOP = 5
# Entries for one token, a few, and many; those of test_gpu_plans, so that kernels are built once.
SIZES = (1, 4, 16, 64)
LIMITS = {"max_sequences": 3, "max_tokens_per_sequence": 192}
# More prompts than slots; the longest comes in chunks, outgrows windows, and needs two pages.
LENGTHS, STEPS = (1, 7, 40, 100), 16
FEW_SIZES, FEW_LENGTHS, FEW_STEPS = (4, 16), (1, 3, 17), 3


# Of dense models in bf16, the most that a log-probability differs relative to the largest logit:
# a few roundings. A token that goes to another expert has no such bound.
ROUNDINGS = 0.03


def hold(directory: Path, where: str, quantize: str | None) -> None:
    """The model of `directory` runs there in bf16, and keeps to what it is compared with."""
    few = where == "interpreted"
    sizes = FEW_SIZES if few else SIZES
    model = compiled(directory, where, sizes, dtype="bf16", quantize=quantize, **LIMITS)
    reference: Reference = TransformersReference(directory, model)
    if quantize:
        reference = CpuReference(
            compiled(directory, "cpu", SIZES, dtype="bf16", quantize=quantize, **LIMITS)
        )
    prompts = prompt_ids(model.tokenizer, 0, 128) if model.tokenizer else []
    if not prompts:
        drawn = torch.Generator().manual_seed(0)
        lengths = FEW_LENGTHS if few else LENGTHS
        prompts = [torch.randint(3, 128, (n,), generator=drawn).tolist() for n in lengths]
    steps = FEW_STEPS if few else STEPS
    with model:
        check = check_model(model, reference, prompts, steps=steps, top=TOP, tolerance=None)
    equal = [p.agreed for p in check.prompts]
    print(check.model_type, check.reference, equal, f"{check.logprob_error:.1e}", check.failures)
    assert check.ok, check.failures
    # Not all by near-ties: a quarter of the tokens at least come before the first that differs.
    assert sum(equal) >= sum(p.steps for p in check.prompts) / 4, check.prompts
    if not any(node.op is experts for node in model.graph("raise-ops").nodes()):
        assert check.logprob_error <= ROUNDINGS, check.prompts


@pytest.fixture(scope="module")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model of the architecture that is asked for, as files."""
    if request.param == "pico":
        return PICO
    path = tmp_path_factory.mktemp("model")
    if request.param in OWN_OPS:
        model = random_model(request.param, max_parameters=10**7).to(torch.bfloat16)
    else:
        model = tiny_model(request.param, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return path


# Types with element-wise ops, extrema and indices that the others have not, as zoo_models names
# them.
OWN_OPS = ("apertus", "ctrl", "gemma4_text, experts", "laguna", "ministral3", "phimoe")
CASES = [
    pytest.param("pico", "cpu", id="pico-cpu"),
    pytest.param("mixtral", "cpu", id="mixtral-cpu"),
    pytest.param("qwen3_moe", "interpreted", id="qwen3_moe-interpreted", marks=pytest.mark.slow),
    pytest.param(
        "gemma4_text, experts", "interpreted", id="gemma4-interpreted", marks=pytest.mark.slow
    ),
    *(
        pytest.param(n, *ON_GPU.values, id=f"{n}-gpu", marks=ON_GPU.marks)
        for n in (*COVERAGE, *OWN_OPS)
    ),
    pytest.param("pico", *ON_GPU.values, id="pico-gpu", marks=ON_GPU.marks),
]


@pytest.mark.parametrize(("directory", "where"), CASES, indirect=["directory"])
def test_tokens_of_transformers(directory: Path, where: str) -> None:
    hold(directory, where, None)


@pytest.mark.parametrize(
    ("directory", "where"),
    [
        pytest.param("llama", "interpreted", id="llama-interpreted", marks=pytest.mark.slow),
        *(case for case in CASES if case.values[1] != "cpu"),
    ],
    indirect=["directory"],
)
def test_packed_weights_give_the_tokens_of_the_dequantized(directory: Path, where: str) -> None:
    hold(directory, where, "mxfp4")


# ---- `ingot verify`, the door to the same


def verify(directory: Path, where: str, sizes: tuple[int, ...], *arguments: str) -> Any:
    with backend(where) as target, entries_of(sizes):
        given = ["verify", str(directory), "--target", target, *arguments, "--json"]
        result = CliRunner().invoke(app, given)
    assert result.exit_code in (0, 1) and result.stdout, result.output
    found = json.loads(result.stdout)
    assert found["ok"] == (result.exit_code == 0), found
    return found


@pytest.mark.parametrize("where", [ON_CPU, ON_GPU])
def test_verify_command(where: str) -> None:
    options = ("--dtype", "bf16", "--max-tokens", "256", "--tokens", "16")
    found = verify(PICO, where, (1, 8, 64), *options)
    assert found["ok"] and found["reference"] == "transformers" and found["tolerance"] is None
    assert (found["target"] == "cpu") == (where == "cpu") and found["dtype"] == "bf16"
    assert all(p["near"] and p["steps"] == 16 for p in found["prompts"])


@pytest.mark.gpu
def test_verify_command_in_f32_holds_the_numbers() -> None:
    found = verify(PICO, "gpu", (1, 8, 64), "--max-tokens", "256", "--tokens", "16")
    assert found["ok"] and found["tolerance"] == 1e-4 > found["logprob_error"] > 0
    assert [p["agreed"] for p in found["prompts"]] == [16] * 5


@pytest.mark.gpu
def test_verify_command_with_packed_weights() -> None:
    options = ("--dtype", "bf16", "--quantize", "mxfp4", "--max-tokens", "256", "--tokens", "16")
    found = verify(PICO, "gpu", (1, 8, 64), *options)
    assert found["ok"] and found["reference"] == "the cpu target" and found["layers"] == []
    assert found["target"] != "cpu"


@pytest.mark.parametrize("broken", [False, True], ids=["sound", "broken"])
def test_verify_command_with_packed_weights_interpreted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """The way through the door; and a device that has another weight is told."""
    tiny_model("llama", dtype=torch.bfloat16, vocab_size=320).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, byte_level())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the\n", encoding="utf-8")
    if broken:
        monkeypatch.setattr(InterpretedDriver, "load", _load_broken)
    options = ("--quantize", "mxfp4", "--max-tokens", "32", "--tokens", "2")
    found = verify(
        tmp_path, "interpreted", (2, 8), *options, "--prompts", str(prompts), "--dtype", "bf16"
    )
    assert (found["target"], found["reference"]) == (INTERPRETED_TARGET, "the cpu target")
    assert found["layers"] == [] and found["ok"] != broken, found
    (prompt,) = found["prompts"]
    assert prompt["near"] != broken and (prompt["agreed"] == 2) != broken
    assert (prompt["logprob_error"] < 0.05) != broken


def _load_broken(driver: InterpretedDriver, program: Program, weights: WeightLoader) -> Any:
    def load(name: str) -> torch.Tensor:
        return -weights(name) if name == "@model.norm.weight" else weights(name)

    return InterpretedExecutable(program, load)


def test_verify_command_compares_no_cpu_with_itself() -> None:
    options = ("--target", "cpu", "--quantize", "mxfp4")
    refused = CliRunner().invoke(app, ["verify", str(PICO), *options])
    assert refused.exit_code == 2 and "is compared with the cpu target" in refused.stderr
