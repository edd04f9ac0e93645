"""Ways to compute a node are candidates with prices: all are asked, and the cheapest wins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ingot.codegen import prices
from ingot.codegen.kernel_query import Candidate, Declined, KernelQuery, Operand, dense_strides
from ingot.codegen.select import select, templates_of
from ingot.codegen.templates.gemm import linear as gemm
from ingot.compiler.ops.linear import linear
from ingot.compiler.target import target_of
from ingot.compiler.types import TensorType


def query(tokens: int, target: str = "cuda:sm_90", dtype: str = "bf16") -> KernelQuery:
    shapes = ((tokens, 512), (256, 512), (tokens, 256))
    x, w, y = (Operand(TensorType(dtype, s), dense_strides(s)) for s in shapes)
    return KernelQuery(linear, {}, (x, w), (y,), target_of(target))


def answers(asked: KernelQuery) -> list[Candidate | Declined]:
    (template,) = templates_of("linear")
    found: Any = template(asked)
    return list(found)


@pytest.mark.parametrize("tokens", [1, 16, 17, 512])
@pytest.mark.parametrize("target", ["cuda:sm_90", "hip:gfx942"])
def test_the_cheapest_candidate_wins(tokens: int, target: str) -> None:
    asked = query(tokens, target)
    found = [a for a in answers(asked) if isinstance(a, Candidate)]
    best = select(asked)
    assert isinstance(best, Candidate) and best.seconds == min(c.seconds for c in found)
    others = sorted(c.seconds for c in found)[1:]
    assert (best.runner_up.seconds if best.runner_up else None) == (others[0] if others else None)


def test_prices_decide_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = query(8, "cuda:sm_100")  # modelled: nothing was measured there
    best = select(asked)
    assert isinstance(best, Candidate) and best.reason.startswith("narrow tiles")
    table = {**prices.GEMM_BANDWIDTH, ("narrow", False): 1e-3}
    monkeypatch.setattr(prices, "GEMM_BANDWIDTH", table)
    best = select(asked)
    assert isinstance(best, Candidate) and best.reason.startswith("square tiles")
    assert best.runner_up and best.runner_up.reason.startswith("narrow tiles")


def test_who_declines_says_why() -> None:
    declined = [a.reason for a in answers(query(17)) if isinstance(a, Declined)]
    assert any("17 tokens, expected at most 16" in reason for reason in declined)
    found = select(query(1, dtype="f64"))
    assert isinstance(found, Declined) and "expected one of bf16, f16, f32" in found.reason


def test_every_file_with_a_variant_is_asked() -> None:
    """A kernel variant is one file of the folder: nothing else names it."""
    files = Path(gemm.__file__).parent.glob("*.py")
    with_variant = {f.stem for f in files if "\ndef variant(" in f.read_text()}
    assert {v.__module__.rpartition(".")[2] for v in gemm.VARIANTS} == with_variant
    assert len(with_variant) >= 3


def test_a_variant_more_is_a_candidate_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def variant(product: Any) -> Any:
        (narrow, *_) = (a for v in before for a in v(product) if not isinstance(a, Declined))
        yield replace(narrow, name="another")

    before = gemm.VARIANTS
    count = sum(isinstance(a, Candidate) for a in answers(query(4)))
    monkeypatch.setattr(gemm, "VARIANTS", (*before, variant))
    assert sum(isinstance(a, Candidate) for a in answers(query(4))) == count + 1
