"""Kernels built and cached: once each, whole or not at all, by many at a time."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
from ingot.codegen import build as build_module
from ingot.codegen.build import BuildError, build, build_one
from ingot.codegen.kernel_source import KernelSource
from ingot.codegen.templates.copy import copy_kernel
from ingot.codegen.templates.generated import from_text
from ingot.compiler.target import TARGETS, Target, target_of
from ingot.runtime.elf import code_target
from ingot.runtime.program import Argument, Kernel

GPUS = [target for target in TARGETS.values() if target.is_gpu]
SM_90 = target_of("cuda:sm_90")
TWICE = """@triton.jit
def twice(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at) * 2)
"""


def source(size: int, text: str = TWICE) -> KernelSource:
    kinds = {"x": Argument("*f32", 16), "y": Argument("*f32", 16)}
    return KernelSource.of(from_text(text, "twice"), kinds, {"N": size}, 1, 2, False)


def built(sources: list[KernelSource], folder: Path) -> tuple[list[Kernel], int]:
    """The kernels, and how many Triton was asked for."""
    with patch.object(build_module, "build_one", side_effect=build_one) as asked:
        kernels = build(sources, SM_90, cache=folder)
    return [kernels[s] for s in sources], asked.call_count


@pytest.mark.parametrize("target", GPUS, ids=lambda t: t.name)
def test_code_is_for_its_target(target: Target, tmp_path: Path) -> None:
    (kernel,) = build([source(64)], target, cache=tmp_path).values()
    assert isinstance(kernel.binary, bytes)
    assert code_target(kernel.binary) == target.name
    assert kernel.symbol == "twice" and kernel.facts["registers"] > 0
    assert kernel.args == (Argument("*f32", 16),) * 2


def test_equal_sources_are_built_once_and_then_read(tmp_path: Path) -> None:
    first, asked = built([source(32), source(64), source(32)], tmp_path)
    assert asked == 2 and first[0] is first[2]
    again, asked = built([source(32), source(64)], tmp_path)
    assert asked == 0 and again == first[:2]
    assert not list(tmp_path.glob(".new-*"))


def test_what_makes_other_code_has_another_name() -> None:
    names = {source(n).hash(t.name) for n in (32, 64) for t in GPUS}
    assert len(names) == 2 * len(GPUS)
    assert source(32, TWICE.replace("* 2", "* 3")).hash("cuda:sm_90") not in names


@pytest.mark.parametrize("damage", ["cut", "no facts", "no JSON", "other JSON"])
def test_a_damaged_entry_is_built_anew(damage: str, tmp_path: Path) -> None:
    before, _ = built([source(32)], tmp_path)
    facts, code = next(tmp_path.glob("*.json")), next(tmp_path.glob("*.cubin"))
    if damage == "cut":
        code.write_bytes(code.read_bytes()[:-1])
    elif damage == "no facts":
        facts.unlink()
    else:
        facts.write_text("{" if damage == "no JSON" else json.dumps([1]))
    after, asked = built([source(32)], tmp_path)
    assert asked == 1 and after == before


def test_many_may_build_at_once(tmp_path: Path) -> None:
    wanted = [source(n) for n in (16, 32, 64, 128)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(build, wanted, SM_90, None, tmp_path) for _ in range(4)]
        found = [job.result() for job in jobs]
    assert all(f == found[0] for f in found)
    assert len(list(tmp_path.iterdir())) == 2 * len(wanted)


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    build([source(n) for n in (16, 32)], SM_90, lambda *done: told.append(done), tmp_path)
    assert told == [(0, 2), (1, 2), (2, 2)]
    build([source(n) for n in (16, 32)], SM_90, lambda *done: told.append(done), tmp_path)
    assert told[3:] == [(2, 2)]


def test_errors_name_the_kernel(tmp_path: Path) -> None:
    broken = source(32, TWICE.replace("tl.load(x + at)", "tl.load(x + nothing)"))
    with pytest.raises(BuildError, match="(?s)kernel twice for cuda:sm_90:.*nothing"):
        build([broken], SM_90, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_parameters_must_be_those_of_the_function() -> None:
    with pytest.raises(ValueError, match=r"kernel copy_kernel: expected parameters .*'count_'"):
        KernelSource.of(copy_kernel, {"count_": Argument("i32")}, {}, 1, 2, False)
