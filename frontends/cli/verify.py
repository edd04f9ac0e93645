"""`ingot verify`: what is compared with what, and how that is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from ..drivers import CPU, present_target
from ..model import Model
from .model_check import F32_TOLERANCE, Check, Reference, built_in_prompts, check_model
from .references import CpuReference, TransformersReference
from .report import table
from .run import UsageError


def prompts_of(path: Path | None) -> list[str]:
    """The lines of a file of prompts; UsageError where there are none."""
    if path is None:
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    if not lines:
        raise UsageError(f"--prompts: {path} holds no prompt; expected one a line")
    return lines


def check_gpu(target: str) -> None:
    """UsageError for the cpu: it would be compared with itself."""
    if (present_target() if target == "auto" else target) == CPU:
        raise UsageError(
            "--quantize: a GPU is compared with the cpu target, and this is it; give --target"
        )


def compared(
    directory: Path,
    model: Model,
    compile_for_cpu: Callable[[], Model] | None,
    *,
    prompts: list[str],
    tokens: int,
    top: int,
    tolerance: float | None,
) -> Check:
    """`model`, of `directory`, beside transformers, or beside the cpu target where that is given.

    UsageError for options that this model cannot have.
    """
    meta = model.session.meta
    longest = meta.max_tokens_per_sequence - tokens
    if longest < 1:
        raise UsageError(f"--tokens {tokens}: sequences end at {meta.max_tokens_per_sequence}")
    if prompts and model.tokenizer is None:
        raise UsageError(f"--prompts: {directory} has no tokenizer.json; leave the option out")
    ids = built_in_prompts(model.tokenizer, meta.vocab_size, longest)
    if prompts and model.tokenizer is not None:
        ids = [model.tokenizer.encode(line)[:longest] for line in prompts]
    if tolerance is None and model.report.dtype == "f32":
        tolerance = F32_TOLERANCE
    reference: Reference = (
        CpuReference(compile_for_cpu())
        if compile_for_cpu is not None
        else TransformersReference(directory, model)
    )
    top = min(top, meta.vocab_size)
    return check_model(model, reference, ids, steps=tokens, top=top, tolerance=tolerance)


def check_data(check: Check) -> dict[str, Any]:
    """The comparison as JSON has it."""
    return {
        **asdict(check),
        "prompts": [{**asdict(p), "near": p.near} for p in check.prompts],
        "logits_error": check.logits_error,
        "logprob_error": check.logprob_error,
        "failures": list(check.failures),
        "ok": check.ok,
    }


def check_tables(check: Check) -> list[Table]:
    """Tokens and numbers of each prompt, and the error of each layer where there are layers."""
    rows: list[list[str]] = []
    for i, p in enumerate(check.prompts):
        parted = ""
        if p.ours is not None:
            ranks = (_among(p.ours_ranked, "theirs"), _among(p.theirs_ranked, "ours"))
            parted = f"{p.ours}, {ranks[0]} / {p.theirs}, {ranks[1]}"
        errors = (f"{p.logits_error:.1e}", f"{p.logprob_error:.1e}")
        rows.append([str(i), str(p.length), f"{p.agreed} of {p.steps}", parted, *errors])
    parting = f"where they part: ours / theirs, among the other's top {check.top}?"
    heads = ["prompt", "tokens", "equal tokens", parting, "Δlogits", "Δlogprobs"]
    title = f"Greedy tokens on {check.target} in {check.dtype}, beside {check.beside}"
    tables = [table(title, heads, rows, right=(0, 1, 2, 4, 5))]
    if check.layers:
        rows = [[layer.path, f"{layer.error:.1e}"] for layer in check.layers]
        tables.append(table("Hidden states", ["layer", "max error"], rows, right=(1,)))
    return tables


def _among(ranked: bool, whose: str) -> str:
    return f"in {whose}" if ranked else f"NOT in {whose}"


def verdict(check: Check) -> list[str]:
    """The figures of all prompts in a line, what is wrong, and the last word."""
    equal, steps = (sum(n) for n in zip(*((p.agreed, p.steps) for p in check.prompts), strict=True))
    figures = (
        f"{equal} of {steps} tokens equal before the first that differs; relative to max |logit|: "
        f"max |Δlogits| {check.logits_error:.1e}, max |Δlogprobs| {check.logprob_error:.1e}"
    )
    return [figures, *check.failures, "agrees" if check.ok else "DISAGREES"]


__all__ = ["check_data", "check_gpu", "check_tables", "compared", "prompts_of", "verdict"]
