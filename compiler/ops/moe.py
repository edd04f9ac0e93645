"""Mixture of experts: the router's choice of k experts a token, and the experts themselves."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from ..axes import rule
from ..dtypes import FLOATS
from ..ir import Cost, Op, Operands, Sample, moved, per_element
from ..torch_types import torch_dtype, wide
from ..types import TensorType, Types, VerifyError, dim
from .glu import ACTIVATIONS, CLAMPED, check_activation, glu
from .linear import product
from .pointwise import sigmoid_of

# ---- router: logits [T, E] (and a correction [E]) -> weights [T, k + S], indices [T, k + S]
#
#   scores  = softmax or sigmoid of the logits, in f32
#   choice  = scores + correction; of `groups` equal groups only the best `topk_groups` stay, judged
#             by their largest choice ("max") or the sum of their two largest ("top2")
#   weights = the scores of the k best choices, divided by (their sum + eps) if `normalize`,
#             times `scale`
# and with `shared` = S, S more columns: the experts E … E + S - 1, which every token has, weigh 1.
# (DeepSeek-V2, arXiv:2405.04434 §2.1.2; DeepSeek-V3, arXiv:2412.19437 §2.1.2. With one group,
# no correction and `normalize` this is also softmax over the k largest logits.)


def _router_infer(
    logits: TensorType,
    *,
    correction: TensorType | None = None,
    k: int,
    score: str,
    normalize: bool,
    dtype: str,
    groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    scale: float = 1.0,
    eps: float = 0.0,
    shared: int = 0,
) -> Types:
    experts = logits.shape[-1] if logits.rank == 2 else 0
    if logits.dtype not in FLOATS or not isinstance(experts, int) or not 1 <= k <= experts:
        raise VerifyError(f"router: expected logits [T, E] with E >= k = {k}, found {logits}")
    fits = correction is None or correction.shape == logits.shape[1:]
    if not fits or correction and correction.dtype not in FLOATS:
        raise VerifyError(f"router: expected a float correction [{experts}], found {correction}")
    if dtype not in FLOATS:
        raise VerifyError(f"router: expected a float dtype of the weights, found {dtype!r}")
    if score not in ("softmax", "sigmoid") or group_score not in ("max", "top2"):
        raise VerifyError(f"router: unknown score {score!r} or group_score {group_score!r}")
    needed = 2 if group_score == "top2" and topk_groups < groups else 1
    if (
        not 1 <= topk_groups <= groups
        or experts % groups
        or experts // groups < needed
        or topk_groups * experts // groups < k
    ):
        raise VerifyError(
            f"router: {topk_groups} of {groups} groups of {experts} experts, judged by "
            f"{group_score}, cannot give {k}"
        )
    if shared < 0:
        raise VerifyError(f"router: expected at least 0 shared experts, found {shared}")
    weights = TensorType(dtype, (logits.shape[0], k + shared))
    return (weights, weights.with_dtype("i64"))


def _router_reference(
    logits: torch.Tensor,
    *,
    correction: torch.Tensor | None = None,
    k: int,
    score: str,
    normalize: bool,
    dtype: str,
    groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    scale: float = 1.0,
    eps: float = 0.0,
    shared: int = 0,
) -> tuple[torch.Tensor, ...]:
    scores = wide(logits)
    scores = sigmoid_of(scores) if score == "sigmoid" else torch.softmax(scores, -1)
    choice = scores if correction is None else scores + correction
    if topk_groups < groups:
        grouped = choice.view(len(choice), groups, -1)
        best = grouped.topk(2 if group_score == "top2" else 1, -1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept.scatter_(1, best.topk(topk_groups, -1).indices, True)
        choice = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    indices = choice.topk(k, -1).indices
    weights = scores.gather(1, indices)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    weights = (weights * scale).to(torch_dtype(dtype))
    if not shared:
        return weights, indices
    always = torch.arange(shared, device=logits.device) + logits.shape[1]
    always = always.expand(len(logits), -1)
    ones = torch.ones_like(always, dtype=weights.dtype)
    return torch.cat((weights, ones), 1), torch.cat((indices, always), 1)


_LOGITS = TensorType("f32", (5, 8))
_CORRECTED = {"correction": TensorType("f32", (8,)), "eps": 1e-20, "shared": 3}
_CHOICE = {"k": 2, "score": "softmax", "normalize": True, "dtype": "f32"}
_GROUPS = {"score": "sigmoid", "groups": 4, "topk_groups": 2, "group_score": "top2", "scale": 2.5}
router = Op(
    "router",
    _router_infer,
    _router_reference,
    per_element(8, "logits"),
    (
        Sample((_LOGITS,), _CHOICE),
        Sample((_LOGITS,), {**_CHOICE, **_GROUPS, **_CORRECTED}),
    ),
    axes=rule("logits[t,e] correction[e]? -> [t,j], [t,j]; e j whole"),
)


# ---- experts: sum over the chosen experts of weight · down(act(gate(x)) · up(x)).
# gate_up [E, 2I, D] holds the gate rows first, then the up rows ([E, I, D] if not `gated`);
# down is [E, D, I]; biases, both or none, are [E, 2I] and [E, D]. A residual [T, D] is added to the
# sum, in f32, before it is rounded.


def _experts_infer(
    x: TensorType,
    weights: TensorType,
    indices: TensorType,
    gate_up: TensorType,
    down: TensorType,
    *,
    gate_up_bias: TensorType | None = None,
    down_bias: TensorType | None = None,
    residual: TensorType | None = None,
    activation: str,
    gated: bool = True,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> Types:
    biases = [b for b in (gate_up_bias, down_bias) if b is not None]
    check_activation("experts", activation, alpha, limit)
    if activation == CLAMPED and not gated:
        raise VerifyError(f"experts: expected gated experts for {activation}, found ungated ones")
    if x.rank != 2 or indices.rank != 2 or indices.shape != weights.shape:
        raise VerifyError(
            f"experts: expected x [T, D], weights and indices [T, k], "
            f"found {x}, {weights}, {indices}"
        )
    if indices.dtype not in ("i32", "i64") or indices.shape[0] != x.shape[0]:
        raise VerifyError(f"experts: expected integer indices [T, k] for x {x}, found {indices}")
    if x.dtype not in FLOATS or weights.dtype not in FLOATS:
        raise VerifyError(f"experts: expected floats, found x {x} and weights {weights}")
    if (
        gate_up.rank != 3
        or down.rank != 3
        or {t.dtype for t in (gate_up, down, *biases)} != {x.dtype}
    ):
        found = ", ".join(map(str, (gate_up, down, *biases)))
        raise VerifyError(f"experts: expected 3-D weights and biases of x's dtype, found {found}")
    count, rows, width = gate_up.shape
    hidden: Any = rows / 2 if gated else rows
    if width != x.shape[1] or down.shape != (count, width, hidden):
        rows_of = "[E, 2I, D]" if gated else "[E, I, D]"
        raise VerifyError(
            f"experts: expected weights {rows_of} and [E, D, I] for x {x}, found {gate_up}, {down}"
        )
    if biases and tuple(b.shape for b in biases) != ((count, rows), (count, width)):
        found = ", ".join(map(str, biases))
        raise VerifyError(
            f"experts: expected biases [{count}, {rows}], [{count}, {width}], found {found}"
        )
    if residual is not None and residual != x:
        raise VerifyError(f"experts: expected a residual {x}, found {residual}")
    return (x,)


def _experts_reference(
    x: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    **attrs: Any,
) -> torch.Tensor:
    tokens, k = indices.shape
    parts = x.new_empty(tokens * k, x.shape[1])
    chosen = indices.flatten()
    for expert in chosen.unique().tolist():
        if expert < 0:  # torch counts it from the end
            raise IndexError(f"experts: expected experts from 0, found {expert}")
        mine = (chosen == expert).nonzero().squeeze(1)
        first, last = (None if b is None else b[expert] for b in (gate_up_bias, down_bias))
        parts[mine] = product(
            expert_hidden(x[mine // k], gate_up[expert], first, **attrs), down[expert], last
        )
    out = (wide(parts).view(tokens, k, -1) * weights[..., None]).sum(1)
    if residual is not None:
        out = out + wide(residual)
    return out.to(x.dtype)


def expert_hidden(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    activation: str,
    gated: bool = True,
    **clamped: float,
) -> torch.Tensor:
    """What one expert's down projection is given, [n, I], for x [n, D] and a node's attributes."""
    h = product(x, gate_up, bias)
    if not gated:
        return ACTIVATIONS[activation](h)
    return glu.reference(*h.chunk(2, -1), activation=activation, **clamped)[0]


def _experts_cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    """Bytes of the experts that T · k choices can touch at most: all that there are, or T · k."""
    per_expert = ("gate_up", "down", "gate_up_bias", "down_bias")
    held = {name: t for name, t in operands.items() if name in per_expert}
    others = {name: t for name, t in operands.items() if name not in held}
    of_one = {name: t.with_shape(t.shape[1:]) for name, t in held.items()}
    choices = operands["indices"].numel
    touched: Any = sympy.Min(choices, held["gate_up"].shape[0])
    flops = 2 * choices * (of_one["gate_up"].numel + of_one["down"].numel)
    flops += operands["residual"].numel if "residual" in operands else 0
    return Cost(flops, dim(touched) * moved(of_one, ()) + moved(others, results))


_X, _W, _I = TensorType("f32", (5, 8)), TensorType("f32", (5, 2)), TensorType("i64", (5, 2))
_OPERANDS = (_X, _W, _I, TensorType("f32", (4, 12, 8)), TensorType("f32", (4, 8, 6)))
_BIASES = {"gate_up_bias": TensorType("f32", (4, 12)), "down_bias": TensorType("f32", (4, 8))}
_CLAMPED = {"activation": CLAMPED, "alpha": 1.702, "limit": 7.0}
experts = Op(
    "experts",
    _experts_infer,
    _experts_reference,
    _experts_cost,
    (
        Sample(_OPERANDS, {"activation": "silu"}, high=4),
        Sample(_OPERANDS, {**_BIASES, **_CLAMPED}, high=4),
        Sample(_OPERANDS, {"residual": _X, "activation": "silu"}, high=4),
        Sample(_OPERANDS, {**_BIASES, "residual": _X, "activation": "gelu_tanh"}, high=4),
    ),
    axes=rule(
        "x[t,c] weights[t,j] indices[t,j] gate_up[e,(g i),c] down[e,d,i] gate_up_bias[e,(g i)]? "
        "+down_bias[e,d]? +residual[t,d]? -> [t,d]; i sum; c dot; d g j whole; e by indices"
    ),
)
