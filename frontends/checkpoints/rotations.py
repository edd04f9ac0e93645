"""Online rotations: activations times Hadamard matrices, which a checkpoint's weights count on.

Rotations that a tool merged into weights need nothing. Of those that are computed when the model
runs, x·H at the inputs or outputs of linear layers is supported, H being Sylvester's matrix, whole
or in blocks (compressed-tensors' transforms of type hadamard, AMD Quark's R4 and online R1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...compiler.dtypes import FLOATS
from ..importers.source_error import SourceError
from .config_section import Section
from .patterns import matches_any
from .safetensors_files import Stored

_MERGED = ("weight_input", "weight_output")
# Both are turned alike where attention multiplies them: (q·H)·(k·H)ᵀ == q·kᵀ.
_ATTENTION = ("q_attn", "k_cache")


@dataclass(frozen=True)
class Rotation:
    """A rotation that a config declares, called `name` there.

    It turns the inputs or outputs (`location`) of the modules that `targets` match (names, patterns
    "re:…" and class names) and `ignore` do not; at "attention" it turns queries and keys alike and
    changes nothing. `block` is the width of its matrix, None that of what it turns. `leaves` are
    the names of stored matrices, as `<module>.<leaf>`; where they are `required`, they alone tell
    which modules are turned, and must be there for all `targets`.
    """

    name: str
    location: str
    targets: tuple[str, ...]
    leaves: tuple[str, ...]
    ignore: tuple[str, ...] = ()
    block: int | None = None
    required: bool = False


@dataclass(frozen=True)
class Rotated:
    """The inputs or outputs (`location`) of the linear layer `module` times H, in blocks."""

    module: str
    location: str
    block: int


def transform_rotations(config: Section) -> tuple[Rotation, ...]:
    """Those of compressed-tensors' transform_config; SourceError for one that is not supported."""
    return tuple(
        rotation
        for name, group in config.objects("config_groups").items()
        for rotation in _of_group(name, group)
    )


def _of_group(name: str, group: Section) -> Iterator[Rotation]:
    kind, block = group.get("type"), group.get("head_dim")
    random = bool(group.get("randomize"))
    group.known("requires_grad", "precision")
    attention: dict[str, set[Any]] = {location: set() for location in _ATTENTION}
    for given in group.objects("apply").values():
        location, inverse = given.get("location"), bool(given.get("inverse"))
        targets, ignore = given.names("targets"), given.names("ignore")
        if location in _MERGED:
            continue
        if location in _ATTENTION and kind in ("hadamard", "random-hadamard"):
            attention[location].add((targets, ignore, inverse))
            continue
        if location not in ("input", "output") or kind != "hadamard" or random:
            what = f"randomized {kind}" if random else str(kind)
            raise SourceError(
                f"{group.path}: the online rotation at {location!r} of type {what!r} is not "
                "supported; known: hadamard at input and output, and what is merged into weights"
            )
        # H is its own inverse.
        leaf = f"{name}_{location}.weight"
        yield Rotation(name, location, targets, (leaf,), ignore, block)
    if attention["q_attn"] != attention["k_cache"]:
        raise SourceError(
            f"{group.path}: queries and keys are rotated differently (q_attn, k_cache): not "
            "supported; known: both alike, which changes nothing"
        )
    if attention["q_attn"]:
        leaves = [f"{name}_{at}.{part}" for at in _ATTENTION for part in ("weight", "perm")]
        yield Rotation(name, "attention", (), tuple(leaves))


def stored_rotation(name: str, targets: Sequence[str]) -> Rotation:
    """AMD Quark's: the inputs of each module with a stored input_rotation, [n, n] of 1 and -1."""
    return Rotation(name, "input", tuple(targets), ("input_rotation",), required=True)


def rotated_modules(
    rotations: Sequence[Rotation],
    model: torch.nn.Module,
    stored: Mapping[str, Stored],
    parameters: Mapping[str, str | None],
) -> tuple[list[Rotated], frozenset[str]]:
    """What is turned, and the names of the stored matrices; only these are read.

    `parameters` has the parameter of the model that each stored weight is, None for one that is
    made part of another (an expert's, of a stack). SourceError for modules that are no linear
    layers of the model and for matrices of another kind.
    """
    modules = dict(model.named_modules())
    found: list[Rotated] = []
    matrices: set[str] = set()
    for rotation in rotations:
        ends = tuple(f".{leaf}" for leaf in rotation.leaves)
        matrices.update(name for name in stored if name.endswith(ends))
        if rotation.location == "attention":
            continue
        named = (
            _required(rotation, stored, parameters)
            if rotation.required
            else _matching(rotation, modules, parameters)
        )
        for name in named:
            module = modules.get(name)
            if not isinstance(module, torch.nn.Linear):
                kind = "no module of the model" if module is None else type(module).__name__
                raise SourceError(
                    f"{name}: rotation {rotation.name!r} at its {rotation.location}, but it is "
                    f"{kind}: only linear layers are supported"
                )
            width = module.in_features if rotation.location == "input" else module.out_features
            block = _block(rotation, name, width, stored)
            found.append(Rotated(name, rotation.location, block))
    return found, frozenset(matrices)


def _required(
    rotation: Rotation,
    stored: Mapping[str, Stored],
    parameters: Mapping[str, str | None],
) -> list[str]:
    """The modules of the stored matrices, by their names in the model where they have one there."""
    (leaf,) = rotation.leaves
    owners = {n.removesuffix(f".{leaf}") for n in stored if n.endswith(f".{leaf}")}
    if missing := [name for name in rotation.targets if name not in owners]:
        raise SourceError(
            f"{missing[0]}: rotation {rotation.name!r} turns its inputs online, but no matrix "
            f"{missing[0]}.{leaf} is stored"
        )
    if not owners:
        raise SourceError(
            f"rotation {rotation.name!r} turns inputs online, but no matrix *.{leaf} is stored"
        )
    of_weights = {n.rpartition(".")[0]: n if p is None else p for n, p in parameters.items()}
    turned = sorted(owners & of_weights.keys())
    return [of_weights[owner].rpartition(".")[0] for owner in turned]


def _matching(
    rotation: Rotation,
    modules: Mapping[str, torch.nn.Module],
    parameters: Mapping[str, str | None],
) -> list[str]:
    """The modules that its targets match, and those that weights had before they were stacked."""
    known = {name: {c.__name__ for c in type(m).__mro__} for name, m in modules.items()}
    parts = [name.rpartition(".")[0] for name, parameter in parameters.items() if parameter is None]
    known |= {name: {"Linear"} for name in parts}
    return [
        name
        for name, classes in known.items()
        if matches_any(rotation.targets, name, classes)
        and not matches_any(rotation.ignore, name, classes)
    ]


def _block(rotation: Rotation, module: str, width: int, stored: Mapping[str, Stored]) -> int:
    """The size of the blocks by which `width` is turned, held to the stored matrix if any."""
    block = width if rotation.block is None else rotation.block
    stored_as = [f"{module}.{leaf}" for leaf in rotation.leaves if f"{module}.{leaf}" in stored]
    matrices = {name: stored[name] for name in stored_as}
    if rotation.required:
        block = next((m.shape[0] for m in matrices.values() if m.type.rank == 2), width)
    if not isinstance(block, int) or block < 1 or block & (block - 1) or width % block:
        raise SourceError(
            f"{module}: rotation {rotation.name!r} in blocks of {block} over {width}: expected a "
            "power of two that divides it"
        )
    for name, matrix in matrices.items():
        usual = matrix.shape == (block, block) and matrix.dtype in (*FLOATS, "i8")
        if not usual or not _is_sylvester(matrix.read()):
            raise SourceError(
                f"{name}: {matrix.type} is not Sylvester's Hadamard matrix of {block}: rotation "
                f"{rotation.name!r} is not supported"
            )
    return block


def _is_sylvester(matrix: torch.Tensor) -> bool:
    """Whether a square matrix is a positive multiple of H: H_1 = 1, H_2n = [[H, H], [H, -H]]."""
    while len(matrix) > 1:
        half = len(matrix) // 2
        first = matrix[:half, :half]
        others = (matrix[:half, half:], matrix[half:, :half], -matrix[half:, half:])
        if not all(torch.equal(first, other) for other in others):
            return False
        matrix = first
    return bool((matrix > 0).all())
