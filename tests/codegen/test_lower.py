"""Lowering: every entry of a program computes what the interpreter computes, in any legal order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from time import process_time

import networkx as nx
import numpy as np
import pytest
import torch
from ingot.codegen.constants import ConstantMaker, folded
from ingot.codegen.lower import Lowered, serving_bindings
from ingot.codegen.memory import ALIGNMENT
from ingot.compiler.interpret import Interpreter, interpret, random_tensor
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.text import parse
from ingot.compiler.torch_types import type_of
from ingot.compiler.weights import Entry, Weights
from ingot.runtime.devices.staging import lay_out
from ingot.runtime.program import STEP, Program, Slice
from msgspec.structs import replace
from pass_checks import plain_serving
from planned import PlannedDriver, planned
from programs import with_entries

# Two layers that share a shape, so that their kernels are the same; heads of 4.
MODEL = """
graph @model(%tokens: i32[T], %positions: i32[T]) T=1..64 {
  %0 = embedding(%tokens, @embed) : f32[T, 8]
  %1, %2 = rope_tables(%positions, @inv_freq, scale=1.0, dtype='f32') : f32[T, 2], f32[T, 2]
  %3 = rms_norm(%0, weight=@norm, eps=1e-06) : f32[T, 8]
  %4 = linear(%3, @w.0) : f32[T, 8]
  %5 = view(%4, shape=[T, 2, 4]) : f32[T, 2, 4]
  %6 = rope(%5, %1, %2, form='half') : f32[T, 2, 4]
  %7 = attention(%6, %6, %5, scale=0.5) : f32[T, 2, 4]
  %8 = view(%7, shape=[T, 8]) : f32[T, 8]
  %9 = permute(@w.1, dims=[1, 0]) : f32[8, 8]
  %10 = linear(%8, %9) : f32[T, 8]
  %11 = add(%0, %10) : f32[T, 8]
  %12 = rms_norm(%11, weight=@norm, eps=1e-06) : f32[T, 8]
  %13 = linear(%12, @w.2) : f32[T, 8]
  %14 = view(%13, shape=[T, 2, 4]) : f32[T, 2, 4]
  %15 = rope(%14, %1, %2, form='half') : f32[T, 2, 4]
  %16 = attention(%15, %15, %14, scale=0.5) : f32[T, 2, 4]
  %17 = view(%16, shape=[T, 8]) : f32[T, 8]
  %18 = add(%11, %17) : f32[T, 8]
  %19 = linear(%18, @embed) : f32[T, 16]
  return %19
} where {
  @embed: f32[16, 8]
  @inv_freq: f32[2]
  @norm: f32[8]
  @w.0: f32[8, 8]
  @w.1: f32[8, 8]
  @w.2: f32[8, 8]
}
"""
BINDINGS = ({"T": 1, "L": 1}, {"T": 4, "L": 2}, {"T": 7, "L": 2})


class Loads(Counter[str]):
    """Random weights for a graph, and how often each was read."""

    def weights(self, graph: Graph) -> Weights:
        generator = torch.Generator().manual_seed(0)
        held: dict[str, Entry] = {}
        for node in graph.nodes():
            if node.op.name == "constant" and node.attrs["name"] not in held:
                name, tensor = node.attrs["name"], random_tensor(node.types[0], generator)

                def load(name: str = name, tensor: torch.Tensor = tensor) -> torch.Tensor:
                    self[name] += 1
                    return tensor

                held[name] = Entry(type_of(tensor), load, "the test")
        return Weights(held)


@cache
def served() -> Graph:
    passes = plain_serving(2, 8)
    return run_pipeline(parse(MODEL), passes)[-1].graph


def inputs_of(graph: Graph, binding: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Serving inputs: two slots with a page each, tokens at growing positions of each."""
    tokens, rows = binding["T"], binding["L"]
    generator = torch.Generator().manual_seed(seed)
    slots = torch.arange(tokens) % 2
    return {
        "tokens": torch.randint(0, 16, (tokens,), generator=generator).int(),
        "positions": (torch.arange(tokens) // 2).int(),
        "slots": torch.where(torch.arange(tokens) == 6, -1, slots).int(),
        "page_table": torch.tensor([[1], [0]]).int(),
        "logit_rows": torch.randint(0, tokens, (rows,), generator=generator).int(),
    }


def caches_of(graph: Graph) -> dict[str, torch.Tensor]:
    return {n: torch.zeros([int(d) for d in graph.param(n).type.shape]) for n in graph.updates}


def run(
    lowered: Lowered | Program,
    load: object,
    inputs: Mapping[str, torch.Tensor],
    entry: int = 0,
) -> dict[str, np.ndarray]:
    program = lowered.program if isinstance(lowered, Lowered) else lowered
    executable = PlannedDriver().load(program, load)  # pyright: ignore
    found = executable.run(
        STEP, program.entries[entry].symbols, {k: v.numpy() for k, v in inputs.items()}
    )
    executable.close()
    return {k: np.array(v) for k, v in found.items()}


def test_every_entry_computes_what_the_interpreter_does() -> None:
    graph = served()
    weights = Loads().weights(graph)
    lowered = planned(graph, weights, BINDINGS, ("logits",))
    executable = PlannedDriver().load(lowered.program, lowered.load_weight)
    caches = caches_of(graph)
    for step, (binding, entry) in enumerate(zip(BINDINGS, lowered.program.entries, strict=True)):
        inputs = inputs_of(graph, binding, seed=step)
        expected = interpret(graph, {**inputs, **caches}, weights)
        caches = expected.updates  # the program keeps its own from step to step
        found = executable.run(STEP, entry.symbols, {k: v.numpy() for k, v in inputs.items()})
        assert entry.symbols == binding
        # Folded weights are dense, so that products with them may round otherwise.
        np.testing.assert_allclose(found["logits"], expected.outputs[0].numpy(), 1e-5, 1e-5)


def test_any_order_that_the_dependencies_allow_gives_the_same() -> None:
    graph = served()
    lowered = planned(graph, Loads().weights(graph), BINDINGS[2:], ("logits",))
    (entry,) = lowered.program.entries
    expected = run(lowered, lowered.load_weight, inputs_of(graph, BINDINGS[2]))["logits"]
    waiting = nx.DiGraph(list(entry.dependencies))
    waiting.add_nodes_from(range(len(entry.launches)))
    assert nx.is_directed_acyclic_graph(waiting)
    assert set(nx.transitive_reduction(waiting).edges) == set(entry.dependencies)
    rng, seen = random.Random(0), set()
    for _ in range(12):
        shuffled = {i: rng.random() for i in waiting}
        order = tuple(nx.lexicographical_topological_sort(waiting, key=shuffled.__getitem__))
        seen.add(order)
        permuted = replace(entry, launches=tuple(entry.launches[i] for i in order))
        program = with_entries(lowered.program, [permuted])
        found = run(program, lowered.load_weight, inputs_of(graph, BINDINGS[2]))["logits"]
        np.testing.assert_array_equal(found, expected)
    assert len(seen) > 3  # there is freedom to test


def test_each_dependency_is_needed() -> None:
    """The last launch, a place too early, reads what is not there yet."""
    graph = served()
    lowered = planned(graph, Loads().weights(graph), BINDINGS[2:], ("logits",))
    (entry,) = lowered.program.entries
    expected = run(lowered, lowered.load_weight, inputs_of(graph, BINDINGS[2]))["logits"]
    *before, first, second = entry.launches
    assert (len(before), len(before) + 1) in entry.dependencies
    moved = (*before, second, first)
    program = with_entries(lowered.program, [replace(entry, launches=moved)])
    found = run(program, lowered.load_weight, inputs_of(graph, BINDINGS[2]))["logits"]
    assert not np.array_equal(found, expected)


def test_buffers_of_a_real_entry_do_not_meet() -> None:
    lowered = planned(served(), Loads().weights(served()), BINDINGS[2:], ("logits",))
    (entry,) = lowered.program.entries
    used: dict[str, list[int]] = {}
    for at, launch in enumerate(entry.launches):
        for arg in launch.args:
            if isinstance(arg, Slice):
                used.setdefault(arg.buffer, []).append(at)
    placed = [b for b in entry.buffers if b.offset is not None]
    assert placed == list(entry.buffers)
    for i, a in enumerate(placed):
        assert a.offset % ALIGNMENT == 0  # pyright: ignore
        assert a.offset + a.nbytes <= lowered.program.arena_bytes  # pyright: ignore
        for b in placed[:i]:
            lives = [
                (
                    -1 if x.kind == "input" else min(used[x.name]),
                    len(entry.launches) if x.kind == "output" else max(used.get(x.name, [0])),
                )
                for x in (a, b)
            ]
            beside = lives[0][0] <= lives[1][1] and lives[1][0] <= lives[0][1]
            apart = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset  # pyright: ignore
            assert apart or not beside


def test_inputs_travel_in_one_copy() -> None:
    """However early some of them have been read: side by side, till the last is."""
    program = planned(served(), Loads().weights(served()), BINDINGS, ("logits",)).program
    for entry in program.entries:
        inputs = [b for b in entry.buffers if b.kind == "input"]
        assert len(inputs) == 5
        assert len(lay_out(inputs).copies) == 1
        assert len(lay_out(b for b in entry.buffers if b.kind == "output").copies) == 1


def test_outputs_but_the_largest_travel_in_one_copy() -> None:
    """The large one is computed last; the others lie apart in time."""
    graph = parse("""
graph @outs(%x: f32[T, 256], %y: i32[T], %w: f32[512, 256]) T=1..8 {
  %0 = add(%x, f32(1.0)) : f32[T, 256]
  %1 = mul(%0, %0) : f32[T, 256]
  %2 = view(%1, shape=[256*T]) : f32[256*T]
  %3 = add(%0, %1) : f32[T, 256]
  %4 = add(%y, %y) : i32[T]
  %5 = linear(%3, %w) : f32[T, 512]
  return %4, %5, %3, %2
}""")
    lowered = planned(graph, Weights({}), [{"T": 8}], tuple("abcd"))
    (entry,) = lowered.program.entries
    kept = {b.name: b for b in entry.buffers if b.kind == "output"}
    assert len(lay_out(b for b in kept.values() if b.name != "b").copies) == 1
    given = {"x": torch.randn(8, 256), "y": torch.arange(8).int(), "w": torch.randn(512, 256)}
    found = run(lowered, lowered.load_weight, given)
    for name, expected in zip("abcd", interpret(graph, given).outputs, strict=True):
        np.testing.assert_allclose(found[name], expected.numpy(), 1e-5, 1e-5)


def test_equal_kernels_are_one() -> None:
    graph = served()
    program = planned(graph, Loads().weights(graph), BINDINGS[1:2], ("logits",)).program
    (entry,) = program.entries
    by_op: dict[str, set[str]] = {}
    for launch in entry.launches:
        by_op.setdefault(launch.label.split()[0], set()).add(launch.kernel)
    launched = Counter(launch.label.split()[0] for launch in entry.launches)
    assert launched["rope"] == launched["kv_append"] == launched["cached_attention"] == 2
    assert {len(by_op[op]) for op in ("rope", "kv_append", "cached_attention")} == {1}
    # Products with 8 and with 16 rows, and rows before and after logit rows are taken.
    assert launched["linear"] == 4 and len(by_op["linear"]) == 2
    assert {launch.kernel for launch in entry.launches} == program.kernels.keys()


def test_weights_are_loaded_once_each_and_folded() -> None:
    graph, loads = served(), Loads()
    lowered = planned(graph, loads.weights(graph), BINDINGS, ("logits",))
    assert not loads  # nothing is read before the program is loaded
    folded = [n for n in lowered.program.buffers if n.startswith("@folded")]
    assert len(folded) == 1
    run(lowered, lowered.load_weight, inputs_of(graph, BINDINGS[0]))
    assert loads == dict.fromkeys(("embed", "inv_freq", "norm", "w.0", "w.1", "w.2"), 1)
    weights = loads.weights(graph)
    assert torch.equal(lowered.load_weight(folded[0]), weights.load("w.1").T)


def test_a_long_chain_of_ops_on_weights_takes_linear_time() -> None:
    count = 4000
    chain = [f"  %{i} = relu({f'%{i - 1}' if i else '@w'}) : f32[8]" for i in range(count)]
    sums = [f"  %{count + i} = add(%{count + i - 1 if i else 'x'}, %{i})" for i in range(count)]
    body = [*chain, *(f"{line} : f32[T, 8]" for line in sums)]
    head = "graph @g(%x: f32[T, 8]) T=1..64 {"
    graph = parse("\n".join([head, "@w: f32[8]", *body, f"  return %{2 * count - 1}", "}"]))
    weights = Weights.of({"w": torch.ones(8)}, "the test")
    start = process_time()
    names = folded(graph)
    made = ConstantMaker(names, weights)
    assert process_time() - start < 2
    assert len(names) == count and made("@folded.3").tolist() == [1.0] * 8


def test_stacked_weights_are_folded_into_one_buffer() -> None:
    graph = parse("""
graph @stack(%x: f32[T, 4]) T=1..8 {
  %0 = cat(@a, @b, dim=0) : f32[6, 4]
  %1 = cast(%0, dtype='f64') : f64[6, 4]
  %2 = cast(%1, dtype='f32') : f32[6, 4]
  %3 = linear(%x, %2) : f32[T, 6]
  %4, %5 = topk(%2, dim=-1, k=1) : f32[6, 1], i64[6, 1]
  return %3, %5, @a
} where {
  @a: f32[2, 4]
  @b: f32[4, 4]
}
""")
    loads = Loads()
    weights = loads.weights(graph)
    lowered = planned(graph, weights, [{"T": 3}], ("y", "best", "a"))
    kinds = {n: b.kind for n, b in lowered.program.buffers.items()}
    assert set(kinds.values()) == {"weight"} and len(kinds) == 3
    x = torch.randn(3, 4)
    found = run(lowered, lowered.load_weight, {"x": x})
    for value, expected in zip(
        found.values(), interpret(graph, {"x": x}, weights).outputs, strict=True
    ):
        np.testing.assert_array_equal(value, expected.numpy())


# ---- state


def state_graph(*body: str) -> str:
    """A graph over two caches %a and %b, what is appended to them, and the lines of `body`."""
    params = "%a: CACHE, %b: CACHE, %rows: f32[T, 1, 3], %slots: i32[T], %positions: i32[T]"
    head = f"graph @state({params}, %table: i32[1, 2]) T=1..4 {{"
    return "\n".join((head, *body, "}")).replace("CACHE", "f32[2, 4, 1, 3]")


def append(results: str, caches: str) -> str:
    rest = "%rows, %rows, %slots, %positions, %table"
    return f"{results} = kv_append({caches}, {rest}) : CACHE, CACHE"


def stepped(text: str, steps: int = 2) -> tuple[Program, list[dict[str, np.ndarray]]]:
    """The program, and what some steps of it gave; the interpreter must give the same."""
    graph = parse(text)
    lowered = planned(graph, Weights({}), [{"T": 2}], [f"y{i}" for i in range(len(graph.outputs))])
    executable = PlannedDriver().load(lowered.program, lowered.load_weight)
    state = {n: torch.zeros([int(d) for d in graph.param(n).type.shape]) for n in graph.updates}
    given = {p.attrs["name"]: p.type for p in graph.params}
    results: list[dict[str, np.ndarray]] = []
    for step in range(steps):
        torch.manual_seed(step)
        inputs = {
            name: {
                "rows": torch.randn(2, 1, 3),
                "slots": torch.zeros(2).int(),
                "positions": torch.tensor([2 * step, 2 * step + 1]).int(),
                "table": torch.tensor([[1, 0]]).int(),
            }.get(name, torch.ones([2, 4, 1, 3]))
            for name in given
            if name not in graph.updates
        }
        expected = interpret(graph, {**inputs, **state})
        state = expected.updates
        found = executable.run(STEP, {"T": 2}, {k: v.numpy() for k, v in inputs.items()})
        for value, tensor in zip(found.values(), expected.outputs, strict=True):
            np.testing.assert_array_equal(value, tensor.numpy())
        results.append({k: np.array(v) for k, v in found.items()})
    return lowered.program, results


def scratch_results(program: Program, op: str) -> int:
    """How many launches of `op` write into memory of the arena, not in place."""
    (entry,) = program.entries
    scratch = {b.name for b in entry.buffers if b.kind in ("scratch", "output")}
    return sum(
        any(isinstance(a, Slice) and a.buffer in scratch for a in launch.args[-2:])
        for launch in entry.launches
        if launch.label.startswith(op)
    )


# Each needs the old content of a cache, so that it may not be written in place.
COPIED = {
    "the old content is an output": ("%a, %b", "return %a, %0", "%0", "%1"),
    "a view of it is an output": (
        "%a, %b",
        "%2 = view(%b, shape=[8, 3]) : f32[8, 3]\nreturn %2, %1",
        "%0",
        "%1",
    ),
    "it is given as a view and read elsewhere": (
        "%va, %vb",
        "%2 = add(%a, %0) : CACHE\nreturn %2",
        "%0",
        "%1",
    ),
    "another node reads it": ("%a, %b", "%2 = add(%a, %0) : CACHE\nreturn %2", "%0", "%1"),
    "it is the next content of other state": ("%a, %b", "return %0, %1", "%0", "%a"),
    "one cache is given twice": ("%a, %a", "return %0, %1", "%0", "%1"),
    "the caches change places": ("%a, %b", "return %0", "%b", "%a"),
}


def test_state_is_written_in_place() -> None:
    text = state_graph(
        append("%0, %1", "%a, %b"),
        "%2 = add(%0, %1) : CACHE",
        "return %2",
        "update %a = %0",
        "update %b = %1",
    )
    program, _ = stepped(text, steps=3)
    assert scratch_results(program, "kv_append") == 0
    assert not [n for n in program.entries[0].launches if n.label in ("copy a", "copy b")]


def attended(result: str, rows: str, caches: str) -> str:
    index = "%slots, %positions, %table"
    return f"{result} = cached_attention({rows}, {caches}, {index}, scale=0.5) : f32[T, 1, 3]"


def again(*body: str) -> str:
    """Two caches that are appended to, attended to and appended to once more, by what that gave."""
    return state_graph(
        append("%0, %1", "%a, %b"),
        attended("%2", "%rows", "%0, %1"),
        "%3, %4 = kv_append(%0, %1, %2, %2, %slots, %positions, %table) : CACHE, CACHE",
        *body,
        "update %a = %3",
        "update %b = %4",
    )


def in_place(text: str) -> None:
    """The interpreter that writes in place gives what it gives otherwise."""
    graph = parse(text)
    torch.manual_seed(0)
    inputs = {
        "rows": torch.randn(2, 1, 3),
        "slots": torch.zeros(2).int(),
        "positions": torch.tensor([2, 3]).int(),
        "table": torch.tensor([[1, 0]]).int(),
        "a": torch.randn(2, 4, 1, 3),
        "b": torch.randn(2, 4, 1, 3),
    }
    expected = interpret(graph, inputs)
    held = {name: x.clone() for name, x in inputs.items()}
    found = Interpreter(graph).run(held, lambda _: torch.empty(0), {"T": 2}, in_place=True)
    for a, b in zip(found.outputs, expected.outputs, strict=True):
        assert torch.equal(a, b)
    for name, content in expected.updates.items():
        assert torch.equal(found.updates[name], content)


def test_state_is_written_in_place_again_and_again() -> None:
    text = again(attended("%5", "%2", "%3, %4"), "return %5, %2")
    program, _ = stepped(text, steps=3)
    assert scratch_results(program, "kv_append") == 0
    assert not [n for n in program.entries[0].launches if n.label.startswith("copy")]
    in_place(text)


@pytest.mark.parametrize(
    "body",
    [
        (attended("%5", "%2", "%3, %4"), attended("%6", "%5", "%0, %1"), "return %6"),
        ("return %2, %0",),
        ("%5 = view(%0, shape=[8, 3]) : f32[8, 3]", "return %2, %5"),
        ("%5 = add(%3, %1) : CACHE", "return %5"),
    ],
    ids=["attended to later", "an output", "a view is an output", "added"],
)
def test_state_is_copied_before_it_is_written_again_when_it_is(body: tuple[str, ...]) -> None:
    text = again(*body)
    program, _ = stepped(text, steps=3)
    assert scratch_results(program, "kv_append") == 1
    in_place(text)


@pytest.mark.parametrize("why", COPIED, ids=str)
def test_state_is_copied_when(why: str) -> None:
    caches, rest, a, b = COPIED[why]
    seen_as = [f"%v{c} = view(%{c}, shape=[2, 4, 1, 3]) : CACHE" for c in "ab" if "v" in caches]
    updates = (f"update %a = {a}", f"update %b = {b}")
    text = state_graph(*seen_as, append("%0, %1", caches), rest, *updates)
    program, _ = stepped(text, steps=3)
    assert scratch_results(program, "kv_append") == 1


def test_in_place_and_copied_kernels_are_two() -> None:
    """One append may write in place, the other not: equal in all else."""
    text = state_graph(
        append("%0, %1", "%a, %b"),
        append("%2, %3", "%0, %1"),
        "return %0, %2",
        "update %a = %2",
        "update %b = %3",
    )
    program, _ = stepped(text, steps=3)
    assert scratch_results(program, "kv_append") == 1


def test_state_written_in_place_that_becomes_other_state() -> None:
    stepped(
        state_graph(
            append("%0, %1", "%a, %b"),
            "%2 = add(%0, f32(1.0)) : CACHE",
            "return %2",
            "update %a = %2",
            "update %b = %0",
        ),
        steps=3,
    )


def test_swapped_state() -> None:
    stepped(
        """
graph @swap(%a: f32[2, 4, 1, 3], %b: f32[2, 4, 1, 3], %rows: f32[T, 1, 3]) T=1..4 {
  %0 = add(%a, f32(1.0)) : f32[2, 4, 1, 3]
  return %a, %b
  update %a = %b
  update %b = %0
}""",
        steps=4,
    )


def test_outputs_that_are_inputs_views_and_each_other() -> None:
    graph = parse("""
graph @outs(%x: f32[T, 4]) T=1..8 {
  %0 = view(%x, shape=[4*T]) : f32[4*T]
  %1 = add(%x, f32(1.0)) : f32[T, 4]
  %2 = view(%1, shape=[T, 2, 2]) : f32[T, 2, 2]
  return %x, %0, %2, %1, %1
}""")
    names = tuple("abcde")
    lowered = planned(graph, Weights({}), [{"T": 3}, {"T": 8}], names)
    for entry, tokens in enumerate((3, 8)):
        x = torch.randn(tokens, 4)
        found = run(lowered, lowered.load_weight, {"x": x}, entry)
        for name, expected in zip(names, interpret(graph, {"x": x}).outputs, strict=True):
            np.testing.assert_array_equal(found[name], expected.numpy())


@pytest.mark.parametrize(
    ("sequences", "tokens", "largest", "sizes"),
    [
        (8, 4096, 2048, [2**i for i in range(12)]),
        (1, 5, 2048, [1, 2, 4, 5]),
        (3, 1, 2048, [1, 2, 3]),
        (4, 100, 16, [1, 2, 4, 8, 16]),
    ],
)
def test_buckets(sequences: int, tokens: int, largest: int, sizes: Sequence[int]) -> None:
    found = serving_bindings(sequences, tokens, largest)
    assert found == [{"T": t, "L": min(t, sequences)} for t in sizes]
    found = serving_bindings(sequences, tokens, largest, rows=5)
    assert found == [{"T": t, "L": min(t, 5)} for t in sizes]
