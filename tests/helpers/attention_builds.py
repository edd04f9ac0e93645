"""Attention kernels built for every GPU target, from the types of their arguments alone."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from ingot.codegen.build import Built, build_one
from ingot.codegen.lower import lower
from ingot.compiler.ir import Op
from ingot.compiler.target import target_of
from interpreted import InterpretedBackend
from kernel_checks import ALL_TARGETS, ON_DEVICE, graph_of_node
from triton import knobs

# Bytes a thread may keep in local memory, by kernel and target: addresses that the walk over slots
# keeps, none of the loop over the context (`held_by_loop`).
_STACK = {
    ("attend_kernel", "cuda:sm_100"): 64,
    ("decode_kernel", "cuda:sm_90"): 48,
    ("decode_kernel", "cuda:sm_100"): 48,
}


def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor that is only a type."""
    return torch.empty(shape, dtype=dtype, device="meta")


def index(tokens: int, slots: int = 8, pages: int = 128) -> tuple[torch.Tensor, ...]:
    """slots, positions and page table of `tokens` tokens."""
    return tuple(empty(torch.int32, *s) for s in ((tokens,), (tokens,), (slots, pages)))


def build_attention(
    op: Op, args: tuple[torch.Tensor, ...], attrs: Mapping[str, Any]
) -> dict[str, list[Mapping[str, Any]]]:
    """Facts of the kernels by target: products are matrix instructions, and nothing spills but, for
    sm_100, a few addresses outside the loop."""
    if ON_DEVICE:
        pytest.skip("kernels are built for every target where they are not run")
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name in ALL_TARGETS:
        target = target_of(name)
        graph, weights, _, _ = graph_of_node(op, args, attrs)
        backend = InterpretedBackend(target)
        lower(graph, weights, target, [{}], ["out0"], backend=backend)
        built = [build_one(source, target) for source in backend.sources.values()]
        facts = [each.facts for each in built]
        products = sum(facts[0].get(kind, 0) for kind in ("mma", "wgmma", "tcgen05", "mfma"))
        assert products, (name, facts[0])
        for each, fact in zip(built, facts, strict=True):
            check_spills(each, name)
            assert fact["shared"] <= target.shared_bytes, (name, fact)
        found[name] = facts
    return found


def check_spills(built: Built, target: str) -> None:
    """Nothing spills, but for what `_STACK` allows outside the loop over the context."""
    facts = built.facts
    assert facts["spills"] <= _STACK.get((facts["name"], target), 0), (target, facts)
    assert not facts.get("scalar_spills"), (target, facts)
    if facts["spills"] and facts["name"] == "decode_kernel":
        assert not held_by_loop(built.binary), (target, facts)


def held_by_loop(cubin: bytes) -> list[str]:
    """Instructions that touch local memory between the first and the last mma of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line for line in text.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/\s+[@A-Z]", line)]
    products = [i for i, line in enumerate(lines) if "HMMA" in line]
    assert products, "no mma found"
    inside = lines[products[0] : products[-1]]
    return [line for line in inside if re.search(r"\b(LDL|STL)\b", line)]
