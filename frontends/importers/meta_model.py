"""Builds the model of a Hugging Face config on the meta device, without weights.

No parameter is allocated. The result also has the values of non-persistent buffers, which no
checkpoint stores, and the tied names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...compiler.torch_types import type_of
from ...compiler.types import TensorType
from .config_bounds import check_config_file
from .module_tensors import named_tensors, owner_of
from .source_error import SourceError
from .tracing import one_at_a_time

try:
    import transformers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.auto.auto_factory import _get_model_class
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
except ImportError as error:
    raise ImportError(
        "Hugging Face models need transformers; install it with: pip install 'ingot[hf]'"
    ) from error

_LANGUAGE_MODELS = {
    name
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    for names in mapping.values()
    for name in ([names] if isinstance(names, str) else names)
}


# Of PEFT, beside the weights of an adapter, which may lie in the directory of a whole model.
ADAPTER = "adapter_config.json"
MERGE = "which Ingot does not apply: merge it into its model before (PEFT's merge_and_unload)"


@dataclass(frozen=True, eq=False)
class MetaModel:
    """A model that is ready to be traced, without its weights.

    `model` is in eval mode with every parameter and buffer on the meta device, in the dtype that
    `from_pretrained(dtype=...)` would give it. `buffers` holds the non-persistent buffers (rotary
    frequencies, embedding scales) by name as CPU tensors with their true values. `tied` maps each
    name that shares its parameter with an earlier one to that one: lm_head.weight to
    model.embed_tokens.weight.
    """

    model: PreTrainedModel
    buffers: Mapping[str, torch.Tensor]
    tied: Mapping[str, str]

    def types(self) -> dict[str, TensorType]:
        """The type of every parameter and buffer by name, tied names included."""
        return {name: type_of(tensor) for name, tensor in named_tensors(self.model)}

    def transforms(self) -> list[Any]:
        """How transformers makes its tensors of stored ones: renamings and converters, in order."""
        return get_model_conversion_mapping(self.model)

    def stored_names(self) -> list[str]:
        """The names that a checkpoint must supply: parameters and persistent buffers, none tied."""
        return [n for n in self.types() if n not in self.buffers and n not in self.tied]


def read_config(directory: str | Path) -> PreTrainedConfig:
    """The config.json of a local directory; SourceError when it is missing or not a known model.

    Code in the directory is never run.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        found = "no such directory"
        if directory.is_dir():
            found = "found " + (
                ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "none"
            )
        if (directory / ADAPTER).is_file():
            found += f"; of an adapter, {MERGE}"
        raise SourceError(f"{directory}: expected a directory with config.json, {found}")
    check_config_file(directory / "config.json")
    try:
        return AutoConfig.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the own code of transformers, which checks little beforehand
        raise SourceError(
            f"{directory / 'config.json'} is no config that the installed transformers knows "
            f"(model code from the directory is never run): {_in_a_line(error)}"
        ) from error


@one_at_a_time()
def build_meta_model(
    config: PreTrainedConfig,
    dtype: torch.dtype | None = None,
    *,
    attn_implementation: str = "ingot",
    experts_implementation: str | None = "ingot",
) -> MetaModel:
    """The causal language model of `config` on the meta device; `config` itself is not changed.

    A config for images and text makes the model for both, which takes text alone. The quantization
    scheme of the config is ignored: layers are unquantized.

    dtype: of the parameters, None for the config's own (float32 where it names none). Modules that
    the model keeps in float32 stay so. The implementations are names registered with transformers;
    a model without experts ignores `experts_implementation`.

    Rotary embeddings of type "longrope" keep their frequencies for short sequences, up to
    `length_limits`.

    SourceError for rotary embeddings whose frequencies depend on the length of the sequence
    ("dynamic"), where a buffer's value cannot be rebuilt, and for a config of which transformers
    can make no model.
    """
    wanted: torch.dtype = dtype or getattr(config, "dtype", None) or torch.float32
    kind: Any = _class_of(config)

    def made(implementation: str) -> PreTrainedModel:
        plain = without_quantization(config)
        text = plain.get_text_config()
        of_text = not isinstance(plain, kind.config_class) and isinstance(text, kind.config_class)
        try:
            with torch.device("meta"):
                return kind._from_config(
                    text if of_text else plain,
                    dtype=wanted,
                    attn_implementation=implementation,
                    experts_implementation=experts_implementation,
                )
        except Exception as error:  # the model's own code, which trusts its config
            if isinstance(error, KeyError) and error.args == (implementation,):
                raise  # it looks for a class of attention by the name
            raise SourceError(
                f"{config.model_type}: transformers can make no model of this config: "
                f"{_in_a_line(error)}"
            ) from error

    try:
        model = made(attn_implementation)
    except KeyError as error:
        model = made("eager")
        if not model._can_set_attn_implementation():
            raise SourceError(
                f"{config.model_type}: the model knows only attention of its own; it does not call "
                "attention through transformers' attention interface"
            ) from error
        model.set_attn_implementation(attn_implementation)  # what has a tower of its own is not set
    return ready(model, wanted)


def ready(model: PreTrainedModel, dtype: torch.dtype) -> MetaModel:
    """`model`, which is on the meta device and is changed, ready to be traced in `dtype`.

    SourceError for dynamic rotary embeddings, and where a buffer's value cannot be rebuilt.
    """
    model.eval().requires_grad_(False)
    refuse_dynamic_rope(model)
    keep_in_float32(model, dtype)
    buffers = _non_persistent_buffers(model)
    return MetaModel(model, {**buffers, **short_rope_of(model)}, tied_names(model))


def _in_a_line(error: Exception) -> str:
    """What `error` is and says, which may be of several lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model of `config`: what its `architectures` name where transformers has that
    for this config, else the one for causal language models, else that for images and text.

    SourceError where there is none.
    """
    for name in config.architectures or ():
        named: Any = getattr(transformers, name, None) if name in _LANGUAGE_MODELS else None
        if named is not None and named.config_class is type(config):
            return named
    for automatic in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in automatic._model_mapping:
            return _get_model_class(config, automatic._model_mapping)
    raise SourceError(
        f"{config.model_type}: transformers has no causal language model for "
        f"{type(config).__name__}"
    )


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of `config` without its quantization scheme."""
    plain = deepcopy(config)
    for holder in (plain, plain.get_text_config()):
        vars(holder).pop("quantization_config", None)
    return plain


def refuse_quantized(model: PreTrainedModel) -> None:
    """SourceError when transformers holds quantized weights in `model`."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or getattr(quantizer.quantization_config, "dequantize", False):
        return
    method = str(getattr(quantizer.quantization_config, "quant_method", "unknown"))
    raise SourceError(
        f"{type(model).__name__} holds quantized weights in memory ({method!r}), in a layout of "
        "transformers' own; give the directory that it was loaded from instead"
    )


def refuse_dynamic_rope(model: torch.nn.Module) -> None:
    """SourceError for rotary embeddings whose frequencies depend on the length."""
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind is not None and "dynamic" in kind:
                raise SourceError(
                    f"{name} has rope_type {kind!r}: its frequencies change with the length of the "
                    "sequence, which a static graph cannot express; set rope_parameters in "
                    "config.json to 'default', 'linear', 'yarn' or 'llama3'"
                )


def length_limits(config: PreTrainedConfig) -> dict[str, int]:
    """The longest sequences that a model was made for, by the reason.

    YaRN stretches the original length by its factor, also where max_position_embeddings still is
    the original. "longrope" has other frequencies behind its original length, with which
    transformers computes all tokens of a sequence anew: the cache of a served sequence cannot
    follow, so that this is the limit.
    """
    text = config.get_text_config()
    parameters: Any = getattr(text, "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
    original = "original_max_position_embeddings"
    limits: dict[str, int | None] = {}
    limits["max_position_embeddings"] = getattr(text, "max_position_embeddings", None)
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            limits[f"{original} of longrope"] = int(kind[original])
        elif kind.get("rope_type") == "yarn" and kind.get(original) and kind.get("factor"):
            stretched = int(kind[original] * kind["factor"])
            if stretched > (limits["max_position_embeddings"] or stretched):
                limits["max_position_embeddings"] = None
                limits[f"{original} of YaRN times its factor"] = stretched
    return {reason: limit for reason, limit in limits.items() if limit}


def short_rope_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Fix every "longrope" embedding to its frequencies for short sequences, and return them."""
    frozen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        by_layer_type = kinds if isinstance(kinds, dict) else {None: kinds}
        if "longrope" not in by_layer_type.values():
            continue
        for layer_type in (key for key, kind in by_layer_type.items() if kind == "longrope"):
            leaf = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
            extra = {} if layer_type is None else {"layer_type": layer_type}
            frozen[f"{name}.{leaf}"], _ = ROPE_INIT_FUNCTIONS["longrope"](
                module.config, "cpu", seq_len=1, **extra
            )
            _fix_scale(module)
        static = {key: "default" if k == "longrope" else k for key, k in by_layer_type.items()}
        frozen_kind: Any = static if isinstance(kinds, dict) else static[None]
        module.rope_type = frozen_kind
    return frozen


def _fix_scale(module: Any) -> None:
    """Fix a rotary embedding that scales by the length, Phi-3.5-MoE's, to the short one's scale.

    It makes its frequencies in each call: from now on they are its buffer.
    """
    scale = module.config.rope_parameters.get("short_mscale")
    if scale is None:
        return
    module.config = deepcopy(module.config)
    module.config.rope_parameters = {**module.config.rope_parameters, "rope_type": "default"}

    def fixed(config: Any) -> tuple[torch.Tensor, float]:
        return module.inv_freq, scale

    module.rope_init_fn = fixed


def keep_in_float32(
    model: PreTrainedModel, dtype: torch.dtype, *, like: PreTrainedModel | None = None
) -> None:
    """Give the modules that `model` keeps in float32 that dtype, as from_pretrained does; `like`
    is the model that says which, another one."""
    patterns = [glob.replace("*", ".*") for glob in (like or model)._get_dtype_plan(dtype)]
    if not patterns:
        return
    kept = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    widened: dict[int, torch.nn.Parameter] = {}  # by identity, so that tied names stay tied
    held = list(named_tensors(model))  # an id is one tensor's only while that lives
    for name, tensor in held:
        module, leaf = owner_of(model, name)
        if leaf in module._non_persistent_buffers_set or not kept.search(name):
            continue
        if leaf in module._buffers:
            module._buffers[leaf] = tensor.float()
            continue
        wide = torch.nn.Parameter(tensor.float(), requires_grad=False)
        module._parameters[leaf] = widened.setdefault(id(tensor), wide)


def _non_persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The true values of the buffers that no checkpoint stores, on the CPU; `model` is unchanged.

    transformers' own initialisation fills them, as in from_pretrained: only these buffers are made
    real, the parameters stay on meta and their initialisation does nothing. It runs twice over
    different old contents: a buffer that differs was not filled.
    """
    meta = {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if owner_of(model, name)[1] in owner_of(model, name)[0]._non_persistent_buffers_set
    }
    zeros, ones = (_initialised(model, meta, fill) for fill in (0, 1))
    if unfilled := [name for name in meta if not torch.equal(zeros[name], ones[name])]:
        raise SourceError(
            f"{type(model).__name__}: no initialisation rebuilds the value of "
            f"{', '.join(unfilled[:5])} ({len(unfilled)} of {len(meta)} non-persistent buffers)"
        )
    return zeros


def _initialised(
    model: PreTrainedModel, meta: Mapping[str, torch.Tensor], fill: int
) -> dict[str, torch.Tensor]:
    """The buffers named in `meta` after initialisation over `fill`; `meta` is put back."""
    real = {name: torch.full_like(buffer, fill, device="cpu") for name, buffer in meta.items()}
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    try:
        for name, buffer in real.items():
            module, leaf = owner_of(model, name)
            module._buffers[leaf] = buffer
        model.initialize_weights()
        return {name: model.get_buffer(name) for name in meta}
    finally:
        for name, buffer in meta.items():
            module, leaf = owner_of(model, name)
            module._buffers[leaf] = buffer


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Each name of a parameter that an earlier one has too, and that one."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (original := first.setdefault(id(parameter), name)) != name:
            tied[name] = original
    return tied
