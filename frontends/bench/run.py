"""A benchmark from a name to its figures: plan, weights, device, peers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...compiler.ir import Graph
from ...compiler.text import parse
from ...runtime.artifact.manifest import is_ingot
from ...runtime.artifact.reader import FINAL_GRAPH, open_ingot
from ...runtime.devices.graph_executable import GpuDriver
from ...runtime.driver import WeightLoader
from ...runtime.program import Program
from .. import api
from ..speculate import Speculation, check_rows
from .device_rates import READ_BYTES, bytes_per_second, gemm_flops_per_second
from .measure import Measured, Rates, measure
from .models import config_of
from .peers import measure_peer
from .random_weights import RandomWeights
from .workload import Workload

_PEER_TOKENS = 64


@dataclass(frozen=True)
class Benchmark:
    """What is measured: steps of a model, and peers. With `timeline` the launches of the first step
    are put on a timeline, which takes a replay of every prefix. Serving drafts as `speculate` says.
    """

    model: str
    works: tuple[Workload, ...]
    quantize: str | None = "mxfp4"
    layers: int | None = None
    peers: tuple[str, ...] = ()
    replays: int = 100
    timeline: bool = True
    speculate: Speculation | None = None

    @property
    def sequences(self) -> int:
        return max(work.batch for work in self.works)

    @property
    def tokens(self) -> int:
        """Positions that the longest workload needs, and 256 for serving behind it."""
        return max(work.seen for work in self.works) + 256


@dataclass(frozen=True)
class Result:
    """The figures of one benchmark.

    `compile_seconds` are by stage, without weights; `peers` are as measure_peer gives them, by
    name.
    """

    model: str
    target: str
    device: str
    rates: Rates
    kernels: int
    weight_bytes: int
    arena_bytes: int
    measured: Measured
    compile_seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    peers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Any])


def run(benchmark: Benchmark, driver: GpuDriver, read_bytes: int = READ_BYTES) -> Result:
    """Measure on the device of `driver`; `read_bytes` are streamed for the read bandwidth.

    An ingot is run with its own weights. Of a directory or a name the config alone is read, and
    weights are random, made on the device; the model's own limit of positions is raised where a
    workload is longer. ValueError for what does not go together.
    """
    if is_ingot(Path(benchmark.model)):
        return _of_ingot(benchmark, driver, read_bytes)
    config = config_of(benchmark.model, benchmark.layers, benchmark.tokens)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        plan = api.plan(
            folder,
            entry=api.ALL,
            target=driver.target,
            quantize=benchmark.quantize,
            speculate=benchmark.speculate,
            max_sequences=benchmark.sequences,
            max_tokens_per_sequence=benchmark.tokens,
        )
        weights = RandomWeights(plan.program)
        result = _measured(benchmark, plan.program, plan.graph(), driver, weights, read_bytes)
        prompt = min(work.context for work in benchmark.works)
        peers = {p: measure_peer(Path(folder), p, prompt, _PEER_TOKENS) for p in benchmark.peers}
    return replace(result, compile_seconds=dict(plan.report.seconds), peers=peers)


def _of_ingot(benchmark: Benchmark, driver: GpuDriver, read_bytes: int) -> Result:
    if benchmark.peers or benchmark.layers:
        raise ValueError("bench: peers and layers need a config, which an ingot does not hold")
    artifact = open_ingot(Path(benchmark.model))
    if artifact.program is None:
        raise ValueError(f"bench: expected an ingot for {driver.target}, found one for the cpu")
    check_rows(benchmark.speculate, artifact.program)
    graph = parse(artifact.graphs[FINAL_GRAPH], trusted=False)
    weights = artifact.weights(artifact.program.buffers)
    return _measured(benchmark, artifact.program, graph, driver, weights, read_bytes)


def _measured(
    benchmark: Benchmark,
    program: Program,
    graph: Graph,
    driver: GpuDriver,
    weights: WeightLoader,
    read_bytes: int,
) -> Result:
    rates = Rates(bytes_per_second(driver, read_bytes), gemm_flops_per_second())
    measured = measure(
        program,
        graph,
        driver,
        weights,
        benchmark.works,
        rates,
        replays=benchmark.replays,
        timeline=benchmark.timeline,
        speculation=benchmark.speculate,
    )
    return Result(
        benchmark.model,
        driver.target,
        driver.info.name,
        rates,
        len(program.kernels),
        sum(b.nbytes for b in program.buffers.values() if b.kind == "weight"),
        program.arena_bytes,
        measured,
    )
