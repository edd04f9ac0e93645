"""What it takes to add an op, a fusion, a kernel or a command: real diffs, applied to a copy.

Each diff in tests/extending adds one thing, and nothing beside the files listed here may be touched
for it. The copy keeps the rules of the house, and a script shows that what was added works.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIFFS = Path(__file__).parent / "extending"
ROOMS = ("compiler", "passes", "codegen", "runtime", "frontends")
KEPT = (*ROOMS, "examples/pico", "tests/helpers")

# The diff -> the files that it may touch, and what must then run.
EXTENSIONS: dict[str, tuple[set[str], str]] = {
    "elementwise_op": (
        {"codegen/expressions.py", "compiler/ops/pointwise.py"},
        """
import torch
from ingot.compiler.ir import Op
from kernel_checks import build_everywhere, check_node
softsign, x = Op.registry["softsign"], torch.randn(5, 8)
torch.testing.assert_close(softsign.reference(x)[0], torch.nn.functional.softsign(x))
check_node(softsign, (x,))
build_everywhere(softsign, (x.bfloat16(),))
""",
    ),
    "gemm_kernel": (
        {"codegen/templates/gemm/__init__.py", "codegen/templates/gemm/gemv_linear.py"},
        """
import torch
from unittest.mock import patch
from ingot.codegen.templates.gemm import gemv_linear
from ingot.codegen.templates.gemm import linear as gemm
from ingot.compiler.ops.linear import linear
from kernel_checks import Weight, build_everywhere, check_node
assert gemv_linear.variant in gemm.VARIANTS
args = torch.randn(1, 96).bfloat16(), Weight(torch.randn(50, 96).bfloat16())
more = {"bias": Weight(torch.randn(50).bfloat16()), "residual": torch.randn(1, 50).bfloat16()}
with patch.object(gemm, "VARIANTS", (gemv_linear.variant,)):
    check_node(linear, args, more)
    build_everywhere(linear, args, more)
""",
    ),
    "cli_command": (
        {"frontends/cli/commands/__init__.py", "frontends/cli/commands/ops.py"},
        """
from typer.testing import CliRunner
from ingot.frontends.cli.main import app
result = CliRunner().invoke(app, ["ops", "examples/pico", "--max-tokens", "64", "--json"])
assert result.exit_code == 0, result.output
assert '"embedding": 1' in result.output, result.output
""",
    ),
    "fusion": (
        {
            "passes/fusion/__init__.py",
            "passes/fusion/fuse_norm_scale.py",
            "passes/pipelines.py",
        },
        """
import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.text import parse
from ingot.compiler.validate import check_rewrite
from ingot.passes.pipelines import module
graph = parse('''graph @g(%x: f32[T, 8], %w: f32[8]) T=1..16 {
  %0 = rms_norm(%x, weight=%w, eps=1e-06) : f32[T, 8]
  %1 = mul(%0, f32(0.5)) : f32[T, 8]
  return %1
}''')
results = run_pipeline(graph, module(), check=check_rewrite)
assert {r.name: r.matches["norm-scale"] for r in results}["fuse-norm-scale"] == 1
inputs = {"x": torch.randn(5, 8), "w": torch.randn(8)}
before, after = (interpret(g, inputs).outputs[0] for g in (graph, results[-1].graph))
torch.testing.assert_close(before, after)
""",
    ),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package, importable as `ingot` from its parent."""
    copy = tmp_path / "ingot"
    for folder in KEPT:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("tests/test_house.py", "tests/conftest.py"):
        shutil.copy(ROOT / file, copy / file)
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "CONTRIBUTING.md"):
        shutil.copy(file, copy)
    return copy


def run(tree: Path, *command: str) -> str:
    path = os.pathsep.join(map(str, (tree.parent, tree / "tests" / "helpers")))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=tree, env=env, text=True, check=False, stdout=-1, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("name", EXTENSIONS)
def test_an_extension_touches_only_its_own_places(name: str, tree: Path) -> None:
    allowed, script = EXTENSIONS[name]
    diff = str(DIFFS / f"{name}.diff")
    touched = run(tree, "git", "apply", "--numstat", diff).splitlines()
    assert {line.split("\t")[2] for line in touched} == allowed
    run(tree, "git", "apply", diff)
    house = ["-p", "no:cacheprovider", "tests/test_house.py", "-k", "test_no_breach"]
    run(tree, sys.executable, "-m", "pytest", "-q", *house)
    run(tree, sys.executable, "-c", script)


def test_every_diff_is_applied() -> None:
    assert {path.stem for path in DIFFS.glob("*.diff")} == EXTENSIONS.keys()
