"""The storage format of each weight and its quantization error."""

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
    """One weight of a matrix product or an embedding: its format, and why.

    `bits` per element include its share of the scales. `error` is the quantization error
    |w - packed| / |w|; None if not quantized. `product_error` is the error of the product over the
    calibration text, |x·wᵀ - x̂·packedᵀ| / |x·wᵀ|, with x̂ from the quantized weights before it.
    """

    name: str
    format: str
    bits: float
    error: float | None
    reason: str
    product_error: float | None = None


@dataclass
class PackingErrors:
    """Measures the quantization error of each weight as it is packed, by the name of its site."""

    errors: dict[str, float] = field(default_factory=dict[str, float])

    def observe(self, node: Node, args: Sequence[Any], results: Sequence[Any]) -> None:
        """See codegen.lower.Observer."""
        if node.op is mxfp4_encode:
            self.errors[node.source] = relative_error(args[0], *results)


def weight_reports(
    packings: Sequence[Packing], measured: PackingErrors
) -> tuple[WeightReport, ...]:
    """One report for each weight that quantize-mxfp4 considered."""
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
