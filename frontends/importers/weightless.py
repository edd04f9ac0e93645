"""A checkpoint from config.json alone: weights have types, and loading one is an error.

Kernels, buffers and launches follow from types, so a model can be inspected without its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from ...compiler.types import TensorType
from ...compiler.weights import Entry, Weights
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.quantization_config import MXFP4, quantization_scheme
from ..checkpoints.rotations import rotated_modules
from .meta_model import MetaModel, read_config
from .prediction_layer import PredictionLayer
from .source_error import SourceError

_GROUP = 32  # elements per scale in gpt-oss


def without_weights(
    directory: str | Path,
    meta: MetaModel,
    *,
    layer: PredictionLayer | None = None,
    allow_unused: bool = False,
) -> Checkpoint:
    """`open_checkpoint` of a `directory` that has no weights: entries with types only.

    Weights declared in another format than MXFP4 are dense, as after reading. SourceError for
    loading one, and for a config that does not determine which weights are in MXFP4.
    """
    directory = Path(directory)
    missing = _missing(directory)
    types = meta.types() | ({} if layer is None else layer.prefixed(layer.types()))
    packed = _packed(directory, types)
    entries: dict[str, Entry] = {}
    for name, type_ in types.items():
        if name in meta.buffers:
            continue
        held = _codes_and_scales(type_, packed[name]) if name in packed else {"": type_}
        for end, part in held.items():
            entries[f"{name}{end}"] = Entry(part, missing, f"{directory}: config.json alone")
    buffers = Weights.of(meta.buffers, origin="computed from the config")
    rotations = quantization_scheme(read_config(directory), directory).rotations
    rotated, _ = rotated_modules(rotations, meta.model, {}, {name: name for name in meta.types()})
    return Checkpoint(Weights(entries).merged(buffers), packed, rotated, {}, (), 0)


def _missing(directory: Path) -> Callable[[], NoReturn]:
    def load() -> NoReturn:
        raise SourceError(f"{directory}: holds no weights: such a model can only be inspected")

    return load


def _packed(directory: Path, types: Mapping[str, TensorType]) -> dict[str, tuple[int, ...]]:
    """The weights in MXFP4, each with the permutation of its dims: see Checkpoint.packed."""
    scheme = quantization_scheme(read_config(directory), directory)
    if scheme.group(MXFP4) is None:
        return {}
    if scheme.method != "mxfp4":
        raise SourceError(
            f"{directory}: {scheme.described}, and which weights those are is known from the "
            "safetensors files alone: expected them, found none"
        )
    # Experts [E, K, N] are stored as codes of [E, N, K], and nothing else is packed.
    leaves = ("gate_up_proj", "down_proj")
    names = [n for n, t in types.items() if n.rpartition(".")[2] in leaves and t.rank == 3]
    return dict.fromkeys(names, (0, 2, 1))


def _codes_and_scales(type_: TensorType, order: tuple[int, ...]) -> dict[str, TensorType]:
    """The types of codes and scales of a weight of `type_`, its dims permuted by `order`."""
    shape: list[int] = [int(type_.shape[i]) for i in order]
    *rows, width = shape
    if width % _GROUP:
        raise SourceError(f"expected rows of a multiple of {_GROUP} for MXFP4, found {type_}")
    codes = TensorType("u8", (*rows, width // 2))
    return {".codes": codes, ".scales": TensorType("u8", (*rows, width // _GROUP))}


__all__ = ["without_weights"]
