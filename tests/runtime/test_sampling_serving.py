"""A whole model that samples by itself gives what it gives when the host samples."""

from __future__ import annotations

import numpy as np
import pytest
from ingot.frontends.api import compile as compile_model
from ingot.passes.pipelines import causal_lm
from ingot.runtime.serving.sampling import Sampling
from ingot.runtime.serving.sequence import Sequence
from ingot.runtime.serving.session import Session
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

PROMPTS = ([5, 6, 7], [1], [9] * 12, [3, 100, 64, 31, 2, 77], [8, 4])
SETTINGS = {
    "greedy": Sampling(),
    "drawn": Sampling(temperature=1.0, seed=3),
    "filtered": Sampling(temperature=0.75, top_k=40, top_p=0.9, min_p=0.02, seed=8),
    "penalized": Sampling(repetition_penalty=1.5),
    "penalized and drawn": Sampling(temperature=1.25, repetition_penalty=1.25, top_p=0.8, seed=1),
}


@pytest.fixture(scope="module")
def sessions() -> list[Session]:
    found: list[Session] = []
    for sample in (False, True):
        model = compile_model(
            tiny_model("llama"),
            target="cpu",
            passes=causal_lm(max_sequences=5, max_tokens_per_sequence=48, sample=sample),
            progress=False,
        )
        found.append(model.session)
    return found


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("top", [0, 4, 25])
def test_the_graph_samples_as_the_host_does(sessions: list[Session], name: str, top: int) -> None:
    runs: list[list[Sequence]] = [
        s.generate(PROMPTS, max_new_tokens=16, sampling=SETTINGS[name], top_logprobs=top)
        for s in sessions
    ]
    for a, b in zip(*runs, strict=True):
        assert a.tokens == b.tokens
        assert len(b.tokens) == 16
        np.testing.assert_allclose(b.logprobs, a.logprobs, atol=1e-4)
        for one, other in zip(a.top_logprobs, b.top_logprobs, strict=True):
            assert [t for t, _ in one] == [t for t, _ in other]
            np.testing.assert_allclose([p for _, p in other], [p for _, p in one], atol=1e-4)


def test_together_as_alone(sessions: list[Session]) -> None:
    sampling = SETTINGS["filtered"]
    together = sessions[1].generate(PROMPTS, max_new_tokens=8, sampling=sampling)
    for prompt, sequence in zip(PROMPTS, together, strict=True):
        (alone,) = sessions[1].generate([prompt], max_new_tokens=8, sampling=sampling)
        assert alone.tokens == sequence.tokens


def test_both_give_the_same_logits(sessions: list[Session]) -> None:
    found, expected = (s.logits(PROMPTS[3]) for s in reversed(sessions))
    np.testing.assert_array_equal(found, expected)
