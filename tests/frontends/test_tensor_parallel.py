"""`tensor_parallel=N` of compile: N processes over gloo give the tokens that one process gives."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from queue import Empty
from typing import Any

import ingot
import pytest
import rank_worker
from ingot.compiler.pipeline import run_pipeline
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.passes.raising.canonicalize import Canonicalize
from ingot.passes.raising.raise_ops import RaiseOps
from ingot.runtime.devices.collectives import GroupError
from safetensors.torch import save_file
from tiny_models import tiny_model

MODELS = ("llama", "qwen3_moe", "deepseek_v3", "gpt_oss")
ROOT = Path(__file__).parents[2]
# A rank that waits for another one for ever must not keep the tests waiting.
SECONDS = 120.0


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """A server that has everything imported, and no thread, when it forks a rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ingot.frontends.api", "ingot.frontends.importers.huggingface"])
    return context


Run = Callable[..., list[Any]]


@pytest.fixture
def run(server: ForkServerContext, tmp_path: Path) -> Iterator[Run]:
    """`run(ranks, job, *args)`: what `job(*args, ranks)` gave on each rank."""
    processes: list[Any] = []

    def start(ranks: int, job: Callable[..., Any], *args: Any) -> list[Any]:
        queue = server.Queue()
        meeting = str(tmp_path / f"meeting-{len(processes)}")
        mine = [
            server.Process(
                target=rank_worker.work, args=(rank, ranks, meeting, queue, job, args), daemon=True
            )
            for rank in range(ranks)
        ]
        processes.extend(mine)
        for process in mine:
            process.start()
        results: dict[int, Any] = {}
        end = time.monotonic() + SECONDS
        while len(results) < ranks:
            try:
                rank, result = queue.get(timeout=1)
                results[rank] = result
            except Empty:
                failed = [p.exitcode for p in mine if p.exitcode]
                assert not failed, f"ranks ended with {failed}; their errors stand above"
                assert time.monotonic() < end, f"only ranks {sorted(results)} came back"
        return [results[rank] for rank in range(ranks)]

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> rank_worker.Models:
    """Traced once: ranks are given the graph and the weights."""
    folder = tmp_path_factory.mktemp("models")
    found: dict[str, tuple[str, str]] = {}
    for name in MODELS:
        model = import_hugging_face(tiny_model(name), dtype=None, max_tokens=rank_worker.TOKENS)
        graph = run_pipeline(model.graph, (Canonicalize(), RaiseOps()))[-1].graph
        used = {n.attrs["name"] for n in graph.nodes() if n.op.name == "constant"}
        file = str(folder / f"{name}.safetensors")
        save_file({n: model.weights.load(n).clone() for n in used}, file)
        found[name] = (str(graph), file)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_tokens_of_ranks_are_those_of_one(ranks: int, run: Run, models: rank_worker.Models) -> None:
    expected = rank_worker.tokens(models, 1)
    for found in run(ranks, rank_worker.tokens, models):
        assert found == expected


def test_front_door(run: Run) -> None:
    """`compile` gives every rank the tokens of one process, and draws of one seed."""
    expected, _ = rank_worker.compiled(1)
    (first, drawn), (second, also_drawn) = run(2, rank_worker.compiled)
    assert first == second == expected
    assert drawn == also_drawn and drawn[0] != drawn[1]


def test_groups_that_do_not_fit(run: Run) -> None:
    for size, options in run(2, rank_worker.refused):
        assert size.startswith("GroupError: tensor_parallel=3: expected a group of 3, found one of")
        assert "compiled different programs: expected the same model and the same" in options


def test_without_a_group_it_says_how_to_start_one() -> None:
    with pytest.raises(GroupError, match="in no group; start 2 processes with torchrun --nproc-"):
        ingot.compile(tiny_model("llama"), tensor_parallel=2, progress=False)
    with pytest.raises(ValueError, match="tensor_parallel: expected at least 1, found 0"):
        ingot.compile(tiny_model("llama"), tensor_parallel=0, progress=False)


@pytest.mark.slow
def test_example() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    example = [str(ROOT / "examples" / "tensor_parallel.py"), str(ROOT / "examples" / "pico")]
    options = ["Once upon a time", "--tokens", "8"]
    done = subprocess.run(
        [*command, *example, *options], capture_output=True, text=True, timeout=240, check=True
    )
    assert "over 2 ranks, weights 5.3 + 5.3 MiB" in done.stdout
    alone = subprocess.run(
        [sys.executable, *example, *options], capture_output=True, text=True, check=False
    )
    assert alone.returncode == 2 and "torchrun --nproc-per-node 2" in alone.stderr
