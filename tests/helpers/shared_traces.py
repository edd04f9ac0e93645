"""Traces that several tests need, made once in each process.

Tracing is most of an import. The fixture `shared_traces` is for tests whose subject comes after it:
a model that is in all that its code can see like one before takes that one's graph. Tests of the
trace itself, and of all that changes it, make their own.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from ingot.frontends.importers import huggingface
from ingot.frontends.importers.draft_head import DraftHead
from ingot.frontends.importers.meta_model import MetaModel
from ingot.frontends.importers.torch_export import Imported

# What a config says of where and how the model was saved.
_SAVED_ONLY = {"_name_or_path", "architectures", "transformers_version"}
_import_traced = huggingface._import_traced


@dataclass(frozen=True)
class _Asked:
    """What to trace; equal where `seen` and the numbers are."""

    meta: MetaModel = field(compare=False)
    seen: tuple[Any, ...]
    name: str
    max_tokens: int
    offset: int

    def imported(self) -> Imported:
        return _import_traced(self.meta, self.name, self.max_tokens, self.offset)


_shared = lru_cache(maxsize=128)(_Asked.imported)


def _seen(meta: MetaModel) -> tuple[Any, ...] | None:
    """All that the code of a model can see of itself; None where it may see or do more."""
    seen: list[Any] = [*meta.tied.items()]
    for path, module in meta.model.named_modules(remove_duplicate=False):
        held = dict(vars(module))
        tensors = {**held.pop("_parameters"), **held.pop("_buffers")}
        types = {n: (t.dtype, t.shape, t.device) for n, t in tensors.items() if t is not None}
        for other in ("_modules", "name_or_path", "generation_config"):
            held.pop(other, None)
        config = held.pop("config", None)
        options = sorted(config.to_dict().items()) if config is not None else []
        options = [(n, repr(value)) for n, value in options if n not in _SAVED_ONLY]
        hooked = any(value for name, value in held.items() if name.endswith("_hooks"))
        if hooked or any(isinstance(v, torch.Tensor) or n == "forward" for n, v in held.items()):
            return None
        seen.append((path, type(module), repr(types), repr(options), repr(held)))
    return tuple(seen)


def _traced_once(
    meta: MetaModel,
    name: str,
    max_tokens: int,
    offset: int,
    head: DraftHead | None = None,
) -> Imported:
    if head is not None:
        return _import_traced(meta, name, max_tokens, offset, head)
    seen = _seen(meta)
    asked = _Asked(meta, seen or (), name, max_tokens, offset)
    return asked.imported() if seen is None else _shared(asked)


@contextmanager
def sharing() -> Generator[None]:
    """Within, imports of equal models share one trace."""
    with patch.object(huggingface, "_import_traced", _traced_once):
        yield
