"""Whole models as GPU plans: in interpreters on the CPU, and on a GPU where one is.

A plan is compared with the same graph lowered for the cpu target: logits of a prompt, and the
tokens that several sequences served together go on with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from ingot.codegen.cpu import CpuDriver
from ingot.codegen.kernel_backend import KernelBackend
from ingot.codegen.lower import Lowered, lower
from ingot.compiler.pipeline import PassContext, run_pipeline
from ingot.compiler.target import CPU, Target, target_of
from ingot.frontends.drivers import driver_for, present_target
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.passes.pipelines import TARGET, causal_lm
from ingot.passes.serving.sample_on_device import output_names
from ingot.passes.transforms.mxfp4_policy import MXFP4
from ingot.runtime.serving.sampling import Sampling
from ingot.runtime.serving.session import Session
from interpreted import InterpretedBackend, InterpretedDriver
from tiny_models import COVERAGE, tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

SEQUENCES, TOKENS = 3, 192
META = {
    "vocab_size": 128,
    "page_size": 64,
    "max_sequences": SEQUENCES,
    "max_tokens_per_sequence": TOKENS,
    "pages": SEQUENCES * 3,
}


@dataclass(frozen=True)
class Made:
    """The model for a GPU target and for the cpu, and for the cpu in f32 with the same weights."""

    for_gpu: Lowered
    plain: Lowered
    exact: Lowered


def made(
    name: str,
    dtype: torch.dtype,
    quantize: bool,
    target: Target,
    backend: Callable[[Target], KernelBackend],
    sizes: tuple[int, ...],
) -> Made:
    passes = causal_lm(
        max_sequences=SEQUENCES,
        max_tokens_per_sequence=TOKENS,
        quantize=MXFP4() if quantize else None,
        sample=True,
    )
    bindings = [{"T": t, "L": min(t, SEQUENCES)} for t in sizes]

    def lowered(to: torch.dtype, target: Target, backend: KernelBackend | None) -> Lowered:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = import_hugging_face(tiny_model(name, dtype=dtype), dtype=to, max_tokens=256)
        steps = (*passes, *TARGET) if target.is_gpu else passes
        graph = run_pipeline(model.graph, steps, PassContext(target))[-1].graph
        names = output_names(graph)
        return lower(graph, model.weights, target, bindings, names, META, backend=backend)

    plain = lowered(dtype, CPU, None)
    exact = plain if dtype == torch.float32 else lowered(torch.float32, CPU, None)
    return Made(lowered(dtype, target, backend(target)), plain, exact)


def assert_as_good(found: Any, plain: Any, exact: Any, dtype: torch.dtype) -> None:
    """Logits of prompts as the cpu's in f32; in narrow dtypes as near to f32's as the cpu's are.

    Of the median token: one that stood between two experts may go to the other. Logits are computed
    a few rows at a time, by kernels for few tokens; those for many prefill what is generated here
    and in test_gpu_models.
    """
    for mine, same, best in zip(found, plain, exact, strict=True):
        if dtype == torch.float32:
            assert np.abs(mine - best).max() <= 2e-5 * np.abs(best).max()
            continue
        errors = [np.median(np.sqrt(np.square(x - best).mean(1))) for x in (mine, same)]
        assert errors[0] <= 1.5 * errors[1], (len(best), errors)


def served(model: Lowered, driver: Any, prompts: list[list[int]], count: int) -> tuple[Any, ...]:
    """Logits of every prompt, and what greedy and drawn sequences became."""
    session = Session(model.program, driver.load(model.program, model.load_weight))
    try:
        logits = [session.logits(prompt) for prompt in prompts]
        greedy = session.generate(prompts, max_new_tokens=count)
        # Without top_k and top_p: of tokens that are nearly as likely either may be at their edge.
        drawn = session.generate(
            prompts[:1],
            max_new_tokens=count,
            sampling=Sampling(temperature=0.8, repetition_penalty=1.3, seed=7),
        )
    finally:
        session.close()
    return logits, [s.history for s in greedy], [s.history for s in drawn]


@pytest.mark.parametrize(
    ("name", "dtype", "quantize"),
    [
        ("deepseek_v3", torch.float32, False),
        pytest.param("gemma3_text", torch.float32, False, marks=pytest.mark.slow),
        pytest.param("gpt_oss", torch.float32, False, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", torch.bfloat16, True, marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(name: str, dtype: torch.dtype, quantize: bool) -> None:
    target = target_of("cuda:sm_90")
    models = made(name, dtype, quantize, target, InterpretedBackend, (4, 32))
    prompts = [[3, 14, 15, 92, 6], [5] * 3 + list(range(20, 40)), [7, 8]]
    found = served(models.for_gpu, InterpretedDriver(target.name), prompts, 3)
    plain = served(models.plain, CpuDriver(), prompts, 3)
    exact = served(models.exact, CpuDriver(), prompts, 3)
    assert_as_good(found[0], plain[0], exact[0], dtype)
    if dtype == torch.float32:
        assert found[1:] == plain[1:]


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("name", COVERAGE)
def test_on_the_gpu(name: str, quantize: bool) -> None:
    """In f32, so that near-ties of bf16 do not part the tokens; bf16 by its logits."""
    target = target_of(present_target())
    assert target.is_gpu
    torch.manual_seed(0)
    prompts = [torch.randint(3, 128, (n,)).tolist() for n in (5, 100, 2)]
    sizes = (1, 2, 4, 8, 16, 32, 64, 128)
    for dtype in (torch.float32, torch.bfloat16):
        models = made(name, dtype, quantize, target, KernelBackend, sizes)
        found = served(models.for_gpu, driver_for(target.name), prompts, 16)
        plain = served(models.plain, CpuDriver(), prompts, 16)
        exact = served(models.exact, CpuDriver(), prompts, 16)
        assert_as_good(found[0], plain[0], exact[0], dtype)
        if dtype == torch.float32:
            assert found[1:] == plain[1:]
            alone = served(models.for_gpu, driver_for(target.name), prompts[:1], 16)
            assert alone[1] == found[1][:1]
