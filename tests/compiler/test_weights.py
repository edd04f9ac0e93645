"""Weights: names to tensors that are read only when asked for."""

from __future__ import annotations

import pytest
import torch
from ingot.compiler.types import TensorType
from ingot.compiler.weights import Entry, Weights

F4 = TensorType("f32", (4,))


def lazy(loads: list[str], name: str, tensor: torch.Tensor, type_: TensorType = F4) -> Entry:
    def load() -> torch.Tensor:
        loads.append(name)
        return tensor

    return Entry(type_, load, f"{name}.safetensors")


def test_nothing_is_read_before_it_is_asked_for() -> None:
    loads: list[str] = []
    store = Weights({n: lazy(loads, n, torch.zeros(4)) for n in ("a", "b")})
    assert list(store) == ["a", "b"]
    assert len(store) == 2
    assert "a" in store
    assert "c" not in store
    assert store["a"].type == F4
    assert store["b"].origin == "b.safetensors"
    merged = store.merged({"c": lazy(loads, "c", torch.zeros(4))})
    assert loads == []
    assert torch.equal(merged.load("b"), torch.zeros(4))
    merged.load("c")
    merged.load("b")
    assert loads == ["b", "c", "b"]


def test_tensors_in_memory_are_not_copied() -> None:
    tensors = {"a": torch.randn(4), "b": torch.randn(2, 3).bfloat16()}
    store = Weights.of(tensors)
    assert store.load("a") is tensors["a"]
    assert store.load("b") is tensors["b"]
    assert store["b"].type == TensorType("bf16", (2, 3))
    assert store["a"].origin == "memory"


def test_a_store_does_not_follow_the_mapping_that_it_was_made_of() -> None:
    entries = {"a": Weights.of({"a": torch.zeros(4)})["a"]}
    store = Weights(entries)
    entries.clear()
    assert list(store) == ["a"]


def test_missing_weights_are_named() -> None:
    store = Weights.of({"a": torch.zeros(4), "b": torch.zeros(4)})
    for ask in (store.load, store.__getitem__):
        with pytest.raises(KeyError, match="no weight 'q' among the 2 of this store"):
            ask("q")
    assert store.get("q") is None


@pytest.mark.parametrize("tensor", [torch.zeros(5), torch.zeros(4).double(), torch.zeros(2, 2)])
def test_a_tensor_that_is_not_what_was_promised(tensor: torch.Tensor) -> None:
    store = Weights({"a": lazy([], "a", tensor)})
    with pytest.raises(
        TypeError, match=r"weight 'a' from a\.safetensors: expected f32\[4\], loaded"
    ):
        store.load("a")


def test_merging_keeps_both_and_refuses_a_name_twice() -> None:
    one, two = Weights.of({"a": torch.zeros(4)}), Weights.of({"b": torch.ones(4)})
    both = one.merged(two)
    assert both.load("b").sum() == 4
    assert list(one) == ["a"]
    many = {f"n{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(ValueError, match=r"weights defined twice: n0, n1, n2, n3, n4$"):
        Weights.of(many).merged(Weights.of(many))
