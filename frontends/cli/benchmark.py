"""`ingot bench`: the figures as tables and lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from ..bench.measure import Serving, StepFigures
from ..bench.run import Result
from .output import table


def result_tables(result: Result) -> Iterator[Table]:
    """The steps side by side, then the launches of each."""
    steps = result.measured.steps
    rows = [
        [
            step.workload,
            f"{step.milliseconds:.3f}",
            f"{step.tokens_per_second:,.0f}",
            f"{step.traffic.bytes / 1e9:.2f}",
            f"{1e3 * step.traffic.bytes / result.rates.bytes_per_second:.3f}",
            f"{step.of_limit:.1%}",
            "" if step.of_gemm_rate is None else f"{step.of_gemm_rate:.1%}",
            str(step.launches),
        ]
        for step in steps
    ]
    heads = ["step", "ms", "tokens/s", "GB", "ms to read", "of the limit", "of the GEMM rate"]
    yield table("Steps", [*heads, "launches"], rows, right=range(1, 8))
    for step in steps:
        yield _launch_table(step)
    if served := result.measured.serving:
        rows = [
            [
                f"{s.batch} × {s.prompt} tokens",
                f"{s.first_token_milliseconds:.1f}",
                "" if s.tokens_per_second is None else f"{s.tokens_per_second:,.1f}",
            ]
            for s in served
        ]
        yield table(
            "Served, host included", ["prompts", "first token, ms", "tokens/s"], rows, right=(1, 2)
        )
        if any(s.speculation for s in served):
            yield _speculation_table(served)
    if result.peers:
        rows = [
            [name, f"{found['tokens_per_second']:,.1f}" if "error" not in found else found["error"]]
            for name, found in result.peers.items()
        ]
        yield table("Peers, batch 1", ["", "tokens/s"], rows, right=(1,))


def _speculation_table(served: Sequence[Serving]) -> Table:
    """What drafting brought each batch."""
    rows = [
        [
            str(s.batch),
            "" if (r.acceptance_length is None) else f"{r.acceptance_length:.2f}",
            "  ".join(f"{rate:.0%}" for rate in r.acceptance_rates),
            f"{r.verified} of {r.verified + r.declined}",
            f"{r.draft_seconds:.3f}",
            f"{r.verify_seconds:.3f}",
            "" if r.speedup is None else f"{r.speedup:.2f}",
            r.decision,
        ]
        for s in served
        if (r := s.speculation)
    ]
    heads = ["batch", "tokens a verified step", "accepted by place", "drafts verified"]
    heads += ["drafting, s", "verifying, s", "speed-up", "last decision"]
    return table("Speculation", heads, rows, right=(0, 1, 4, 5, 6))


def _launch_table(step: StepFigures) -> Table:
    rows = [
        [
            part.op,
            part.place,
            part.kernel,
            "×".join(map(str, part.grid)),
            str(part.count),
            f"{part.microseconds:.2f}",
            f"{part.bytes / 1e6 / part.count:.2f}",
            f"{part.of_limit:.0%}" if part.bytes else "",
            f"{part.share:.1%}",
        ]
        for part in sorted(step.parts, key=lambda part: -part.share)
    ]
    heads = ["op", "of", "kernel", "grid", "times", "µs each", "MB each", "of the limit", "share"]
    alone = sum(part.microseconds * part.count for part in step.parts) / 1e3
    title = f"Launches of {step.workload}: chains of each kind alone, {alone:.3f} ms in all"
    return table(title, heads, rows, right=range(4, 9))


def result_lines(result: Result) -> list[str]:
    """The device, sizes and seconds."""
    rates, measured = result.rates, result.measured
    reads = f"reads {rates.bytes_per_second / 1e12:.2f} TB/s"
    if rates.flops_per_second is not None:
        reads += f", bf16 GEMM {rates.flops_per_second / 1e12:.0f} TFLOP/s"
    sizes = f"{result.weight_bytes / 1e9:.2f} GB of weights, {result.arena_bytes / 1e6:.1f} MB"
    lines = [
        f"{result.model} on {result.device} ({result.target}): {reads}",
        f"{sizes} of scratch, {result.kernels} kernels; loaded in {measured.load_seconds:.1f} s",
    ]
    if seconds := result.compile_seconds:
        stages = ", ".join(f"{name} {each:.1f}" for name, each in seconds.items())
        lines.append(f"compiled in {sum(seconds.values()):.1f} s: {stages}")
    for step in measured.steps:
        layers = ", ".join(f"{count} in {title}" for title, count in step.launches_by_layer.items())
        lines.append(f"{step.workload}: {layers}")
    return lines
