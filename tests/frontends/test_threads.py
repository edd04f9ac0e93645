"""Threads that share a model, and threads that compile: each gets what it would get alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ingot
import pytest
import torch
from ingot.frontends.api import plan
from tiny_models import tiny_model

PICO = Path(__file__).parents[2] / "examples" / "pico"
SERVING = {"max_sequences": 4, "max_tokens_per_sequence": 64, "progress": False}


@pytest.fixture(autouse=True)
def _switching() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    """What each gives, all at once; within five minutes, or something is stuck."""
    ready = threading.Barrier(len(works))

    def one(work: Callable[[], Any]) -> Any:
        ready.wait()
        return work()

    pool = ThreadPoolExecutor(len(works))
    try:
        return [job.result(timeout=300) for job in [pool.submit(one, work) for work in works]]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture(scope="module")
def pico() -> Any:
    return ingot.compile(PICO, **SERVING)


ASKED: list[tuple[Any, dict[str, Any]]] = [
    ("def main(", {}),
    (["import os\n", "class Stack:"], {"temperature": 0.8, "seed": 3, "logprobs": 2}),
    ("for i in range(", {"stop": [":"]}),
    (["x = [", "return "], {"temperature": 1.0, "top_k": 20, "seed": 5, "stop": ["\n", ")"]}),
    ("import sys\n", {"repetition_penalty": 1.3}),
]


def said(model: Any, prompts: Any, options: dict[str, Any]) -> list[Any]:
    found = model.generate(prompts, max_new_tokens=12, **options)
    completions = found if isinstance(found, list) else [found]
    return [(c.text, c.tokens, c.finish_reason) for c in completions]


def streamed(model: Any, prompts: Any, options: dict[str, Any]) -> list[Any]:
    """As `said`, of a stream."""
    events = list(model.generate(prompts, max_new_tokens=12, stream=True, **options))
    found: list[Any] = []
    for index in sorted({event.index for event in events}):
        mine = [event for event in events if event.index == index]
        text = "".join(event.text for event in mine)
        found.append((text, mine[-1].finish_reason))
    return found


def given_up(model: Any) -> None:
    """Streams that are left after an event: closed, or dropped."""
    for close in (True, False) * 3:
        stream = model.generate(["a", "b"], max_new_tokens=40, stream=True)
        next(stream)
        if close:
            stream.close()


def test_threads_share_a_model(pico: Any) -> None:
    alone = [said(pico, *asked) for asked in ASKED]
    works = [lambda asked=asked: [said(pico, *asked) for _ in range(2)] for asked in ASKED]
    streams = [lambda asked=asked: streamed(pico, *asked) for asked in ASKED]
    ids = pico.tokenizer.encode("def f(x):")
    logits = pico.logits(ids)
    scored = lambda: [pico.logits(ids) for _ in range(3)]  # noqa: E731
    found = in_threads([*works, *streams, scored, lambda: given_up(pico)])
    for together, expected in zip(found[: len(works)], alone, strict=True):
        assert together == [expected] * 2
    for together, expected in zip(found[len(works) : -2], alone, strict=True):
        assert together == [(text, reason) for text, _, reason in expected]
    for one in found[-2]:
        torch.testing.assert_close(torch.tensor(one), torch.tensor(logits), rtol=0, atol=1e-4)
    assert pico.session.idle


def test_threads_compile_while_another_generates(pico: Any) -> None:
    """torch.export and transformers are patched for a trace, which all threads see."""
    names = ["llama", "gpt_oss"]
    models = {name: tiny_model(name) for name in names}
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    x = torch.randn(3, 8)

    def compiled(name: str) -> tuple[str, Any]:
        with ingot.compile(models[name], **SERVING) as model:
            return str(model.graph()), model.generate([5, 6, 7], max_new_tokens=6).tokens

    def compiled_module() -> tuple[str, Any]:
        made = ingot.compile(module, example_inputs=(x,), progress=False)
        return str(made.graph()), made(x).tolist()

    works: list[Callable[[], Any]] = [lambda name=name: compiled(name) for name in names]
    works += [compiled_module, lambda: [said(pico, *asked) for asked in ASKED]]
    for together, work in zip(in_threads(works), works, strict=True):
        assert together == work()


@pytest.mark.slow
def test_threads_compile_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing in the caches: kernels are built by several calls at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    models = [tiny_model("llama", dtype=torch.bfloat16) for _ in range(3)]
    options = {"target": "cuda:sm_90", "max_sequences": 2, "progress": False}
    plans = in_threads([lambda model=model: plan(model, **options) for model in models])
    assert len({str(p.graph()) for p in plans}) == 1
    assert len({tuple(p.program.kernels) for p in plans}) == 1


def test_threads_call_a_module() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.SiLU(), torch.nn.Linear(64, 16))
    rows = torch.export.Dim("rows", min=1, max=64)
    compiled = ingot.compile(
        module,
        example_inputs=(torch.randn(8, 16),),
        dynamic_shapes=({0: rows},),
        progress=False,
    )
    inputs = [torch.randn(i + 1, 16) for i in range(6)]
    alone = [compiled(x) for x in inputs]
    works = [lambda x=x: [compiled(x) for _ in range(20)] for x in inputs]
    for together, expected in zip(in_threads(works), alone, strict=True):
        assert all(torch.equal(one, expected) for one in together)
