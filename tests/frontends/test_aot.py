"""Export and load: equal tokens, nothing half-written, no torch where none is needed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_device
import ingot
import numpy as np
import pytest
import tiny_ingot
import torch
from click.testing import Result
from ingot.codegen.constants import folded_graph
from ingot.codegen.lower import Lowered, lower
from ingot.compiler.target import CPU
from ingot.compiler.text import ParseError, parse, same_structure
from ingot.compiler.types import VerifyError
from ingot.compiler.weights import Weights
from ingot.frontends import api
from ingot.frontends.aot import export
from ingot.frontends.cli.main import app
from ingot.frontends.drivers import NoDriverError, driver_for, present_target
from ingot.frontends.loading import LoadedModel, load
from ingot.frontends.options import CompileOptions, NotYetError
from ingot.runtime.artifact import atomic_write
from ingot.runtime.artifact.reader import FINAL_GRAPH, FOLDED_GRAPH, IngotError, open_ingot
from ingot.runtime.devices.check_program import ProgramError
from ingot.runtime.program import Buffer
from ingot.runtime.serving.sampling import GREEDY
from msgspec import structs
from tiny_ingot import edit, rewrite
from tiny_models import tiny_model
from tiny_tokenizers import byte_level
from tiny_tokenizers import save as save_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("shared_traces")

ROOT = Path(__file__).parents[2]
PICO = ROOT / "examples" / "pico"
SHARE = """graph @share(%x: f32[4]) {
  %0 = all_reduce(%x, ranks=2) : f32[4]
  return %0
}"""
TEMPLATE = "{% for m in messages %}<|sep|>{{ m.role }}:{{ m.content }}{% endfor %}<|sep|>"


# ---- the cpu, for real


@pytest.fixture(scope="module")
def pico() -> Any:
    return ingot.compile(PICO, max_sequences=2, max_tokens_per_sequence=32, progress=False)


@pytest.mark.parametrize("name", ["pico", "pico.ingot"])
def test_tokens_are_those_of_before(pico: Any, tmp_path: Path, name: str) -> None:
    pico.export(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    loaded = ingot.load(tmp_path / name)
    assert isinstance(loaded, LoadedModel)
    prompts = ["def main(", "import os\n", "class Stack:"]
    options = {"max_new_tokens": 12, "temperature": 0.7, "seed": 5, "logprobs": 2}
    before, after = pico.generate(prompts, **options), loaded.generate(prompts, **options)
    assert [replace(c, stats=None) for c in after] == [replace(c, stats=None) for c in before]
    ids = pico.tokenizer.encode("def f(x):")
    np.testing.assert_array_equal(pico.logits(ids), loaded.logits(ids))
    assert loaded.stop_tokens == pico.stop_tokens
    assert same_structure(loaded.graph(), pico.graph())
    assert loaded.manifest.symbols == {"T": (1, 32), "L": (1, 2)}


def test_folded_graphs_are_the_same_program(pico: Any) -> None:
    graph = pico.graph()
    folded = folded_graph(graph)
    assert folded.constants() == {n for n in folded.nodes() if n.op.name in ("constant", "literal")}
    ends = [{"T": 1, "L": 1}, {"T": 4, "L": 2}]
    plans = [lower(g, Weights({}), CPU, ends, ["logits"]).program for g in (graph, folded)]
    assert plans[0] == plans[1]


IR: dict[str, tuple[Callable[[str], str], str]] = {
    "no graph": (lambda text: "", "expected `graph @name"),
    "unknown op": (lambda text: text.replace("embedding(", "embeding("), "unknown op 'embeding'"),
    "wrong type": (lambda text: text.replace(" : f32[L, 64]", " : f32[L, 65]"), "written as"),
    "reads a file": (
        lambda text: text.replace("  return", "  %x = aten.from_file.default() : u8[1]\n  return"),
        "aten.from_file.default: expected an operator that an ingot may hold",
    ),
    "other symbols": (lambda text: text.replace("T=1..", "T=2.."), "expected symbols"),
    "another weight": (
        lambda text: text.replace("@model.embed_tokens.weight", "@other"),
        "weights: expected '@other', found no such tensor",
    ),
    "more memory than there is": (
        lambda text: text.replace("f32[2, 64, 2, 16]", "f32[2000000000, 64, 2, 16]"),
        "expected to need at most the ",
    ),
    "two outputs": (lambda text: text.replace("return ", "return %0, "), FOLDED_GRAPH),
    "work that is not done": (
        lambda text: text.replace(
            "  return", "  %x = full(value=0.0, shape=[9], dtype='f32') : f32[9]\n  return %x,"
        ),
        "expected weights in place of what they make, found full",
    ),
}


@pytest.mark.parametrize("case", IR)
def test_ir_is_refused(small: Path, tmp_path: Path, case: str) -> None:
    change, expected = IR[case]
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", small, copy], check=True)
    text = (copy / FOLDED_GRAPH).read_text(encoding="utf-8")
    assert change(text) != text
    rewrite(copy, FOLDED_GRAPH, change(text).encode())
    with pytest.raises(IngotError) as caught:
        load(copy)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


class Seen(TorchDispatchMode):
    """Records the names of the operators that torch runs."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._names.append(str(func))
        return func(*args, **(kwargs or {}))


POOL = "max_pool2d_with_indices_backward.default(%x, %x, %i, kernel_size=[2, 2], stride=[2, 2], "
POOL += "padding=[0, 0], dilation=[1, 1], ceil_mode=False)"
# Operators that would write out of bounds, give memory that nothing wrote, or change torch's state.
UNSAFE = {
    "writes out of bounds": f"aten.{POOL}",
    "reads what nothing wrote": "aten.empty_like.default(%x)",
    "turns on gradients": "aten.set_grad_enabled.default(val=True)",
    "seeds": "aten.manual_seed.default(seed=7)",
    "spaces": "aten . empty_like . default(%x)",
    "full width": "ａten.empty_like.default(%x)",
    "full width of an attribute": "aten.ｅmpty_like.default(%x)",
    "brackets": "(aten).empty_like.default(%x)",
    "call": "getattr(aten, 'empty_like').default(%x)",
    "packet": "aten.empty_like(%x)",
    "prims": "prims.empty_like.default(%x)",
    "torch.ops": "torch.ops.aten.empty_like.default(%x)",
}


@pytest.mark.parametrize("graph", [FOLDED_GRAPH, FINAL_GRAPH])
@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_operators_are_refused_before_anything_runs(
    small: Path, tmp_path: Path, case: str, graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", small, copy], check=True)
    text = (copy / graph).read_text(encoding="utf-8")
    lines = "  %x = full(value=0.0, shape=[1, 4, 4], dtype='f32') : f32[1, 4, 4]\n"
    lines += f"  %i = full(value={2**40}, shape=[1, 2, 2], dtype='i64') : i64[1, 2, 2]\n"
    lines += f"  %y = {UNSAFE[case]} : f32[1, 4, 4]\n  return %y, "
    rewrite(copy, graph, text.replace("  return ", lines, 1).encode())
    grad, seed, ran = torch.is_grad_enabled(), torch.initial_seed(), list[str]()
    with Seen(ran), pytest.raises((IngotError, ParseError, VerifyError)) as caught:
        load(copy).graph()
    said = str(caught.value).splitlines()
    assert len(said) == (1 if graph == FOLDED_GRAPH else 2) and len(said[0]) < 600
    assert "line" in said[0] and re.search("an ingot may hold|unknown op|expected", said[0])
    assert (torch.is_grad_enabled(), torch.initial_seed()) == (grad, seed)
    assert not {name for name in ran if re.search("empty_like|pool|seed|grad", name)}
    assert ran == [] or graph == FINAL_GRAPH


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama", vocab_size=320).save_pretrained(path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    generation = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    generation |= {"temperature": 0.6, "top_k": 20, "do_sample": True}
    (path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return save_tokenizer(path, byte_level(), tokenizer_config=config)


@pytest.fixture(scope="module")
def small(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ingots") / "llama"
    options = {"max_sequences": 2, "max_tokens_per_sequence": 64, "progress": False}
    written = ingot.compile_to(directory, path, quantize="mxfp4", **options)
    assert written.path == path and written.report.weights, "errors of packing are known"
    assert dict(written.manifest.generation) == {"temperature": 0.6, "top_k": 20}
    return path


def test_quantized_and_written_without_being_loaded(small: Path, directory: Path) -> None:
    options = {"max_sequences": 2, "max_tokens_per_sequence": 64, "progress": False}
    model = ingot.compile(directory, quantize="mxfp4", **options)
    expected = model.generate("the é", max_new_tokens=9)
    assert load(small).generate("the é", max_new_tokens=9).text == expected.text
    with pytest.raises(NotYetError, match="a module is compiled where it runs"):
        ingot.compile_to(torch.nn.Linear(2, 2), small.parent / "x")


# ---- the command line


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def test_command_line(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "llama.ingot"
    small = ("--max-tokens", "64", "--max-sequences", "1")
    written = run("compile", directory, "-o", path, *small, "--json")
    assert written.exit_code == 0, written.output
    again = run("compile", directory, "-o", path, *small)
    assert again.exit_code == 2 and "is there already" in again.stderr
    assert run("compile", directory, "--overwrite").exit_code == 2

    said = run("run", path, "--prompt", "the é", "--max-new-tokens", "9")
    text = load(path).generate("the é", max_new_tokens=9).text
    assert said.exit_code == 0 and said.stdout == f"{text}\n" != "\n"
    refused = run("run", path, "--prompt", "a", "--quantize", "mxfp4")
    assert refused.exit_code == 2 and "is compiled already" in refused.stderr

    shown = run("inspect", path)
    assert shown.exit_code == 0, shown.output
    for part in ("llama for cpu in f32", "serves 1 sequences of 64 tokens", "max_sequences 1"):
        assert part in shown.stdout
    data = json.loads(run("inspect", path, "--weights", "--json").stdout)
    options = CompileOptions(max_tokens_per_sequence=64, max_sequences=1)
    assert data["options"] == options.data()
    assert data["target"] == "cpu" and data["generation"] == {"temperature": 0.6, "top_k": 20}
    report = json.loads(written.stdout)
    assert sum(w["bytes"] for w in data["weights"]) == report["weight_bytes"]
    assert data["entries"] == report["entries"] == [] and data["symbols"]["T"] == [1, 64]

    os.truncate(path, 5000)
    broken = run("run", path, "--prompt", "a")
    assert broken.exit_code == 1 and broken.stderr.startswith(f"error: {path}: zip: expected")


def test_what_there_is_to_note_is_told_once(directory: Path, tmp_path: Path) -> None:
    most = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    limit = most["max_position_embeddings"]
    wide = ("--max-tokens", str(limit + 1), "--max-sequences", "1")
    lowered = f"lowered to {limit}, the "
    compiled = run("compile", directory, "-o", tmp_path / "x.ingot", *wide)
    assert lowered in compiled.stdout
    notes = api.plan(directory, max_tokens_per_sequence=limit + 1, progress=False).report
    for said in (
        run("run", directory, "--prompt", "a", "--max-new-tokens", "1", *wide),
        run("chat", directory, "--max-new-tokens", "1", *wide, stdin="a\nb\n"),
    ):
        assert said.exit_code == 0, said.output
        assert notes.departures and all(said.stderr.count(n) == 1 for n in notes.departures)
        assert lowered not in said.stdout
    loaded = run("run", tmp_path / "x.ingot", "--prompt", "a", "--max-new-tokens", "1")
    assert loaded.stderr.count(lowered) == 1 and lowered not in loaded.stdout


def test_chat_remembers(small: Path) -> None:
    result = run("chat", small, "--max-new-tokens", "4", "--system", "s", stdin="a\n\nb\n")
    assert result.exit_code == 0, result.output
    model = load(small)
    tokenizer = model.tokenizer
    assert tokenizer is not None

    def answer(text: str) -> str:
        ids = tokenizer.encode(text, special_tokens=False)
        return model.generate(ids, max_new_tokens=4).text

    start = "<|sep|>system:s<|sep|>user:a<|sep|>"
    first = answer(start)
    second = answer(f"{start}assistant:{first}<|sep|>user:b<|sep|>")
    assert result.stdout == f"{first}\n{second}\n"
    plain = run("chat", small.parent.parent / "nowhere")
    assert plain.exit_code == 2


# ---- GPUs, by hand-made programs

TORCH_FREE = """
import json, sys
import ingot, fake_device

class Driver(fake_device.FakeDriver):
    def load(self, program, weights):
        named = [b.name for b in program.buffers.values() if b.kind == "weight"]
        self.weights = {name: weights(name) for name in named}
        return fake_device.FakeExecutable(program, self)

driver = Driver()
from ingot.frontends.loading import load
assert ingot.load is load
with load(sys.argv[1], driver=driver) as model:
    completion = model.generate([5, 6, 7], max_new_tokens=6)
    sums = {name: int(w.view("u1").astype("i8").sum()) for name, w in driver.weights.items()}
    kinds = {name: str(w.dtype) for name, w in driver.weights.items()}
    heavy = sorted({"torch", "triton", "transformers", "sympy"} & set(sys.modules))
    print(json.dumps([completion.tokens, completion.text, sums, kinds, heavy]))
"""


@pytest.mark.parametrize("name", ["tiny", "tiny.ingot"])
def test_gpu_ingots_are_served_without_torch(tmp_path: Path, name: str) -> None:
    files = {"tokenizer.json": byte_level().to_str().encode(), "config.json": b"{}"}
    export(tiny_ingot.exportable(files=files), tmp_path / name)
    command = [sys.executable, "-c", TORCH_FREE, str(tmp_path / name)]
    paths = os.pathsep.join([*sys.path, str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    tokens, text, sums, kinds, heavy = json.loads(done.stdout)
    assert heavy == []
    expected, _ = fake_device.expected_tokens([5, 6, 7], 6, GREEDY, tiny_ingot.VOCAB)
    assert tokens == expected[: expected.index(2)] if 2 in expected else expected
    assert text == byte_level().decode(tokens)
    assert kinds == {"@embed.weight": "uint16", "@folded.0": "float32", "@codes": "uint8"}
    for weight, tensor in tiny_ingot.weights().items():
        assert sums[weight] == int(tensor.contiguous().view(torch.uint8).long().sum())


SERVED = """
import json, sys
import ingot
with ingot.load(sys.argv[1]) as model:
    completions = model.generate(sys.argv[2:], max_new_tokens=24, logprobs=2)
    heavy = sorted({"torch", "triton", "transformers", "sympy"} & set(sys.modules))
    said = [[c.text, c.tokens, c.logprobs] for c in completions]
    print(json.dumps([model.manifest.target, said, heavy]))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [None, "mxfp4"], ids=["dense", "packed"])
def test_text_to_text_on_the_gpu_without_torch(tmp_path: Path, quantize: str | None) -> None:
    """From an ingot alone, in a process of its own: what the compiled model says in this one."""
    options = {"max_sequences": 2, "max_tokens_per_sequence": 64, "progress": False}
    written = ingot.compile_to(PICO, tmp_path / "pico.ingot", quantize=quantize, **options)
    assert written.manifest.target == present_target() != CPU.name
    prompts = ["def __init__(self, ", "import os\n", "é"]
    command = [sys.executable, "-c", SERVED, str(written.path), *prompts]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, cwd=tmp_path, check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    target, said, heavy = json.loads(done.stdout)
    assert (target, heavy) == (written.manifest.target, [])
    with ingot.compile(PICO, quantize=quantize, **options) as model:
        expected = model.generate(prompts, max_new_tokens=24, logprobs=2)
    assert said == [[c.text, list(c.tokens), list(c.logprobs)] for c in expected]
    assert all(text for text, _, _ in said)


def test_a_target_without_a_driver_is_told() -> None:
    with pytest.raises(NoDriverError, match="no driver that runs programs for tpu:v5"):
        driver_for("tpu:v5")
    assert driver_for("cpu").target == "cpu"


def test_programs_that_would_be_refused_are_not_written(tmp_path: Path) -> None:
    broken = structs.replace(tiny_ingot.program(), arena_bytes=1)
    with pytest.raises(ProgramError, match="within the arena of 1 bytes"):
        tiny_ingot.write(tmp_path / "x", broken)
    held = tiny_ingot.weights()
    wrong = Lowered(tiny_ingot.program(), lambda name: held[name].float())
    with pytest.raises(TypeError, match=r"weight @.*: expected .*, found f32"):
        export(replace(tiny_ingot.exportable(), lowered=wrong), tmp_path / "x")
    wide = Buffer("@wide", "c128", (2,), "weight", 32)
    made = tiny_ingot.program()
    made = structs.replace(made, buffers={**made.buffers, "@wide": wide})
    with pytest.raises(ValueError, match="weight @wide: a safetensors file holds no c128"):
        tiny_ingot.write(tmp_path / "x", made)
    collective = parse(
        "graph @g(%x: f32[4]) {\n  %0 = all_reduce(%x, ranks=2) : f32[4]\n  return %0\n}"
    )
    with pytest.raises(ValueError, match="tensor_parallel=1"):
        export(replace(tiny_ingot.exportable(), graph=collective), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_one_weight_at_a_time_is_in_memory(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    held = tiny_ingot.weights()

    def load_weight(name: str) -> torch.Tensor:
        assert [r for r in alive if r() is not None] == [], "the one before is gone"
        tensor = held[name].clone()
        alive.append(weakref.ref(tensor))
        return tensor

    told: list[int] = []
    lowered = Lowered(tiny_ingot.program(), load_weight)
    export(replace(tiny_ingot.exportable(), lowered=lowered), tmp_path / "x", written=told.append)
    assert len(alive) == 3 and sum(told) == sum(t.nbytes for t in held.values())


# ---- whole or not at all


def loads(path: Path) -> bool:
    try:
        artifact = open_ingot(path)
        artifact.weights(tiny_ingot.program().buffers)
    except IngotError:
        return False
    return True


@contextmanager
def dying_at(steps: int) -> Iterator[None]:
    """Kill this process when so many steps of writing were done: syncs, renames, weights."""
    left = steps

    def counted(function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(Path, "rename", counted(Path.rename))
        for name in ("_rename", "_remove", "_identity"):
            patch.setattr(atomic_write, name, counted(getattr(atomic_write, name)))
        patch.setattr(tiny_ingot, "weights", lambda: _Counted(counted))
        yield


class _Counted(dict[str, torch.Tensor]):
    def __init__(self, counted: Callable[[Any], Any]) -> None:
        super().__init__(WEIGHTS)
        self._get = counted(super().__getitem__)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._get(name)


WEIGHTS = tiny_ingot.weights()


def killed_writing(path: Path, steps: int, **options: Any) -> bool:
    """Write an ingot in a process that dies after `steps`; whether it did."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with dying_at(steps):
                tiny_ingot.write(path, **options)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("name", ["tiny", "tiny.ingot"])
def test_killed_at_any_step_leaves_nothing_that_loads(tmp_path: Path, name: str) -> None:
    steps = 0
    seen: list[bool] = []
    while True:
        place = tmp_path / str(steps)
        place.mkdir()
        died = killed_writing(place / name, steps)
        seen.append((place / name).exists())
        if seen[-1]:
            assert loads(place / name)
        left = [p for p in place.iterdir() if p.name != name]
        assert not any(map(loads, left))
        if not died:
            break
        steps += 1
    assert steps >= 6 and not any(seen[:5]) and seen[-1]


@pytest.mark.parametrize("name", ["tiny", "tiny.ingot"])
def test_killed_while_replacing_leaves_the_old_or_the_new(tmp_path: Path, name: str) -> None:
    steps = 0
    while killed_writing(_old(tmp_path / str(steps), name), steps, overwrite=True):
        place = tmp_path / str(steps)
        assert loads(place / name)
        tiny_ingot.write(place / "next")  # removes what the killed one left
        assert {p.name for p in place.iterdir()} == {name, "next"}
        steps += 1
    assert steps >= 5


def _old(place: Path, name: str) -> Path:
    place.mkdir()
    return tiny_ingot.write(place / name)


def test_what_is_there_stays(tmp_path: Path) -> None:
    path = tiny_ingot.write(tmp_path / "x")
    with pytest.raises(FileExistsError, match="is there already: expected a new path"):
        tiny_ingot.write(path)
    (path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "folder").mkdir()
    for other in ("file", "link", "folder"):
        with pytest.raises(FileExistsError, match="is no ingot, so it is not replaced"):
            tiny_ingot.write(tmp_path / other, overwrite=True)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        tiny_ingot.write(tmp_path / "nowhere" / "x")
    assert not loads(path)
    tiny_ingot.write(path, overwrite=True)
    assert loads(path) and sorted(p.name for p in tmp_path.iterdir()) == [
        "file",
        "folder",
        "link",
        "x",
    ]


def test_tokenizer_of_an_ingot_is_checked(tmp_path: Path) -> None:
    export(tiny_ingot.exportable(files={"tokenizer.json": b"{}"}), tmp_path / "x")
    with pytest.raises(IngotError, match="tokenizer.json is no tokenizer"):
        load(tmp_path / "x", driver=fake_device.FakeDriver())
    files = {
        "tokenizer.json": byte_level().to_str().encode(),
        "tokenizer_config.json": b'{"added_tokens_decoder": {"x": 1}}',
    }
    export(tiny_ingot.exportable(files=files), tmp_path / "y")
    with pytest.raises(IngotError, match=r"y: tokenizer: SourceError: .*: x: expected a token"):
        load(tmp_path / "y", driver=fake_device.FakeDriver())
    edit(tmp_path / "x", "manifest.json", lambda m: m["files"].clear())
    with pytest.raises(IngotError, match="found it too"):
        load(tmp_path / "x", driver=fake_device.FakeDriver())
