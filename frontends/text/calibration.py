"""From calibration texts to encoded weights, which wait in a temporary directory to be loaded."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ...compiler.ir import Graph
from ...compiler.torch_types import type_of
from ...compiler.weights import Entry, Weights
from ...passes.transforms.calibrate import Calibrated, calibrate, count_matrices
from ...passes.transforms.quantize_mxfp4 import QuantizeMxfp4
from ..progress import Progress
from .tokenizer import Tokenizer

# Longer texts are cut: attention over a sequence takes memory with the square of its length.
_LONGEST = 2048


class _Spool:
    """Tensors in files of a temporary directory, which goes when the last of their entries does."""

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


def token_sequences(
    texts: Sequence[str | Sequence[int]], tokenizer: Tokenizer | None, longest: int, vocab_size: int
) -> list[list[int]]:
    """Texts and lists of ids as sequences of at most `longest` ids.

    ValueError for text without a tokenizer, text without tokens, and ids that the model lacks.
    """
    longest = min(longest, _LONGEST)
    sequences: list[list[int]] = []
    for text in texts:
        if isinstance(text, str) and tokenizer is None:
            raise ValueError("calibrate: text needs a tokenizer, and this model has none: give ids")
        ids = tokenizer.encode(text) if isinstance(text, str) and tokenizer else list(text)
        if not ids:
            raise ValueError(f"calibrate: expected text, found {text!r}, which has no tokens")
        if wrong := [i for i in ids if not 0 <= int(i) < vocab_size]:
            raise ValueError(
                f"calibrate: expected token ids from 0 to {vocab_size - 1}, found {wrong[0]}"
            )
        sequences += [list(map(int, ids[i : i + longest])) for i in range(0, len(ids), longest)]
    return sequences


def calibrated(
    step: QuantizeMxfp4,
    graph: Graph,
    weights: Weights,
    sequences: Sequence[Sequence[int]],
    bar: Progress,
) -> tuple[QuantizeMxfp4, Weights, str]:
    """`step` with the weights of `graph` encoded, the store that has them too, and what was found.

    With hadamard="auto" the whole model is encoded both ways, and the way of the smaller error of
    the products is taken.
    """
    options = step.options
    choices = (False, True) if options.hadamard == "auto" else (bool(options.hadamard),)
    bar.expect(len(choices) * count_matrices(graph, options))
    runs: dict[bool, Calibrated] = {}
    for rotate in choices:
        args = (graph, weights, sequences, options, rotate, _Spool(), bar.advance)
        runs[rotate] = calibrate(*args)
    best = min(runs, key=lambda rotate: runs[rotate].product_error)
    found = runs[best]
    tokens = sum(map(len, sequences))
    note = (
        f"{step.name}: {options.method} over {tokens} tokens: "
        f"products are off by {found.product_error:.2%} on average"
    )
    if len(runs) > 1:
        without, rotated = (runs[rotate].product_error for rotate in choices)
        word = "rotated" if best else "not rotated"
        note += f"; {word}, of {rotated:.2%} with Hadamard rotations and {without:.2%} without"
    return replace(step, encoded=found.encoded), weights.merged(found.entries), note
