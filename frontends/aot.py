"""Exports an ingot: a lowered program and everything needed to serve it.

Weights are built and written one buffer at a time, so that one of them is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from msgspec import convert

from ..codegen.lower import Lowered
from ..compiler.ambient import default_torch
from ..compiler.ir import Graph
from ..compiler.types import TensorType, VerifyError
from ..compiler.untrusted import check_exportable
from ..runtime.artifact.manifest import EntryFact, Manifest, is_file_name
from ..runtime.artifact.plan_json import entry_json, program_json
from ..runtime.artifact.reader import (
    CPU,
    FINAL_GRAPH,
    FOLDED_GRAPH,
    SHARED_PLAN,
    TEMPLATES,
    TOKENIZER_FILES,
    code_name,
    plan_name,
)
from ..runtime.artifact.safetensors_file import Item, ShardWriter, shards_of
from ..runtime.artifact.writer import IngotWriter
from ..runtime.devices.check_program import check_program
from ..runtime.program import STEP, Buffer, Program
from ..runtime.serving.abi import ServingMeta
from .checkpoints.safetensors_files import torch_item
from .importers.side_files import json_object

# A loader checks shards in parallel: a large model has several.
SHARD_BYTES = 1 << 29
# Sampling parameters of generation_config.json that Ingot has too.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Exportable:
    """The content of an ingot: a lowered graph, and the metadata for serving it.

    `graph` is the lowered graph; `options` are those of compiling it, as plain JSON; `model_files`
    are the tokenizer's, by their names in the model directory.
    """

    lowered: Lowered
    graph: Graph
    model_type: str
    dtype: str
    stop_tokens: frozenset[int]
    options: Mapping[str, Any]
    model_files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])


@default_torch()
def export(
    what: Exportable,
    path: str | Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    written: Callable[[int], None] = lambda nbytes: None,
) -> Manifest:
    """Write an ingot: a zip where `path` ends in .ingot, else a directory.

    Writing is atomic. `written` gets the bytes of each weight. FileExistsError if `path` exists,
    except an ingot with `overwrite`; ValueError for what an ingot cannot hold; ProgramError for an
    invalid program.
    """
    program = what.lowered.program
    on_cpu = program.target == CPU
    if any(node.op.collective for node in what.graph.nodes()):
        raise ValueError("an ingot holds a whole model: export one with tensor_parallel=1")
    try:
        check_exportable(what.graph)
    except VerifyError as error:
        raise ValueError(f"this model can be served, not exported: {error}") from error
    _check_stop_tokens(what)
    if not on_cpu:
        check_program(program)
    texts = {FINAL_GRAPH: str(what.graph)}
    if on_cpu:
        texts[FOLDED_GRAPH] = program.functions[STEP].graph
    with IngotWriter(path, overwrite=overwrite) as out:
        for name, text in texts.items():
            out.add(name, f"{text}\n".encode())
        if not on_cpu:
            _write_plan(out, program)
        for name, data in _kept(what.model_files).items():
            out.add(name, data)
        weights = [_item(b, what.lowered) for b in program.buffers.values() if b.kind == "weight"]
        for i, items in enumerate(shards_of(weights, shard_bytes), 1):
            shard = ShardWriter(items)
            with out.file(f"weights/{i:05}.safetensors", shard.nbytes) as write:
                shard.write(write, written)
        return out.finish(_manifest(what))


def _check_stop_tokens(what: Exportable) -> None:
    """ValueError for an end-of-text id that the model lacks: no ingot with one can be loaded."""
    size = what.lowered.program.meta["vocab_size"]
    if beyond := [i for i in what.stop_tokens if not isinstance(i, int) or not 0 <= i < size]:
        raise ValueError(
            f"eos_token_id: expected ids from 0 to {size - 1}, the model's vocabulary, found "
            f"{beyond[0]!r:.40}: correct generation_config.json and config.json"
        )


def _write_plan(out: IngotWriter, program: Program) -> None:
    out.add(SHARED_PLAN, program_json(program))
    for i, entry in enumerate(program.entries):
        out.add(plan_name(i), entry_json(entry))
    for code in dict.fromkeys(kernel.binary for kernel in program.kernels.values()):
        out.add(code_name(program.target, sha256(code).hexdigest()), code)


def _kept(model_files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The tokenizer's files by their names in the ingot."""
    kept = {f"tokenizer/{n}": data for n, data in model_files.items() if n in TOKENIZER_FILES}
    for name, data in model_files.items():
        if name.startswith(TEMPLATES):
            if not is_file_name(name):
                raise ValueError(f"chat template {name!r}: an ingot has no such name for a file")
            kept[name] = data
    return kept


def _manifest(what: Exportable) -> Manifest:
    program = what.lowered.program
    return Manifest(
        target=program.target,
        model_type=what.model_type,
        dtype=what.dtype,
        made_with=f"torch {torch.__version__}",
        symbols=program.functions[STEP].symbols,
        entries=tuple(
            EntryFact(name, dict(e.symbols), len(e.launches))
            for name, function in program.functions.items()
            for e in function.entries
        ),
        meta=convert(program.meta, ServingMeta),
        stop_tokens=tuple(sorted(what.stop_tokens)),
        generation=_generation(what.model_files),
        options=what.options,
    )


def _generation(model_files: Mapping[str, bytes]) -> dict[str, float]:
    """The numeric sampling defaults of generation_config.json."""
    name = "generation_config.json"
    given = json_object(model_files.get(name, b"{}"), name)
    found = {name: given.get(name) for name in _SAMPLING}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _item(buffer: Buffer, lowered: Lowered) -> Item:
    type_ = TensorType(buffer.dtype, buffer.shape)
    return torch_item({buffer.name: type_}, lambda: [lowered.load_weight(buffer.name)])
