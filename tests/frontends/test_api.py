"""The front door: what compile takes, refuses, and gives back."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ingot
import numpy as np
import pytest
import torch
from ingot.codegen.entries import Choice
from ingot.frontends.importers.source_error import SourceError
from ingot.frontends.importers.torch_export import ImportFailure
from ingot.runtime.devices.device_api import DriverMissingError
from ingot.runtime.host_memory import NotEnoughMemory
from tiny_models import tiny_model
from torch.nn.functional import dropout

pytestmark = pytest.mark.usefixtures("shared_traces")


@pytest.fixture(scope="module")
def source() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def model(source: Any) -> Any:
    return ingot.compile(source, max_sequences=3, max_tokens_per_sequence=100, verify=True)


@pytest.mark.parametrize("capacity", [1, 3])
def test_small_capacities(source: Any, capacity: int) -> None:
    small = ingot.compile(source, max_sequences=2, max_tokens_per_sequence=capacity)
    assert small.generate([5], max_new_tokens=9).finish_reason == "length"
    with pytest.raises(ValueError, match="tokens"):
        small.generate([5] * (capacity + 1))


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "f64"])
def test_every_dtype_is_served(source: Any, dtype: str) -> None:
    served = ingot.compile(source, dtype=dtype, max_sequences=1, max_tokens_per_sequence=16)
    assert served.logits([5, 6, 7]).dtype == np.float32
    assert len(served.generate([5, 6, 7], max_new_tokens=3).tokens) == 3


def test_a_model_that_is_trained_on_changes_nothing(tmp_path: Path) -> None:
    """Some of its weights would be read in place, and others are folded."""
    source = tiny_model("llama")
    served = ingot.compile(source, max_sequences=1, max_tokens_per_sequence=16)
    before = served.logits([5, 6, 7])
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.5)
    assert np.array_equal(served.logits([5, 6, 7]), before)
    with pytest.raises(SourceError, match=r"\.weight was changed in place since the model was"):
        served.export(tmp_path / "m.ingot")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("sequences", [10**8, 10**30])
def test_more_memory_than_there_is_is_refused_before_it_is_taken(
    source: Any, sequences: int
) -> None:
    start = time.process_time()
    with pytest.raises(NotEnoughMemory, match="expected to need at most the") as caught:
        ingot.compile(source, max_sequences=sequences, max_tokens_per_sequence=100, target="cpu")
    assert "\n" not in str(caught.value) and time.process_time() - start < 60


def test_batched_tokens_are_those_of_each_alone(model: Any) -> None:
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    lengths = torch.randint(1, 80, (64,), generator=generator).tolist()
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]
    together = model.generate(prompts, max_new_tokens=8, temperature=0.9, top_p=0.9, seed=3)
    for prompt, completion in zip(prompts, together, strict=True):
        alone = model.generate(prompt, max_new_tokens=8, temperature=0.9, top_p=0.9, seed=3)
        assert alone.tokens == completion.tokens


def test_prompts_in_every_form(model: Any) -> None:
    one = model.generate([5, 6], max_new_tokens=4)
    assert model.generate(torch.tensor([5, 6]), max_new_tokens=4).tokens == one.tokens
    many = model.generate(([5, 6] for _ in range(3)), max_new_tokens=4)
    assert [c.tokens for c in many] == [one.tokens] * 3
    assert model.generate([]) == []
    events = list(model.generate([5, 6], max_new_tokens=4, stream=True))
    assert tuple(e.token for e in events if e.token is not None) == one.tokens
    for wrong in ("text", [[]], [[200]]):
        with pytest.raises(ValueError, match=r"tokenizer|prompt|token"):
            model.generate(wrong)


def test_end_of_text_ids_come_from_the_generation_config(source: Any) -> None:
    source.generation_config.eos_token_id = [2, 7]
    try:
        assert ingot.compile(source, max_tokens_per_sequence=64).stop_tokens == {2, 7}
    finally:
        source.generation_config.eos_token_id = 2


def test_graphs_by_name(model: Any) -> None:
    assert model.graph("traced") is not model.graph("final")
    assert model.graph() is model.graph("fuse-norm-linear")
    with pytest.raises(KeyError, match="insert-kv-cache"):
        model.graph("nothing")


def test_options_are_refused_not_ignored(source: Any) -> None:
    with pytest.raises(ValueError, match="speculate: expected .* found 'draft'"):
        ingot.compile(source, speculate="draft")
    with pytest.raises(DriverMissingError, match="libamdhip64"):
        ingot.compile(source, target="hip:gfx950")
    with pytest.raises(ValueError, match="unknown target"):
        ingot.compile(source, target="tpu")
    with pytest.raises(ValueError, match="insert-kv-cache, found none"):
        ingot.compile(source, passes=[])
    with pytest.raises(ValueError, match="nn.Module"):
        ingot.compile(source, example_inputs=(torch.ones(1),))
    with pytest.raises(ValueError, match="dtype"):
        ingot.compile(torch.nn.Linear(2, 2), example_inputs=(torch.ones(1, 2),), dtype="bf16")


class _Structured(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
        return {"features": self.norm(self.conv(image)).relu(), "ids": [ids // 2, -ids]}


def test_modules_keep_the_structure_of_what_they_return() -> None:
    module = _Structured()
    module.norm.running_var.uniform_(0.5, 2.0)
    image, ids = torch.randn(2, 3, 8, 8), torch.arange(5)
    compiled = ingot.compile(module, example_inputs=(image, ids), verify=True)
    assert module.training
    found, expected = compiled(image, ids), module.eval()(image, ids)
    torch.testing.assert_close(found, expected)


class _Picks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 6)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[ids.long()] * scale


def test_modules_take_arrays_and_other_dtypes() -> None:
    module, x, ids = _Picks(), torch.randn(3, 4), torch.tensor([2, 0, 1, 1], dtype=torch.int32)
    scale = torch.tensor(2.0, dtype=torch.bfloat16)
    compiled = ingot.compile(module, example_inputs=(x, ids, scale))
    expected = module(x, ids, scale)
    wide, narrow = x.numpy().astype(np.float64), ids.numpy().astype(np.uint16)
    frozen = wide.copy()
    frozen.flags.writeable = False
    for given in (
        (x.numpy(), ids.numpy(), scale),
        (wide, narrow, np.float32(2)),
        (frozen, ids.long(), scale.double()),
        (wide[::-1].copy()[::-1], narrow.astype(">i8"), np.array(2.0)),
        (x.requires_grad_(), ids.byte(), scale),
    ):
        torch.testing.assert_close(compiled(*given), expected)
    for given, error in (
        ((x, ids.float(), scale), r"parameter %ids: expected i32\[4\], found f32\[4\]"),
        ((x, ids.long() + 2**40, scale), "%ids: .* numbers that do not fit"),
        ((x, np.full(4, 2**64 - 1, np.uint64), scale), "%ids: .* numbers that do not fit"),
        ((x > 0, ids, scale), r"%x: expected f32\[3, 4\], found bool"),
        ((x.tolist(), ids, scale), "%x: .* as a tensor or a numpy array, found list"),
        ((np.array([["a"] * 4] * 3), ids, scale), "%x: .* found an array of <U1"),
        ((x.detach().numpy()[:2].T, ids, scale), r"%x: expected f32\[3, 4\], found \[4, 2\]"),
    ):
        with pytest.raises(ValueError, match=error):
            compiled(*given)


class _Counts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x + self.calls


def test_modules_that_write_are_refused() -> None:
    with pytest.raises(ImportFailure, match="writes into"):
        ingot.compile(_Counts(), example_inputs=(torch.ones(2),))


class _Noisy(torch.nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.draw(x) - self.draw(x)


@pytest.mark.parametrize(
    "draw",
    [torch.randn_like, torch.bernoulli, lambda x: dropout(x, 0.5), lambda x: torch.rand(3)],
    ids=["randn_like", "bernoulli", "dropout", "rand"],
)
def test_random_numbers_are_refused(draw: Any) -> None:
    """Equal nodes are one, and what depends on no input is computed once."""
    with pytest.raises(ImportFailure, match=r"at  @test_api.py:\d+ draws random numbers"):
        ingot.compile(_Noisy(draw), example_inputs=(torch.rand(2, 3),), target="cpu")


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: dropout(x, 0.5, training=False),
        lambda x: dropout(x, 0.0),
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    ],
    ids=["off", "never", "attention"],
)
def test_dropout_that_is_off_is_not_random(draw: Any) -> None:
    x = torch.rand(2, 4, 8)
    source = _Noisy(draw)
    compiled = ingot.compile(source, example_inputs=(x,), target="cpu")
    torch.testing.assert_close(compiled(x), source(x))


def test_modules_that_are_trained_on_change_nothing() -> None:
    source, x = torch.nn.Linear(8, 8), torch.rand(3, 8)
    compiled = ingot.compile(source, example_inputs=(x,), target="cpu")
    before = source(x).detach()
    with torch.no_grad():
        source.weight.mul_(2)
    torch.testing.assert_close(compiled(x), before)


def test_modules_come_out_in_their_modes() -> None:
    part = torch.nn.BatchNorm1d(8).eval()
    source = torch.nn.Sequential(torch.nn.Linear(8, 8), part, torch.nn.Dropout(0.5))
    source.train()
    part.eval()
    ingot.compile(source, example_inputs=(torch.randn(3, 8),), target="cpu")
    assert [m.training for m in source.modules()] == [True, True, False, True]


def test_what_torch_cannot_export_is_said_in_one_line() -> None:
    source = torch.nn.Linear(8, 8)
    with pytest.raises(ImportFailure, match=r"^Linear: torch.export cannot trace it: [^\n]*$"):
        ingot.compile(source, example_inputs=(torch.ones(2, 8),), dynamic_shapes=({}, {}))


def test_report_says_which_kernels_and_why(model: Any) -> None:
    assert not model.report.kernels  # references have none
    few = Choice("linear", "T=1,L=1", ("fragment_kernel",), "few tokens", 1e-6)
    many = Choice("linear", "T=64,L=8", ("product_kernel",), "many tokens", 1e-6)
    report = replace(model.report, choices=(few, few, many))
    first, second = report.kernels
    assert first == {**first, "entry": "T=1,L=1", "why": "few tokens", "nodes": 2, "seconds": 2e-6}
    assert second["kernels"] == ["product_kernel"] and second["nodes"] == 1
    assert "kernels of T=64,L=8\n  1 x linear: product_kernel (many tokens)" in str(report)
