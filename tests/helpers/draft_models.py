"""Tiny checkpoints of a model and a smaller one that drafts for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mtp_checkpoints import without_stop
from tiny_models import tiny_model


def write_pair(
    path: Path, name: str, drafts: str, *, spread: float = 0.0, **sizes: Any
) -> tuple[Path, Path]:
    """A tiny `name` and a tiny `drafts` in folders of `path`, which end at no token.

    With `spread` both are of one kind, and the second is the first with weights moved by so much
    noise, so that it is often right.
    """
    model = tiny_model(name, seed=1, **sizes)
    draft = tiny_model(drafts, seed=1 if spread else 3, **sizes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for _, weight in sorted(draft.named_parameters()):
            weight.add_(spread * weight.std() * torch.randn_like(weight))
    made = path / "model", path / "draft"
    for directory, one in zip(made, (model, draft), strict=True):
        one.save_pretrained(directory)
        without_stop(directory)
    return made
