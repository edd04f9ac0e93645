"""Calibration texts as token sequences, and a temporary directory for calibrated weights."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ...compiler.torch_types import type_of
from ...compiler.weights import Entry
from ..progress import Progress
from .tokenizer import Tokenizer

# Longer texts are cut: attention over a sequence takes memory with the square of its length.
_LONGEST = 2048


class _Spool:
    """Tensors in files of a temporary directory, removed with the last of their entries."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="ingot-calibrated-"))
        self._numbers = count()
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)

    def __call__(self, name: str, tensor: torch.Tensor) -> Entry:
        file = self._directory / f"{next(self._numbers)}.safetensors"
        save_file({name: tensor.contiguous()}, file)
        return Entry(type_of(tensor), partial(self._load, file, name), "calibration")

    def _load(self, file: Path, name: str) -> torch.Tensor:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)


@dataclass(frozen=True)
class TextCalibration:
    """See compiler.pipeline.Calibration: for a model of `longest` tokens and its tokenizer."""

    tokenizer: Tokenizer | None
    longest: int
    bar: Progress

    def sequences(
        self, texts: Sequence[str | Sequence[int]], vocab_size: int
    ) -> Sequence[Sequence[int]]:
        """Texts and lists of ids as sequences of at most `longest` ids.

        ValueError for text without a tokenizer, text without tokens, and ids that the model lacks.
        """
        longest, tokenizer = min(self.longest, _LONGEST), self.tokenizer
        sequences: list[list[int]] = []
        for text in texts:
            if isinstance(text, str) and tokenizer is None:
                raise ValueError(
                    "calibrate: text needs a tokenizer, and this model has none: give ids"
                )
            ids = tokenizer.encode(text) if isinstance(text, str) and tokenizer else list(text)
            if not ids:
                raise ValueError(f"calibrate: expected text, found {text!r}, which has no tokens")
            if wrong := [i for i in ids if not 0 <= int(i) < vocab_size]:
                raise ValueError(
                    f"calibrate: expected token ids from 0 to {vocab_size - 1}, found {wrong[0]}"
                )
            sequences += [list(map(int, ids[i : i + longest])) for i in range(0, len(ids), longest)]
        return sequences

    def spool(self) -> Callable[[str, torch.Tensor], Entry]:
        return _Spool()

    def expect(self, matrices: int) -> None:
        self.bar.count(0, matrices)

    def advance(self) -> None:
        self.bar.done()
