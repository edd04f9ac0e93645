"""`ingot tune`: measure the kernels that a model could use, for the prices of the next compile."""

from __future__ import annotations

import tempfile
from typing import Annotated

import typer

from ...options import CompileOptions
from ..flags import MANY, UsageError
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
    """Time every GEMM kernel that could compute a product of a model, on the GPU that is here.

    The points go into a table in the user's cache, from which compiling for this target takes its
    prices from then on. Weights are random and made on the device.
    """
    from ....codegen.price_table import add_points
    from ....runtime.devices.graph_executable import GpuDriver
    from ...bench.models import config_of
    from ...bench.run import torch_device
    from ...bench.tune import tune
    from ...drivers import driver_here, present_target
    from ...options import AUTO
    from ...progress import Progress

    driver = driver_here(present_target() if options.target == AUTO else options.target)
    if not isinstance(driver, GpuDriver):
        raise UsageError(f"expected a GPU, found {driver.target}, which launches no kernels")
    with tempfile.TemporaryDirectory() as folder, Progress(enabled=options.progress) as progress:
        config_of(model, layers).save_pretrained(folder)
        points = tune(folder, options, driver, torch_device(), progress)
    path = add_points(driver.target, driver.info.name, points)
    rows = [
        [p.kernel, str(p.tokens), f"{p.rows}×{p.columns}", f"{p.microseconds:.2f}"] for p in points
    ]
    heads = ["kernel", "tokens", "weight", "µs"]
    shown = table(f"{model} on {driver.info.name}", heads, rows, right=(1, 2, 3))
    data = [{name: getattr(p, name) for name in p.__struct_fields__} for p in points]
    return Shown(
        lambda: {"table": str(path), "points": data}, [shown, [f"{len(points)} points in {path}"]]
    )
