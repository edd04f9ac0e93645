"""What a program has set in torch around a call changes nothing, and is still set after it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import ingot
import numpy as np
import pytest
import torch
from tiny_models import tiny_model

SMALL = {"max_sequences": 1, "max_tokens_per_sequence": 32}


@contextmanager
def default_dtype() -> Generator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Generator[None]:
    torch.set_default_device("meta")
    try:
        yield
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


STATES: dict[str, Any] = {
    "device context": lambda: torch.device("meta"),
    "default device": default_device,
    "default dtype": default_dtype,
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


class _Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * 1.5 + torch.arange(3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    layer = dict(num_hidden_layers=1, layer_types=["sliding_attention"])
    tiny_model("gemma3_text", dtype=torch.bfloat16, **layer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain(directory: Path) -> ingot.Model:
    return ingot.compile(directory, **SMALL)


@pytest.mark.parametrize("name", STATES)
def test_state_of_torch_changes_nothing(
    name: str, directory: Path, plain: ingot.Model, tmp_path: Path
) -> None:
    state: AbstractContextManager[Any] = STATES[name]()
    module, x = _Module(), torch.randn(2, 4)
    expected = plain.logits([5, 6, 7])
    tokens = plain.generate([5, 6, 7], max_new_tokens=6).tokens
    with torch.no_grad():
        of_module = module(x)
    with state:
        model = ingot.compile(directory, **SMALL)
        logits = model.logits([5, 6, 7])
        assert model.generate([5, 6, 7], max_new_tokens=6).tokens == tokens
        assert plain.generate([5, 6, 7], max_new_tokens=6).tokens == tokens
        model.export(tmp_path / "m.ingot")
        loaded = ingot.load(tmp_path / "m.ingot").logits([5, 6, 7])
        found = ingot.compile(module, example_inputs=(x,))(x)
    assert str(model.graph()) == str(plain.graph())
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(loaded, expected)
    torch.testing.assert_close(found, of_module)
