"""A transformers model that runs with the weights of one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...compiler.ops.mxfp4 import mxfp4
from ...compiler.torch_types import dtype_name
from ...compiler.weights import Weights
from .meta_model import MetaModel, PreTrainedModel
from .module_tensors import named_tensors, owner_of


def stream_layers(
    meta: MetaModel, layers: Sequence[str], load: Callable[[str], torch.Tensor]
) -> PreTrainedModel:
    """The model of `meta`, made ready to run on the CPU.

    `load` gives a parameter or persistent buffer by name. What is in none of the `layers`, which
    are module paths, is loaded now; a layer's tensors are loaded when it is called, and let go
    after it.
    """
    model = meta.model
    inside = tuple(f"{path}." for path in layers)
    for name, tensor in list(named_tensors(model)):
        module, leaf = owner_of(model, name)
        if name in meta.buffers:
            module._buffers[leaf] = meta.buffers[name]
        elif not name.startswith(inside) and tensor.is_meta:
            _put(module, leaf, load(name))
    for path in layers:
        names = [n for n, _ in named_tensors(model) if n.startswith(f"{path}.")]
        stored = [n for n in names if n not in meta.buffers]
        layer = model.get_submodule(path)
        layer.register_forward_pre_hook(_loading(model, stored, load))
        layer.register_forward_hook(_releasing(model, stored))
    return model


def dense_weight(
    weights: Weights, packed: Mapping[str, tuple[int, ...]], name: str, *, dtype: torch.dtype
) -> torch.Tensor:
    """A parameter by its name, dequantized to `dtype` where it is stored in MXFP4."""
    if name not in packed:
        return weights.load(name)
    parts = (weights.load(f"{name}.{part}") for part in ("codes", "scales"))
    (value,) = mxfp4.reference(*parts, dtype=dtype_name(dtype))
    return value.permute(packed[name]).contiguous()


def skip_layers(model: PreTrainedModel, paths: Sequence[str]) -> None:
    """Put in place of the layers at `paths` of `model` such as give the hidden state as it came."""
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        layer = model.get_submodule(path)
        setattr(model.get_submodule(parent), leaf, _Skipped(layer))


class _Skipped(torch.nn.Module):
    """Returns its first argument; has the attributes of the layer that it stands for."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self._attributes = {k: v for k, v in vars(layer).items() if not k.startswith("_")}

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("_attributes", {})
        return attributes[name] if name in attributes else super().__getattr__(name)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


def _put(module: torch.nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)


def _loading(
    model: PreTrainedModel, names: Sequence[str], load: Callable[[str], torch.Tensor]
) -> Callable[[Any, Any], None]:
    def hook(_module: Any, _args: Any) -> None:
        for name in names:
            _put(*owner_of(model, name), load(name))

    return hook


def _releasing(model: PreTrainedModel, names: Sequence[str]) -> Callable[[Any, Any, Any], None]:
    def hook(_module: Any, _args: Any, _output: Any) -> None:
        for name in names:
            module, leaf = owner_of(model, name)
            held: Any = module._buffers.get(leaf, module._parameters.get(leaf))
            _put(module, leaf, held.to("meta"))

    return hook
