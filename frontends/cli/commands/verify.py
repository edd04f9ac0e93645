"""`ingot verify`: compares a compiled model with a reference and shows the result."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ...drivers import CPU, present_target
from ...options import AUTO, CompileOptions
from ..flags import Directory, UsageError
from ..models import compile_model
from ..output import Shown, table

if TYPE_CHECKING:
    from ..model_check import Check

# Both sides compute in this.
_F32 = CompileOptions(dtype="f32")


def command(
    directory: Directory,
    prompts: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Prompts, one a line, for the built-in."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each.")] = 32,
    top: Annotated[int, typer.Option(min=1, help="n of the top-n rule.")] = 5,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative Δlogits; without it, 1e-4 in f32.")
    ] = None,
    streamed: Annotated[
        bool,
        typer.Option("--streamed", help="Layer by layer, with one in memory; no generation."),
    ] = False,
    options: CompileOptions = _F32,
) -> Shown:
    """Compare with transformers: greedy tokens, logits, and layer outputs.

    With --streamed hidden states and logits alone, of a model that need not fit into memory.

    Where the greedy tokens first differ, each must be among the other's top n. With --quantize a
    GPU is compared with the cpu target instead, which computes with the same weights dequantized.
    """
    from ..model_check import F32_TOLERANCE, check_model, prompt_ids
    from ..references import CpuReference, TransformersReference

    texts = prompts.read_text(encoding="utf-8").splitlines() if prompts else []
    texts = [text for text in texts if text]
    if prompts and not texts:
        raise UsageError(f"--prompts: {prompts} holds no prompt; expected one a line")
    if streamed:
        return _streamed(directory, texts, tolerance, options)
    against_cpu = options.quantize is not None
    if against_cpu and (present_target() if options.target == AUTO else options.target) == CPU:
        raise UsageError(
            "--quantize: a GPU is compared with the cpu target, and this is it; give --target"
        )
    model = compile_model(directory, options)
    meta, tokenizer = model.session.meta, model.tokenizer
    longest = meta.max_tokens_per_sequence - tokens
    if longest < 1:
        raise UsageError(f"--tokens {tokens}: sequences end at {meta.max_tokens_per_sequence}")
    if texts and tokenizer is None:
        raise UsageError(f"--prompts: {directory} has no tokenizer.json; leave the option out")
    ids = prompt_ids(tokenizer, meta.vocab_size, longest, texts)
    if tolerance is None and model.report.dtype == "f32":
        tolerance = F32_TOLERANCE
    if against_cpu:
        reference = CpuReference(compile_model(directory, replace(options, target=CPU)))
    else:
        reference = TransformersReference(directory, model)
    top = min(top, meta.vocab_size)
    with Console(stderr=True).status("comparing"):
        check = check_model(model, reference, ids, steps=tokens, top=top, tolerance=tolerance)
    return Shown(lambda: check_data(check), [*check_tables(check), verdict(check)], check.ok)


def _streamed(
    directory: Path, texts: list[str], tolerance: float | None, options: CompileOptions
) -> Shown:
    """Hidden states of every layer and logits, over the prompts; nothing is compiled."""
    from ....compiler.torch_types import torch_dtype
    from ...import_check import TOLERANCES, compare_streamed
    from ...importers.huggingface import import_hugging_face
    from ...text.model_tokenizer import open_tokenizer
    from ..model_check import F32_TOLERANCE, prompt_ids

    if options.quantize is not None:
        raise UsageError("--streamed compares the imported graph, which --quantize comes after")
    dtype = torch_dtype(str(options.dtype)) if options.dtype else None
    with Console(stderr=True).status("importing"):
        imported = import_hugging_face(
            directory,
            dtype=dtype,
            max_tokens=options.max_tokens_per_sequence,
            allow_unused=options.unused == "allow",
        )
    if tolerance is None:
        tolerance = F32_TOLERANCE if options.dtype == "f32" else TOLERANCES[imported.dtype]
    vocabulary = imported.config.get_text_config().vocab_size
    ids = prompt_ids(open_tokenizer(directory), vocabulary, imported.max_tokens, texts)
    chosen = ids if texts else [max(ids, key=len)]  # each reads the whole checkpoint
    with Console(stderr=True).status("comparing"):
        errors = compare_streamed(imported, directory, chosen)
    failures = [
        f"{path} differs by {error:.1e}, over {tolerance:.0e}"
        for path, error in errors.items()
        if not error <= tolerance  # NaN is not within any tolerance
    ]
    data = {"layers": errors, "tolerance": tolerance, "failures": failures, "ok": not failures}
    rows = [[path, f"{error:.1e}"] for path, error in errors.items()]
    title = f"Hidden states of {imported.config.model_type}, compared with transformers"
    lines = [*failures, "DISAGREES" if failures else "agrees"]
    shown = table(title, ["layer", "max error"], rows, right=(1,))
    return Shown(lambda: data, [shown, lines], not failures)


def check_data(check: Check) -> dict[str, Any]:
    """The comparison for `--json`."""
    return {
        **asdict(check),
        "prompts": [{**asdict(p), "near": p.near} for p in check.prompts],
        "logits_error": check.logits_error,
        "logprob_error": check.logprob_error,
        "failures": list(check.failures),
        "ok": check.ok,
    }


def check_tables(check: Check) -> list[Table]:
    """A table of tokens and errors by prompt, and one of errors by layer if there are any."""
    rows: list[list[str]] = []
    for i, p in enumerate(check.prompts):
        differing = ""
        if p.ours is not None:
            ranks = (_among(p.ours_ranked, "theirs"), _among(p.theirs_ranked, "ours"))
            differing = f"{p.ours}, {ranks[0]} / {p.theirs}, {ranks[1]}"
        errors = (f"{p.logits_error:.1e}", f"{p.logprob_error:.1e}")
        rows.append([str(i), str(p.length), f"{p.agreed} of {p.steps}", differing, *errors])
    differ = f"first difference: ours / theirs, among the other's top {check.top}?"
    heads = ["prompt", "tokens", "equal tokens", differ, "Δlogits", "Δlogprobs"]
    title = f"Greedy tokens on {check.target} in {check.dtype}, compared with {check.reference}"
    tables = [table(title, heads, rows, right=(0, 1, 2, 4, 5))]
    if check.layers:
        rows = [[layer.path, f"{layer.error:.1e}"] for layer in check.layers]
        tables.append(table("Hidden states", ["layer", "max error"], rows, right=(1,)))
    return tables


def _among(ranked: bool, whose: str) -> str:
    return f"in {whose}" if ranked else f"NOT in {whose}"


def verdict(check: Check) -> list[str]:
    """Totals over all prompts, failures, and the verdict."""
    equal, steps = (sum(n) for n in zip(*((p.agreed, p.steps) for p in check.prompts), strict=True))
    figures = (
        f"{equal} of {steps} tokens equal before the first that differs; relative to max |logit|: "
        f"max |Δlogits| {check.logits_error:.1e}, max |Δlogprobs| {check.logprob_error:.1e}"
    )
    return [figures, *check.failures, "agrees" if check.ok else "DISAGREES"]
