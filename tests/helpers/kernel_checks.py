"""One node through the whole GPU road, against its reference.

`run_node` lowers a graph of the one node for a GPU target and runs the program: in interpreters on
the CPU, or with `pytest --device` on the GPU of this machine. `check_node` compares.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from ingot.codegen.build import build_one
from ingot.codegen.kernel_backend import KernelBackend
from ingot.codegen.lower import lower
from ingot.compiler.ir import Graph, Op, Value
from ingot.compiler.microscaling import decode, encode
from ingot.compiler.ops.leaf import constant, literal, param
from ingot.compiler.ops.mxfp4 import mxfp4
from ingot.compiler.ops.shape import slice_
from ingot.compiler.target import GPUS, target_of
from ingot.compiler.torch_types import dtype_name, type_of
from ingot.compiler.verify import verify
from ingot.compiler.weights import Entry, Weights
from ingot.frontends.drivers import driver_for, present_target
from ingot.runtime.program import STEP
from interpreted import InterpretedBackend, InterpretedDriver
from pass_checks import for_target

# Largest |Δ| relative to max |reference|, by dtype of the result: sums in another order in f32; in
# narrow dtypes a rounding that falls the other way, of the result or of what a product takes.
TOLERANCE = {"f64": 1e-6, "f32": 2e-5, "f16": 2**-10, "bf16": 2**-7}


@dataclass(frozen=True)
class Weight:
    """An argument that is a weight of the model."""

    tensor: torch.Tensor


@dataclass(frozen=True)
class Packed:
    """A weight that is held in MXFP4: `tensor` is rounded to it first."""

    tensor: torch.Tensor
    group: int = 32


@dataclass(frozen=True)
class Strided:
    """An input whose rows lie apart: a slice of a wider tensor, past its first columns."""

    tensor: torch.Tensor


Given = torch.Tensor | Weight | Packed | Strided | bool | int | float


@dataclass(frozen=True)
class Plain:
    """What the reference of a node is called with: tensors and numbers, and attributes."""

    op: Op
    args: tuple[Any, ...]
    named: Mapping[str, Any]

    def in_f64(self) -> Plain:
        def wide(x: Any) -> Any:
            is_float = isinstance(x, torch.Tensor) and x.is_floating_point()
            return x.double() if is_float else x

        named = {name: wide(x) for name, x in self.named.items()}
        return Plain(self.op, tuple(map(wide, self.args)), named)

    @property
    def is_narrow(self) -> bool:
        """Whether a tensor is in a dtype in which results are rounded much."""
        tensors = (x for x in (*self.args, *self.named.values()) if isinstance(x, torch.Tensor))
        return any(x.dtype in (torch.bfloat16, torch.float16) for x in tensors)

    def reference(self) -> tuple[Any, ...]:
        return self.op.reference(*self.args, **self.named)


def graph_of_node(
    op: Op, args: Sequence[Given], named: Mapping[str, Any]
) -> tuple[Graph, Weights, dict[str, torch.Tensor], Plain]:
    """The graph, its weights, its inputs, and how the reference is called.

    `args` are the required operands, `named` the optional ones and attributes.
    """
    params: list[Value] = []
    values: list[Value] = []
    held: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}
    plain: list[Any] = []
    optional = tuple(name for name in op.optional if name in named)
    attrs = {name: value for name, value in named.items() if name not in optional}
    first = len(args)
    args = (*args, *(named[name] for name in optional))

    def weight(name: str, tensor: torch.Tensor) -> Value:
        held[name] = tensor
        return constant(name=name, type=type_of(tensor))

    def given(name: str, tensor: torch.Tensor) -> Value:
        inputs[name] = tensor
        params.append(param(name=name, type=type_of(tensor)))
        return params[-1]

    # A literal has the dtype of the last tensor beside it: `where` begins with a condition.
    tensors = [getattr(a, "tensor", a) for a in args]
    beside = [dtype_name(t.dtype) for t in tensors if isinstance(t, torch.Tensor)][-1:] or ["f32"]
    for i, arg in enumerate(args):
        match arg:
            case Weight(tensor):
                values.append(weight(f"w{i}", tensor))
            case Packed(tensor, group):
                codes, scales = encode(tensor, group, "mse")
                dtype = dtype_name(tensor.dtype)
                parts = (weight(f"w{i}.codes", codes), weight(f"w{i}.scales", scales))
                values.append(mxfp4(*parts, dtype=dtype))
                tensor = decode(codes, scales, tensor.dtype)
            case Strided(tensor):
                wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 24), torch.nan)
                wide = wide.to(tensor.dtype)
                wide[..., 16:-8] = tensor
                size = wide.shape[-1]
                x = given(f"x{i}", wide)
                values.append(slice_(x, dim=tensor.ndim - 1, start=16, stop=size - 8))
            case torch.Tensor():
                tensor = arg
                values.append(given(f"x{i}", arg))
            case _:
                tensor = arg
                values.append(literal(value=arg, dtype=beside[0]))
        plain.append(tensor)
    by_name = dict(zip(optional, values[first:], strict=True))
    graph = Graph("node", tuple(params), op.node(values[:first], {**by_name, **attrs}).results, {})
    verify(graph)
    entries = {n: Entry(type_of(t), partial(torch.clone, t), "the test") for n, t in held.items()}
    by_name = dict(zip(optional, plain[first:], strict=True))
    return graph, Weights(entries), inputs, Plain(op, tuple(plain[:first]), {**by_name, **attrs})


ON_DEVICE = os.environ.get("INGOT_TEST_KERNELS") == "device"


@cache
def _device() -> Any:
    """The driver of this machine's GPU."""
    return driver_for(present_target())


def run_node(
    op: Op,
    args: Sequence[Given],
    named: Mapping[str, Any],
    target: str = "cuda:sm_90",
    prefer: str = "",
) -> tuple[list[torch.Tensor], Plain, Any]:
    """The results of the node, how its reference is called, and what was lowered; `prefer` is as
    `select` has it."""
    graph, weights, inputs, plain = graph_of_node(op, args, named)
    names = [f"out{i}" for i in range(len(graph.outputs))]
    driver = _device() if ON_DEVICE else InterpretedDriver(target)
    chosen = target_of(driver.target)
    kind = KernelBackend if ON_DEVICE else InterpretedBackend
    backend = kind(chosen, prefer=prefer)
    graph = for_target(graph, chosen)
    lowered = lower(graph, weights, chosen, [{}], names, backend=backend)
    executable = driver.load(lowered.program, lowered.load_weight)
    try:
        found = executable.run(STEP, {}, {n: numpy_of(t) for n, t in inputs.items()})
    finally:
        executable.close()
    return [torch.from_numpy(found[name]) for name in names], plain, lowered


def numpy_of(tensor: torch.Tensor) -> Any:
    """As the driver takes it: bf16 as a tensor, which numpy does not know."""
    return tensor if tensor.dtype == torch.bfloat16 else tensor.numpy()


def check_node(
    op: Op,
    args: Sequence[Given],
    named: Mapping[str, Any] | None = None,
    target: str = "cuda:sm_90",
    tolerance: float | None = None,
    prefer: str = "",
) -> Any:
    """The node computed by kernels equals its reference; integers and bools exactly.

    The reference rounds as it does in narrow dtypes; all else is computed in float64.
    """
    found, plain, lowered = run_node(op, args, named or {}, target, prefer)
    (entry,) = lowered.program.entries
    dtypes = {b.name: b.dtype for b in entry.buffers}
    expected = (plain if plain.is_narrow else plain.in_f64()).reference()
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert a.shape == b.shape
        if not b.is_floating_point():
            assert torch.equal(a.to(b.dtype), b), f"result {i}"
            continue
        size = a.double().abs()[a.isfinite()].amax().item() if a.isfinite().any() else 0.0
        allowed = (tolerance or TOLERANCE[dtypes[f"out{i}"]]) * max(size, 1e-6)
        torch.testing.assert_close(b.double(), a.double(), rtol=0, atol=allowed, equal_nan=True)
    return lowered


ALL_TARGETS = tuple(GPUS)


# For sm_100 ptxas keeps a few bytes in local memory where most registers are free.
_SPILLED = {"cuda:sm_100": 16}


def build_everywhere(
    op: Op, args: Sequence[Given], named: Mapping[str, Any] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Facts of every kernel of the node, built for all four GPU targets; nothing spills."""
    if ON_DEVICE:
        pytest.skip("kernels are built for every target where they are not run")
    facts: dict[str, list[dict[str, Any]]] = {}
    for name in ALL_TARGETS:
        target = target_of(name)
        graph, weights, _, _ = graph_of_node(op, args, named or {})
        backend = InterpretedBackend(target)
        names = [f"out{i}" for i in range(len(graph.outputs))]
        lower(for_target(graph, target), weights, target, [{}], names, backend=backend)
        built = [dict(build_one(source, target).facts) for source in backend.sources.values()]
        for found in built:
            assert found["shared"] <= target.shared_bytes
            assert found["spills"] <= _SPILLED.get(name, 0), (name, found)
        facts[name] = built
    return facts


def chosen(op: Op, args: Sequence[Given], named: Mapping[str, Any]) -> list[str]:
    """The kernels that compute the node for cuda:sm_90, by name, in order."""
    graph, weights, _, _ = graph_of_node(op, args, named)
    target = target_of("cuda:sm_90")
    backend = InterpretedBackend(target)
    names = [f"out{i}" for i in range(len(graph.outputs))]
    lower(for_target(graph, target), weights, target, [{}], names, backend=backend)
    (choice,) = (c for c in backend.choices if c.op == op.name)
    return list(choice.kernels)


def operands(
    names: tuple[str, ...], tokens: int, k: int, n: int, rows: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The optional operands of a product, some norms in f32, and the attributes with them."""
    made = {
        "norm": lambda: Weight(1 + 0.1 * torch.randn(k)),
        "delta": lambda: torch.randn(tokens, k).to(dtype),
        "post_norm": lambda: Weight((1 + 0.1 * torch.randn(k)).to(dtype)),
        "bias": lambda: Weight(torch.randn(rows).to(dtype)),
        "residual": lambda: torch.randn(tokens, n).to(dtype),
    }
    named: dict[str, Any] = {name: made[name]() for name in names}
    if "norm" in names:
        named["eps"] = 1e-5
    if "post_norm" in names:
        named["post_eps"] = 1e-6
    return named
