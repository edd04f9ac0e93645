"""Kernels that choose the next tokens, against the host's sampling and the op's reference."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ingot.codegen.kernel_query import Declined, KernelQuery, Operand, dense_strides
from ingot.codegen.templates.sampling import sample as template
from ingot.codegen.templates.sampling.sample import Sizes
from ingot.compiler.ops.sampling import sample
from ingot.compiler.target import target_of
from ingot.compiler.torch_types import type_of
from ingot.runtime.serving.sampling import Sampling
from ingot.runtime.serving.sequence import Sequence
from kernel_checks import Strided, build_everywhere, run_node
from sampling_checks import check_choices, operands, options, random_logits, requests_of

# Several parts and strips, and more scores than the list holds, in a small vocabulary.
SMALL = Sizes(part=32, strip=64, listed=48, block=16)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_sampling(
    logits: torch.Tensor,
    requests: list[Sequence],
    candidates: int = 4,
    strided: bool = False,
) -> list[torch.Tensor]:
    """The kernels choose what the host does; returns their results."""
    given_ = operands(logits.shape[1], requests, candidates)
    x = Strided(logits) if strided else logits
    found, _, _ = run_node(sample, (x, *given_), {"candidates": candidates})
    check_choices(logits, requests, given_[5], found)
    return found


@hypothesis_settings(max_examples=15)
@given(
    st.lists(options, min_size=1, max_size=4),
    st.integers(0, 2**32),
    st.booleans(),
    st.sampled_from([1, 31, 97, 250]),
    st.sampled_from(FLOATS),
)
def test_small_vocabularies_in_many_pieces(
    rows: list[Sampling], seed: int, ties: bool, vocab: int, dtype: torch.dtype
) -> None:
    logits = random_logits(len(rows), vocab, seed, ties).to(dtype)
    top = min(4, vocab)
    with patch.object(template, "SIZES", SMALL):
        check_sampling(logits, requests_of(rows, vocab, top, seed), top)


EVERY = (
    Sampling(),
    Sampling(repetition_penalty=1.25),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.5, top_k=20, seed=2),
    Sampling(temperature=1.5, top_p=0.9, seed=3),
    Sampling(temperature=1.0, min_p=0.05, repetition_penalty=1.25, seed=4),
    Sampling(temperature=0.75, top_k=50, top_p=0.8, min_p=0.01, seed=5),
    Sampling(temperature=30.0, top_p=0.99, seed=6),
)


@pytest.mark.parametrize("vocab", [2000, 20_000])
def test_larger_vocabularies(vocab: int) -> None:
    logits = random_logits(len(EVERY), vocab, 3, ties=False)
    check_sampling(logits, requests_of(EVERY, vocab, 3), 3)


def test_what_rows_lie_beside_does_not_matter() -> None:
    vocab = 500
    logits = random_logits(len(EVERY), vocab, 4, ties=False)
    requests = requests_of(EVERY, vocab, 2)
    together = check_sampling(logits, requests, 2)
    for i in (1, 4, 6):
        alone = check_sampling(logits[i : i + 1], requests[i : i + 1], 2)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a[0], b[i])


def test_logits_that_lie_apart() -> None:
    logits = random_logits(2, 70, 5, ties=True)
    check_sampling(logits, requests_of(EVERY[3:5], 70, 4), strided=True)


@pytest.mark.parametrize("sampling", EVERY[::2], ids=str)
def test_extremes(sampling: Sampling) -> None:
    """Masked tokens, equal ones, negative zeros and the largest numbers."""
    vocab = 150
    logits = torch.stack(
        [
            torch.full((vocab,), -math.inf),
            torch.zeros(vocab),
            torch.zeros(vocab),
            3e38 * torch.linspace(-1, 1, vocab),
        ]
    )
    logits[0, 100], logits[0, 7] = 2.0, 1.0
    logits[2, ::3] = -0.0
    with patch.object(template, "SIZES", SMALL):
        found = check_sampling(logits, requests_of([sampling] * 4, vocab, 4))
    assert found[0][0] in (7, 100)


@pytest.mark.parametrize("small", [True, False])
def test_where_the_kept_tokens_begin(small: bool) -> None:
    """Of almost equal tokens a draw of 0 takes the first that is kept."""
    vocab = 100
    rows = (
        *(Sampling(temperature=1.0, top_k=k) for k in (1, 3, 50, 99)),
        *(Sampling(temperature=1.0, top_p=p) for p in (0.015, 0.505, 0.985)),
        Sampling(temperature=1.0, top_k=10, top_p=0.55),
        Sampling(temperature=1e-3, min_p=0.5),
    )
    logits = torch.linspace(1, 1.01, vocab).expand(len(rows), vocab).contiguous()
    given_ = operands(vocab, requests_of(rows, vocab, 0), 0)
    given_[5].zero_()
    with patch.object(template, "SIZES", SMALL if small else Sizes()):
        found, plain, _ = run_node(sample, (logits, *given_), {})
    assert found[0].tolist() == plain.reference()[0].tolist()
    assert found[0].tolist()[:4] == [99, 97, 50, 1]


def test_penalties_by_sign() -> None:
    vocab = 100
    for sign in (-1, 1):
        logits = sign * torch.linspace(1, 1.01, vocab).expand(2, vocab).contiguous()
        rows = [Sampling(repetition_penalty=p, temperature=0.0) for p in (1.25, 0.75)]
        found = check_sampling(logits, requests_of(rows, vocab, 4))
        tokens = [set(r.history) for r in requests_of(rows, vocab, 4)]
        assert int(found[0][0]) not in tokens[0]
        assert int(found[0][1]) in tokens[1]


def test_a_list_that_is_too_long_leaves_the_next_row_alone() -> None:
    vocab = SMALL.listed + 12
    logits = torch.zeros(2, vocab)
    logits[1, :3] = torch.tensor([8.0, 9.0, 8.5])
    rows = [Sampling(temperature=1.0, top_p=0.95, seed=seed) for seed in (1, 2)]
    with patch.object(template, "SIZES", SMALL):
        found = check_sampling(logits, requests_of(rows, vocab, 4))
    assert int(found[0][1]) < 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_rows(temperature: float) -> None:
    vocab, bad = 100, (math.nan, math.inf, -math.inf)
    logits = random_logits(5, vocab, 6, ties=False)
    for row, value in enumerate(bad):
        logits[row] = value if value == -math.inf else logits[row]
        logits[row, 90 - row] = value
    logits[4, 50] = math.nan
    requests = requests_of([Sampling(temperature=temperature, top_p=0.9)] * 5, vocab, 2)
    given_ = operands(vocab, requests, 3)
    with patch.object(template, "SIZES", SMALL):
        found, plain, _ = run_node(sample, (logits, *given_), {"candidates": 3})
    expected = plain.reference()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, equal_nan=True)
    assert found[0][:3].tolist() == [-1] * 3 and found[0][4] == -1
    assert [str(v) for v in found[1][:3].tolist()] == [str(v) for v in bad]


def test_without_candidates() -> None:
    logits = random_logits(1, 300, 7, ties=False)
    given_ = operands(300, requests_of(EVERY[3:4], 300, 0), 0)
    found, plain, lowered = run_node(sample, (logits, *given_), {"candidates": 0})
    expected = plain.reference()
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    (entry,) = lowered.program.entries
    assert sum(launch.label.startswith("sample") for launch in entry.launches) == 4


def test_it_declines_what_it_cannot_read() -> None:
    logits = random_logits(2, 70, 8, ties=False)
    tensors = (logits, *operands(70, requests_of(EVERY[:2], 70, 0), 0))
    args = [Operand(type_of(t), dense_strides(t.shape)) for t in tensors]
    results = [Operand(t, (1,)) for t in sample.types(tuple(a.type for a in args), {})]
    target = target_of("cuda:sm_90")
    turned = [Operand(args[0].type, (1, 2)), *args[1:]]
    declined = template.sample(KernelQuery(sample, {}, tuple(turned), tuple(results), target))
    assert isinstance(declined, Declined) and "do not lie dense" in declined.reason
    many = {"candidates": 33}
    declined = template.sample(KernelQuery(sample, many, tuple(args), tuple(results), target))
    assert isinstance(declined, Declined)
    assert declined.reason == "expected at most 32 candidates, found 33"


@pytest.mark.parametrize(("vocab", "candidates"), [(128_256, 20), (262_144, 0)])
def test_they_are_built_for_every_target(vocab: int, candidates: int) -> None:
    logits = torch.zeros(2, vocab, dtype=torch.bfloat16)
    given_ = operands(vocab, requests_of(EVERY[:2], vocab, candidates), candidates)
    facts = build_everywhere(sample, (logits, *given_), {"candidates": candidates})
    names = {"part_kernel", "strip_kernel", "list_kernel", "choose_kernel"}
    for built in facts.values():
        assert names <= {found["name"] for found in built}
