"""A model in memory made ready to be traced as it is: a copy that shares the user's tensors.

Whatever the user changed (hooks, replaced modules and activations, attributes, ties, adapters) is
in the copy, because no part of it is rebuilt from the config. The user's own object is not touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .meta_model import (
    MetaModel,
    PreTrainedModel,
    keep_in_float32,
    refuse_dynamic_rope,
    refuse_quantized,
    short_rope_of,
    tied_names,
)
from .module_tensors import named_tensors, owner_of, shared_copy
from .source_error import SourceError


def unwrapped(source: Any) -> PreTrainedModel:
    """The transformers model in `source`, which may be wrapped by torch.compile or by PEFT.

    SourceError in one line for anything else that has a config: a wrapper computes what the model
    in it does not.
    """
    model = getattr(source, "_orig_mod", source)  # of torch.compile
    if adapters := getattr(model, "peft_config", None):
        if any(getattr(config, "is_prompt_learning", False) for config in adapters.values()):
            raise SourceError(
                f"{type(model).__name__} learns prompts, which come before the tokens: not "
                "supported; only adapters inside of layers are"
            )
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise SourceError(
            f"{type(model).__name__} has a config but is no transformers model: expected a "
            "PreTrainedModel, or a module and example_inputs; give the model inside of it"
        )
    return model


def traceable_model(model: PreTrainedModel, dtype: torch.dtype | None) -> MetaModel:
    """`model` as it is, ready to be traced; its tensors are shared, not copied.

    `dtype` None keeps every tensor's own. Another one casts the parameters and persistent buffers,
    but those that the model keeps in float32; the traced copy then lies on the meta device, where
    a tensor that is held by a hook, and by no module, cannot follow it. `buffers` has only
    rotary frequencies that are fixed here. SourceError for a quantized model, one with weights on
    the meta device, and one whose attention cannot be chosen, or is computed by a function that is
    not transformers' own.
    """
    refuse_quantized(model)
    if foreign := [(n, type(t)) for n, t in named_tensors(model) if type(t) not in _PLAIN]:
        name, kind = foreign[0]
        raise SourceError(
            f"{type(model).__name__}: {name} is a tensor of type {kind.__name__}; expected plain "
            "tensors"
        )
    if unloaded := [n for n, t in named_tensors(model) if t.is_meta]:
        raise SourceError(
            f"{type(model).__name__}: on the meta device: {unloaded[0]} and "
            f"{len(unloaded) - 1} more; load the weights before"
        )
    _refuse_own_functions(model)
    copy = shared_copy(model)
    _use_traced_ops(copy)
    refuse_dynamic_rope(copy)
    if dtype is not None and any(p.dtype != dtype for p in copy.parameters()):
        _cast_on_meta(copy, dtype)
        keep_in_float32(copy, dtype)
    return MetaModel(copy, short_rope_of(copy), tied_names(copy))


def meta_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` without the values of its tensors, on the meta device."""
    copy = shared_copy(model)
    _cast_on_meta(copy, None)
    return copy


_PLAIN = (torch.nn.Parameter, torch.Tensor, torch.nn.Buffer)


def _refuse_own_functions(model: PreTrainedModel) -> None:
    """SourceError where `model` chose a function of the user's for attention, masks or experts.

    The trace puts Ingot's own in the place of what the model chose, so it must be known what that
    computes.
    """
    for module in model.modules():
        for kind, name, function in _chosen_functions(module):
            made_in = _made_in(function)
            if made_in.partition(".")[0] in ("torch", "transformers"):
                continue
            if name == "eager" and made_in == type(module).__module__:
                continue  # by the author of the model
            called = f"{made_in}.{getattr(function, '__name__', type(function).__name__)}"
            raise SourceError(
                f"{type(model).__name__}: {kind} {name!r} is the function {called}: expected one "
                "that comes with transformers, in whose place Ingot puts its own"
            )


def _chosen_functions(module: torch.nn.Module) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """What `module` would call by a name in its config: the kind, the name and the function."""
    config: Any = getattr(module, "config", None)
    attention: Any = getattr(config, "_attn_implementation", None)
    by_name = (
        ("attention", attention, ALL_ATTENTION_FUNCTIONS),
        ("attention's mask", attention, ALL_MASK_ATTENTION_FUNCTIONS),
        ("experts", getattr(config, "_experts_implementation", None), ALL_EXPERTS_FUNCTIONS),
    )
    for kind, name, functions in by_name:
        if isinstance(name, str) and name in functions:
            yield kind, name, functions[name]
    eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if attention == "eager" and callable(eager):
        yield "attention", attention, eager


def _made_in(function: Callable[..., Any]) -> str:
    """The module whose code `function` is, whatever functools.wraps says."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__globals__", {}).get("__name__", type(function).__module__)


def _use_traced_ops(copy: PreTrainedModel) -> None:
    """Let `copy` call attention and experts by the ops that the importer knows."""
    for set_implementation in (copy.set_attn_implementation, copy.set_experts_implementation):
        try:
            set_implementation("ingot")
        except (ValueError, KeyError, ImportError) as error:
            raise SourceError(
                f"{copy.config.model_type}: the model knows only attention and experts of its own; "
                f"it does not call them through transformers' interfaces: {error}"
            ) from error


def _cast_on_meta(copy: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Give the floats of `copy` that dtype, if any, without values: on the meta device."""
    made: dict[int, torch.nn.Parameter] = {}
    held = list(named_tensors(copy))  # an id is one tensor's only while that lives
    for name, tensor in held:
        module, leaf = owner_of(copy, name)
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        if leaf in module._buffers:
            if leaf in module._non_persistent_buffers_set:
                wanted = tensor.dtype
            module._buffers[leaf] = torch.empty_like(tensor, dtype=wanted, device="meta")
            continue
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, dtype=wanted, device="meta")
            made[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False)
        module._parameters[leaf] = made[id(tensor)]
