"""The references of `ingot verify`: transformers, and the cpu target for quantized weights."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from ...compiler.interpret import interpret
from ...compiler.ir import Graph
from ...compiler.ops.leaf import constant
from ...compiler.torch_types import torch_dtype
from ...compiler.weights import Weights
from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.quantization_config import quantization_scheme
from ..import_check import layer_ends, record_layers
from ..importers.huggingface import import_hugging_face
from ..importers.meta_model import build_meta_model, read_config
from ..importers.source_error import SourceError
from ..model import Model
from .model_check import Answer, relative_error


class TransformersReference:
    """transformers on the CPU, eager, in the dtype of `model`, which is compiled from `directory`.

    Layer outputs are those of the graph after raise-ops, interpreted: an error in them is the
    importer's, not of later passes or of the target.
    """

    name = "transformers"

    def __init__(self, directory: Path, model: Model) -> None:
        dtype = torch_dtype(model.report.dtype)
        if rotations := quantization_scheme(read_config(directory), directory).rotations:
            raise SourceError(
                f"{directory}: transformers does not compute its online rotations "
                f"({rotations[0].name}), and is no reference for it"
            )
        graph = model.graph("raise-ops")
        self._theirs = _transformers_model(directory, dtype)
        self._weights = _weights(directory, graph, dtype)
        ends = layer_ends(graph, self._theirs.config)
        self._ends = list(ends)
        self._part = Graph(graph.name, graph.params, tuple(ends.values()), graph.symbols)
        self._hidden = record_layers(self._theirs, ends)

    def answer(self, ids: Sequence[int]) -> Answer:
        inputs = {
            "tokens": torch.tensor(ids, dtype=torch.int32),
            "positions": torch.arange(len(ids), dtype=torch.int32),
        }
        with torch.inference_mode():
            found = self._theirs(input_ids=torch.tensor([ids]), use_cache=False)
            ours = interpret(self._part, inputs, self._weights).outputs
        pairs = zip(self._ends, ours, strict=True)
        layers = {path: relative_error(value, self._hidden[path]) for path, value in pairs}
        return Answer(found.logits[0].float(), layers)


@dataclass(frozen=True)
class CpuReference:
    """The same model compiled for the cpu target, which dequantizes the same codes and scales."""

    model: Model
    name: str = "the cpu target"

    def answer(self, ids: Sequence[int]) -> Answer:
        return Answer(torch.from_numpy(self.model.logits(ids)))


def _weights(directory: Path, graph: Graph, dtype: torch.dtype) -> Weights:
    """The weights of `graph`; traced again only if tracing created some of them."""
    meta = build_meta_model(read_config(directory), dtype)
    stored = open_checkpoint(directory, meta, allow_unused=True).weights
    if all(n.attrs["name"] in stored for n in graph.nodes() if n.op is constant):
        return stored
    return import_hugging_face(directory, dtype=dtype, max_tokens=2, allow_unused=True).weights


def _transformers_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        )
    return model.eval()


@contextmanager
def _quiet() -> Generator[None]:
    """Silence transformers' progress bars and its report of unused tensors (an MTP layer)."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
