"""Every op is accounted for: it has a template, or it is known why it needs none.

And every kernel: it waits for the launches before it as templates.pdl says.
"""

from __future__ import annotations

import ast
import itertools
import pkgutil
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
from attention_builds import empty, index
from expert_cases import Case
from ingot.codegen import select, templates
from ingot.codegen.kernel_backend import KernelBackend, NoKernelError
from ingot.codegen.kernel_source import PROGRAMMATIC, KernelSource
from ingot.codegen.lower import lower
from ingot.codegen.select import templates_of
from ingot.codegen.templates.generated import from_text
from ingot.codegen.templates.rowwise import arithmetic
from ingot.compiler.interpret import random_tensor
from ingot.compiler.ir import Op, Sample
from ingot.compiler.ops.attention import cached_attention, kv_append
from ingot.compiler.ops.collective import all_gather
from ingot.compiler.ops.gating import moe_gating
from ingot.compiler.ops.linear import linear
from ingot.compiler.ops.mla import cached_mla_attention
from ingot.compiler.ops.moe import experts
from ingot.compiler.ops.project_attention import project_attention
from ingot.compiler.target import target_of
from ingot.compiler.text import parse
from ingot.compiler.types import TensorType
from ingot.compiler.weights import Weights
from kernel_checks import Given, Packed, Weight, check_node, graph_of_node, run_node
from pass_checks import for_target
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# The result is other strides over the same bytes, or bytes copied as they are.
VIEWS = {"view", "permute", "expand", "slice"}
LEAVES = {"param", "constant", "literal"}
# Ops on weights alone: computed when a program is loaded.
FOLDED = {"mxfp4", "mxfp4_encode", "mxfp4_fragments", "mxfp4_tiled"}
COLLECTIVE = {"all_reduce", "all_gather"}
# What the compiler knows; other test modules may have registered ops of their own.
OPS = {n: op for n, op in Op.registry.items() if not n.startswith(("aten.", "test."))}
COVERED = {n: op for n, op in OPS.items() if n in VIEWS or templates_of(n)}
CASES = [(op, sample) for op in COVERED.values() for sample in op.samples]


def test_every_op_is_accounted_for() -> None:
    named = VIEWS | LEAVES | FOLDED | COLLECTIVE
    assert named <= OPS.keys()
    assert OPS.keys() - named == COVERED.keys() - VIEWS
    assert not any(templates_of(n) for n in named)


Call = tuple[list[torch.Tensor], dict[str, Any]]


def arguments(op: Op, sample: Sample, dtype: str | None) -> Call:
    """Drawn for a sample, floats in `dtype` if given, where the op is defined; and attributes."""
    generator = torch.Generator().manual_seed(0)
    symbols = {"T": 3, "L": 2}

    def drawn(type_: TensorType) -> torch.Tensor:
        bound = type_.bind(symbols)
        if dtype and bound.dtype == "f32":
            bound = bound.with_dtype(dtype)
        x = random_tensor(bound, generator, sample.high)
        positive = op.name in ("log", "sqrt", "rsqrt", "pow", "div")
        return x.abs() + 0.5 if positive and x.is_floating_point() else x

    named = {k: drawn(v) if k in op.optional else v for k, v in sample.named.items()}
    return [*map(drawn, sample.args)], named


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize(
    ("op", "sample"), CASES, ids=[f"{op.name}-{i}" for i, (op, _) in enumerate(CASES)]
)
def test_samples(op: Op, sample: Sample, dtype: str | None) -> None:
    # A product that norms its own input rounds x · weight where the reference rounds the normed x,
    # and rows of 8 show it. How near that is to float64 is tested in test_norm_in_product.
    within = dtype is not None and "norm" in sample.named
    tolerance = 2**-5 if within else None
    check_node(op, *arguments(op, sample, dtype), tolerance=tolerance)


def test_what_ranks_exchange_is_refused() -> None:
    with pytest.raises(NoKernelError, match=r"no kernel for all_gather\(f32\[4\]\) on cuda:sm_90"):
        run_node(all_gather, (torch.ones(4),), {"dim": 0, "ranks": 1})


# ---- every kernel lets later launches begin and waits for those before, whatever it then does

# They wait after their first loads of weights, of the index of a cache, or of what is in it; the
# experts' first launch lets the second begin late (see test_expert_stream).
REGISTER_DECODE = "decode_registers.register_decode_kernel"
EXPERT_STREAM = "expert_stream.expert_stream_kernel"
THEIR_OWN_WAY = [
    "decode.decode_kernel",
    REGISTER_DECODE,
    "dense_gemv.gemv_kernel",
    EXPERT_STREAM,
    "fragment_linear.fragment_kernel",
    "gating_kernels.token_partials_kernel",
    "mxfp4_stream.stream_kernel",
    "parts.combine_kernel",
]
AMD_ONLY = "mfma_linear.mfma_kernel"
OF_NO_NODE = "read_stream.read_kernel"  # benchmarks launch it


def launched() -> dict[str, JITFunction[Any]]:
    """Functions of the templates that no other one calls, by module and name: the kernels."""
    functions: dict[str, JITFunction[Any]] = {}
    called = {name for name, f in vars(arithmetic).items() if isinstance(f, JITFunction)}
    for module in pkgutil.walk_packages(templates.__path__, f"{templates.__name__}."):
        for name, f in vars(import_module(module.name)).items():
            if isinstance(f, JITFunction) and f.__module__ == module.name:
                functions[f"{module.name.rpartition('.')[2]}.{name}"] = f
                called |= {node.id for node in ast.walk(tree_of(f)) if isinstance(node, ast.Name)}
    return {key: f for key, f in functions.items() if key.partition(".")[2] not in called}


def tree_of(function: JITFunction[Any]) -> ast.FunctionDef:
    (tree,) = ast.parse(function.src).body
    assert isinstance(tree, ast.FunctionDef)
    return tree


def waits_first(function: JITFunction[Any]) -> bool:
    """Whether the first statement after the docstring is pdl_wait."""
    body = tree_of(function).body
    first = next(s for s in body if not isinstance(getattr(s, "value", None), ast.Constant))
    return ast.unparse(first) == "pdl_wait(PROGRAMMATIC)" and "PROGRAMMATIC" in function.arg_names


def test_the_first_statement_of_every_kernel_is_its_wait() -> None:
    kernels = launched()
    assert len(kernels) > 30
    assert sorted(k for k, f in kernels.items() if not waits_first(f)) == THEIR_OWN_WAY
    assert all("PROGRAMMATIC" in kernels[k].arg_names for k in THEIR_OWN_WAY)


@pytest.mark.parametrize("body", ["pass", "if x:\n        pdl_wait(PROGRAMMATIC)"])
def test_a_kernel_that_may_not_wait_is_found(body: str) -> None:
    text = f"@triton.jit\ndef late(x, PROGRAMMATIC: tl.constexpr):\n    {body}\n"
    assert not waits_first(from_text(text, "late"))


def requests() -> Iterator[tuple[Op, Sequence[Given], dict[str, Any]]]:
    """Nodes of which, with every template in turn, all kernels are made."""
    yield from ((op, *arguments(op, sample, None)) for op, sample in CASES)
    bf16 = torch.bfloat16
    yield linear, (torch.randn(2, 64).to(bf16), Packed(torch.randn(32, 64).to(bf16))), {}
    yield experts, *Case(dtype=bf16, width=64, inner=32, gate_up=32, down=32).call()
    paged = empty(bf16, 1024, 64, 8, 128)
    yield cached_attention, (empty(bf16, 1, 32, 128), paged, paged, *index(1)), {"scale": 0.1}
    routing = {"k": 2, "score": "softmax", "normalize": True, "dtype": "f32", "logits": "f32"}
    yield moe_gating, (torch.randn(1, 64), Weight(torch.randn(8, 64))), routing
    yield kv_append, (paged, empty(bf16, 4, 8, 128), *index(4)), {}
    # A launch of its own joins parts: on AMD within a window, on NVIDIA where there are many.
    windowed = {"scale": 0.1, "window": 512}
    yield cached_attention, (empty(bf16, 4, 32, 128), paged, paged, *index(4)), windowed
    query = (empty(bf16, 1, 128, 512), empty(bf16, 1, 128, 64))
    latent = empty(bf16, 1024, 64, 576)
    yield cached_mla_attention, (*query, latent, *index(1)), {"scale": 0.05}
    cache = empty(bf16, 16, 64, 2, 64)
    named = {"k_cache": cache, "v_cache": cache, "heads": (4, 2, 2), "dims": (64, 64, 64)}
    named |= dict(zip(("slots", "positions", "page_table"), index(1), strict=True))
    weight = Weight(torch.randn(8 * 64, 32).to(bf16))
    yield project_attention, (empty(bf16, 1, 32), weight), {**named, "scale": 0.1}


@cache
def sources(target: str) -> dict[str, KernelSource]:
    """One source of every kernel, by module and name; one of all generated ones."""
    found: dict[str, KernelSource] = {}
    for (op, args, attrs), prefer in itertools.product(requests(), ("", "stream MXFP4")):
        for template in templates_of(op.name):
            backend = KernelBackend(target_of(target), prefer=prefer)
            graph, weights, _, _ = graph_of_node(op, args, attrs)
            if op is project_attention:  # keys and values are read from the caches alone
                graph = replace(graph, outputs=(graph.outputs[0], *graph.outputs[-2:]))
            graph = for_target(graph, backend.target)
            names = [f"out{i}" for i in range(len(graph.outputs))]
            with (
                patch.object(select, "_TABLES", ({op.name: (template,)},)),
                patch.object(KernelBackend, "kernels", return_value={}),
            ):
                try:
                    lower(graph, weights, backend.target, [{}], names, backend=backend)
                except NoKernelError:  # for other sizes than these
                    continue
            for source in backend.sources.values():
                module = source.function.__module__.rpartition(".")[2]
                generated = module == "generated"
                name = "generated" if generated else f"{module}.{source.function.__name__}"
                found.setdefault(name, overlapping(source, target))
    return found


def overlapping(source: KernelSource, target: str) -> KernelSource:
    """The source as if its call overlapped others, where the target has that."""
    return KernelSource.of(
        source.function,
        {n: a for n, a in source.arguments if n != PROGRAMMATIC},
        source.num_warps,
        source.num_stages,
        target.startswith("cuda"),
    )


@pytest.mark.parametrize("kernel", sorted({*launched(), "generated"} - {AMD_ONLY, OF_NO_NODE}))
def test_the_assembly_of_every_kernel_waits_once(kernel: str) -> None:
    """Before any memory is touched and on the way of every program."""
    source = sources("cuda:sm_90")[kernel]
    assert source.programmatic and dict(source.constants)["PROGRAMMATIC"] is True
    options = {"num_warps": source.num_warps, "num_stages": source.num_stages}
    gpu = GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source.ast_source(), target=gpu, options=options).asm["ptx"]
    # What does not see what earlier launches wrote.
    assert ".nc" not in ptx
    code = re.sub("//.*", "", ptx[ptx.index(".entry") :])
    before, *after = re.split(r"\bgriddepcontrol\.wait\b", code)
    assert len(after) == 1
    first, second = (after[0], before) if kernel == EXPERT_STREAM else (before, after[0])
    assert len(re.findall(r"\bgriddepcontrol\.launch_dependents\b", first)) == 1
    assert "launch_dependents" not in second
    assert not re.search(r"\b(st\.(?!shared)|(atom|red|bra|ret|exit)\b)", before)
    if kernel not in THEIR_OWN_WAY:
        assert not re.search(r"\b(ld\.(?!param)|cp\.)", before)


@pytest.mark.parametrize("constant", [True, False])
def test_only_constants_are_read_ahead_of_the_wait(constant: bool) -> None:
    """A product with what a launch may have written, as a weight, waits first."""
    w = torch.randn(32, 64)
    backend = KernelBackend(target_of("cuda:sm_90"))
    graph, weights, _, _ = graph_of_node(
        linear, (torch.randn(1, 64), Weight(w) if constant else w), {}
    )
    with patch.object(KernelBackend, "kernels", return_value={}):
        lower(graph, weights, backend.target, [{}], ["y"], backend=backend)
    (source,) = backend.sources.values()
    assert source.function.__name__ == "gemv_kernel"
    assert dict(source.constants)["AHEAD"] is constant
    ptx = triton.compile(source.ast_source(), target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    before, _ = ptx[ptx.index(".entry") :].split("griddepcontrol.wait")
    assert bool(re.search(r"\bld\.global", before)) is constant


INDEXED = """graph @g(%q: bf16[1, 4, 64], %k: bf16[8, 64, 2, 64], %v: bf16[8, 64, 2, 64], \
%slots: i32[1], %positions: i32[1], %table: i32[2, 4]) {{
  %p = add(%positions, i32(1)) : i32[1]
  %y = cached_attention(%q, %k, %v, %slots, {at}, %table, scale=0.1) : bf16[1, 4, 64]
  return %y, %p
}}"""


@pytest.mark.parametrize("at", ["%positions", "%p"])
def test_a_cache_is_indexed_ahead_of_the_wait_where_no_launch_writes_its_index(at: str) -> None:
    """And its first keys and values are asked for, of the L2, where writes are seen."""
    backend = KernelBackend(target_of("cuda:sm_90"))
    graph = parse(INDEXED.format(at=at))
    with patch.object(KernelBackend, "kernels", return_value={}):
        lower(graph, Weights({}), backend.target, [{}], ["y", "p"], backend=backend)
    (source,) = (s for s in backend.sources.values() if s.function.__name__ == "decode_kernel")
    ahead = at == "%positions"
    assert dict(source.constants)["AHEAD"] is ahead
    ptx = triton.compile(source.ast_source(), target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    before, after = ptx[ptx.index(".entry") :].split("griddepcontrol.wait")
    assert bool(re.search(r"\bld\.global", before)) is ahead
    assert ("prefetch.global.L2" in before) is ahead and "prefetch" not in after


@pytest.mark.parametrize(("tokens", "overlaps"), [(16, True), (17, False)])
def test_tiles_for_many_tokens_keep_the_device_to_themselves(tokens: int, overlaps: bool) -> None:
    args = (torch.randn(tokens, 64), Weight(torch.randn(32, 64)))
    backend = KernelBackend(target_of("cuda:sm_90"))
    graph, weights, _, _ = graph_of_node(linear, args, {})
    with patch.object(KernelBackend, "kernels", return_value={}):
        lower(graph, weights, backend.target, [{}], ["y"], backend=backend)
    (source,) = backend.sources.values()
    assert source.programmatic is overlaps


def test_kernels_for_amd_are_told_that_launches_do_not_overlap() -> None:
    found = sources("hip:gfx942")
    missing = launched().keys() - found.keys()
    assert missing == {
        EXPERT_STREAM,
        REGISTER_DECODE,
        "fragment_linear.fragment_kernel",
        "mxfp4_stream.stream_kernel",
        OF_NO_NODE,
    }
    for source in found.values():
        assert not source.programmatic and dict(source.constants)["PROGRAMMATIC"] is False
