"""`tensor_parallel=N` of compile: N ranks, which are threads, give the tokens of one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ingot
import pytest
import torch
from ingot.codegen.lower import UnsupportedTarget
from ingot.compiler.ops import collective
from ingot.frontends.model import Model
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

PROMPTS = ((5, 9, 77, 3), (64, 1, 30), (120, 119, 118, 7, 8, 9, 10, 11, 12))
ROOT = Path(__file__).parents[2]


def compiled(name: str, ranks: int, **options: Any) -> Model:
    limits = {"max_sequences": 2, "max_tokens_per_sequence": 64, "progress": False}
    return ingot.compile(tiny_model(name), tensor_parallel=ranks, **limits, **options)


def served(model: Model) -> list[Sequence[int]]:
    """Greedy tokens of more prompts than slots, and such as are drawn by a fixed seed."""
    greedy = model.generate(PROMPTS, max_new_tokens=12)
    drawn = model.generate(PROMPTS, max_new_tokens=12, temperature=0.8, top_p=0.9, seed=3)
    return [c.tokens for c in (*greedy, *drawn)]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("llama", 2), ("qwen3_moe", 2), ("deepseek_v3", 2), ("gpt_oss", 2), ("llama", 4)],
)
def test_tokens_of_ranks_are_those_of_one(name: str, ranks: int) -> None:
    with compiled(name, 1) as one, compiled(name, ranks) as several:
        assert served(several) == served(one)
        logits = torch.from_numpy(several.logits(list(PROMPTS[2])))
        expected = torch.from_numpy(one.logits(list(PROMPTS[2])))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_each_rank_holds_its_share_alone() -> None:
    with compiled("llama", 1) as one, compiled("llama", 2) as two:
        whole, shares = one.report.weight_bytes, two.report.weight_bytes
        assert whole < shares < 1.3 * whole, "norms alone are held twice"
        assert two.report.state_bytes == one.report.state_bytes
        ops = {node.op.name for node in two.graph().nodes()}
        assert ops & {"all_reduce", "add_rms_norm"}


def test_a_rank_that_fails_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for it in an exchange: they end with it, and nobody hangs."""
    with compiled("llama", 2) as model:
        before = model.generate([1, 2], max_new_tokens=2)
        exchanged = collective.exchanged

        def failing(x: torch.Tensor, ranks: int, communicator: Any) -> list[torch.Tensor]:
            if communicator.rank == 1:
                raise RuntimeError("rank 1 is gone")
            return exchanged(x, ranks, communicator)

        monkeypatch.setattr(collective, "exchanged", failing)
        (sequence,) = model.session.generate([[1, 2]], max_new_tokens=2)
        assert sequence.finish_reason == "error"
        assert sequence.message == "the step failed: RuntimeError: rank 1 is gone"
        monkeypatch.undo()
        assert model.generate([1, 2], max_new_tokens=2).tokens == before.tokens


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="tensor_parallel: expected at least 1, found 0"):
        compiled("llama", 0)
    with pytest.raises(ValueError, match="tensor_parallel=1"), compiled("llama", 2) as model:
        model.export("nowhere")


def test_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingot.frontends.api, "driver_here", lambda target: None)  # pyright: ignore
    with pytest.raises(UnsupportedTarget, match="threads of the cpu target only, not on cuda"):
        compiled("llama", 2, target="cuda:sm_90")


@pytest.mark.slow
def test_example() -> None:
    example = [str(ROOT / "examples" / "tensor_parallel.py"), str(ROOT / "examples" / "pico")]
    options = ["Once upon a time", "--tokens", "8", "--ranks", "2"]
    command = [sys.executable, *example, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert "over 2 ranks" in done.stdout
