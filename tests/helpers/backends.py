"""Where whole models of tests run: on the cpu, in interpreters, or on the GPU that is here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ingot
import pytest
from ingot.codegen import kernel_backend
from ingot.compiler.target import target_of
from ingot.frontends import api, compilation
from ingot.frontends.drivers import driver_here, present_target
from ingot.runtime.driver import Driver
from interpreted import InterpretedBackend, InterpretedDriver

INTERPRETED_TARGET = "cuda:sm_90"
ON_CPU = pytest.param("cpu", id="cpu")
SLOW_ON_CPU = pytest.param("cpu", marks=pytest.mark.slow, id="cpu")
ON_GPU = pytest.param("gpu", marks=pytest.mark.gpu, id="gpu")


@contextmanager
def backend(name: str) -> Iterator[str]:
    """The target to compile for; within, `ingot.compile` for it works on this machine."""
    if name == "cpu":
        yield "cpu"
    elif name == "gpu":
        target = present_target()
        assert target_of(target).is_gpu, target
        yield target
    else:
        assert name == "interpreted", name
        with (
            patch.object(api, "driver_here", _driver),
            patch.object(kernel_backend, "KernelBackend", InterpretedBackend),
        ):
            yield INTERPRETED_TARGET


def _driver(target: str) -> Driver:
    return InterpretedDriver(target) if target == INTERPRETED_TARGET else driver_here(target)


@contextmanager
def entries_of(sizes: Sequence[int]) -> Iterator[None]:
    """Within, what is compiled has entries of so many tokens alone: kernels take time to build."""

    def bindings(max_sequences: int, max_tokens: int, *, rows: int) -> list[dict[str, int]]:
        assert max_sequences <= sizes[-1] <= max_tokens, (max_sequences, sizes, max_tokens)
        return [{"T": t, "L": min(t, rows)} for t in sizes]

    with patch.object(compilation, "serving_bindings", bindings):
        yield


def compiled(source: Path, where: str, sizes: Sequence[int], **options: Any) -> Any:
    """A Model of the directory `source` that runs there, with entries of `sizes` tokens."""
    with backend(where) as target, entries_of(sizes):
        return ingot.compile(source, target=target, progress=False, **options)
