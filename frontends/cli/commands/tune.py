"""`ingot tune`: measure the kernels that a model could use, for the prices of the next compile."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from msgspec import structs

from ...options import CompileOptions
from ..flags import MANY
from ..output import Shown, table


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A directory with a config.json, or a name that bench knows."
        ),
    ],
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the model has.")] = None,
    options: CompileOptions = MANY,
) -> Shown:
    """Time, on the GPU that is here, every GEMM kernel that could compute a product of a model.

    Not those of experts. The points go into a table in the user's cache, from which compiling for
    this target takes its prices from then on. Weights are random and made on the device;
    --quantize mxfp4 packs them.
    """
    from ....codegen.price_table import add_points
    from ...bench.models import config_of
    from ...bench.tune import tune
    from ...drivers import gpu_here
    from ...progress import Progress

    driver = gpu_here(options.target)
    with tempfile.TemporaryDirectory() as folder, Progress(enabled=options.progress) as progress:
        config_of(model, layers).save_pretrained(folder)
        points = tune(Path(folder), options, driver, progress)
    path = add_points(driver.target, driver.info.name, points)
    rows = [
        [p.kernel, str(p.tokens), f"{p.rows}×{p.columns}", f"{p.microseconds:.2f}"] for p in points
    ]
    heads = ["kernel", "tokens", "weight", "µs"]
    shown = table(f"{model} on {driver.info.name}", heads, rows, right=(1, 2, 3))
    data = {"table": str(path), "points": [structs.asdict(point) for point in points]}
    return Shown(lambda: data, [shown, [f"{len(points)} points in {path}"]])
