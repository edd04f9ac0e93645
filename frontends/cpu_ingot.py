"""The program of a cpu ingot, whose IR may come from anywhere; its weights as torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from msgspec import structs

from ..codegen.cpu import check_memory, cpu_program
from ..compiler.ambient import default_torch
from ..compiler.ops.leaf import constant, literal
from ..compiler.text import ParseError, parse
from ..compiler.torch_types import torch_dtype
from ..compiler.types import VerifyError
from ..compiler.verify import verify
from ..passes.serving.sample_on_device import output_names
from ..runtime.artifact.reader import FOLDED_GRAPH, Artifact
from ..runtime.artifact.strict_json import IngotError
from ..runtime.driver import WeightLoader
from ..runtime.host_memory import NotEnoughMemory
from ..runtime.program import Buffer, Program
from ..runtime.serving.abi import ServingAbi

_SHOWN = 400  # characters of an error, which may quote the text
# What parsing raises for graphs that no compiler made.
_BROKEN = (
    ParseError,
    VerifyError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


@default_torch()
def read_cpu_program(artifact: Artifact) -> Program:
    """The program that the folded IR is. IngotError for IR that is none, and where this machine has
    not the memory for its state and scratch: nothing is tried then."""
    manifest, text = artifact.manifest, artifact.graphs[FOLDED_GRAPH]
    where = f"{artifact.path}: {FOLDED_GRAPH}"
    try:
        graph = parse(text, trusted=False)
        verify(graph)
        ranges = {name: (r.start, r.stop - 1) for name, r in graph.symbols.items()}
        wider = all(
            name in ranges and ranges[name][0] <= first and last <= ranges[name][1]
            for name, (first, last) in manifest.symbols.items()
        )
        if not wider or ranges.keys() != manifest.symbols.keys():
            raise IngotError(f"expected symbols {dict(manifest.symbols)}, found {ranges}")
        if made := [n.op.name for n in graph.constants() if n.op not in (constant, literal)]:
            raise IngotError(f"expected weights in place of what they make, found {made[0]}")
        program = cpu_program(
            graph, manifest.symbols, output_names(graph), structs.asdict(manifest.meta)
        )
        ServingAbi(program)
    except _BROKEN as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise IngotError(f"{where}: {first[:_SHOWN]}") from error
    try:
        check_memory([program], where, mapped=True)
    except NotEnoughMemory as error:
        raise IngotError(str(error)) from error
    return program


def torch_weights(load: WeightLoader, buffers: Mapping[str, Buffer]) -> WeightLoader:
    """`load`, whose arrays are numpy's, as tensors over the same memory."""

    def tensor(name: str) -> torch.Tensor:
        array: Any = load(name)
        if not array.flags.aligned:
            array = array.copy()
        return torch.from_numpy(array).view(torch_dtype(buffers[name].dtype))

    return tensor
