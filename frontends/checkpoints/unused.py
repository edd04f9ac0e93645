"""Stored tensors that no parameter of the model is made of: known reasons, or a refusal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..importers.meta_model import MetaModel
from ..importers.prediction_layer import predicts
from ..importers.source_error import SourceError
from .quantization_config import QuantizationScheme
from .safetensors_files import listed

# Of a module, by the last part of the name.
_ROTARY = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")
_CACHE = ("k_scale", "v_scale", "kv_scale", "k_bias", "v_bias", "k_zero_point", "v_zero_point")
_ACTIVATIONS = (
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "activation_scale",
    "q_scale",
    "prob_scale",
)
_WEIGHT_SCALES = ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale")
# What a product multiplies or adds: without it, its numbers are others.
_NEEDED = (
    "pre_quant_scale",
    "input_rotation",
    "input_prescale",
    "smooth_scale",
    "smoothing_scale",
    "smooth_factor",
    "smoothing_factor",
    "g_idx",
    "weight_g_idx",
    "weight_zero_point",
    "qzeros",
    "lora_A",
    "lora_B",
)


def reasons(
    names: Sequence[str],
    meta: MetaModel,
    scheme: QuantizationScheme,
    *,
    predicting: bool = False,
    allow: bool,
    where: object,
) -> dict[str, str]:
    """Why the model needs none of the stored `names`; `predicting`, when its prediction layer is
    read.

    SourceError, which begins with `where`, for one that changes what a module computes, and, unless
    `allow`, for those without a known reason.
    """
    found: dict[str, str] = {}
    unknown: list[str] = []
    known = _Known.of(names, meta, scheme, predicting)
    for name in names:
        if reason := known.reason(name):
            found[name] = reason
        elif name.removesuffix(".weight").rpartition(".")[2] in _NEEDED:
            raise SourceError(
                f"{where}: {name} changes what its module computes: not supported; use a version "
                "of the model without it"
            )
        else:
            unknown.append(name)
    if unknown and not allow:
        raise SourceError(
            f"{where}: the model reads no {listed(unknown)}, for no reason that is known; "
            "unused='allow' (--unused allow) leaves them out"
        )
    return found | dict.fromkeys(unknown, "the model does not read it; allowed")


@dataclass(frozen=True)
class _Known:
    """What is known of the tensors of a checkpoint: `ignored` patterns are transformers' own,
    `extra` the names of layers that predict further tokens, `served` whether one of them does."""

    ignored: tuple[re.Pattern[str], ...]
    extra: frozenset[str]
    served: bool
    scheme: QuantizationScheme

    @classmethod
    def of(
        cls, names: Sequence[str], meta: MetaModel, scheme: QuantizationScheme, served: bool
    ) -> _Known:
        ignored = meta.model._keys_to_ignore_on_load_unexpected or ()
        extra = frozenset(predicts(names, meta.model.config))
        return cls(tuple(map(re.compile, sorted(ignored))), extra, served, scheme)

    def reason(self, name: str) -> str:
        """Why the model does not need it, "" where that is not known."""
        module, _, leaf = name.rpartition(".")
        if name in self.extra:
            if not self.served:
                return "multi-token prediction, which is not served"
            if leaf == "weight" and module.endswith(("embed_tokens", "shared_head.head")):
                return "multi-token prediction's copy of the model's own, which is taken instead"
            return "multi-token prediction, of which one layer drafts"
        if leaf in _ROTARY:
            return "rotary frequencies, which follow from the config"
        if leaf == "position_ids":
            return "positions, which are counted"
        if any(pattern.search(name) for pattern in self.ignored):
            return "transformers does not load it for this model either"
        if not self.scheme.method:
            return ""
        if leaf in _CACHE:
            return "a scale of a quantized KV cache; the cache stays in floats"
        if leaf in _ACTIVATIONS:
            return "a scale of quantized activations; activations stay in floats"
        if leaf in _WEIGHT_SCALES and self.scheme.ignores(module):
            return "a scale of a module that config.json keeps dense"
        return ""
