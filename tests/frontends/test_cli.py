"""The command line over one tiny model, and over the model in examples/ end to end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from ingot.compiler.text import parse, same_structure
from ingot.frontends import api
from ingot.frontends.cli import graph as cli_graph
from ingot.frontends.cli.commands import doctor
from ingot.frontends.cli.inspect_view import page
from ingot.frontends.cli.main import app
from ingot.frontends.cli.output import THEME, IrHighlighter
from ingot.frontends.drivers import present_target
from ingot.frontends.layers import graph_sections
from ingot.frontends.show import show_bytes, show_numbers
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_tokenizers import byte_level
from tiny_tokenizers import save as save_tokenizer
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("shared_traces")

PICO = Path(__file__).parents[2] / "examples" / "pico"
TEMPLATE = "{% for m in messages %}<|sep|>{{ m.role }}:{{ m.content }}{% endfor %}<|sep|>"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 of one dense layer and three MoE layers, with a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("deepseek_v3", vocab_size=320, num_hidden_layers=4).save_pretrained(path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    return save_tokenizer(path, byte_level(), tokenizer_config=config)


class Compiler:
    """`compile` that makes each model once; `model` is what the last command got."""

    def __init__(self) -> None:
        self.real = api.compile
        self.made: dict[Any, Any] = {}
        self.model: Any = None

    def __call__(self, source: Path, **options: Any) -> Any:
        usual = {
            "progress",
            *(k for k, v in options.items() if v in (None, False, "auto", "refuse", 8, 4096)),
        }
        key = (source, *sorted((k, v) for k, v in options.items() if k not in usual))
        if key not in self.made:
            self.made[key] = self.real(source, **options)
        self.model = self.made[key]
        return self.model


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture(autouse=True)
def _models_are_shared(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "compile", compiler)


def ingot(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def done(*arguments: str | Path, stdin: str | None = None) -> str:
    result = ingot(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


# ---- run


def test_run_streams_what_generate_gives(directory: Path, compiler: Compiler) -> None:
    options = ("--max-new-tokens", "9", "--max-tokens", "64")
    result = ingot("run", directory, "--prompt", "the é", *options)
    model = compiler.model
    expected = model.generate("the é", max_new_tokens=9)
    assert result.stdout == expected.text + "\n"
    assert "9 tokens, " in result.stderr and "tokens/s, first token after" in result.stderr
    assert done("run", directory, *options, stdin="the é") == result.stdout
    found = json.loads(done("run", directory, "--prompt", "the é", *options, "--json"))
    assert found["text"] == expected.text and tuple(found["tokens"]) == expected.tokens
    assert found["finish_reason"] == "length" and found["stats"]["tokens_per_second"] > 0
    ids = " ".join(map(str, model.tokenizer.encode("the é")))
    assert done("run", directory, "--ids", ids, *options) == result.stdout


def test_run_samples_and_stops_as_told(directory: Path) -> None:
    base = ("run", directory, "--prompt", "a", "--max-tokens", "64", "--max-new-tokens", "12")
    drawn = ("--temperature", "2", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.001")
    draws = [done(*base, *drawn, "--repetition-penalty", "1.1", "--seed", s) for s in "112"]
    assert draws[0] == draws[1] != draws[2]
    text = done(*base).rstrip("\n")
    stop = next(c for c in text if c.isascii() and c.isprintable())
    assert done(*base, "--stop", "\x00never", "--stop", stop) == text[: text.index(stop)] + "\n"


def test_run_chat_goes_through_the_template(directory: Path, compiler: Compiler) -> None:
    options = ("--max-tokens", "64", "--max-new-tokens", "5", "--json")
    said = ("--prompt", "hi", "--system", "be")
    found = json.loads(done("run", directory, "--chat", *said, *options))
    model = compiler.model
    ids = model.tokenizer.encode("<|sep|>system:be<|sep|>user:hi<|sep|>", special_tokens=False)
    assert tuple(found["tokens"]) == model.generate(ids, max_new_tokens=5).tokens


# ---- inspect


def test_inspect_page_shows_each_kind_of_layer_once(directory: Path, compiler: Compiler) -> None:
    small = ("--max-sequences", "1", "--max-tokens", "64")
    text = done("inspect", directory, "--after", "insert-kv-cache", *small)
    titles = [row.split(" ─")[0] for row in text.splitlines() if re.match("# [a-z].*(─| as )", row)]
    assert titles == [
        "# embedding, and values shared by all layers",
        "# layer 0, dense: model.layers.0",
        "# layer 1, mixture of experts: model.layers.1",
        next(t for t in titles if t.startswith("# layers 2, 3 as layer 1; layer 3 gives %")),
        "# head",
    ]
    assert text.splitlines()[0].startswith("graph @deepseek_v3 after insert-kv-cache: ")
    assert "%latent_cache.0 … 3" in text and "token ids" in text and "\x1b" not in text
    assert text.count("cached_mla_attention(") == 2 and text.count("rope_tables(") == 1
    assert max(map(len, text.splitlines())) <= 100

    whole = done("inspect", directory, "--after", "insert-kv-cache", "--all", *small)
    model = compiler.model
    graph = model.graph("insert-kv-cache")
    assert same_structure(parse(whole), graph)
    # A line of the page says what the line of that number says in the whole text.
    line = next(row for row in text.splitlines() if "router" in row or "experts(" in row)
    number = line.split()[0].rstrip(",")
    assert f"  {number}" in whole and line.split("=")[1].split("(")[0] in whole


def test_layers_that_differ_in_anything_are_shown(directory: Path, compiler: Compiler) -> None:
    done("inspect", directory, "--passes", "--max-sequences", "1", "--max-tokens", "64")
    text = str(compiler.model.graph("raise-ops"))
    # Text has no sources: layers are then found by the names of their weights.
    assert [layer.same_as for layer in graph_sections(parse(text)).layers] == [0, 1, 1, 1]
    changed = re.sub(r"(rms_norm\(.*layers\.2\.input_layernorm.*eps=)1e-06", r"\g<1>1e-05", text)
    graph = parse(changed)
    assert [layer.same_as for layer in graph_sections(graph).layers] == [0, 1, 2, 1]
    assert "# layer 3 as layer 1; " in page(graph, "")


def test_inspect_tables_and_json(directory: Path, compiler: Compiler) -> None:
    small = ("--max-sequences", "1", "--max-tokens", "64")
    text = done("inspect", directory, "--passes", "--entries", *small)
    assert "graph @" not in text
    for part in ("canonicalize", "insert-kv-cache", "rms-norm", "→", "launches", "Mflop"):
        assert part in text
    data = json.loads(done("inspect", directory, "--after", "traced", "--json", *small))
    model = compiler.model
    assert [p["name"] for p in data["passes"]] == [p.name for p in model.report.passes]
    assert data["graph"] == {"name": "traced", "text": str(model.graph("traced"))}
    cost = model.graph("final").cost({"T": 1, "L": 1})
    assert data["one_token"] == {"flops": cost.flops, "bytes": cost.bytes}
    launches = [entry["launches"] for entry in data["entries"]]
    assert launches == [launches for _, launches, _ in model.report.entries]
    compiled = json.loads(done("compile", directory, "--json", *small))
    assert compiled["passes"] == data["passes"]
    assert "weights" in done("compile", directory, *small)


def test_inspect_writes_dot(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("--max-sequences", "1", "--max-tokens", "64")
    files = tmp_path / "folded.dot", tmp_path / "all.dot"
    assert done("inspect", directory, *small, "--dot", files[0]) == ""
    small += ("--after", "raise-ops")
    done("inspect", directory, *small, "--dot", files[0])
    done("inspect", directory, *small, "--all", "--dot", files[1])
    folded, whole = (file.read_text(encoding="utf-8") for file in files)
    assert folded.startswith('digraph "deepseek_v3" {') and folded.rstrip().endswith("}")
    assert '"cluster model.layers.1"' in folded and '"cluster model.layers.3"' not in folded
    assert '"cluster model.layers.3"' in whole and "as layer 1" not in whole
    boxes = {line.split('"')[1] for line in folded.splitlines() if "[label=" in line}
    edges = [line.split('"')[1::2] for line in folded.splitlines() if " -> " in line]
    assert edges and {end for edge in edges for end in edge} <= boxes
    monkeypatch.setattr(cli_graph.shutil, "which", lambda name: None)
    result = ingot("inspect", directory, *small, "--svg", tmp_path / "x.svg")
    assert result.exit_code == 1 and "--svg needs Graphviz" in result.stderr


def test_colours_are_for_terminals() -> None:
    console = Console(theme=THEME, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(IrHighlighter()("  %1 = linear(%0, @w) : f32[T, 4]"))
    assert "\x1b[36m%1\x1b[0m" in capture.get() and "\x1b[32m@w" in capture.get()


def test_numbers_and_bytes_in_short() -> None:
    rows = [[2], [2, 3], [2, 3, 4, 5], [0, 2, 4, 6], [1, 5, 6]]
    assert [show_numbers(r) for r in rows] == ["2", "2, 3", "2 to 5", "0, 2 … 6", "1, 5, 6"]
    assert [show_bytes(n) for n in (0, 1023, 1536, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
    ]


# ---- doctor, help, errors


def test_doctor_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = done("doctor")
    assert "kernels by triton" in text and "transformers" in text
    data = json.loads(done("doctor", "--json"))
    runs = {t["name"]: (t["builds"], t["runs"]) for t in data["targets"]}
    here = present_target()
    assert runs["cpu"] == (True, True)
    assert {name for name, (_, is_here) in runs.items() if is_here} == {"cpu", here}
    assert all(builds for builds, _ in runs.values())
    assert data["versions"]["torch"] and data["devices"][0]["target"] == "cpu"
    real = doctor.importlib.metadata.version

    def version(name: str) -> str:
        if name == "transformers":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert "pip install 'ingot[hf]'" in done("doctor")


def test_inspect_tells_how_weights_are_held(directory: Path) -> None:
    small = ("--max-sequences", "1", "--max-tokens", "64", "--quantize", "mxfp4")
    shown = done("inspect", directory, "--weights", *small)
    assert "mxfp4g32" in shown and "scores experts for the router" in shown
    data = json.loads(done("inspect", directory, "--json", *small))
    held = {w["name"]: w for w in data["weights"]}
    assert held["lm_head.weight"]["reason"] == "gives an output of the model"
    packed = [w for w in data["weights"] if w["format"] == "mxfp4g32"]
    assert packed and all(w["bits"] == 4.25 and 0.05 < w["error"] < 0.2 for w in packed)


ERRORS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no directory": (("run", "{}/nowhere"), 2, "does not exist"),
    "unknown option": (("run", "{}", "--nothing"), 2, "No such option"),
    "no model": (("inspect", "{}/empty"), 1, "expected a directory with config.json"),
    "temperature": (("run", "{}", "--prompt", "a", "--temperature", "-1"), 2, "temperature: exp"),
    "two prompts": (("run", "{}", "--prompt", "a", "--ids", "1"), 2, "--prompt and --ids"),
    "ids": (("run", "{}", "--ids", "1 x"), 2, "--ids: expected numbers"),
    "unknown id": (("run", "{}", "--ids", "999", "--max-tokens", "64"), 2, "from 0 to 319"),
    "no prompt": (("run", "{}"), 2, "no prompt: give --prompt"),
    "system": (("run", "{}", "--prompt", "a", "--system", "b"), 2, "--system belongs to --chat"),
    "chat of ids": (("run", "{}", "--chat", "--ids", "1"), 2, "--chat takes text"),
    "output": (("compile", "{}", "-o", "{}"), 2, "is there already: expected a new path"),
    "gpu": (("compile", "{}", "--target", "hip:gfx942"), 1, "no GPU driver library"),
    "target": (("compile", "{}", "--target", "tpu"), 2, "unknown target 'tpu'"),
    "quantize": (("run", "{}", "--prompt", "a", "--quantize", "int4"), 2, "expected 'mxfp4'"),
    "weights": (
        ("inspect", "{}", "--weights", "--max-sequences", "1", "--max-tokens", "64"),
        2,
        "give --quantize too",
    ),
    "dtype": (("run", "{}", "--prompt", "a", "--dtype", "f8"), 2, "dtype: expected one of"),
    "pass": (
        ("inspect", "{}", "--after", "fold", "--max-sequences", "1", "--max-tokens", "64"),
        2,
        "--after fold: expected one of traced, canonicalize",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case: str, directory: Path) -> None:
    (directory / "empty").mkdir(exist_ok=True)
    arguments, code, expected = ERRORS[case]
    result = ingot(*(a.replace("{}", str(directory)) for a in arguments), stdin="")
    said = result.stderr
    assert (result.exit_code, result.stdout) == (code, "")
    assert expected in said and "Traceback" not in said
    if "Usage:" not in said:  # typer's own come in a box
        assert said.startswith("error: ") and said.count("\n") == 1


def test_tensors_that_nobody_reads(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"head.weight": torch.zeros(2)}, path)
    refused = ingot("compile", tmp_path, "--target", "cpu")
    assert refused.exit_code == 1
    assert "reads no head.weight" in refused.stderr and "--unused allow" in refused.stderr
    allowed = ingot("compile", tmp_path, "--target", "cpu", "--unused", "allow", "--json")
    assert [*json.loads(allowed.stdout)["unused"]] == ["head.weight"]


def test_traceback_when_asked(directory: Path) -> None:
    result = ingot("compile", directory, "--overwrite", "--traceback")
    assert result.exception is not None and "belongs to --output" in str(result.exception)


def test_help_is_quick_and_light(tmp_path: Path) -> None:
    code = "import sys; from ingot.frontends import cli; print({'torch', 'rich'} & {*sys.modules})"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "torch" not in out
    for command in ("compile", "run", "inspect", "verify", "doctor"):
        assert command in done("--help")
        assert "--json" in done(command, "--help")
    assert done("--version").startswith("ingot 0.")


@pytest.mark.slow
def test_pico_through_the_console(tmp_path: Path) -> None:
    def console(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ingot", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)

    prompt = ("--prompt", "def __init__(self, ", "--max-new-tokens", "12")
    result = console("run", str(PICO), *prompt, "--json")
    assert result.returncode == 0, result.stderr
    model = api.compile(PICO, max_sequences=1, progress=False)
    alone = model.generate(prompt[1], max_new_tokens=12)
    assert json.loads(result.stdout)["text"] == alone.text != ""
    text = done("inspect", PICO, "--after", "insert-kv-cache", "--dtype", "f32")
    assert "# layers 2 to 4 as layer 1; layer 4 gives %" in text
    found = json.loads(done("verify", PICO, "--json"))
    assert {p["agreed"] for p in found["prompts"]} == {32} and found["logits_error"] < 1e-4
    assert len(found["layers"]) == 5
