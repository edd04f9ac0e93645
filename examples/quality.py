"""What MXFP4 costs a model: perplexity on text that it was not trained on, by method and group.

    python examples/quality.py --model examples/pico --out quality

The text is the Python standard library of the running interpreter, split as `train_pico.py` splits
it: one file in 25 is held out, by a hash of its path; GPTQ is calibrated on some of the others.
Writes `quality.json` and, where matplotlib is installed, `quality.png`. Pico takes minutes.
"""

import argparse
import json
import math
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import ingot
import numpy as np
from ingot import MXFP4
from ingot.frontends.text.model_tokenizer import open_tokenizer
from ingot.frontends.text.tokenizer import Tokenizer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from train_pico import read_corpus

METHODS = ("rtn-even", "rtn-mse", "gptq", "gptq+hadamard")
GROUPS = (32, 16)
# A step gives the logits of as many rows as there may be sequences.
ROWS = 32


@dataclass(frozen=True)
class Result:
    """One way of holding the weights. `seconds` are those of compiling.

    `divergence` is the mean over tokens of KL(p ‖ q), nats, from what the unpacked model says to
    what this one says: it is surer than the perplexity, which a wrong weight can also better.
    `error` is the mean over the packed weights of |w - ŵ| / |w|, `product_error` that of
    |x·(w - ŵ)ᵀ| / |x·wᵀ|, which is known where there was a calibration text.
    """

    method: str
    group: int | None
    perplexity: float
    divergence: float
    seconds: float
    error: float | None = None
    product_error: float | None = None


def options(method: str, group: int, texts: Sequence[Sequence[int]]) -> MXFP4:
    """What a line of the table stands for."""
    if method.startswith("rtn"):
        return MXFP4(group=group, scale=method.removeprefix("rtn-"))
    return MXFP4(group=group, method="gptq", hadamard=method.endswith("hadamard"), calibrate=texts)


def windows(
    tokenizer: Tokenizer, texts: Iterable[str], tokens: int, length: int
) -> list[list[int]]:
    """About `tokens` ids of `texts`, evenly from all of them, as sequences of `length`.

    Each begins as the tokenizer begins a text; between texts stands the end-of-text token.
    """
    eos = tokenizer.eos_token_id
    first, end = tokenizer.encode(""), [] if eos is None else [eos]
    stream: list[int] = []
    for text in texts:
        stream += end + tokenizer.encode(text, special_tokens=False)
    step = length - len(first)
    count = min(max(1, round(tokens / length)), len(stream) // step)
    starts = np.linspace(0, len(stream) - step, count).astype(int).tolist()
    return [first + stream[start : start + step] for start in starts]


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def mean(numbers: Iterable[float | None]) -> float | None:
    known = [n for n in numbers if n is not None]
    return sum(known) / len(known) if known else None


def measure(
    directory: Path,
    method: str,
    group: int | None,
    held_out: Sequence[Sequence[int]],
    calibration: Sequence[Sequence[int]],
    unpacked: Path,
    bar: Progress,
) -> Result:
    """Compile the model in one way and read the held-out text with it.

    The log-probabilities of the unpacked model, which comes first, are kept in `unpacked`.
    """
    name = method if group is None else f"{method} g{group}"
    task = bar.add_task(f"{name}: compiling", total=len(held_out))
    packing = None if group is None else options(method, group, calibration)
    start = perf_counter()
    longest = max(map(len, (*held_out, *calibration)))
    with ingot.compile(
        directory,
        quantize=packing,
        max_sequences=ROWS,
        max_tokens_per_sequence=longest,
        progress=False,
    ) as model:
        seconds = perf_counter() - start
        bar.update(task, description=name)
        loss = divergence = 0.0
        for i, ids in enumerate(held_out):
            log_q = log_probabilities(model.logits(ids))
            loss -= float(np.take_along_axis(log_q[:-1], np.array(ids[1:])[:, None], -1).sum())
            if packing is None:
                np.save(unpacked / f"{i}.npy", log_q.astype(np.float16))
            else:
                log_p = np.load(unpacked / f"{i}.npy").astype(np.float32)
                divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
            bar.advance(task)
        packed = [w for w in model.report.weights if w.error is not None]
        return Result(
            method,
            group,
            math.exp(loss / sum(len(ids) - 1 for ids in held_out)),
            divergence / sum(map(len, held_out)),
            seconds,
            mean(w.error for w in packed),
            mean(w.product_error for w in packed),
        )


def table(results: Sequence[Result]) -> Table:
    """A line for each way of holding the weights."""
    shown = Table("method", "group", title="Perplexity on held-out text")
    for column in ("perplexity", "more", "divergence", "weights", "products", "seconds"):
        shown.add_column(column, justify="right")
    base = results[0].perplexity
    for r in results:
        more = r.perplexity / base - 1
        shown.add_row(
            r.method,
            "" if r.group is None else str(r.group),
            f"{r.perplexity:.3f}",
            "" if r.group is None else f"{more:+.2%}",
            "" if r.group is None else f"{r.divergence:.4f}",
            "" if r.error is None else f"{r.error:.2%}",
            "" if r.product_error is None else f"{r.product_error:.2%}",
            f"{r.seconds:.0f}",
        )
    shown.caption = (
        "divergence: from the unpacked model, nats a token; weights, products: relative error of "
        "the packed weights, and of what they give on the calibration text"
    )
    return shown


def plot(results: Sequence[Result], file: Path) -> bool:
    """Bars by method and group: how far above the unpacked model's; False without matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        return False
    base, *packed = results
    more = {(r.method, r.group): 100 * (r.perplexity / base.perplexity - 1) for r in packed}
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    width = 0.8 / len(GROUPS)
    for i, group in enumerate(GROUPS):
        places = [x + (i - (len(GROUPS) - 1) / 2) * width for x in range(len(METHODS))]
        heights = [more[m, group] for m in METHODS]
        bars = axes.bar(places, heights, width, label=f"groups of {group}")
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(METHODS)), METHODS)
    axes.set_ylabel(f"perplexity on held-out text, % above {base.perplexity:.3f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    return True


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Measure what MXFP4 costs a model.")
    parser.add_argument("--model", type=Path, default=here / "pico")
    parser.add_argument("--out", type=Path, default=Path("quality"))
    parser.add_argument("--tokens", type=int, default=32768, help="held-out tokens to read")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512, help="tokens of one sequence")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    args = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)  # columns stay whole in a file or a pipe

    tokenizer = open_tokenizer(args.model)
    if tokenizer is None:
        parser.error(f"{args.model} has no tokenizer.json")
    documents = read_corpus(args.stdlib)
    kept = [d.text for d in documents if not d.held_out]
    # As many texts as windows would do; four times as many, for those that are short.
    some = kept[:: max(1, len(kept) * args.window // (4 * args.calibration_tokens))]
    calibration = windows(tokenizer, some, args.calibration_tokens, args.window)
    held_out_texts = (d.text for d in documents if d.held_out)
    held_out = windows(tokenizer, held_out_texts, args.tokens, args.window)
    ways = [("unpacked", None), *((m, g) for g in GROUPS for m in METHODS)]
    with Progress(console=console) as bar, TemporaryDirectory() as directory:
        whole = bar.add_task("all", total=len(ways))
        results = []
        for method, group in ways:
            given = (held_out, calibration, Path(directory), bar)
            results.append(measure(args.model, method, group, *given))
            bar.advance(whole)
    console.print(table(results))
    args.out.mkdir(parents=True, exist_ok=True)
    found = {
        "model": args.model.name,
        "held_out_tokens": sum(map(len, held_out)),
        "calibration_tokens": sum(map(len, calibration)),
        "window": args.window,
        "results": [asdict(r) for r in results],
    }
    (args.out / "quality.json").write_text(json.dumps(found, indent=2) + "\n")
    picture = plot(results, args.out / "quality.png")
    console.print(f"wrote {args.out}/quality.json" + (" and quality.png" if picture else ""))
    if not picture:
        console.print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
