"""`ingot bench`: what it counts, against counts by hand; its whole way, on a driver without a GPU.

The fake driver computes nothing, so that no time is right there; which launches are timed, how
often, and what is printed and written of them is.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import msgspec
import numpy as np
import pytest
import torch
from fake_gpu import CUDA, FakeGpu, build_fake
from ingot.codegen import price_table
from ingot.compiler.dtypes import INTEGERS
from ingot.compiler.ir import Graph
from ingot.compiler.target import target_of
from ingot.frontends import api, drivers
from ingot.frontends.bench import tune as tune_module
from ingot.frontends.bench.explain import explain
from ingot.frontends.bench.measure import bytes_by_launch, decode_rate
from ingot.frontends.bench.models import MODELS, config_of
from ingot.frontends.bench.parts import parts_of, prefix_name, with_own_integers, with_parts
from ingot.frontends.bench.plots import write_plots
from ingot.frontends.bench.random_weights import RandomWeights
from ingot.frontends.bench.run import Benchmark, run
from ingot.frontends.bench.traffic import NOTHING, traffic_by_label
from ingot.frontends.bench.workload import Workload, step_inputs, symbols_for
from ingot.frontends.cli.benchmark import result_lines, result_tables
from ingot.frontends.cli.commands.bench import command
from ingot.frontends.cli.flags import UsageError
from ingot.frontends.cli.main import app
from ingot.frontends.drivers import NoDriverError
from ingot.frontends.launches import PlannedEntry
from ingot.frontends.model import Plan
from ingot.frontends.speculate import NGram
from ingot.runtime.devices.check_program import check_program
from ingot.runtime.program import STEP, Program
from ingot.runtime.serving.abi import ServingAbi
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

PAGE = 64
PREFILL, DECODE = Workload(1, 64, 0), Workload(2, 1, 200)


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "deepseek_v3"])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_config(request.param, dtype="bfloat16").save_pretrained(folder)
    return planned(folder)


def planned(folder: Path) -> Plan:
    return api.plan(
        folder,
        entry=api.ALL,
        target="cuda:sm_90",
        max_sequences=2,
        max_tokens_per_sequence=256,
        progress=False,
    )


# ---- what a step must read


def traffic(graph: Graph, work: Workload) -> tuple[int, int]:
    found = sum(traffic_by_label(graph, work).values(), NOTHING)
    return found.bytes, found.flops


def bf16(*shapes: tuple[int, ...]) -> int:
    return sum(2 * int(np.prod(shape)) for shape in shapes)


def of_llama(batch: int, seen: int) -> int:
    """Of the tiny llama: hidden 64, 4 heads and 2 of keys of 16, MLP 96, vocabulary 128."""
    rope = 4 * 16 // 2
    layer = bf16((64,), (64 + 2 * 32, 64), (64, 64), (64,), (2 * 96, 64), (64, 96))
    cache = batch * seen * bf16((2, 16), (2, 16))
    return batch * bf16((64,)) + rope + 2 * (layer + cache) + bf16((64,), (128, 64))


@pytest.mark.parametrize("plan", ["llama"], indirect=True)
def test_dense_model_reads_its_weights_once_and_what_is_seen_of_the_cache(plan: Plan) -> None:
    for batch, context in ((1, 0), (1, 63), (1, 200), (2, 200)):
        found, _ = traffic(plan.graph(), Workload(batch, 1, context))
        assert found == pytest.approx(of_llama(batch, context + 1), abs=512)  # indices


def test_twice_the_tokens_are_twice_the_flops(plan: Plan) -> None:
    one, two = (traffic(plan.graph(), Workload(batch, 1, 100))[1] for batch in (1, 2))
    assert two == pytest.approx(2 * one, rel=1e-3)


@pytest.mark.parametrize("plan", ["qwen3_moe"], indirect=True)
def test_experts_are_read_that_are_expected_to_be_chosen(plan: Plan) -> None:
    each = bf16((64, 64), (64, 32))
    for tokens in (1, 2, 64):
        found = traffic_by_label(plan.graph(), Workload(tokens, 1, 10))
        (first, second) = (t.bytes for label, t in found.items() if label.startswith("experts"))
        # Each token chooses 2 of 8, on its own.
        chosen = torch.rand(2000, tokens, 8).topk(2).indices.flatten(1)
        distinct = np.mean([len(row.unique()) for row in chosen])
        assert first == second
        assert first / each == pytest.approx(distinct, abs=0.55)  # whole experts


def test_a_window_bounds_what_is_seen_of_the_cache(tmp_path: Path) -> None:
    """Of a chunk of the prompt each token sees a window, all together that and the chunk."""
    config = tiny_config("gpt_oss", dtype="bfloat16")
    config.save_pretrained(tmp_path)
    graph = api.plan(tmp_path, target="cpu", max_tokens_per_sequence=256, progress=False).graph()
    token = 2 * bf16((config.num_key_value_heads, config.head_dim))  # keys and values
    assert len({*config.layer_types}) == 2
    for new, context in ((1, 0), (1, 180), (64, 0), (64, 100)):
        seen = new + context
        reached = min(config.sliding_window + new - 1, seen)
        positions = {"full_attention": seen, "sliding_attention": reached}
        found = traffic_by_label(graph, Workload(1, new, context)).items()
        read = [t.bytes for label, t in found if label.startswith("cached_attention")]
        assert read == [token * positions[kind] for kind in config.layer_types]


def test_launches_of_an_op_share_its_bytes(plan: Plan) -> None:
    """What each is given of the weights, and the caches where attention is."""
    program, graph = plan.program, plan.graph()
    traffic = traffic_by_label(graph, DECODE)
    entry = program.functions[STEP].entry(symbols_for(ServingAbi(program), DECODE))
    found = bytes_by_launch(program, entry, traffic)
    assert found.keys() == {*range(len(entry.launches))}
    by_label: dict[str, float] = {}
    for i, launch in enumerate(entry.launches):
        by_label[launch.label] = by_label.get(launch.label, 0) + found[i]
    assert by_label == {n: pytest.approx(traffic.get(n, NOTHING).bytes) for n in by_label}
    experts = [i for i, launch in enumerate(entry.launches) if launch.label.startswith("experts")]
    for hidden, summed in zip(experts[::2], experts[1::2], strict=True):
        # Gate and up rows are twice the down rows.
        assert found[hidden] == pytest.approx(2 * found[summed], rel=1e-3)


# ---- launches as functions of their own


def test_parts_are_every_launch_once_and_the_program_stays_valid(plan: Plan) -> None:
    entry = plan.program.functions[STEP].entries[0]
    parts = parts_of(plan.program, entry)
    assert sorted(i for part in parts for i in part.launches) == list(range(len(entry.launches)))
    made = with_parts(plan.program, [entry], entry)
    check_program(made)
    assert made.functions[STEP] == plan.program.functions[STEP]
    for part in parts:
        (chain,) = made.functions[part.function].entries
        assert {*chain.launches} == {entry.launches[i] for i in part.launches}
        assert len(chain.launches) == part.chained >= 16
        assert chain.dependencies == tuple((i, i + 1) for i in range(part.chained - 1))
    whole = made.functions[prefix_name(entry, len(entry.launches))].entries[0]
    assert (whole.launches, whole.dependencies) == (entry.launches, entry.dependencies)


def test_launches_that_are_tuned_find_indices_of_a_step(plan: Plan) -> None:
    """Loading replays each kind of launch by itself: experts' would read what another wrote."""

    class Loaded(Exception):
        pass

    def load(program: Program, weights: object) -> None:
        integers = [b for e in program.entries for b in e.buffers if b.dtype in INTEGERS]
        assert integers
        assert all((b.offset or 0) >= plan.program.arena_bytes for b in integers if b.nbytes)
        raise Loaded

    driver: Any = SimpleNamespace(target="cuda:sm_90", load=load)
    with pytest.raises(Loaded):
        list(tune_module._timed(plan.program, (), driver, ()))


def test_integers_lie_where_nothing_else_does(plan: Plan) -> None:
    made = with_own_integers(plan.program)
    check_program(made)
    for function, before in zip(
        made.functions.values(), plan.program.functions.values(), strict=True
    ):
        for entry, old in zip(function.entries, before.entries, strict=True):
            assert (entry.launches, entry.dependencies) == (old.launches, old.dependencies)
            placed = sorted(
                (b for b in entry.buffers if b.nbytes and b.offset is not None),
                key=lambda b: b.offset or 0,
            )
            integers = [b for b in placed if b.dtype in INTEGERS]
            assert {"tokens", "slots"} <= {b.name for b in integers}
            assert placed[-len(integers) :] == integers
            assert (integers[0].offset or 0) >= plan.program.arena_bytes
            for one, other in pairwise(integers):
                assert (one.offset or 0) + one.nbytes <= (other.offset or 0)


def test_inputs_are_those_of_the_workload(plan: Plan) -> None:
    step, abi = plan.program.functions[STEP], ServingAbi(plan.program)
    found = step_inputs(step, abi.meta, {"T": 4, "L": 2}, DECODE)
    assert found["slots"].tolist() == [0, 1, -1, -1]
    assert found["positions"].tolist()[:2] == [200, 200]
    assert found["logit_rows"].tolist() == [0, 1]
    assert len({*found["page_table"].flatten().tolist()}) == found["page_table"].size
    found = step_inputs(step, abi.meta, {"T": 64, "L": 2}, PREFILL)
    assert found["positions"].tolist() == [*range(64)]
    assert found["logit_rows"].tolist()[:1] == [63]


def test_a_workload_that_fits_no_entry_is_refused(plan: Plan) -> None:
    abi = ServingAbi(plan.program)
    assert symbols_for(abi, PREFILL)["T"] == 64 and symbols_for(abi, DECODE)["L"] == 2
    for work in (Workload(1, 1, 256), Workload(3, 1, 8), Workload(2, 200, 0)):
        with pytest.raises(ValueError, match=f"^{work}: expected at most 2 sequences of 256 tok.*"):
            symbols_for(abi, work)


def test_the_rate_of_decoding_is_that_of_all_together() -> None:
    # The second begins when the first has four tokens, and outlives it.
    assert decode_rate([[1.0, 2.0, 3.0, 4.0, 4.5, 5.0], [4.0, 4.5, 5.0, 9.0]]) == 2 * 2 / 1.0
    assert decode_rate([[1.0, 3.0]]) == 0.5
    assert decode_rate([[1.0], [1.0]]) is None
    assert decode_rate([[1.0, 2.0], [3.0, 4.0]]) is None


def test_random_weights_fit_every_buffer(plan: Plan) -> None:
    load = RandomWeights(plan.program)
    for buffer in plan.program.buffers.values():
        if buffer.kind == "weight":
            made = load(buffer.name)
            assert tuple(made.shape) == buffer.shape and made.nbytes == buffer.nbytes
            assert not made.is_floating_point() or 0 < made.float().std() < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_names_are_models_of_transformers(name: str) -> None:
    config = config_of(name, layers=2)
    assert config.num_hidden_layers == 2 and config.dtype == torch.bfloat16
    described = get_type_hints(command, include_extras=True)["model"].__metadata__[0].help
    assert re.search(rf"\b{name}\b", described)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3-8b", 8.19),
        ("qwen3-30b-a3b", 30.53),
        ("deepseek-v2-lite", 15.71),
        ("gpt-oss-20b", 20.91),
    ],
)
def test_names_are_as_large_as_what_was_published(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=1e-3)


def test_a_limit_of_positions_is_raised_and_never_lowered() -> None:
    assert config_of("qwen3-8b", tokens=65536).max_position_embeddings == 65536
    assert config_of("qwen3-8b", tokens=10).max_position_embeddings == 40960


def test_a_name_that_is_none_lists_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"expected a directory with a config\.json, or one of qwen3"
    ):
        config_of("qwen3-9b")


# ---- the whole way


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> FakeGpu:
    return build_fake(CUDA, tmp_path_factory.mktemp("fake"))


@pytest.fixture
def device(gpu: FakeGpu) -> Iterator[FakeGpu]:
    gpu.reset()
    yield gpu
    assert gpu.complaints == "" and gpu.outstanding == []


def test_bench_times_steps_launches_and_serving(device: FakeGpu, tmp_path: Path) -> None:
    tiny_config("qwen3_moe", dtype="bfloat16").save_pretrained(tmp_path)
    works = (DECODE, Workload(1, 1, 20), PREFILL)
    found = run(Benchmark(str(tmp_path), works, replays=5), device.driver(), read_bytes=8 << 20)
    assert [step.workload for step in found.measured.steps] == [
        "decode, batch 2, context 200",
        "decode, batch 1, context 20",
        "prefill, 64 tokens",
    ]
    for step in found.measured.steps:
        assert sum(part.count for part in step.parts) == step.launches
        assert sum(part.bytes for part in step.parts) == step.traffic.bytes
        assert sum(part.share for part in step.parts) == pytest.approx(1)
    first, *others = found.measured.steps
    assert len(first.timeline) == first.launches and not any(o.timeline for o in others)
    assert [s.batch for s in found.measured.serving] == [1, 2]
    assert all(s.tokens_per_second for s in found.measured.serving)
    assert not any(s.speculation for s in found.measured.serving)
    json.dumps(dataclasses.asdict(found))
    write_plots(found, tmp_path / "plots")
    assert (tmp_path / "plots" / "bandwidth.png").stat().st_size > 10_000
    assert (tmp_path / "plots" / "timeline.png").stat().st_size > 10_000
    events = json.loads((tmp_path / "plots" / "trace.json").read_text(encoding="utf-8"))
    assert [e["name"] for e in events["traceEvents"]] == [
        span.label.partition(" ")[0] for span in first.timeline
    ]
    assert len([*result_tables(found)]) == 2 + len(works)
    assert any("reads" in line for line in result_lines(found))


def test_an_ingot_is_measured_with_its_own_weights(device: FakeGpu, tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    path = tmp_path / "llama.ingot"
    limits: dict[str, Any] = {"max_sequences": 2, "max_tokens_per_sequence": 256}
    api.compile_to(
        tmp_path / "model", path, target="cuda:sm_90", check_import=False, progress=False, **limits
    )
    asked = Benchmark(str(path), (Workload(1, 1, 255),), replays=2, timeline=False)
    found = run(asked, device.driver(), read_bytes=8 << 20)
    (step,), (served,) = found.measured.steps, found.measured.serving
    assert step.traffic.bytes == pytest.approx(of_llama(1, 256), abs=512) and not step.timeline
    assert served.tokens_per_second is None  # there is room for one token
    for more in ({"layers": 1}, {"peers": ("hf-eager",)}):
        with pytest.raises(ValueError, match="bench: peers and layers need a config"):
            run(dataclasses.replace(asked, **more), device.driver())
    with pytest.raises(ValueError, match="context 256: expected at most 2 sequences of 256 tokens"):
        run(dataclasses.replace(asked, works=(Workload(1, 1, 256),)), device.driver(), 8 << 20)


def test_serving_may_draft(device: FakeGpu, tmp_path: Path) -> None:
    tiny_config("llama", dtype="bfloat16").save_pretrained(tmp_path)
    asked = Benchmark(str(tmp_path), (DECODE,), replays=2, timeline=False, speculate=NGram(k=3))
    found = run(asked, device.driver(), read_bytes=8 << 20)
    (served,) = found.measured.serving
    # The device gives token 0 whatever it is given: a text that repeats itself.
    assert served.speculation is not None and served.speculation.kind == "ngram:3:2"
    assert served.speculation.verified + served.speculation.declined > 10
    *_, title = (str(shown.title) for shown in result_tables(found))
    assert title == "Speculation"
    json.dumps(dataclasses.asdict(found))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"batch": "0"}, "--batch 0: expected numbers from 1, found '0'"),
        ({"context": "1e3"}, "--context 1e3: expected numbers from 1, found '1e3'"),
        ({"quantize": "int4"}, "--quantize int4: expected mxfp4 or none"),
        ({"peer": "vllm"}, "--peer vllm: expected one of hf-eager, hf-compile"),
        ({"target": "cpu"}, "expected a GPU, found cpu, which launches no kernels"),
    ],
)
def test_wrong_flags_are_told(flags: dict[str, Any], said: str) -> None:
    given = {"batch": "1", "context": "8", "prefill": "8", "quantize": "mxfp4", "peer": ""}
    with pytest.raises((UsageError, NoDriverError), match=said):
        command("qwen3-8b", **{**given, "layers": None, "plots": None, "target": "cpu", **flags})


# ---- tuning


def test_tune_times_every_kernel_that_could_compute_a_product(
    device: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config("llama", dtype="bfloat16").save_pretrained(tmp_path)
    table = tmp_path / "prices" / "table.json"
    monkeypatch.setattr(price_table, "user_table", lambda target: table)
    monkeypatch.setattr(drivers, "gpu_here", lambda target: device.driver())
    flags = ["--max-sequences", "2", "--max-tokens", "16", "--json"]
    try:
        done = CliRunner().invoke(app, ["tune", str(tmp_path), *flags])
    finally:
        price_table.table_of.cache_clear()
    assert done.exit_code == 0, done.output
    held = msgspec.json.decode(table.read_bytes(), type=price_table.Table)
    told = json.loads(done.stdout)
    points = held.points
    assert told == {"table": str(table), "points": [*msgspec.to_builtins(points)]}
    assert held.target == "cuda:sm_90" and len({p.of for p in points}) == len(points)
    kernels = {p.kernel for p in points}
    gemv = {f"gemv of {rows} bf16{norm}" for rows in ("rows", "a row") for norm in ("", " normed")}
    assert kernels == {*gemv, "narrow bf16", "narrow bf16 normed", "square bf16"}
    for kernel, tokens in (("gemv of rows bf16", {1, 2, 4}), ("square bf16", {1, 2, 4, 8, 16})):
        assert {p.tokens for p in points if p.kernel == kernel} == tokens
    q_k_v, o, gate_up = (64 + 2 * 32, 64), (64, 64), (2 * 96, 64)
    assert {(p.rows, p.columns) for p in points} >= {q_k_v, o, gate_up}


def test_compile_measures_what_the_table_lacks(
    device: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "prices" / "table.json"
    point = price_table.Point("gemv of rows bf16", 1, 128, 64, 1e-3)
    asked: list[set[price_table.Launched]] = []

    def measured(source: Any, options: Any, driver: Any, progress: Any, known: Any) -> list[Any]:
        asked.append(known)
        return [point]

    monkeypatch.setattr(price_table, "user_table", lambda target: table)
    monkeypatch.setattr(api, "driver_here", lambda target: device.driver())
    monkeypatch.setattr(api, "tune", measured)
    limits: dict[str, Any] = {"max_sequences": 1, "max_tokens_per_sequence": 16}
    try:
        for _ in range(2):
            api.plan(tiny_model("llama"), target="cuda:sm_90", tune=True, progress=False, **limits)
        assert price_table.table_of("cuda:sm_90").seconds(point.of) == 1e-9
    finally:
        price_table.table_of.cache_clear()
    assert asked == [set(), {point.of}]


def test_tuning_needs_a_device_with_kernels() -> None:
    with pytest.raises(ValueError, match="tune: expected a GPU target, found cpu"):
        api.plan(tiny_model("llama"), target="cpu", tune=True, progress=False)
    with pytest.raises(api.NotYetError, match="tune: this version times the kernels of language"):
        api.compile(torch.nn.Linear(2, 2), example_inputs=(torch.ones(1, 2),), tune=True)


# ---- explaining


def test_explain_has_every_node_and_its_bytes(plan: Plan) -> None:
    step = PlannedEntry.of(plan.program, "1", plan.report.choices)
    work, target = Workload(1, 1, 100), target_of("cuda:sm_90")
    kinds = explain(step, plan.graph(), plan.report.passes, target, work)
    assert sum(len(k.kernels) * k.times for k in kinds) == len(step.entry.launches)
    assert [k.lost for k in kinds] == sorted((k.lost for k in kinds), reverse=True)
    moved, _ = traffic(plan.graph(), work)
    assert sum(k.bytes * k.times for k in kinds) == pytest.approx(moved, abs=len(step.choices))
    for k in kinds:
        assert k.limit == pytest.approx(1e6 * k.bytes / target.bytes_per_second, abs=1e-6)
        # Products by head were not measured.
        assert k.measured == ("gemv_kernel" in k.kernels and k.op != "head_linear")


def test_explain_tells_what_passes_declined(plan: Plan) -> None:
    step = PlannedEntry.of(plan.program, "1", plan.report.choices)
    first, *others = plan.report.passes
    declined = "fuse-x: linear at model.layers.1.self_attn.o_proj @modeling.py:7: too wide"
    passes = [dataclasses.replace(first, declined=(declined, "fuse-y: add: no place")), *others]
    found = explain(step, plan.graph(), passes, target_of("cuda:sm_90"), Workload(1, 1, 0))
    told = {k.place: k.declined for k in found}
    assert told["model.layers.*.self_attn.o_proj"] == ("fuse-x: too wide",)


def test_explain_from_the_shell(tmp_path: Path) -> None:
    tiny_config("llama", dtype="bfloat16").save_pretrained(tmp_path)
    call = ["explain", str(tmp_path), "--target", "cuda:sm_90", "--max-tokens", "64", "--context"]
    done = CliRunner().invoke(app, [*call, "20"])
    assert done.exit_code == 0, done.output
    assert "at the bandwidth on paper" in done.output and "next best:" in done.output
    done = CliRunner().invoke(app, ["explain", str(tmp_path), "--target", "cpu"])
    assert done.exit_code == 2 and "the cpu target launches no kernels" in done.output
    done = CliRunner().invoke(app, [*call, "20", "--batch", "100"])
    assert done.exit_code == 0 and "batch 100" in done.output, done.output
