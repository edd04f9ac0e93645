"""Attention kernels built for every GPU target, from the types of their arguments alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from ingot.codegen.build import build_one
from ingot.codegen.lower import lower
from ingot.compiler.ir import Op
from ingot.compiler.target import target_of
from interpreted import InterpretedBackend
from kernel_checks import ALL_TARGETS, ON_DEVICE, graph_of_node

# Bytes a thread may keep in local memory: for sm_100, addresses that the walk over slots keeps,
# none of the loop over the context.
_STACK = {"cuda:sm_100": 64}


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
        facts = [build_one(source, target).facts for source in backend.sources.values()]
        products = sum(facts[0].get(kind, 0) for kind in ("mma", "wgmma", "tcgen05", "mfma"))
        assert products, (name, facts[0])
        for fact in facts:
            assert fact["spills"] <= _STACK.get(name, 0), (name, fact)
            assert not fact.get("scalar_spills"), (name, fact)
            assert fact["shared"] <= target.shared_bytes, (name, fact)
        found[name] = facts
    return found
