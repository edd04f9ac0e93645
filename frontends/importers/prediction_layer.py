"""The layer of a model that predicts the token behind the next: multi-token prediction (MTP).

It takes the hidden state of a token, which the model's last norm gives, and the embedding of the
token that follows, and gives the hidden state from which the model's own head predicts the token
after that (DeepSeek-V3, arXiv:2412.19437, §2.2). transformers has its module (MtpModel) and says
how published names map to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.modeling_layers import MtpModel

from .draft_head import DraftHead
from .meta_model import MetaModel, keep_in_float32
from .source_error import SourceError
from .tracing import one_at_a_time

# What only such layers have, under the names of the published layouts.
PARTS = ("eh_proj", "enorm", "hnorm", "shared_head")
COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_LAYER = re.compile(r"((?:^|.*\.)layers\.(\d+))\.(.*)")


def predicts(names: Iterable[str], config: Any) -> set[str]:
    """Those of the stored `names` that are of prediction layers, told by the layout: layers behind
    the last of the model that `config` counts or that have what only such layers have, and what
    lies under `mtp` or a name that begins with `mtp_`."""
    text = config.get_text_config()
    layers = int(getattr(text, "num_hidden_layers", 0) or 0)
    declared = max(int(getattr(text, count, 0) or 0) for count in COUNTS)
    extra: set[str] = set()
    names = list(names)
    for match in filter(None, map(_LAYER.fullmatch, names)):
        layer, index, rest = match[1], int(match[2]), match[3]
        counted = layers <= index < layers + declared
        if counted or (index >= layers and rest.partition(".")[0] in PARTS):
            extra.add(layer)
    found: set[str] = set()
    for name in names:
        match = _LAYER.fullmatch(name)
        parts = name.split(".")
        if (match and match[1] in extra) or any(p == "mtp" or p.startswith("mtp_") for p in parts):
            found.add(name)
    return found


@dataclass(frozen=True, eq=False)
class PredictionLayer(DraftHead):
    """The first prediction layer of a model, on the meta device: `model` is an MtpModel that
    shares the embedding, the head and the rotary embedding of `trunk`.

    Its own tensors are `layers.0.…` (and `shared_post_norm`).
    """

    prefix: ClassVar[str] = "mtp."

    @property
    def parts(self) -> Mapping[str, torch.nn.Module]:
        """See DraftHead."""
        model: Any = self.model
        own = {"layers": model.layers}
        if model.use_shared_post_norm:
            own["shared_post_norm"] = model.shared_post_norm
        return own

    def features(self, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """See DraftHead: what the model's last norm gives."""
        return hidden_states[-1]

    def step(
        self, hidden: torch.Tensor, following: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See DraftHead."""
        model: Any = self.model
        return model.forward_layer(0, hidden, positions, None, input_ids=following)

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """See DraftHead."""
        model: Any = self.model
        return model._project_to_logits(state)

    def transforms(self) -> list[Any]:
        """See MetaModel."""
        model: Any = self.model
        return model.get_weight_conversions(self.trunk)


@one_at_a_time()
def prediction_layer(meta: MetaModel, dtype: torch.dtype) -> PredictionLayer:
    """The first prediction layer behind the model of `meta`, in `dtype`.

    SourceError where transformers can build none for it.
    """
    trunk: Any = meta.model
    kind, text = trunk.config.model_type, trunk.config.get_text_config()
    # What transformers' config of the model says nothing of follows its last layer.
    if not getattr(text, "num_mtp_layers", None):
        text.num_mtp_layers = 1
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None) and not getattr(text, f"mtp_{name}", None):
            setattr(text, f"mtp_{name}", [getattr(text, name)[-1]])
    try:
        with torch.device("meta"):
            model: Any = MtpModel(trunk, 1)
    except Exception as error:  # the model's own code, which trusts its config
        told = " ".join(str(error).split())
        raise SourceError(
            f"{kind}: transformers can make no layer of multi-token prediction of this config: "
            f"{type(error).__name__}: {told}"
        ) from error
    layer = PredictionLayer(model, {}, {}, trunk)
    for own in layer.parts.values():
        own.to(dtype)
    model.eval().requires_grad_(False)
    keep_in_float32(model, dtype, like=trunk)
    stored = model.state_dict().keys()
    if unstored := [name for name in layer.types() if name not in stored]:
        raise SourceError(
            f"{kind}: its layer of multi-token prediction has buffers that no checkpoint stores: "
            f"{', '.join(unstored[:5])}"
        )
    return layer
