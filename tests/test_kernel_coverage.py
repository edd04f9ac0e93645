"""Every op is accounted for: it has a template, or it is known why it needs none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.codegen.kernel_backend import NoKernelError
from ingot.codegen.select import templates_of
from ingot.compiler.interpret import random_tensor
from ingot.compiler.ir import Op, Sample
from ingot.compiler.ops.collective import all_gather
from kernel_checks import check_node, run_node

# The result is other strides over the same bytes, or bytes copied as they are.
VIEWS = {"view", "permute", "expand", "slice"}
LEAVES = {"param", "constant", "literal"}
# Ops on weights alone: computed when a program is loaded.
FOLDED = {"mxfp4", "mxfp4_encode", "mxfp4_fragments"}
COLLECTIVE = {"all_reduce", "all_gather"}
OPS = {name: op for name, op in Op.registry.items() if not name.startswith("aten.")}
COVERED = {n: op for n, op in OPS.items() if n in VIEWS or templates_of(n)}
CASES = [(op, sample) for op in COVERED.values() for sample in op.samples]


def test_every_op_is_accounted_for() -> None:
    named = VIEWS | LEAVES | FOLDED | COLLECTIVE
    assert named <= OPS.keys()
    assert OPS.keys() - named == COVERED.keys() - VIEWS
    assert not any(templates_of(n) for n in named)


def arguments(op: Op, sample: Sample, dtype: str | None) -> list[torch.Tensor]:
    """Drawn for a sample, floats in `dtype` if given, where the op is defined."""
    generator = torch.Generator().manual_seed(0)
    symbols = {"T": 3, "L": 2}
    drawn: list[torch.Tensor] = []
    for type_ in sample.args:
        bound: Any = type_.bind(symbols)
        if dtype and bound.dtype == "f32":
            bound = bound.with_dtype(dtype)
        x = random_tensor(bound, generator, sample.high)
        positive = op.name in ("log", "sqrt", "rsqrt", "pow", "div")
        drawn.append(x.abs() + 0.5 if positive and x.is_floating_point() else x)
    return drawn


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize(
    ("op", "sample"), CASES, ids=[f"{op.name}-{i}" for i, (op, _) in enumerate(CASES)]
)
def test_samples(op: Op, sample: Sample, dtype: str | None) -> None:
    # A product that norms its own input rounds x · weight where the reference rounds the normed x,
    # and rows of 8 show it. How near that is to float64 is tested in test_norm_in_product.
    within = dtype is not None and "norm" in sample.attrs.get("optional", ())
    tolerance = 2**-5 if within else None
    check_node(op, arguments(op, sample, dtype), dict(sample.attrs), tolerance=tolerance)


def test_what_ranks_exchange_is_refused() -> None:
    with pytest.raises(NoKernelError, match=r"no kernel for all_gather\(f32\[4\]\) on cuda:sm_90"):
        run_node(all_gather, (torch.ones(4),), {"dim": 0, "ranks": 1})
