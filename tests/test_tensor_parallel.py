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
from ingot.runtime.collectives import GroupError
from tiny_models import tiny_model

MODELS = ("llama", "qwen3_moe", "deepseek_v3", "gpt_oss")
ROOT = Path(__file__).parents[1]
# A rank that waits for another one for ever must not keep the tests waiting.
SECONDS = 120.0


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """A server that has everything imported, and no thread, when it forks a rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_worker", "transformers"])
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
def expected() -> dict[str, list[list[int]]]:
    return rank_worker.tokens(MODELS, 1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_tokens_of_ranks_are_those_of_one(
    ranks: int, run: Run, expected: dict[str, list[list[int]]]
) -> None:
    for found in run(ranks, rank_worker.tokens, MODELS):
        assert found == expected


def test_ranks_draw_the_same_seed(run: Run) -> None:
    first, second = run(2, rank_worker.drawn)
    assert first == second and first[0] != first[1]


def test_groups_that_do_not_fit(run: Run) -> None:
    for size, sequences, dtype in run(2, rank_worker.refused):
        assert size.startswith("GroupError: tensor_parallel=3: expected a group of 3, found one of")
        for said in (sequences, dtype):
            assert "compiled different programs: expected the same model and the same" in said


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
