"""What drafting by prompt lookup brings a model on text that it was not trained on.

    python examples/speculation.py --model examples/pico --out speculation

Prompts are windows of the held-out files of `train_pico.py`, continued by the model: greedily, and
sampled at temperature 1. As sequences get the same tokens with drafts and without, what is accepted
of every draft follows from the tokens of plain generation: that is the table by k. The speed-up is
measured on the device that is here, one sequence at a time, with as many drafted tokens verified as
pay. Writes `speculation.json` and, where matplotlib is installed, `speculation.png`.
"""

import argparse
import json
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import ingot
from ingot.frontends.api import LoadedModel
from ingot.frontends.text.model_tokenizer import open_tokenizer
from ingot.runtime.serving.ngram import NGramDrafter
from ingot.runtime.serving.sequence import Request
from ingot.runtime.serving.sequence import Sequence as Served
from quality import windows
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from train_pico import read_corpus

WAYS = {"greedy": {"temperature": 0.0}, "temperature 1": {"temperature": 1.0, "seed": 1}}


@dataclass(frozen=True)
class Accepted:
    """What is accepted of drafts of up to `k` tokens.

    `rates` has, for each place in a draft, which share of the tokens drafted there was accepted;
    `length` is the mean of the tokens of a step that verified a draft, `per_step` of all steps, and
    `drafted` the share of steps that had a draft.
    """

    way: str
    k: int
    rates: tuple[float, ...]
    length: float
    per_step: float
    drafted: float


@dataclass(frozen=True)
class Speed:
    """Tokens a second while decoding, and what the session said of its own speed-up."""

    way: str
    k: int
    plain: float
    drafting: float
    own_speedup: float | None

    @property
    def speedup(self) -> float:
        return self.drafting / self.plain


def accepted(
    way: str, k: int, min_match: int, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Accepted:
    """By walking through (prompt, continuation) pairs, as a session that verifies all."""
    drafter = NGramDrafter(k, min_match)
    drafted, right = [0] * k, [0] * k
    steps = verified = tokens = of_verified = 0
    for prompt, continuation in texts:
        sequence = Served(0, tuple(prompt), Request(len(continuation)), seed=0)
        sequence.history.append(continuation[0])
        while sequence.generated < len(continuation):
            most = len(continuation) - sequence.generated - 1
            draft = drafter.draft(sequence, most) if most else []
            coming = continuation[sequence.generated :]
            same = [a == b for a, b in zip(draft, coming, strict=False)]
            kept = same.index(False) if False in same else len(same)
            for place in range(len(draft)):
                drafted[place] += 1
                right[place] += place < kept
            steps, tokens = steps + 1, tokens + kept + 1
            verified, of_verified = verified + bool(draft), of_verified + bool(draft) * (kept + 1)
            sequence.history += coming[: kept + 1]
    rates = tuple(r / d if d else 0.0 for r, d in zip(right, drafted, strict=True))
    length = of_verified / max(verified, 1)
    return Accepted(way, k, rates, length, tokens / max(steps, 1), verified / max(steps, 1))


def generate(
    model: LoadedModel, prompt: Sequence[int], tokens: int, way: Mapping[str, Any]
) -> tuple[tuple[int, ...], float]:
    """The continuation, and the seconds behind its first token."""
    times: list[float] = []
    made: list[int] = []
    for event in model.generate(prompt, max_new_tokens=tokens, stream=True, **way):
        if event.token is not None:
            times.append(perf_counter())
            made.append(event.token)
    return tuple(made), times[-1] - times[0]


def tables(results: Sequence[Accepted], speeds: Sequence[Speed]) -> list[Table]:
    shown = Table(
        "", "k", "steps with a draft", "tokens a verified step", "tokens a step", "by place"
    )
    for r in results:
        by_place = "  ".join(f"{rate:.0%}" for rate in r.rates)
        numbers = (f"{r.drafted:.0%}", f"{r.length:.2f}", f"{r.per_step:.2f}")
        shown.add_row(r.way, str(r.k), *numbers, by_place)
    shown.title = "What is accepted where all that is drafted is verified"
    measured = Table(
        "", "k", "tokens/s without", "tokens/s with", "speed-up", "as the session says"
    )
    for s in speeds:
        own = "" if s.own_speedup is None else f"{s.own_speedup:.2f}"
        rates = (f"{s.plain:.1f}", f"{s.drafting:.1f}", f"{s.speedup:.2f}")
        measured.add_row(s.way, str(s.k), *rates, own)
    measured.title = "Decoding of one sequence at a time, as much verified as pays"
    return [shown, measured]


def plot(results: Sequence[Accepted], file: Path) -> bool:
    """Tokens a step over k; False without matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        return False
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for way in dict.fromkeys(r.way for r in results):
        mine = [r for r in results if r.way == way]
        axes.plot([r.k for r in mine], [r.length for r in mine], "o-", label=f"{way}, verified")
        axes.plot([r.k for r in mine], [r.per_step for r in mine], "o--", label=f"{way}, all steps")
    axes.set_xticks(sorted({r.k for r in results}))
    axes.set_xlabel("k")
    axes.set_ylabel("tokens a step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    return True


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Measure what prompt lookup brings a model.")
    parser.add_argument("--model", type=Path, default=here / "pico")
    parser.add_argument("--out", type=Path, default=Path("speculation"))
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--window", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate for each")
    parser.add_argument("--most", type=int, default=4, help="largest k")
    parser.add_argument("--min-match", type=int, default=2)
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    args = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)  # columns stay whole in a file or a pipe

    tokenizer = open_tokenizer(args.model)
    if tokenizer is None:
        parser.error(f"{args.model} has no tokenizer.json")
    held_out = (d.text for d in read_corpus(args.stdlib) if d.held_out)
    prompts = windows(tokenizer, held_out, args.prompts * args.window, args.window)
    results: list[Accepted] = []
    speeds: list[Speed] = []
    with TemporaryDirectory() as folder, Progress(console=console) as bar:
        path = Path(folder) / "model"
        ingot.compile_to(
            args.model,
            path,
            speculate=ingot.NGram(args.most, args.min_match),
            max_sequences=1,
            max_tokens_per_sequence=args.window + args.tokens,
            progress=False,
        )
        kinds = ["none", *(ingot.NGram(k, args.min_match) for k in range(1, args.most + 1))]
        for way, options in WAYS.items():
            models = [ingot.load(path, speculate=kind) for kind in kinds]
            made: list[list[tuple[int, ...]]] = [[] for _ in models]
            seconds = [0.0 for _ in models]
            for model in models:
                generate(model, prompts[0], args.tokens, options)  # the first use of anything
            # Side by side: what else the machine does falls on all of them.
            for prompt in bar.track(prompts, description=way):
                for i, model in enumerate(models):
                    tokens, taken = generate(model, prompt, args.tokens, options)
                    made[i].append(tokens)
                    seconds[i] += taken
            plain, *others = (
                sum(len(tokens) - 1 for tokens in texts) / taken
                for texts, taken in zip(made, seconds, strict=True)
            )
            for k, rate in enumerate(others, 1):
                results.append(
                    accepted(way, k, args.min_match, list(zip(prompts, made[0], strict=True)))
                )
                speeds.append(Speed(way, k, plain, rate, models[k].session.stats.speedup))
                equal = sum(a == b for a, b in zip(made[0], made[k], strict=True))
                if equal < len(prompts):  # narrow floats round by the batch
                    console.print(f"{way}, k={k}: {equal} of {len(prompts)} texts are equal")
            for model in models:
                model.close()
    for shown in tables(results, speeds):
        console.print(shown)
    args.out.mkdir(parents=True, exist_ok=True)
    data = {
        "model": args.model.name,
        "prompts": len(prompts),
        "window": args.window,
        "tokens": args.tokens,
        "min_match": args.min_match,
        "accepted": [asdict(r) for r in results],
        "speed": [{**asdict(s), "speedup": s.speedup} for s in speeds],
    }
    (args.out / "speculation.json").write_text(json.dumps(data, indent=2) + "\n")
    picture = plot(results, args.out / "speculation.png")
    console.print(
        f"wrote {args.out}/speculation.json" + (" and speculation.png" if picture else "")
    )
    if not picture:
        console.print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
