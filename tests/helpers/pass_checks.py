"""What the tests of passes share: graphs from short text, and equality of before and after."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from ingot.compiler.interpret import interpret, random_tensor
from ingot.compiler.ir import INLINE, Graph, Node
from ingot.compiler.pipeline import Pass, PassContext, run_pipeline
from ingot.compiler.rewrite import Log
from ingot.compiler.target import Target
from ingot.compiler.text import parse
from ingot.compiler.torch_types import type_of
from ingot.compiler.types import VerifyError
from ingot.compiler.verify import verify
from ingot.compiler.weights import Entry, Weights
from ingot.passes.pipelines import RAISING, TARGET
from ingot.passes.serving.gather_logits import GatherLogits
from ingot.passes.serving.insert_kv_cache import InsertKvCache


def plain_serving(max_sequences: int, max_tokens_per_sequence: int) -> tuple[Pass, ...]:
    """To a paged cache without absorption and fusions: each op of the model by itself."""
    return (*RAISING, InsertKvCache(max_sequences, max_tokens_per_sequence), GatherLogits())


def for_target(graph: Graph, target: Target) -> Graph:
    """`graph` after the passes of a GPU target."""
    return run_pipeline(graph, TARGET, PassContext(target))[-1].graph


def graph_of(text: str) -> Graph:
    """The graph of IR text in which a node's types may be left out.

    They are found by asking: the parser says what an op gives instead of a type that is wrong.
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    end = next((i for i, line in enumerate(lines) if line.startswith("}")), len(lines))
    for i in range(1, end):
        if " = " not in lines[i] or " : " in lines[i] or lines[i].startswith("update"):
            continue
        asked = [*lines[:i], f"{lines[i]} : c128[987]", "return", *lines[end:]]
        try:
            parse("\n".join(asked))
        except VerifyError as error:
            found = re.search(r"but the op gives ([^\n]*)", str(error))
            if not found:
                raise
            lines[i] = f"{lines[i]} : {found[1]}"
    return parse("\n".join(lines))


def form(node: Node) -> str:
    """The op and what it has beside its required operands: `linear norm gate`."""
    gate = ("gate",) if node.attrs.get("gate") else ()
    return " ".join((node.op.name, *node.given, *gate))


def forms(graph: Graph) -> Counter[str]:
    """How many nodes there are of each form; of parameters, weights and literals none."""
    return Counter(form(n) for n in graph.nodes() if n.op.name not in INLINE)


def random_weights(graph: Graph, seed: int = 0) -> Weights:
    """Standard normal weights for every constant of `graph`; the same name, the same weight."""
    held: dict[str, Entry] = {}
    for node in graph.nodes():
        if node.op.name == "constant":
            name, type_ = node.attrs["name"], node.types[0]
            generator = torch.Generator().manual_seed(seed + sum(name.encode()))
            tensor = random_tensor(type_, generator)
            held[name] = Entry(type_of(tensor), partial(torch.clone, tensor), "the test")
    return Weights(held)


def random_inputs(
    graph: Graph, binding: Mapping[str, int], seed: int = 0, high: int = 8
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        p.attrs["name"]: random_tensor(p.type.bind(binding), generator, high) for p in graph.params
    }


def assert_equal_results(
    before: Graph, after: Graph, tolerance: float = 1e-5, sizes: Sequence[int] = (1, 3, 8)
) -> None:
    """Both graphs give the same through the interpreter, at several sizes of every symbol.

    `tolerance` bounds max |Δ| against max |value|; integers and bools must be equal.
    """
    weights = random_weights(before)
    for seed, size in enumerate(sizes):
        inputs = random_inputs(before, dict.fromkeys(before.symbols, size), seed)
        expected, found = (interpret(g, inputs, weights).outputs for g in (before, after))
        for a, b in zip(expected, found, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            if not a.is_floating_point():
                assert torch.equal(a, b)
                continue
            scale = a.float().abs().nan_to_num(0, 0, 0).max().item()
            torch.testing.assert_close(
                b, a, rtol=0, atol=tolerance * max(scale, 1e-6), equal_nan=True
            )


def applied(step: Pass, graph: Graph, target: Target | None = None) -> tuple[Graph, Log]:
    """`graph` after one pass, verified, and what the pass reported."""
    log = Log()
    after = step(graph, PassContext(target, log=log))
    verify(after)
    return after, log


def checked(step: Pass, text: str, tolerance: float = 1e-5, target: Target | None = None) -> Graph:
    """The graph of `text` after one pass; it must compute what it computed before."""
    before = graph_of(text)
    after, _ = applied(step, before, target)
    assert_equal_results(before, after, tolerance)
    return after


def ops(graph: Graph) -> Counter[str]:
    """How often each op occurs, but for parameters, weights and literals."""
    leaves = ("param", "constant", "literal")
    return Counter(n.op.name for n in graph.nodes() if n.op.name not in leaves)


def body(graph: Graph) -> list[str]:
    """The lines of the nodes and results, without types, sections and weights."""
    lines = [line.strip() for line in str(graph).splitlines()[1:]]
    return [line.rpartition(" : ")[0] or line for line in lines if line[:1] in ("%", "r", "u")]
