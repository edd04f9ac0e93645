"""The imported graph of an `nn.Module` against the module itself, called again and again.

torch.export sees one call. What a call leaves behind in Python for the next (a counter, a list, a
global) is a number or a branch of the graph, right for that call alone: the module is called, with
other inputs, and again, and must give what the graph gives each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..compiler.interpret import interpret
from ..compiler.ir import Graph
from ..compiler.ops.leaf import constant
from ..compiler.weights import Weights
from .importers.module_tensors import shared_copy
from .importers.torch_export import ImportFailure, ImportMismatch
from .module_inputs import module_input

# Largest error relative to the largest value of an output, by dtype; f32 for all others.
_TOLERANCES = {torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_TOLERANCE = 1e-3
# A rounding may move a comparison; what was misunderstood moves more than this share of values.
_FEW = 0.1
# Graphs with weights of more bytes are not interpreted on the CPU.
_LARGEST = 2**30
_FAR = 10**6


def check_module(
    graph: Graph, weights: Weights, source: torch.nn.Module, inputs: Sequence[Any]
) -> str:
    """Compare `graph` with `source` over its example inputs, and calls of `source` among them.

    A copy is called that shares the tensors of `source`. Gives what was not compared, and why, ""
    for nothing. ImportMismatch where the graph computes other numbers, ImportFailure where a later
    call does.
    """
    kind = type(source).__name__
    module, fresh = shared_copy(source), shared_copy(source)
    others = tree_map(_other, tuple(inputs))
    before = _numbers(module)
    try:
        with torch.no_grad():
            first = _call(module, inputs)
            _call(module, others, may_fail=True)
            later = [_call(module, inputs), _call(module, inputs)]
            _call(fresh, others, may_fail=True)
            later.append(_call(fresh, inputs))
            changed = {key: v for key, v in _numbers(module).items() if before.get(key) != v}
            for (part, name), value in changed.items():
                setattr(part, name, not value if isinstance(value, bool) else value + _FAR)
            later.append(_call(module, inputs))
    except Exception as error:  # noqa: BLE001 the module's own code
        told = " ".join(str(error).split())[:200]
        return f"import not checked: {kind} does not run: {type(error).__name__}: {told}"
    if any(_differing(outputs, first) > 0 for outputs in later):
        names = ", ".join(dict.fromkeys(name for _, name in changed))
        raise ImportFailure(
            f"{kind}: called again with the same inputs it computes other numbers: what a call "
            f"leaves behind for the next {f'({names}) ' if names else ''}cannot be compiled; "
            "check_import=False compiles its first call"
        )
    size = sum(int(n.types[0].nbytes) for n in graph.nodes() if n.op is constant)
    if size > _LARGEST:
        return f"graph not compared with {kind}: it has {size / 2**30:.1f} GiB of weights"
    given = [x for x in tree_leaves(tuple(inputs)) if isinstance(x, torch.Tensor)]
    named: Mapping[str, torch.Tensor] = {
        p.attrs["name"]: module_input(p.attrs["name"], p.type, x)
        for p, x in zip(graph.params, given, strict=True)
    }
    with torch.no_grad():
        found = interpret(graph, named, weights).outputs
    if (share := _differing(found, first)) > _FEW:
        raise ImportMismatch(
            f"{kind}: the imported graph computes other numbers than the module, in {share:.0%} of "
            "an output; please report it; check_import=False compiles it all the same"
        )
    return ""


def _call(
    module: torch.nn.Module, inputs: Sequence[Any], *, may_fail: bool = False
) -> list[torch.Tensor]:
    try:
        outputs = tree_leaves(module(*inputs))
    except Exception:  # of inputs that are none for this module
        if not may_fail:
            raise
        return []
    return [x.detach().clone() for x in outputs if isinstance(x, torch.Tensor)]


def _other(value: Any) -> Any:
    """Another input of the same type and shape, whose numbers are in the same range."""
    if not isinstance(value, torch.Tensor):
        return value
    turned = value.flatten().flip(0).view(value.shape)
    return turned * 0.5 + 0.25 if value.is_floating_point() else turned


def _numbers(module: torch.nn.Module) -> dict[tuple[torch.nn.Module, str], bool | int | float]:
    """The attributes of all modules that are numbers."""
    return {
        (part, name): value
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float)
    }


def _differing(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest share of values of an output that differ beyond its tolerance."""
    worst = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        if ours.shape != theirs.shape:
            return 1.0
        if not theirs.numel():
            continue
        kind = torch.complex128 if theirs.is_complex() else torch.float64
        a, b = ours.cpu().to(kind), theirs.cpu().to(kind)
        largest = b.abs().nan_to_num(0.0, 0.0, 0.0).max()
        same = (a == b) | (a.isnan() & b.isnan())
        near = (a - b).abs() <= _TOLERANCES.get(theirs.dtype, _TOLERANCE) * largest
        worst = max(worst, float((~(same | near)).double().mean()))
    return worst
