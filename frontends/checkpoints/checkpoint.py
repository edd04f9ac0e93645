"""Opens a directory of safetensors files as lazy `Weights` under the model's parameter names.

Opening reads headers only. A tensor of the model's own type is a view into the mapped file; one
that must be cast, transposed, dequantized or stacked (per-expert tensors) is built on loading, with
one source tensor in memory beside it. A weight in MXFP4 is two entries, codes and scales.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ...compiler.dtypes import DTYPES
from ...compiler.torch_types import torch_dtype, type_of
from ...compiler.weights import Bounds, Entry, Weights, within
from ..importers.meta_model import MetaModel, read_config, refuse_quantized
from ..importers.module_tensors import named_tensors
from ..importers.prediction_layer import PredictionLayer, predicts
from ..importers.source_error import SourceError
from .conversions import destinations
from .entries import check_type, entries_of
from .quantization_config import quantization_scheme
from .quantized import Source, sources_of
from .rotations import Rotated, rotated_modules
from .safetensors_files import File, Stored, listed, safetensors_files
from .unused import reasons

# Those in which a model can compute; others are formats of quantized weights.
_PLAIN_FLOATS = ("bf16", "f16", "f32", "f64")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    `weights` has an entry for every parameter and buffer name of the model: stored ones, tied ones
    (the same entry under each name) and the non-persistent buffers. A name in `packed` has instead
    `<name>.codes` and `<name>.scales`: mxfp4 of both, its dims permuted as `packed` says, is the
    parameter. `rotated` are activations that the model turns, which its own code does not know of.
    `unused` has the stored names without a parameter, and why, `files` the safetensors files,
    `total_bytes` the size of their tensor data.
    """

    weights: Weights
    packed: Mapping[str, tuple[int, ...]]
    rotated: Sequence[Rotated]
    unused: Mapping[str, str]
    files: tuple[Path, ...]
    total_bytes: int


def open_checkpoint(
    directory: str | Path,
    meta: MetaModel,
    *,
    layer: PredictionLayer | None = None,
    allow_unused: bool = False,
) -> Checkpoint:
    """The weights of `meta` from model.safetensors or its shards; no tensor is read.

    With `layer` also the weights of that, under its prefix; SourceError where there are none.
    Names and layouts are converted as transformers does when it loads; a tensor stored in another
    float dtype than the model's is cast when it is loaded. SourceError names what is missing, of
    another shape, truncated, not in the format that config.json declares, a pickle, or outside the
    directory, and a tensor without a parameter for no known reason, unless `allow_unused`.
    """
    directory = Path(directory)
    stored, files = stored_tensors(directory)
    scheme = quantization_scheme(read_config(directory), directory)
    foreign = {n: d for file in files for n, d in file.foreign.items() if n not in stored}
    sources = sources_of(stored, scheme)
    targets = dict(destinations([*sources, *foreign], meta))
    if unread := next((name for name in foreign if targets[name]), None):
        raise SourceError(
            f"{directory}: {unread} is stored as {foreign[unread]}: expected a dtype of "
            f"{', '.join(DTYPES)}"
        )
    parameters = {n: None if t.converter else t.name for n, t in targets.items() if t}
    rotated, matrices = rotated_modules(scheme.rotations, meta.model, stored, parameters)
    entries, packed = entries_of(sources, targets, meta)
    _resolve_ties(entries, packed, meta)
    check_held(meta, entries.keys() | packed.keys(), directory)
    rest = [name for name, target in targets.items() if target is None and name not in matrices]
    if layer is not None:
        own, own_packed, read = _prediction(sources, foreign, layer, directory)
        entries |= layer.prefixed(own)
        packed |= layer.prefixed(own_packed)
        rest = [name for name in rest if name not in read]
    return Checkpoint(
        weights=Weights(entries).merged(
            Weights.of(meta.buffers, origin="computed from the config")
        ),
        packed=packed,
        rotated=rotated,
        unused=reasons(
            rest,
            meta,
            scheme,
            predicting=layer is not None,
            allow=allow_unused,
            where=directory,
        ),
        files=tuple(file.path for file in files),
        total_bytes=sum(tensor.nbytes for tensor in stored.values()),
    )


def _prediction(
    sources: Mapping[str, Source],
    foreign: Mapping[str, str],
    layer: PredictionLayer,
    directory: Path,
) -> tuple[dict[str, Entry], dict[str, tuple[int, ...]], set[str]]:
    """Entries and permutations of `layer` by its own names, and the stored names that it reads."""
    config = layer.trunk.config
    names = predicts([*sources, *foreign], config)
    if not names:
        raise SourceError(
            f"{directory}: speculate=MTP(...) needs a layer of multi-token prediction, and the "
            f"checkpoint has none behind the {config.get_text_config().num_hidden_layers} layers "
            "of the model"
        )
    targets = {name: target for name, target in destinations(names, layer) if target}
    if unread := next((name for name in foreign if name in targets), None):
        raise SourceError(
            f"{directory}: {unread} is stored as {foreign[unread]}: expected a dtype of "
            f"{', '.join(DTYPES)}"
        )
    entries, packed = entries_of(sources, targets, layer)
    try:
        check_held(layer, entries.keys() | packed.keys(), directory)
    except SourceError as error:
        stored = listed(sorted(names))
        raise SourceError(
            f"{error} of the layer of multi-token prediction, among the stored {stored}"
        ) from error
    return entries, packed, set(targets)


def check_held(meta: MetaModel, held: Collection[str], directory: Path) -> None:
    """SourceError unless all that a checkpoint must supply for `meta` is in `held`."""
    if missing := [name for name in meta.stored_names() if name not in held]:
        raise SourceError(f"{directory}: no tensor for {listed(missing)}")


def stored_tensors(directory: Path) -> tuple[dict[str, Stored], list[File]]:
    """Every tensor of a checkpoint by its stored name, and the files; headers are read.

    A name that several files have is the tensor of the file that the index names. SourceError where
    it names none of them.
    """
    stored: dict[str, Stored] = {}
    files: list[File] = []
    chosen: dict[str, bool] = {}  # by the index
    for path, names in safetensors_files(directory).items():
        file = File(path)
        files.append(file)
        for name, tensor in file.tensors.items():
            here = names is not None and name in names
            if name in stored and not here and not chosen[name]:
                raise SourceError(
                    f"tensor {name!r} is stored twice: in {stored[name].file.path.name} "
                    f"and in {file.path.name}, and the index names neither"
                )
            if name not in stored or here:
                stored[name], chosen[name] = tensor, here
    return stored, files


def stored_dtype(directory: str | Path) -> torch.dtype | None:
    """The plain float dtype of most values of a checkpoint, by its headers; None without any."""
    counts: Counter[str] = Counter()
    for tensor in stored_tensors(Path(directory))[0].values():
        if tensor.dtype in _PLAIN_FLOATS:
            counts[tensor.dtype] += prod(tensor.shape)
    return torch_dtype(counts.most_common(1)[0][0]) if counts else None


def weights_of(model: PreTrainedModel, meta: MetaModel) -> Weights:
    """The weights of `model`, which is in memory, under the names and types of `meta`.

    Tensors on the CPU in the dtype of `meta` are not copied; others are converted when loaded.
    Buffers are the model's own. SourceError for a quantized model, meta tensors, missing names and
    wrong shapes; loading raises it where a tensor was changed in place meanwhile.
    """
    refuse_quantized(model)
    tensors = dict(named_tensors(model))
    types = meta.types()
    if missing := [name for name in types if name not in tensors]:
        raise SourceError(f"{type(model).__name__}: no tensor for {listed(missing)}")
    if unloaded := [name for name in types if tensors[name].is_meta]:
        raise SourceError(f"{type(model).__name__}: on the meta device: {listed(unloaded)}")
    entries: dict[str, Entry] = {}
    for name, type_ in types.items():
        tensor = tensors[name].detach()
        check_type(name, type_, type_of(tensor), f"{type(model).__name__} holds")
        held = _Held(f"{type(model).__name__}: {name}", tensor, torch_dtype(type_.dtype))
        origin = f"{type(model).__name__} in memory"
        entries[name] = Entry(type_, held.load, origin, held.load_part)
    return Weights(entries)


class _Held:
    """A tensor in memory, as it was when the model was imported."""

    def __init__(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        self._name, self._tensor, self._dtype = name, tensor, dtype
        self._version = self._version_now()

    def load(self) -> torch.Tensor:
        return self._unchanged().to("cpu", self._dtype)

    def load_part(self, bounds: Bounds) -> torch.Tensor:
        return within(self._unchanged(), bounds).to("cpu", self._dtype)

    def _version_now(self) -> int:
        """How often it was written to; what torch.inference_mode made does not count."""
        return 0 if self._tensor.is_inference() else self._tensor._version

    def _unchanged(self) -> torch.Tensor:
        if self._version_now() != self._version:
            raise SourceError(
                f"{self._name} was changed in place since the model was compiled; compile it again"
            )
        return self._tensor


def _resolve_ties(
    entries: dict[str, Entry], packed: Mapping[str, tuple[int, ...]], meta: MetaModel
) -> None:
    """Give both names of a tied weight the one entry that is stored.

    SourceError when both are stored and differ.
    """
    for alias, original in meta.tied.items():
        if alias in packed or original in packed:
            raise SourceError(
                f"{alias} and {original} are tied in the config but stored in MXFP4; set "
                "tie_word_embeddings to false in config.json"
            )
        if alias in entries and original in entries:
            if not torch.equal(entries[alias].load(), entries[original].load()):
                raise SourceError(
                    f"{alias} and {original} are tied in the config but stored with different "
                    "values; set tie_word_embeddings to false in config.json"
                )
        elif alias in entries:
            entries[original] = entries[alias]
        if original in entries:
            entries[alias] = entries[original]
