"""A trained model served on a GPU as on the cpu: batches, streams, ends, chances, replays.

What is batched together never changes which numbers a token's sums have, but in which entry it is
computed may: products of up to 16 tokens and of more, and experts, have kernels of their own, which
sum in other orders. So a prompt gives in company what it gives alone
- bit for bit, in any dtype, where both run in the same entry;
- in f32 the same tokens, whatever the entries;
- in bf16, across entries, the same tokens up to the top-n rule at the first that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends import ON_CPU, ON_GPU, SLOW_ON_CPU, compiled
from ingot.frontends.cli.model_check import F32_TOLERANCE, compare_tokens
from ingot.frontends.cli.references import TransformersReference
from ingot.runtime.serving.sampling import GREEDY, Sampling
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

PICO = Path(__file__).parents[2] / "examples" / "pico"
TEXT = Path(__file__).parents[1] / "fixtures" / "served_text.txt"
SLOTS, SIZES = 8, (1, 8, 64)
LIMITS = {"max_sequences": SLOTS, "max_tokens_per_sequence": 256}
PROMPTS = {"cpu": 12, "gpu": 64}
TOP = 5
DRAWN = Sampling(temperature=0.8, repetition_penalty=1.3, seed=7)


@pytest.fixture(scope="module", params=[ON_CPU, ON_GPU])
def where(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pico(where: str) -> Iterator[Any]:
    with compiled(PICO, where, SIZES, dtype="f32", **LIMITS) as model:
        yield model


@pytest.fixture(scope="module")
def many(where: str) -> int:
    """How many prompts: the cpu is only there to try the tests themselves."""
    return PROMPTS[where]


def pieces(model: Any, count: int) -> list[list[int]]:
    """Prompts of 1 to 120 tokens out of a text, the first of them longer than a chunk.

    The text, of the kind that Pico has learnt, never changes: entries sum in different orders,
    which moves a draw over the edge of its token where the two are within some 1e-6: a chance of
    about one in a hundred for a new text.
    """
    ids = model.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    drawn = np.random.default_rng(0)
    lengths = [120, *drawn.integers(1, 120, count - 1).tolist()]
    starts = drawn.integers(0, len(ids) - 120, count).tolist()
    assert lengths[0] > SIZES[-1] and count > SLOTS
    return [ids[s : s + n] for s, n in zip(starts, lengths, strict=True)]


def run(model: Any, prompts: Sequence[Sequence[int]], count: int, **options: Any) -> list[Any]:
    sequences = model.session.generate(prompts, max_new_tokens=count, **options)
    assert [s.finish_reason for s in sequences] == ["length"] * len(prompts)
    return sequences


def alone(model: Any, prompts: Sequence[Sequence[int]], count: int, **options: Any) -> list[Any]:
    return [run(model, [prompt], count, **options)[0] for prompt in prompts]


# ---- in company as alone


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_tokens_in_company_are_those_of_each_alone(
    pico: Any, many: int, sampling: Sampling
) -> None:
    """All entries: a prompt's chunks and its tokens fall into others in company than alone."""
    prompts = pieces(pico, many)
    before = pico.session.stats.steps
    together = run(pico, prompts, 16, sampling=sampling)
    steps = pico.session.stats.steps - before
    single = alone(pico, prompts, 16, sampling=sampling)
    assert [s.tokens for s in together] == [s.tokens for s in single]
    assert steps < sum(s.stats.steps for s in single) / 3, "they ran side by side"
    assert len({s.tokens for s in together}) > many / 2, "they are no one text"


@pytest.mark.parametrize("where", [SLOW_ON_CPU, ON_GPU])
def test_tokens_in_company_keep_the_top_n_rule_in_bf16(where: str) -> None:
    with compiled(PICO, where, SIZES, dtype="bf16", **LIMITS) as model:
        prompts = pieces(model, PROMPTS[where])
        together = run(model, prompts, 16, top_logprobs=TOP)
        single = alone(model, prompts, 16, top_logprobs=TOP)
    found = [
        compare_tokens(a.tokens, _tops(a), b.tokens, _tops(b))
        for a, b in zip(together, single, strict=True)
    ]
    same = sum(agreement.agreed == agreement.steps for agreement in found)
    print(f"{same} of {len(found)} prompts have the same 16 tokens in company and alone")
    assert all(agreement.near for agreement in found), found
    assert sum(a.agreed for a in found) >= 0.8 * sum(a.steps for a in found)


def _tops(sequence: Any) -> list[list[int]]:
    return [[token for token, _ in step] for step in sequence.top_logprobs]


@pytest.mark.parametrize("where", [SLOW_ON_CPU, ON_GPU])
@pytest.mark.parametrize("quantize", [None, "mxfp4"], ids=["dense", "packed"])
@pytest.mark.parametrize("size", [16, 64])
def test_one_entry_gives_the_same_bits_in_any_company(
    where: str, size: int, quantize: str | None
) -> None:
    """With its kernels fixed, a token's numbers depend on its own sequence alone, also in bf16."""
    options = {"dtype": "bf16", "quantize": quantize, **LIMITS}
    with compiled(PICO, where, (size,), **options) as model:
        prompts = pieces(model, PROMPTS[where])
        together = run(model, prompts, 8, top_logprobs=TOP)
        single = alone(model, prompts, 8, top_logprobs=TOP)
    for a, b in zip(together, single, strict=True):
        assert (a.tokens, a.logprobs, a.top_logprobs) == (b.tokens, b.logprobs, b.top_logprobs)


# ---- what callers see


def test_streaming(pico: Any) -> None:
    """Tokens come as they are made, of all prompts by turns, and spell what `generate` gives."""
    prompts = ["def main(", "import os\n", "class Stack:"]
    whole = pico.generate(prompts, max_new_tokens=12)
    events = list(pico.generate(prompts, max_new_tokens=12, stream=True))
    for i, completion in enumerate(whole):
        mine = [e for e in events if e.index == i]
        assert "".join(e.text for e in mine) == completion.text != ""
        assert tuple(e.token for e in mine if e.token is not None) == completion.tokens
        assert [e.finish_reason for e in mine if e.finish_reason] == [completion.finish_reason]
    assert {e.index for e in events[:5]} == {0, 1, 2}, "no prompt waits for another's end"

    stream = pico.generate(prompts, max_new_tokens=12, stream=True)
    next(stream)
    stream.close()
    assert pico.session.idle, "who stops listening cancels"


def test_cancelling_frees_the_slot_and_changes_nothing_else(pico: Any) -> None:
    prompts = pieces(pico, SLOTS + 2)
    expected = [s.tokens for s in alone(pico, prompts, 12)]
    session = pico.session
    sequences = [session.submit(p, max_new_tokens=12) for p in prompts]
    victim, waiting = sequences[2], sequences[SLOTS]
    while victim.generated < 3:
        session.step()
        assert waiting.slot is None
    slot = victim.slot
    session.cancel(victim)
    assert (victim.finish_reason, victim.slot) == ("cancelled", None)
    events = session.step()
    assert waiting.slot == slot is not None, "the next in line has its place"
    assert [e.finish_reason for e in events if e.sequence is victim] == ["cancelled"]
    while not session.idle:
        session.step()
    assert victim.tokens == expected[2][: victim.generated] and 3 <= victim.generated < 12
    others = [i for i, s in enumerate(sequences) if s is not victim]
    assert [sequences[i].tokens for i in others] == [expected[i] for i in others]


def test_logprobs_are_those_of_transformers(pico: Any) -> None:
    """Of the tokens and of the most likely ones, chosen by the device or, of more, by the host."""
    reference = TransformersReference(PICO, pico)
    prompts = pieces(pico, SLOTS + 1)[:4]
    for asked in (TOP, 30):
        for sequence in run(pico, prompts, 8, top_logprobs=asked):
            logits = reference.answer([*sequence.prompt, *sequence.tokens[:-1]]).logits
            scores = logits[len(sequence.prompt) - 1 :].log_softmax(-1)
            near = F32_TOLERANCE * float(logits.abs().max())
            for step, (token, logprob, top) in enumerate(
                zip(sequence.tokens, sequence.logprobs, sequence.top_logprobs, strict=True)
            ):
                assert abs(logprob - float(scores[step, token])) <= near
                best = scores[step].topk(asked)
                assert [t for t, _ in top][:2] == best.indices.tolist()[:2]
                found = torch.tensor([p for _, p in top])
                assert float((found - best.values).abs().max()) <= near


def test_sampling_is_repeated_by_its_seed(pico: Any, where: str) -> None:
    prompts = pieces(pico, SLOTS + 2)
    narrow = Sampling(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, seed=3)
    for sampling in (DRAWN, narrow):
        first, again = (run(pico, prompts, 12, sampling=sampling) for _ in range(2))
        assert [(s.tokens, s.logprobs) for s in first] == [(s.tokens, s.logprobs) for s in again]
        greedy = run(pico, prompts, 12)
        assert [s.tokens for s in first] != [s.tokens for s in greedy]
    other = run(pico, prompts, 12, sampling=Sampling(temperature=0.8, seed=8))
    assert [s.tokens for s in other] != [s.tokens for s in first]
    if where == "gpu":
        with compiled(PICO, "cpu", SIZES, dtype="f32", **LIMITS) as model:
            on_cpu = run(model, prompts, 12, sampling=DRAWN)
        first = run(pico, prompts, 12, sampling=DRAWN)
        assert [s.tokens for s in first] == [s.tokens for s in on_cpu]


# ---- replays


class _Watched:
    """An executable, and how to run its last replay again, with all outputs."""

    def __init__(self, executable: Any) -> None:
        self._executable = executable
        self.symbols: dict[str, int] = {}
        self._function = ""
        self._inputs: dict[str, Any] = {}

    def launch(self, function: str, symbols: Any, inputs: Any, outputs: Any = None) -> Any:
        self._function, self.symbols = function, dict(symbols)
        self._inputs = {name: np.array(value) for name, value in inputs.items()}
        return self._executable.launch(function, symbols, inputs, outputs)

    def again(self) -> dict[str, bytes]:
        found = self._executable.run(self._function, self.symbols, self._inputs)
        return {name: np.asarray(value).tobytes() for name, value in found.items()}

    def close(self) -> None:
        self._executable.close()


def replayed(model: Any, prompts: list[list[int]]) -> Callable[[], dict[str, bytes]]:
    """Runs the last decoding step of `prompts` again; it writes the same to the cache once more."""
    watched = _Watched(model.session._executable)
    # Each step gets all of its inputs from the host, who can give them again.
    model.session._steps._executable, model.session._ahead = watched, False
    run(model, prompts, 4)
    assert watched.symbols["T"] <= len(prompts), watched.symbols  # of decoding, not of prefill
    return watched.again


@pytest.mark.parametrize("where", [SLOW_ON_CPU, ON_GPU])
@pytest.mark.parametrize(
    ("name", "quantize", "sequences"),
    [("pico", None, 1), ("pico", "mxfp4", 3), ("gpt_oss", "mxfp4", 3)],
)
def test_replays_are_bit_identical(
    where: str, tmp_path: Path, name: str, quantize: str | None, sequences: int
) -> None:
    directory = PICO
    if name != "pico":
        directory = tmp_path
        tiny_model(name, dtype=torch.bfloat16).save_pretrained(directory)
    limits = {"max_sequences": 3, "max_tokens_per_sequence": 192}
    drawn = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (20,), generator=drawn).tolist() for _ in range(sequences)]
    options = {"dtype": "bf16", "quantize": quantize, **limits}
    with compiled(directory, where, (sequences, 16), **options) as model:
        again = replayed(model, prompts)
        first = again()
        assert "logits" in first and any(first["logits"])
        for _ in range(1000 if where == "gpu" else 5):
            assert again() == first
