"""Steps that feed themselves, as they are planned: inputs that stay, and are written in place."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from ingot.codegen.cpu import CpuDriver
from ingot.codegen.lower import lower
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.target import CPU, target_of
from ingot.passes.serving.feed_next_step import FeedNextStep
from ingot.passes.serving.sample_on_device import SampleOnDevice
from ingot.runtime.program import STEP, Slice
from interpreted import InterpretedBackend, InterpretedDriver
from pass_checks import applied, graph_of, random_weights
from planned import PlannedDriver, planned

VOCAB, ROWS = 40, 3
GRAPH = """
    graph @end(%tokens: i32[T], %positions: i32[T], %slots: i32[T], %rows: i32[L]) T=1..8 L=1..8 {
      %x = embedding(%tokens, @embed)
      %y = embedding(%positions, @places)
      %z = add(%x, %y)
      %t = take(%z, %rows)
      %logits = linear(%t, @v)
      return %logits
    } where {
      @embed: f32[40, 8]
      @places: f32[30, 8]
      @v: f32[40, 8]
    }""".replace("%rows", "%logit_rows")
BINDING = {"T": 4, "L": ROWS}
OUTPUTS = ("logits", "token", "logprob")


def fed_graph() -> Graph:
    sampled, _ = applied(SampleOnDevice(candidates=0), graph_of(GRAPH))
    fed, _ = applied(FeedNextStep(), sampled)
    return fed


def first_inputs() -> dict[str, torch.Tensor]:
    """Two rows of two sequences, penalized and drawn, a place of padding, a row twice."""
    ints = {
        "tokens": [3, 9, 0, 11],
        "positions": [0, 5, 0, 8],
        "slots": [1, 0, -1, 2],
        "logit_rows": [1, 3, 1],
        "top_k": [0, 7, 0],
        "top": [0, 0, 0],
        "prompt": [2, 9, 0],
    }
    floats = {
        "temperature": [0, 1.5, 1],
        "top_p": [1, 1, 1],
        "min_p": [0, 0, 0],
        "penalty": [1.5, 1.25, 1],
        "draw": [0, 0.25, 0.5],
    }
    made = {n: torch.tensor(x, dtype=torch.int32) for n, x in ints.items()}
    made |= {n: torch.tensor(x, dtype=torch.float32) for n, x in floats.items()}
    made["seen"] = torch.zeros((ROWS, -(-VOCAB // 32)), dtype=torch.int32)
    made["seed"] = torch.tensor([1, -7, 3])
    return made


def expected_steps(graph: Graph, count: int) -> list[Mapping[str, np.ndarray]]:
    """What the interpreter gives, each step with the updates of the one before."""
    inputs, found = first_inputs(), list[Mapping[str, np.ndarray]]()
    weights = random_weights(graph)
    for _ in range(count):
        results = interpret(graph, inputs, weights)
        found.append({n: x.numpy() for n, x in zip(OUTPUTS, results.outputs, strict=False)})
        inputs |= results.updates
    return found


@pytest.mark.parametrize("where", ["cpu", "planned", "kernels"])
def test_a_step_feeds_the_next(where: str) -> None:
    graph = fed_graph()
    weights = random_weights(graph)
    target = target_of("cuda:sm_90")
    if where == "cpu":
        lowered, driver = lower(graph, weights, CPU, [BINDING], OUTPUTS), CpuDriver()
    elif where == "planned":
        lowered, driver = planned(graph, weights, [BINDING], OUTPUTS), PlannedDriver()
    else:
        backend = InterpretedBackend(target)
        lowered = lower(graph, weights, target, [BINDING], OUTPUTS, backend=backend)
        driver = InterpretedDriver(target.name)
    assert lowered.program.functions[STEP].fed == ("tokens", "positions", "draw", "seen")
    executable = driver.load(lowered.program, lowered.load_weight)
    given = {name: x.numpy() for name, x in first_inputs().items()}
    for expected in expected_steps(graph, 9):
        found = executable.launch(STEP, BINDING, given).wait()
        np.testing.assert_array_equal(found["token"], expected["token"])
        np.testing.assert_allclose(found["logits"], expected["logits"], 1e-5, 1e-5)
        given = {}
    # What is given comes in place of what was left, and the rest stays.
    other = executable.run(STEP, BINDING, {"slots": np.full(4, -1, np.int32)})
    again = executable.run(STEP, BINDING, {})
    np.testing.assert_array_equal(other["token"], again["token"])
    executable.close()


def test_a_run_of_other_sizes_leaves_nothing() -> None:
    graph = fed_graph()
    weights = random_weights(graph)
    lowered = lower(graph, weights, CPU, [BINDING], OUTPUTS)
    executable = CpuDriver().load(lowered.program, lowered.load_weight)
    given = {name: x.numpy() for name, x in first_inputs().items()}
    executable.run(STEP, BINDING, given)
    with pytest.raises(ValueError, match=r"expected inputs .*, found \[\]"):
        executable.run(STEP, {"T": 4, "L": 2}, {})
    with pytest.raises(ValueError, match=r"expected inputs .*, found \[\]"):
        executable.run(STEP, BINDING, {})
    executable.close()


def test_what_the_caller_gave_is_not_written() -> None:
    graph = fed_graph()
    lowered = lower(graph, random_weights(graph), CPU, [BINDING], OUTPUTS)
    executable = CpuDriver().load(lowered.program, lowered.load_weight)
    given = {name: x.numpy().copy() for name, x in first_inputs().items()}
    for _ in range(2):
        executable.run(STEP, BINDING, given)
    for name, x in first_inputs().items():
        np.testing.assert_array_equal(given[name], x.numpy())
    executable.close()


def test_inputs_stay_and_are_written_in_place() -> None:
    graph = fed_graph()
    lowered = planned(graph, random_weights(graph), [BINDING], OUTPUTS)
    (entry,) = lowered.program.entries
    *others, last = entry.launches
    assert last.label.startswith("feed")
    assert not any(launch.label.startswith("copy") for launch in others)
    written = [arg.buffer for arg in last.args[:4] if isinstance(arg, Slice)]
    assert written == ["tokens", "positions", "draw", "seen"]
    inputs = [b for b in entry.buffers if b.kind == "input"]
    for one in inputs:
        for other in entry.buffers:
            apart = (one.offset or 0) >= (other.offset or 0) + other.nbytes or (
                other.offset or 0
            ) >= (one.offset or 0) + one.nbytes
            assert apart or one is other, (one, other)


def test_an_output_that_is_an_input_is_what_it_was() -> None:
    """What is read after the step is not written over: the update is copied behind it."""
    fed = fed_graph()
    graph = Graph(
        fed.name, fed.params, (*fed.outputs, fed.param("positions")), fed.symbols, fed.updates
    )
    lowered = planned(graph, random_weights(graph), [BINDING], (*OUTPUTS, "where"))
    executable = PlannedDriver().load(lowered.program, lowered.load_weight)
    given = {name: x.numpy() for name, x in first_inputs().items()}
    places = [executable.run(STEP, BINDING, given if i == 0 else {})["where"] for i in range(3)]
    assert [list(p) for p in places] == [[0, 5, 0, 8], [0, 6, 0, 9], [0, 7, 0, 10]]
    executable.close()
