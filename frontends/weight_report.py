"""How each weight is held, and what rounding it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..compiler.dtypes import STORED_BITS
from ..compiler.ir import Node
from ..compiler.microscaling import relative_error
from ..compiler.ops.mxfp4 import mxfp4_encode
from ..passes.transforms.mxfp4_policy import Packing


@dataclass(frozen=True)
class WeightReport:
    """One weight of a product or an embedding: how it is held, and why.

    `bits` are those of one element, its share of the scales included. `error` is what rounding
    cost, |w - packed| / |w|; None where nothing was rounded. `product_error` is what it costs what
    the weight gives, over a calibration text where there was one: |x·wᵀ - x̂·packedᵀ| / |x·wᵀ|, x̂
    having gone through the packed weights before it.
    """

    name: str
    format: str
    bits: float
    error: float | None
    reason: str
    product_error: float | None = None


@dataclass
class PackingErrors:
    """Measures every weight that is packed, when it is packed; by the names of their sites."""

    errors: dict[str, float] = field(default_factory=dict[str, float])

    def observe(self, node: Node, args: Sequence[Any], results: Sequence[Any]) -> None:
        """See codegen.lower.Observer."""
        if node.op is mxfp4_encode:
            self.errors[node.source] = relative_error(args[0], *results)


def weight_reports(
    packings: Sequence[Packing], measured: PackingErrors
) -> tuple[WeightReport, ...]:
    """A line for each weight that quantize-mxfp4 met."""
    return tuple(_report(packing, measured) for packing in packings)


def _report(packing: Packing, measured: PackingErrors) -> WeightReport:
    site = packing.site
    if packing.group is None:
        return WeightReport(site.name, site.weight.stored.dtype, site.bits, None, site.reason)
    format_ = f"mxfp4g{packing.group}"
    bits = float(STORED_BITS[format_])
    if done := packing.encoded:
        reason = f"{site.reason}; {done}"
        return WeightReport(site.name, format_, bits, done.error, reason, done.product_error)
    reason = f"{site.reason}; rotated" if packing.rotated else site.reason
    return WeightReport(site.name, format_, bits, measured.errors.get(site.name), reason)
