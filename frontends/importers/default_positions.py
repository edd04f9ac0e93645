"""The positions that a model gives its tokens when it is called without any.

Serving numbers tokens from 0. A model that numbers them otherwise by itself (roberta's decoders
begin behind the id of padding) is told to add the difference; one whose own positions are no such
numbers is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map

from .attention_masks import described_masks
from .meta_model import PreTrainedModel
from .module_tensors import owner_of
from .source_error import UnsupportedModel

_TOKENS = 24


def default_position_offset(model: PreTrainedModel, buffers: Mapping[str, torch.Tensor]) -> int:
    """What `model` adds to 0, 1, 2, … where it makes positions itself.

    `model` is on the meta device and `buffers` has the values of some of its buffers. It runs twice
    over the same token ids, without positions and with 0, 1, 2, …: integers are computed, all else
    has a shape only, and the integers that reach each module are compared. UnsupportedModel where
    they differ by more than one number.
    """
    text = model.config.get_text_config()
    ids = torch.arange(3, 3 + _TOKENS)[None] % max(text.vocab_size - 1, 1)
    if isinstance(padding := getattr(text, "pad_token_id", None), int):
        ids = torch.where(ids == padding, (padding + 1) % text.vocab_size, ids)
    positions = torch.arange(_TOKENS)[None]
    with _real_buffers(model, buffers):
        own = _integers(model, input_ids=ids)
        given = _integers(model, input_ids=ids, position_ids=positions)
        differing = {place for place in own.keys() & given.keys() if _differ(own, given, place)}
        if not differing:
            return 0
        first = next(place for place in own if place in differing)
        offset = int((own[first] - given[first]).flatten()[0])
        moved = _integers(model, input_ids=ids, position_ids=positions + offset)
        if not any(_differ(own, moved, place) for place in own.keys() & moved.keys()):
            return offset
    raise UnsupportedModel(
        f"{model.config.model_type}: the positions that it gives tokens by itself are not 0, 1, 2, "
        f"… nor these and one number: {first} is given {own[first].flatten()[:8].tolist()} …"
    )


def _differ(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], place: str
) -> bool:
    """Whether two integer tensors differ, where one may be repeated along more dims."""
    try:
        return not torch.equal(*torch.broadcast_tensors(ours[place], theirs[place]))
    except RuntimeError:
        return True


def _integers(model: PreTrainedModel, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The integers that each module is called with, by its path and the argument's place, and those
    that rows of weights are looked up by, by the operator and its turn."""
    found: dict[str, torch.Tensor] = {}

    def hook_for(path: str) -> Any:
        def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for place, value in (*enumerate(args), *kwargs.items()):
                if isinstance(value, torch.Tensor) and _is_known(value):
                    found.setdefault(f"{path}({place})", value)

        return keep

    hooks = [
        module.register_forward_pre_hook(hook_for(path), with_kwargs=True)
        for path, module in model.named_modules()
        if path
    ]
    try:
        with torch.no_grad(), described_masks(_TOKENS), _IntegersOnly(found):
            model(**inputs, use_cache=False)
    except UnsupportedModel:
        raise
    except Exception as error:  # the model's own code
        raise UnsupportedModel(
            f"{model.config.model_type}: the positions that it gives tokens by itself cannot be "
            f"found out: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _is_known(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and not tensor.is_floating_point() and tensor.dtype != torch.bool


@contextmanager
def _real_buffers(model: PreTrainedModel, buffers: Mapping[str, torch.Tensor]) -> Generator[None]:
    """Put `buffers` in place of those of `model`, which comes out as it was."""
    before = {name: model.get_buffer(name) for name in buffers}
    try:
        _put(model, buffers)
        yield
    finally:
        _put(model, before)


def _put(model: PreTrainedModel, buffers: Mapping[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        module, leaf = owner_of(model, name)
        module._buffers[leaf] = buffer


class _IntegersOnly(TorchDispatchMode):
    """Computes what depends on no tensor of the meta device; the rest stays there. What rows of
    floats are looked up by goes into `lookups`."""

    def __init__(self, lookups: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.lookups = lookups
        self.turns: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = torch.device("cpu")
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if func.overloadpacket in _LOOKUPS and any(x.is_floating_point() for x in tensors):
            self.turns[func] += 1
            for index in filter(_is_known, tensors):
                self.lookups[f"{func} {self.turns[func]}"] = index
        if tree_any(lambda x: isinstance(x, torch.Tensor) and x.is_meta, (args, kwargs)):
            args, kwargs = tree_map(_on_meta, (args, kwargs))
            if "device" in kwargs:
                kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


_LOOKUPS = (torch.ops.aten.embedding, torch.ops.aten.index_select, torch.ops.aten.gather)


def _on_meta(x: Any) -> Any:
    return x.to("meta") if isinstance(x, torch.Tensor) else x
