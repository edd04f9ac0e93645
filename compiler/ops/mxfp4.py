"""Weights in MXFP4: what stands for them in a graph, and how they are made.

A quantized weight is a value like any other: `linear(x, mxfp4(codes, scales))`. Such a node depends
on weights alone; where a target has kernels that read the packed form, they match it as their
weight operand, and elsewhere it is folded when the program is loaded. Costs price it by its bytes.
"""

from __future__ import annotations

import torch

from ..axes import rule
from ..dtypes import FLOATS
from ..ir import Node, Op, Sample, Tolerance, free
from ..microscaling import GROUPS, SCALE_RULES, decode, encode
from ..torch_types import torch_dtype
from ..types import TensorType, Types, VerifyError

_CODES, _SCALES = TensorType("u8", (6, 16)), TensorType("u8", (6, 1))


def _group(codes: TensorType, scales: TensorType) -> int:
    """Elements that share a scale; 0 where the shapes do not fit."""
    pairs, blocks = codes.shape[-1:], scales.shape[-1:]
    fits = codes.rank == scales.rank and codes.rank >= 1 and codes.shape[:-1] == scales.shape[:-1]
    if not fits or not isinstance(pairs[0], int) or not isinstance(blocks[0], int) or not blocks[0]:
        return 0
    return 2 * pairs[0] // blocks[0] if 2 * pairs[0] % blocks[0] == 0 else 0


# ---- mxfp4: codes u8 [..., K/2] and scales u8 [..., K/g] -> numbers [..., K]


def _mxfp4_infer(codes: TensorType, scales: TensorType, *, dtype: str) -> Types:
    group = _group(codes, scales)
    if codes.dtype != "u8" or scales.dtype != "u8" or group not in GROUPS:
        raise VerifyError(
            f"mxfp4: expected codes u8 [..., K/2] and scales u8 [..., K/g] with g one of "
            f"{', '.join(map(str, GROUPS))}, found {codes} and {scales}"
        )
    if dtype not in FLOATS:
        raise VerifyError(f"mxfp4: expected a float dtype, found {dtype!r}")
    return (TensorType(dtype, (*codes.shape[:-1], 2 * codes.shape[-1])),)


def _mxfp4_reference(codes: torch.Tensor, scales: torch.Tensor, *, dtype: str) -> torch.Tensor:
    return decode(codes, scales, torch_dtype(dtype))


def _stored(node: Node) -> TensorType:
    (result,), (codes, scales) = node.types, (a.type for a in node.args)
    return result.with_dtype(f"mxfp4g{_group(codes, scales)}")


mxfp4 = Op(
    "mxfp4",
    _mxfp4_infer,
    _mxfp4_reference,
    free,  # whoever uses the weight reads it in its packed form
    (
        Sample((_CODES, _SCALES), {"dtype": "bf16"}, high=251),
        Sample(
            (TensorType("u8", (2, 3, 16)), TensorType("u8", (2, 3, 2))), {"dtype": "f32"}, high=251
        ),
    ),
    stored=_stored,
    # Any two codes; of the scales those of weights, 2^-6 to 1.
    domain={"codes": range(256), "scales": range(121, 128)},
    axes=rule("codes[*,(b c)] scales[*,b] -> [*,(b w)]; c w whole"),
)


# ---- mxfp4_encode: floats [..., K] -> codes and scales (see microscaling.encode)


def _encode_infer(w: TensorType, *, group: int, scale: str) -> Types:
    inner = w.shape[-1] if w.rank else 1
    if w.dtype not in FLOATS or not isinstance(inner, int) or group not in GROUPS or inner % group:
        raise VerifyError(
            f"mxfp4_encode: expected floats [..., K] with K a multiple of the group (one of "
            f"{', '.join(map(str, GROUPS))}), found {w} and group {group}"
        )
    if scale not in SCALE_RULES:
        known = ", ".join(SCALE_RULES)
        raise VerifyError(f"mxfp4_encode: scale is one of {known}; found {scale!r}")
    lead = w.shape[:-1]
    return (TensorType("u8", (*lead, inner // 2)), TensorType("u8", (*lead, inner // group)))


_W = TensorType("f32", (3, 64))
mxfp4_encode = Op(
    "mxfp4_encode",
    _encode_infer,
    encode,
    samples=tuple(Sample((_W,), {"group": g, "scale": s}) for g, s in ((32, "mse"), (16, "even"))),
    # Of what the codes stand for: an element is off by a sixth of its block's largest at most, or a
    # quarter where that is cut.
    tolerance=Tolerance(f64=0.033, f32=0.033, f16=0.033, bf16=0.033),
    axes=rule("w[*,(b w)] -> [*,(b c)], [*,b]; w c whole"),
)
