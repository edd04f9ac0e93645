"""`ingot explain`: where the time of a step goes by its prices, and what would help."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from ...options import AUTO, CompileOptions
from ..flags import MANY, UsageError
from ..output import Shown, table

if TYPE_CHECKING:
    from rich.table import Table

# Kinds of nodes of which it is told what would help.
_WORST = 5


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A directory with a config.json, or a name that bench knows."
        ),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Sequences that decode at once.")] = 1,
    context: Annotated[int, typer.Option(min=0, help="Tokens before the decoded one.")] = 512,
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the model has.")] = None,
    options: CompileOptions = MANY,
) -> Shown:
    """Show a step of decoding against the roofline: what each launch is priced at, what its bytes
    take at the target's bandwidth, what loses most, and for that the next best kernel and the
    fusions that declined.

    The target's device need not be here, and nothing runs. `ingot bench` measures.
    """
    from ....codegen.lower import serving_bindings
    from ....compiler.target import target_of
    from ....runtime.program import STEP
    from ....runtime.serving.abi import ServingAbi
    from ... import api
    from ...bench.explain import explain
    from ...bench.models import config_of
    from ...bench.workload import Workload
    from ...drivers import present_target
    from ...launches import PlannedEntry

    name = present_target() if options.target == AUTO else options.target
    if not target_of(name).is_gpu:
        raise UsageError("the cpu target launches no kernels: give a GPU's --target")
    work = Workload(batch, 1, context)
    options = replace(
        options,
        target=name,
        max_sequences=max(options.max_sequences, batch),
        max_tokens_per_sequence=max(options.max_tokens_per_sequence, work.seen),
    )
    config = config_of(model, layers, options.max_tokens_per_sequence)
    buckets = serving_bindings(options.max_sequences, options.max_tokens_per_sequence)
    bucket = next(b["T"] for b in buckets if b["T"] >= batch)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        plan = api.plan(folder, entry=str(bucket), **options.keywords())
    entry = plan.program.functions[STEP].entry(ServingAbi(plan.program).smallest(batch, batch))
    step = PlannedEntry.of(plan.program, entry.name, plan.report.choices)
    kinds = explain(step, plan.graph(), plan.report.passes, target_of(name), work)

    def parts() -> Iterator[Table | Sequence[str]]:
        total = sum(k.times * k.priced for k in kinds)
        rows = [
            [
                k.op,
                k.place,
                " ".join(k.kernels),
                str(k.times),
                f"{k.priced:.2f}" + ("" if k.measured else " ~"),
                f"{k.bytes / 1e6:.2f}",
                f"{k.limit:.2f}",
                f"{k.times * k.priced / total:.1%}",
                f"{k.lost:.0f}",
            ]
            for k in kinds
        ]
        heads = [
            "op",
            "of",
            "kernels",
            "times",
            "µs each",
            "MB each",
            "limit, µs",
            "share",
            "lost, µs",
        ]
        yield table(f"{work} for {name}", heads, rows, right=range(3, 9))
        limit = sum(k.times * k.limit for k in kinds)
        at_limit = f"{limit / 1e3:.3f} ms at the bandwidth on paper: {limit / total:.0%}"
        yield [
            f"priced at {total / 1e3:.3f} ms in {len(entry.launches)} launches; {at_limit}",
            "~: modelled; what has no ~ was measured on the target",
        ]
        for k in kinds[:_WORST]:
            lines = [f"{k.op} of {k.place}: {k.lost:.0f} µs lost; {k.why}"]
            lines += [f"  next best: {k.next_best}"] if k.next_best else []
            yield [*lines, *(f"  declined: {why}" for why in k.declined[:3])]

    return Shown(lambda: {"workload": str(work), "kinds": [asdict(k) for k in kinds]}, parts())
