"""Why a model cannot be compiled: told from its modules before the trace, and from a failed trace.

Both name the module or the line of code at fault in one line.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch._dynamo.exc import UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from .attention_masks import AttentionMask
from .meta_model import PreTrainedModel
from .source_error import UnsupportedModel

NOT_THE_INTERFACE = "it does not call attention through transformers' attention interface"
ENCODER_DECODER = "{}: the model has an encoder and a decoder: only decoders are supported"
# Parts for other inputs than text, wherever a model keeps them.
_OTHER_MODALITY = re.compile(
    r"(?:^|[._])(?:vision|visual|image|img|video|audio|speech|vq\w*)(?:[._]|$)"
)
# Parameters and buffers by which a layer makes its state of the state before.
_STATE = {"A_log", "slope_rate", "time_decay"}


def language_modules(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules of `model` that text goes through, by name: those of no tower for images, video
    or sound, and of nothing that joins these to the text."""
    several = model.config.get_text_config() is not model.config
    heads = (model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings())
    inner = {id(m) for part in heads if part is not None for m in part.modules()}
    for name, module in model.named_modules():
        if (id(module) in inner or not several) and not _OTHER_MODALITY.search(name):
            yield name, module


def language_parameters(model: PreTrainedModel) -> set[str]:
    """The names of the parameters of `language_modules`, but of layers that attend to images."""
    layers = tuple(f"{layer}." for layer in cross_attention_layers(model))
    return {
        ".".join(filter(None, (path, name)))
        for path, module in language_modules(model)
        if not f"{path}.".startswith(layers)
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def cross_attention_layers(model: PreTrainedModel) -> list[str]:
    """The layers of a language model that attend to images, and are left out without any."""
    of_images = re.compile(r"CrossAttention\w*Layer$")
    return [n for n, m in model.named_modules() if of_images.search(type(m).__name__)]


def refuse_unsupported_layers(model: PreTrainedModel) -> None:
    """UnsupportedModel, by name, for layers with a recurrent state and for sparse attention.

    Recurrent are state space models, linear attention and convolutions over tokens: what such a
    layer keeps from token to token is no cache of keys and values.
    """
    kind = model.config.model_type
    for path, module in language_modules(model):
        name = type(module).__name__
        if "Indexer" in name:
            raise UnsupportedModel(
                f"{kind}: {path} ({name}) chooses by an indexer which keys attention sees: sparse "
                "attention is not supported"
            )
        own = {
            n
            for n, _ in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            )
        }
        convolves = any(isinstance(child, torch.nn.Conv1d) for child in module.children())
        if convolves or own & _STATE or "LSTM" in name:
            raise UnsupportedModel(
                f"{kind}: {path or 'the model'} ({name}) keeps a recurrent state (a state space "
                "model, linear attention or a convolution over tokens): only attention is supported"
            )


def reason_of(error: Exception, model: PreTrainedModel) -> str:
    """Why tracing `model` ended with `error`, which its own code or torch.export raised."""
    kind, place = model.config.model_type, _place(error)
    if AttentionMask.__name__ in str(error):
        return f"{kind}: the model computes attention from the mask itself; {NOT_THE_INTERFACE}"
    if getattr(model.config, "is_encoder_decoder", False):
        return ENCODER_DECODER.format(kind)
    if not model._can_set_attn_implementation():
        return f"{kind}: the model knows only attention of its own; {NOT_THE_INTERFACE}"
    if isinstance(error, GuardOnDataDependentSymNode):
        return f"{kind}: the code at {place} branches on the values of tensors: not supported"
    if isinstance(error, UserError) and "Constraints violated" in str(error):
        return (
            f"{kind}: the model computes otherwise for other numbers of tokens, which one graph "
            f"for all of them cannot: {_guard(error)}"
        )
    return (
        f"{kind}: torch.export cannot trace it without a cache and with a dynamic number of "
        f"tokens: {type(error).__name__} at {place}: {' '.join(str(error).split())[:300]}"
    )


def _place(error: Exception) -> str:
    """The last line of code of no torch, by file and number."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f"{Path(torch.__file__).parent}" not in f.filename]
    last = (own or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def _guard(error: Exception) -> str:
    """What torch.export found that a number of tokens must be, in short."""
    text = " ".join(str(error).split())
    found = re.search(r"satisfy the generated guard (.{1,120}?)(?: - |\.|$)", text)
    fixed = re.search(r"specialized it to be a constant \((\d+)\)", text)
    if fixed:
        return f"its code fixes it to the {fixed[1]} of the sample"
    return found[1].replace("L['input_ids'].size()[1]", "T") if found else text[:120]
