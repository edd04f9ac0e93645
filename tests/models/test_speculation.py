"""Speculation is lossless on whole models: the same tokens, drawn from the same distribution."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import ingot
import numpy as np
import pytest
import torch
from drafting_programs import SWEPT
from eagle_checkpoints import write_eagle
from ingot.frontends import speculate
from ingot.runtime.driver import Array
from ingot.runtime.serving.batch import Row
from ingot.runtime.serving.row_sampling import Choice, RowSampler
from ingot.runtime.serving.sampling import Sampling, distribution, sample, uniform
from ingot.runtime.serving.session import Session
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("shared_traces")

PICO = Path(__file__).parents[2] / "examples" / "pico"
MODELS = ("pico", "llama", "qwen3_moe", "gpt_oss", "gemma3_text")
SAMPLED = {"top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}


@pytest.fixture
def _all_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is drafted is verified, whatever steps take on this machine."""

    def session(*given: Any, **options: Any) -> Session:
        made = Session(*given, **options)
        made._scheduler._adaptive = None
        return made

    monkeypatch.setattr(speculate, "Session", session)


def compiled(name: str, sequences: int, **options: Any) -> Any:
    """In f64, where no two tokens are as likely as each other but for the rounding of a batch."""
    source = PICO if name == "pico" else tiny_model(name)
    return ingot.compile(
        source,
        dtype="f64",
        max_sequences=sequences,
        max_tokens_per_sequence=256,
        progress=False,
        check_import=False,
        **options,
    )


def prompts_for(vocab: int, count: int) -> list[list[int]]:
    """Prompts of 3 to 60 tokens, half of them with repetitions."""
    draw = random.Random(0)
    made: list[list[int]] = []
    for i in range(count):
        tokens = [draw.randrange(3, vocab) for _ in range(draw.randint(3, 30))]
        made.append(tokens + tokens[: len(tokens) * (i % 2)])
    return made


def identity_cases() -> list[Any]:
    """Every model, greedily and by seed: 30 prompts of 64 tokens, and of 128 tokens 200; of one a
    few in short."""
    cases = [pytest.param("qwen3_moe", sampled, 6, 40) for sampled in (False, True)]
    for size, more in (((30, 64), ()), ((200, 128), (pytest.mark.sweep,))):
        for name in MODELS:
            marks = [pytest.mark.slow, *more]
            cases += [pytest.param(name, sampled, *size, marks=marks) for sampled in (False, True)]
    return cases


def moved(name: str, directory: Path, spread: float = 0.2) -> ingot.Draft:
    """The model `name` with other weights by so much noise, which is often right."""
    if name != "pico":
        return noisy(tiny_model(name), directory, spread)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PICO / file, directory)
    return noisy(AutoModelForCausalLM.from_pretrained(PICO), directory, spread)


def noisy(model: Any, directory: Path, spread: float, k: int = 4) -> ingot.Draft:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for _, weight in sorted(model.named_parameters()):
            weight.add_(spread * weight.std() * torch.randn_like(weight))
    model.save_pretrained(directory)
    return ingot.Draft(directory, k)


def headed(model: Any, directory: Path, k: int = 4) -> ingot.Eagle3:
    """A random EAGLE-3 head for `model`, which is right as often as any guess."""
    layers = model.config.num_hidden_layers
    ids = [0, layers // 2, layers - 1]
    write_eagle(directory, model, eagle_aux_hidden_state_layer_ids=ids)
    return ingot.Eagle3(directory, k)


def drafting_by(kind: str, name: str, directory: Path) -> Any:
    """A way to draft four tokens for the model `name`."""
    if kind == "ngram":
        return ingot.NGram(k=4, min_match=1)
    if kind == "draft":
        return moved(name, directory)
    source = AutoModelForCausalLM.from_pretrained(PICO) if name == "pico" else tiny_model(name)
    return headed(source, directory)


@pytest.mark.usefixtures("_all_verified")
@pytest.mark.parametrize(
    "kind",
    [
        "ngram",
        *(
            pytest.param(kind, marks=[pytest.mark.slow, pytest.mark.sweep])
            for kind in ("draft", "eagle3")
        ),
    ],
)
@pytest.mark.parametrize(("name", "sampled", "count", "tokens"), identity_cases())
def test_tokens_are_those_without(
    name: str, sampled: bool, count: int, tokens: int, kind: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_new_tokens": tokens}
    if sampled:  # logits of random weights differ little
        options |= {**SAMPLED, "seed": 11, "temperature": 0.8 if name == "pico" else 0.03}
    plain = compiled(name, 20)
    drafting = compiled(name, 20, speculate=drafting_by(kind, name, tmp_path))
    prompts = prompts_for(plain.session.meta.vocab_size, count)
    expected = plain.generate(prompts, **options)
    found = drafting.generate(prompts, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.tokens, ours.finish_reason) == (theirs.tokens, theirs.finish_reason)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-6)
    stats = drafting.session.stats
    assert stats.verified_steps > count
    steps = [sum(c.stats.steps for c in completions) for completions in (found, expected)]
    assert steps[0] == steps[1] - sum(stats.accepted)
    if kind != "eagle3":
        assert sum(stats.accepted) > count / 2


# ---- the distribution

VOCAB = 8
Prompt = tuple[int, ...]
SAMPLING = Sampling(temperature=0.1, top_k=7, top_p=0.98, min_p=0.01, repetition_penalty=1.02)
Rule = Callable[[Row, Mapping[str, Array], int, Choice], Choice]


def drawn(sampling: Sampling, seed: int) -> Sampling:
    return Sampling(**{**vars(sampling), "seed": seed})


def prompt_of(model: Any) -> Prompt:
    """One that drafts a token which comes in about a third of the cases."""
    prompts = [(5, b, c, 5, b) for b, c in permutations(set(range(VOCAB)) - {5}, 2)]

    def far(prompt: Prompt) -> float:
        chances = distribution(model.logits(prompt)[-1], SAMPLING, prompt)
        return abs(float(chances[prompt[2]]) - 1 / 3)

    return min(prompts, key=far)


def continuations(
    model: Any, prompt: Prompt, count: int, tokens: int, first_seed: int
) -> Counter[tuple[int, ...]]:
    """How often each continuation of `prompt` is drawn, in sequences of `count` seeds."""
    session = model.session
    sequences = [
        session.submit(prompt, max_new_tokens=tokens, sampling=drawn(SAMPLING, first_seed + i))
        for i in range(count)
    ]
    while not session.idle:
        session.step()
    return Counter(sequence.tokens for sequence in sequences)


def exact(model: Any, prompt: Prompt, tokens: int) -> dict[tuple[int, ...], float]:
    """The probability of each continuation, token by token from the model's own logits."""
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(tokens):
        longer: dict[tuple[int, ...], float] = {}
        for continuation, chance in chances.items():
            history = [*prompt, *continuation]
            next_ = distribution(model.logits(history)[-1], SAMPLING, history)
            for token in np.flatnonzero(next_):
                longer[*continuation, int(token)] = chance * float(next_[token])
        chances = longer
    return chances


def chi_square(found: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    """The chance of counts as far from what is expected as these, or farther (Pearson 1900).

    Continuations that are expected fewer than 5 times count as one.
    """
    total = found.total()
    assert found.keys() <= chances.keys()
    cells = [(found[c], total * p) for c, p in chances.items() if total * p >= 5]
    rest = total - sum(n for n, _ in cells), total - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def accepts_what_is_possible(
    row: Row, found: Mapping[str, Array], at: int, choice: Choice
) -> Choice:
    """Wrong: any drafted token that may come is taken."""
    sampling = row.sequence.request.sampling
    chances = distribution(found["logits"][at], sampling, row.history)
    possible = row.drafted is not None and chances[row.drafted] > 0
    return Choice(row.drafted, choice.logprob, ()) if possible else choice  # type: ignore[arg-type]


def redraws_from_all(row: Row, found: Mapping[str, Array], at: int, choice: Choice) -> Choice:
    """Wrong: after a rejection the token is drawn anew from p, the rejected one included."""
    if row.drafted is None or choice.token == row.drafted:
        return choice
    draw = uniform(row.sequence.seed + (1 << 40), row.step)
    token, logprob = sample(found["logits"][at], row.sequence.request.sampling, row.history, draw)
    return Choice(token, logprob, ())


@pytest.mark.usefixtures("_all_verified")
@pytest.mark.parametrize(
    ("kind", "count", "tokens"),
    [
        ("ngram", 600, 2),
        *(pytest.param(kind, 20_000, 3, marks=SWEPT) for kind in ("ngram", "draft", "eagle3")),
    ],
)
def test_the_distribution(
    kind: str, count: int, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continuations are drawn as the model says, with drafts and without; by a rule that accepts
    too much, or one that does not take the rejected token out, they are not."""
    source = tiny_model("llama", vocab_size=VOCAB, max_position_embeddings=1024)
    options: dict[str, Any] = dict(
        max_sequences=100, max_tokens_per_sequence=1024, progress=False, check_import=False
    )
    plain = ingot.compile(source, **options)
    by: Any = ingot.NGram(k=3, min_match=1)
    if kind == "draft":
        by = noisy(
            tiny_model("llama", vocab_size=VOCAB, max_position_embeddings=1024), tmp_path, 0.2, k=3
        )
    if kind == "eagle3":
        by = headed(source, tmp_path, k=3)
    drafting = ingot.compile(source, speculate=by, **options)
    prompt = prompt_of(plain)
    chances = exact(plain, prompt, tokens)
    assert sum(chances.values()) == pytest.approx(1)
    without = continuations(plain, prompt, count, tokens, first_seed=0)
    by_drafts = continuations(drafting, prompt, count, tokens, first_seed=count)
    stats = drafting.session.stats
    assert stats.verified_steps >= 0.9 * count and 0.02 < stats.acceptance_rates[0] < 0.9
    assert chi_square(without, chances) > 1e-3
    assert chi_square(by_drafts, chances) > 1e-3
    # The same seeds give the same tokens.
    assert continuations(drafting, prompt, count, tokens, first_seed=0) == without

    right, outputs = RowSampler.choose, RowSampler.outputs

    def with_logits(self: RowSampler, rows: Sequence[Row]) -> list[str]:
        return list(dict.fromkeys([*outputs(self, rows), "logits"]))

    monkeypatch.setattr(RowSampler, "outputs", with_logits)
    for rule in (accepts_what_is_possible, redraws_from_all):

        def choose(
            self: RowSampler, row: Row, found: Mapping[str, Array], at: int, rule: Rule = rule
        ) -> Choice:
            return rule(row, found, at, right(self, row, found, at))

        monkeypatch.setattr(RowSampler, "choose", choose)
        wrong = continuations(drafting, prompt, count, tokens, first_seed=2 * count)
        assert chi_square(wrong, chances) < 1e-9, rule.__name__
