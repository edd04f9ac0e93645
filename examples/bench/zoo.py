"""Every causal language model type of transformers, tiny and random: right, or refused clearly?

    python examples/bench/zoo.py [NAME ...] [--output zoo.jsonl] [--markdown docs/coverage.md]

Each type is built by transformers in f32 on the CPU from a tiny configuration, and compiled twice:
as the model in memory, and from the directory that save_pretrained writes. Logits of a prompt that
crosses windows, and greedily decoded tokens with their log-probabilities, are compared with eager
attention. A NAME is a model type or a variant (--list shows all). Every type has a process of its
own, with limits of time and memory. The exit status is 1 where one is wrong or unclear.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, NoReturn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ingot
import ingot.frontends.api
import ingot.frontends.importers.huggingface  # here once, not in the process of every type
import numpy as np
import torch
from tiny_configs import ORDINARY_TOKENS
from transformers import PreTrainedModel
from zoo_models import TYPES, class_of, random_model

PROMPT_TOKENS = 40
NEW_TOKENS = 12
MAX_TOKENS = 96
TOLERANCE = 1e-4  # of max |Δ| against max |logit|
MAX_PARAMETERS = 120_000_000
SECONDS = 300
MEMORY_BYTES = 8 << 30

RIGHT, REFUSED, UNCLEAR, WRONG, NOT_BUILT = "right", "refused", "unclear", "WRONG", "not built here"
_WORST = (NOT_BUILT, RIGHT, REFUSED, UNCLEAR, WRONG)


@dataclass(frozen=True)
class Verdict:
    """What became of one type.

    `refused` is an error of Ingot's own, of one line; `unclear` any other exception, and one that
    only passes on what another says; `not built here` a type that transformers could not make or
    run. `error` is the largest, relative to the largest logit. `memory` and `directory` are the
    verdicts of the two ways in, of which `verdict` is the worse.
    """

    name: str
    verdict: str
    reason: str = ""
    error: float | None = None
    memory: str = ""
    directory: str = ""
    seconds: float = 0.0


class Attempt(NamedTuple):
    """One way in: its verdict, the reason where it is not right, the error where it is known."""

    verdict: str
    reason: str = ""
    error: float | None = None


# ---- what transformers says


@dataclass(frozen=True)
class Reference:
    """A prompt with its logits [T, V], and the tokens that transformers appends to it greedily."""

    prompt: list[int]
    logits: np.ndarray
    tokens: list[int]


def forward(model: PreTrainedModel, tokens: Sequence[int]) -> np.ndarray:
    """The logits [T, V] of a whole sequence, without a cache."""
    with torch.no_grad():
        found = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return found.float().numpy()


def greedy(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """What transformers' own generate appends."""
    ids = torch.tensor([prompt])
    options: dict[str, Any] = dict(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    for name in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
        setattr(model.generation_config, name, None)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return found[0, len(prompt) :].tolist()


def continued(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """The greedy continuation; of whole forward passes where generate itself fails."""
    try:
        return greedy(model, prompt)
    except Exception:  # noqa: BLE001, transformers' code; a model that fails here too is not built
        tokens: list[int] = []
        for _ in range(NEW_TOKENS):
            tokens.append(int(forward(model, prompt + tokens)[-1].argmax()))
        return tokens


def reference(model: PreTrainedModel) -> Reference:
    """The first of some prompts whose continuation holds no image or control token."""
    for seed in range(8):
        drawn = torch.randint(
            ORDINARY_TOKENS.start,
            ORDINARY_TOKENS.stop,
            (PROMPT_TOKENS,),
            generator=torch.Generator().manual_seed(seed),
        )
        prompt = drawn.tolist()
        logits = forward(model, prompt)
        tokens = continued(model, prompt)
        if all(token < ORDINARY_TOKENS.stop for token in tokens):
            break
    if not np.array_equal(forward(model, prompt), logits):
        raise ValueError("the logits of transformers are not finite, or differ from call to call")
    return Reference(prompt, logits, tokens)


# ---- what Ingot makes of it


class Differs(Exception):
    """Numbers or tokens that are not those of transformers."""

    def __init__(self, what: str, error: float) -> None:
        super().__init__(what)
        self.error = error


def relative_error(found: np.ndarray, expected: np.ndarray, scale: float) -> float:
    """max |Δ| / scale where `expected` is no mask; infinite for other shapes or NaN."""
    if found.shape != expected.shape:
        return float("inf")
    counted = np.abs(expected) < 1e30
    error = float(np.abs(found - expected)[counted].max() / scale)
    return error if np.isfinite(error) else float("inf")


def compare(source: Any, model: PreTrainedModel, expected: Reference) -> Attempt:
    """Compile `source` and compare; Differs where something is not equal.

    What counts is the forward pass over each prefix: the caches of some types of transformers give
    other tokens, which a note tells.
    """
    with ingot.compile(
        source, target="cpu", max_sequences=2, max_tokens_per_sequence=MAX_TOKENS, progress=False
    ) as compiled:
        logits = compiled.logits(expected.prompt)
        vocabulary = logits.shape[-1]
        limit = compiled.session.meta.max_tokens_per_sequence
        completion = compiled.generate(
            expected.prompt, max_new_tokens=NEW_TOKENS, logprobs=vocabulary
        )
    finite = expected.logits[np.abs(expected.logits) < 1e30]
    scale = float(np.abs(finite).max())
    error = relative_error(logits, expected.logits, scale)
    if error > TOLERANCE:
        raise Differs(f"logits of the prompt differ by {error:.1e} of the largest", error)
    tokens = list(completion.tokens)
    count = min(NEW_TOKENS, limit + 1 - PROMPT_TOKENS)  # where compiling says a lower limit
    if completion.message or len(tokens) != count:
        raise Differs(f"{len(tokens)} tokens of {count}: {completion.message}", 1.0)
    # Each prefix by itself: rotary frequencies may depend on how long the sequence is.
    prefixes = [expected.prompt + tokens[:i] for i in range(count)]
    said = np.stack([forward(model, prefix)[-1] for prefix in prefixes])
    said = torch.from_numpy(said).double().log_softmax(-1).numpy()
    chosen = np.full((count, vocabulary), np.nan)
    for row, top in zip(chosen, completion.top_logprobs, strict=True):
        row[[token for token, _ in top]] = [logprob for _, logprob in top]
    step = relative_error(chosen, said, scale)
    if step > TOLERANCE:
        raise Differs(f"decoding differs by {step:.1e} of the largest logit", step)
    best = said.max(-1) - said[range(count), tokens]
    if (margin := float(best.max() / scale)) > TOLERANCE:
        raise Differs(f"a token that is not the likeliest (by {margin:.1e})", margin)
    note = "" if limit == MAX_TOKENS else f"sequences end at {limit} tokens"
    if tokens != expected.tokens[:count]:
        at = next(i for i in range(count) if tokens[i] != expected.tokens[i])
        if (said[at, tokens[at]] - said[at, expected.tokens[at]]) / scale > TOLERANCE:
            note = f"generate of transformers, with its cache, takes another token at step {at}"
    return Attempt(RIGHT, note, max(error, step))


def one_line(error: BaseException, limit: int = 400) -> str:
    """The type and text of an exception."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:limit]


def is_clear(error: BaseException) -> bool:
    """Whether an error is Ingot's own, of one line, and not another's exception passed on."""
    ours = any(t.__module__.startswith("ingot.") for t in type(error).__mro__)
    text = str(error)
    return ours and "\n" not in text and "torch.export cannot trace" not in text


def attempt(source: Any, model: PreTrainedModel, expected: Reference) -> Attempt:
    """Compile `source` and compare it with `expected`, which is what `model` says."""
    try:
        return compare(source, model, expected)
    except Differs as error:
        return Attempt(WRONG, str(error), error.error)
    except Exception as error:  # noqa: BLE001, whatever escapes is the finding
        verdict = REFUSED if is_clear(error) else UNCLEAR
        return Attempt(verdict, one_line(error).replace(str(source), "DIR"))


def judge(name: str) -> Verdict:
    """Build, save and compile one type, in this process."""
    start = perf_counter()
    try:
        model = random_model(name, MAX_PARAMETERS)
        expected = reference(model)
    except Exception as error:  # noqa: BLE001, the code of 300 architectures under a guess
        return Verdict(name, NOT_BUILT, one_line(error), seconds=perf_counter() - start)
    memory = attempt(model, model, expected)
    if not np.array_equal(forward(model, expected.prompt), expected.logits, equal_nan=True):
        memory = Attempt(WRONG, "compile changed the model in memory")
    with tempfile.TemporaryDirectory() as directory:
        stored = from_directory(name, model, expected, Path(directory))
    worse = max(memory, stored, key=lambda found: _WORST.index(found.verdict))
    reason = worse.reason
    if memory[:2] != stored[:2]:
        way, other = ("directory", stored) if worse is memory else ("in memory", memory)
        reason += f" [{way}: {other.verdict}{': ' if other.reason else ''}{other.reason}]"
    error = max(
        (found.error for found in (memory, stored) if found.error is not None), default=None
    )
    seconds = round(perf_counter() - start, 1)
    return Verdict(name, worse.verdict, reason, error, memory.verdict, stored.verdict, seconds)


def from_directory(
    name: str, model: PreTrainedModel, expected: Reference, directory: Path
) -> Attempt:
    """Save `model` and compile the directory; where numbers differ, what transformers reads counts.

    Not every type of transformers reads from a directory what it wrote.
    """
    try:
        model.save_pretrained(directory)
    except Exception as error:  # noqa: BLE001, transformers' code
        return Attempt(NOT_BUILT, f"save_pretrained: {one_line(error)}")
    found = attempt(directory, model, expected)
    if found.verdict != WRONG:
        return found
    options: dict[str, Any] = dict(dtype=torch.float32, attn_implementation="eager")
    try:
        read = class_of(name).from_pretrained(directory, **options).eval()
        said = reference(read)
    except Exception as error:  # noqa: BLE001, transformers' code
        return Attempt(NOT_BUILT, f"from_pretrained: {one_line(error)}")
    if np.allclose(said.logits, expected.logits, atol=1e-5):
        return found
    return attempt(directory, read, said)


# ---- one process a type


def isolated(
    name: str, judged: Callable[[str], Verdict] = judge, seconds: int = SECONDS
) -> Verdict:
    """What `judged` says, in a process of its own that may fail or take too long."""
    start = perf_counter()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _judge_and_exit(name, judged, writing, seconds)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return Verdict(**json.loads(text))
    took = round(perf_counter() - start, 1)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        return Verdict(name, UNCLEAR, f"takes more than {seconds} seconds", seconds=took)
    ended = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return Verdict(name, UNCLEAR, f"the process ends: {ended}", seconds=took)


def _judge_and_exit(
    name: str, judged: Callable[[str], Verdict], writing: int, seconds: int
) -> NoReturn:
    """In the child: write the verdict and end, so that nothing of the parent runs twice."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        text = json.dumps(asdict(judged(name)))
        with os.fdopen(writing, "w", encoding="utf-8") as pipe:
            pipe.write(text)
    finally:
        os._exit(1)


# ---- the command


def rows_of(markdown: str) -> dict[str, tuple[str, str]]:
    """The table in a text: verdict and reason by name."""
    rows: dict[str, tuple[str, str]] = {}
    for line in markdown.splitlines():
        if line.startswith("|") and not line.startswith(("|--", "| type")):
            name, verdict, reason = line.strip("|").split("|", 2)
            rows[name.strip()] = verdict.strip(), reason.strip()
    return rows


def with_rows(markdown: str, verdicts: Iterable[Verdict]) -> str:
    """`markdown` with these verdicts in its table, which other rows stay in, and their counts."""
    rows = rows_of(markdown)
    for found in verdicts:
        reason = found.reason.partition(" Model type should be one of")[0]
        reason = reason.replace("|", "/").replace("<", "&lt;").replace("*", "\\*")
        rows[found.name] = found.verdict, reason
    text = [line for line in markdown.splitlines() if not line.startswith(("|", "Counts: "))]
    table = [f"| {name} | {' | '.join(row)} |" for name, row in sorted(rows.items())]
    counted = f"Counts: {counts(verdict for verdict, _ in rows.values())}"
    head = ["| type | verdict | reason |", "|---|---|---|"]
    return "\n".join(["\n".join(text).rstrip(), "", counted, "", *head, *table]).lstrip() + "\n"


def counts(verdicts: Iterable[str]) -> str:
    found = Counter(verdicts)
    return ", ".join(f"{found[v]} {v}" for v in (RIGHT, REFUSED, UNCLEAR, WRONG, NOT_BUILT))


def finished(path: Path | None) -> dict[str, Verdict]:
    """What an earlier run wrote."""
    if path is None or not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {found.name: found for found in (Verdict(**json.loads(line)) for line in lines)}


def sweep(
    names: Sequence[str], output: Path | None, known: Mapping[str, Verdict], seconds: int
) -> list[Verdict]:
    """The verdicts of `names`; those that are not known are found and appended to `output`."""
    verdicts: list[Verdict] = []
    for name in names:
        found = known.get(name) or isolated(name, seconds=seconds)
        if output and name not in known:
            with output.open("a", encoding="utf-8") as out:
                out.write(json.dumps(asdict(found)) + "\n")
        print(f"{name:42} {found.verdict:14} {found.reason[:160]}", flush=True)
        verdicts.append(found)
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types or variants; default: all")
    parser.add_argument(
        "--output", type=Path, help="append JSON lines; what stands there is not run again"
    )
    parser.add_argument("--markdown", type=Path, help="write the rows into the table of this file")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="a type (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    options = parser.parse_args()
    names = options.names or list(TYPES)
    if unknown := [name for name in names if name not in TYPES]:
        parser.error(f"unknown: {', '.join(unknown)}; --list shows all")
    if options.list:
        print("\n".join(names))
        return
    verdicts = sweep(names, options.output, finished(options.output), options.seconds)
    print(counts(found.verdict for found in verdicts))
    if options.markdown:
        path: Path = options.markdown
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(with_rows(before, verdicts), encoding="utf-8")
    sys.exit(any(found.verdict in (UNCLEAR, WRONG) for found in verdicts))


if __name__ == "__main__":
    main()
