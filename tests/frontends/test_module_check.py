"""Modules whose Python state changes what they compute: right, or refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import ingot
import pytest
import torch
from ingot.frontends import module_check
from ingot.frontends.importers.source_error import SourceError
from ingot.frontends.importers.torch_export import ImportFailure, ImportMismatch
from torch import nn

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Stateful(nn.Module):
    """`step(self, x)` is its forward."""

    def __init__(self, step: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.step = step
        self.n, self.flag, self.seen, self.held = 0, True, [0], {}
        self.cache: Any = None
        self.plain = torch.ones(4)
        self.register_buffer("buffer", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(self, x)


def compiled(step: Any, **options: Any) -> Any:
    module = Stateful(step)
    return module, ingot.compile(
        module, example_inputs=(X,), target="cpu", progress=False, **options
    )


def counts(m: Any, x: Any) -> Any:
    m.n += 1
    return m.linear(x) * m.n


def turns(m: Any, x: Any) -> Any:
    m.flag = not m.flag
    return m.linear(x) if m.flag else -m.linear(x)


def warms_up(m: Any, x: Any) -> Any:
    m.n += 1
    return m.linear(x) if m.n < 1000 else -m.linear(x)


def begins(m: Any, x: Any) -> Any:
    first, m.cache = m.cache is None, 1
    return m.linear(x) if first else -m.linear(x)


def appends(m: Any, x: Any) -> Any:
    m.seen.append(1)
    return m.linear(x) * len(m.seen)


def keeps_its_first_input(m: Any, x: Any) -> Any:
    m.cache = x.mean(0) if m.cache is None else m.cache
    return m.linear(x) * m.cache


def grows_a_tensor(m: Any, x: Any) -> Any:
    m.plain = m.plain + 1
    return m.linear(x) + m.plain


def draws(m: Any, x: Any) -> Any:
    return m.linear(x) * random.random()


def trains(m: Any, x: Any) -> Any:
    factor = 2 if m.training else 1
    m.train(not m.training)
    return m.linear(x) * factor


def replaces_a_module(m: Any, x: Any) -> Any:
    found = m.linear(x)
    m.linear = nn.Linear(4, 4)
    return found


def counts_outside() -> Any:
    calls: list[int] = []

    def step(m: Any, x: Any) -> Any:
        calls.append(1)
        return m.linear(x) * len(calls)

    return step


AGAIN = "Stateful: called again with the same inputs it computes other numbers: "
STEPS = [
    (counts, r"\(n\) cannot be compiled"),
    (turns, "cannot be compiled"),
    (warms_up, r"\(n\) cannot be compiled"),
    (begins, r"\(cache\) cannot be compiled"),
    (appends, "cannot be compiled"),
    (keeps_its_first_input, "cannot be compiled"),
    (grows_a_tensor, "cannot be compiled"),
    (draws, "cannot be compiled"),
    (trains, "cannot be compiled"),
    (replaces_a_module, "cannot be compiled"),
    (counts_outside(), "cannot be compiled"),
]


@pytest.mark.parametrize(("step", "words"), STEPS)
def test_what_a_call_leaves_for_the_next_is_refused(step: Any, words: str) -> None:
    with pytest.raises(ImportFailure, match=AGAIN + ".*" + words):
        compiled(step)


def reassigns_a_buffer(m: Any, x: Any) -> Any:
    m.buffer = m.buffer + 1
    return m.linear(x) + m.buffer


def writes_into_a_buffer(m: Any, x: Any) -> Any:
    m.buffer.add_(1)
    return m.linear(x) + m.buffer


def writes_into_a_tensor(m: Any, x: Any) -> Any:
    m.plain.add_(1)
    return m.linear(x) + m.plain


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (reassigns_a_buffer, "writes into buffer"),
        (writes_into_a_buffer, "writes into buffer"),
        (writes_into_a_tensor, "Constant plain is mutated"),
    ],
)
def test_what_writes_into_tensors_is_refused(step: Any, words: str) -> None:
    with pytest.raises(ImportFailure, match=words):
        compiled(step)


def reads_a_flag(m: Any, x: Any) -> Any:
    return m.linear(x) if m.flag else -m.linear(x)


def counts_for_itself(m: Any, x: Any) -> Any:
    m.n += 1
    m.seen.append(x.shape)
    return m.linear(x)


def makes_a_table_once(m: Any, x: Any) -> Any:
    if m.cache is None:
        m.cache = torch.arange(4.0) + 1
    return m.linear(x) * m.cache


@pytest.mark.parametrize("step", [reads_a_flag, counts_for_itself, makes_a_table_once])
def test_state_that_changes_no_number_is_taken(step: Any) -> None:
    module, found = compiled(step)
    before = (module.n, module.seen, module.cache, module.flag)
    for scale in (1.0, -2.0, 3.0):
        torch.testing.assert_close(found(X * scale), module(X * scale).detach())
    assert before[0] == 0 and before[2] is None, "the compiler called a copy"


def test_the_module_of_the_user_is_not_touched() -> None:
    module = Stateful(replaces_a_module)
    linear, tensors = module.linear, {n: t.clone() for n, t in module.state_dict().items()}
    module.train()
    with pytest.raises(ImportFailure):
        ingot.compile(module, example_inputs=(X,), target="cpu", progress=False)
    assert module.linear is linear and module.training and module.n == 0
    assert all(torch.equal(t, tensors[n]) for n, t in module.state_dict().items())


def test_its_first_call_on_demand() -> None:
    module, found = compiled(counts, check_import=False)
    torch.testing.assert_close(found(X), module.linear(X).detach())


def test_weights_that_another_module_computes() -> None:
    """A weight that weight_norm left behind is no leaf, and cannot be copied by itself."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        module = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    found = ingot.compile(module, example_inputs=(X,), target="cpu", progress=False)
    torch.testing.assert_close(found(X), module(X).detach())


def test_what_cannot_be_copied_is_told() -> None:
    module = Stateful(reads_a_flag)
    module.cache = (i for i in range(3))
    with pytest.raises(SourceError, match="Stateful cannot be copied to be traced: .*generator"):
        ingot.compile(module, example_inputs=(X,), target="cpu", progress=False)


def test_a_graph_of_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_check, "interpret", _halved(module_check.interpret))
    with pytest.raises(ImportMismatch, match="Stateful: the imported graph computes other numbers"):
        compiled(reads_a_flag)


def _halved(interpret: Any) -> Any:
    class Halved:
        def __init__(self, found: Any) -> None:
            self.outputs = [x / 2 for x in found.outputs]

    return lambda *given: Halved(interpret(*given))
