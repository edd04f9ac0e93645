"""Custom ops ingot::attention and ingot::experts, which a Hugging Face model calls when traced.

Registered with transformers' attention and experts interfaces under the name "ingot"; its masks are
descriptions (see `attention_masks`). Run eagerly, they compute the references.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ...compiler.ops.attention import attention as attention_op
from ...compiler.ops.glu import ACTIVATIONS, CLAMPED, gated
from ...compiler.ops.moe import experts as experts_op
from .attention_masks import AttentionMask
from .source_error import UnsupportedModel

NAME = "ingot"


@torch.library.custom_op("ingot::attention", mutates_args=())
def traced_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """q [1, H, T, D], k [1, G, T, D], v [1, G, T, V] -> [1, T, H, V]."""
    if q.shape[0] != 1:
        raise UnsupportedModel(
            f"attention {NAME!r} runs one sequence at a time, found {q.shape[0]}"
        )
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    (out,) = attention_op.reference(
        *rows, sinks=sinks, scale=scale, causal=causal, window=window, softcap=softcap
    )
    return out[None].clone()


@traced_attention.register_fake
def _(
    q: Any, k: Any, v: Any, sinks: Any, scale: Any, causal: Any, window: Any, softcap: Any
) -> Any:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("ingot::experts", mutates_args=())
def traced_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    transposed: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """Hugging Face's layouts: `transposed` weights are [E, in, out], `interleaved` gate and up
    alternate. The importer turns both into the IR's layout by ops on the weights.
    """
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if interleaved:
        gate_up = torch.cat((gate_up[:, ::2], gate_up[:, 1::2]), 1)
        if gate_up_bias is not None:
            gate_up_bias = torch.cat((gate_up_bias[:, ::2], gate_up_bias[:, 1::2]), 1)
    (out,) = experts_op.reference(
        x,
        weights,
        indices,
        gate_up,
        down,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        activation=activation,
        gated=gated,
        alpha=alpha,
        limit=limit,
    )
    return out


@traced_experts.register_fake
def _(x: Any, *rest: Any) -> Any:
    return torch.empty_like(x)


def _layer_type(module: torch.nn.Module) -> str | None:
    """The entry of config.layer_types for an attention module, wherever the model keeps it."""
    if hasattr(module, "layer_type"):
        return module.layer_type  # pyright: ignore[reportReturnType]
    types: Any = getattr(getattr(module, "config", None), "layer_types", None)
    layer: Any = getattr(module, "layer_idx", None)
    return None if types is None or layer is None else types[layer]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | AttentionMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q, k, v [B, heads, T, dim] -> ([B, T, H, V], None).

    Where the model made a mask by transformers' functions it alone decides, as in eager attention;
    `is_causal` and `sliding_window` count where it made none.
    """
    where = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
    if isinstance(attention_mask, torch.Tensor):
        raise UnsupportedModel(f"{where} builds an attention mask of its own")
    for name in ("indices", "position_bias", "block_mask"):
        if extra.get(name) is not None:
            raise UnsupportedModel(f"{where} passes {name!r} to attention: not supported")
    if _layer_type(module) == "chunked_attention":
        raise UnsupportedModel(f"{where} uses chunked attention: not supported")
    if attention_mask is not None:
        if attention_mask.problem:
            raise UnsupportedModel(f"{where} masks attention {attention_mask.problem}")
        causal, window = attention_mask.causal, attention_mask.window
    else:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        window = sliding_window or 0
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = traced_attention(
        query,
        key,
        value,
        s_aux,
        float(scale),
        bool(causal),
        int(window),
        float(softcap or 0.0),
    )
    return out, None


def _activation_of(module: Any, gated_unit: bool) -> tuple[str, float, float]:
    """(activation, alpha, limit) of an experts module, found by what it computes.

    The module's own function is run on numbers over and beyond the usual limits, and compared with
    every activation that Ingot knows: neither a name in the config nor a class says what it does.
    """
    alpha, limit = (float(getattr(module, name, 0.0) or 0.0) for name in ("alpha", "limit"))
    with _disable_current_modes():
        drawn = torch.Generator().manual_seed(0)
        gate, up = 6 * torch.randn(2, 64, 16, generator=drawn)
        gate[48:] *= 1e3  # a limit of the user's may be far
        try:
            if not gated_unit:
                found = module.act_fn(gate)
            elif getattr(module, "is_concatenated", True):
                found = module._apply_gate(torch.cat((gate, up), -1))
            else:
                found = module._apply_gate(torch.stack((gate, up), -1).flatten(-2))
        except Exception as error:  # the model's own function
            raise UnsupportedModel(
                f"{type(module).__name__}: its activation cannot be run by itself: {error}"
            ) from error
        ones = torch.ones_like(up)
        for name in (*ACTIVATIONS, CLAMPED):
            if name == CLAMPED and not (gated_unit and alpha > 0 and limit > 0):
                continue
            given = (alpha, limit) if name == CLAMPED else (0.0, 0.0)
            expected = gated(gate, up if gated_unit else ones, name, *given)
            if torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
                return name, *given
    known = ", ".join((*ACTIVATIONS, CLAMPED))
    raise UnsupportedModel(
        f"{type(module).__name__}: its activation is none of {known}: not supported"
    )


def register() -> None:
    """Make "ingot" known to transformers as an attention and an experts implementation."""
    from transformers import AttentionInterface
    from transformers.integrations import moe

    def experts(
        self: Any, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        if getattr(self, "has_post_expert_norm", False):
            raise UnsupportedModel(f"{type(self).__name__} norms each expert: not supported")
        gated_unit, biased = getattr(self, "has_gate", True), getattr(self, "has_bias", False)
        activation, alpha, limit = _activation_of(self, gated_unit)
        up_name = "gate_up_proj" if gated_unit else "up_proj"
        return traced_experts(
            x,
            weights,
            indices,
            getattr(self, up_name),
            self.down_proj,
            getattr(self, f"{up_name}_bias") if biased else None,
            self.down_proj_bias if biased else None,
            activation,
            gated_unit,
            getattr(self, "is_transposed", False),
            not getattr(self, "is_concatenated", True),
            alpha,
            limit,
        )

    AttentionInterface.register(NAME, _attention)
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
