"""CompileOptions and GenerateOptions: checked once, shown everywhere, typed at the doors."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import ingot
import pytest
import torch
from ingot.frontends import api, options
from ingot.frontends.cli.commands import COMMANDS
from ingot.frontends.cli.main import app
from ingot.frontends.options import CompileOptions, GenerateOptions
from ingot.frontends.text.text_model import TextModel
from ingot.passes.pipelines import RAISING
from ingot.passes.transforms.mxfp4_policy import MXFP4
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]

WRONG: dict[str, tuple[type, Any, type[Exception], str]] = {
    "target": (CompileOptions, "tpu", ValueError, "unknown target 'tpu'"),
    "quantize": (CompileOptions, "int4", ValueError, "expected 'mxfp4'.*found 'int4'"),
    "speculate": (CompileOptions, "draft", ValueError, "found 'draft'"),
    "speculate of another kind": (
        CompileOptions,
        4,
        TypeError,
        "an NGram, an MTP, an Eagle3, a Draft, text or.* found 4",
    ),
    "speculate by an unknown way": (CompileOptions, "guess", ValueError, "'none'.*found 'guess'"),
    "speculate by too many numbers": (CompileOptions, "ngram:4:2:1", ValueError, "'ngram:4:2:1'"),
    "speculate by no number": (CompileOptions, "ngram:", ValueError, "found 'ngram:'"),
    "speculate by k": (CompileOptions, "ngram:65", ValueError, "k: expected.* 1 to 64, found 65"),
    "speculate by two numbers": (CompileOptions, "mtp:1:2", ValueError, "found 'mtp:1:2'"),
    "speculate by k of a layer": (CompileOptions, "mtp:5", ValueError, "k: .* 1 to 4, found 5"),
    "speculate by no head": (CompileOptions, "eagle3:4", ValueError, "'eagle3:k:DIR'.*'eagle3:4'"),
    "speculate by a head alone": (CompileOptions, "eagle3:DIR", ValueError, "found 'eagle3:DIR'"),
    "speculate by nothing": (
        CompileOptions,
        "eagle3:4:",
        ValueError,
        "directory: expected the path",
    ),
    "speculate by k of a head": (CompileOptions, "eagle3:5:DIR", ValueError, "1 to 4, found 5"),
    "speculate by k of a model": (
        CompileOptions,
        "draft:5:it",
        ValueError,
        "k: .* 1 to 4, found 5",
    ),
    "speculate by a model nowhere": (CompileOptions, "draft:4:", ValueError, "the path of a model"),
    "speculate by a model alone": (CompileOptions, "draft:it", ValueError, "found 'draft:it'"),
    "speculate by min_match": (CompileOptions, "ngram:4:0", ValueError, "min_match.*found 0"),
    "tensor_parallel": (CompileOptions, 0, ValueError, "at least 1, found 0"),
    "max_sequences": (CompileOptions, 1.5, ValueError, "at least 1, found 1.5"),
    "max_tokens_per_sequence": (CompileOptions, True, ValueError, "at least 1, found True"),
    "dtype": (CompileOptions, torch.int8, ValueError, "expected one of bf16.*found torch.int8"),
    "verify": (CompileOptions, "yes", ValueError, "expected True or False, found 'yes'"),
    "check_import": (CompileOptions, 1, ValueError, "expected True or False, found 1"),
    "tune": (CompileOptions, 1, ValueError, "expected True or False, found 1"),
    "unused": (CompileOptions, "drop", ValueError, "expected 'refuse' or 'allow', found 'drop'"),
    "progress": (CompileOptions, None, ValueError, "expected True or False, found None"),
    "max_new_tokens": (GenerateOptions, 0, ValueError, "at least 1, found 0"),
    "temperature": (GenerateOptions, -1, ValueError, "a finite number ≥ 0, found -1"),
    "top_k": (GenerateOptions, -1, ValueError, "an integer ≥ 0, found -1"),
    "top_p": (GenerateOptions, 0, ValueError, r"in \(0, 1\], found 0"),
    "min_p": (GenerateOptions, 2, ValueError, r"in \[0, 1\], found 2"),
    "repetition_penalty": (GenerateOptions, 0, ValueError, "> 0, found 0"),
    "seed": (GenerateOptions, -1, ValueError, "None or an integer"),
    "stop": (GenerateOptions, ["a", ""], ValueError, "not empty"),
    "logprobs": (GenerateOptions, -1, ValueError, "at least 0, found -1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_name_the_option(name: str) -> None:
    type_, value, error, message = WRONG[name]
    name, *_ = name.split()
    with pytest.raises(error, match=message) as raised:
        type_(**{name: value})
    assert name in str(raised.value)


def test_every_option_is_checked() -> None:
    checked = {(type_, name.split()[0]) for name, (type_, *_) in WRONG.items()}
    every = {(t, f.name) for t in (CompileOptions, GenerateOptions) for f in fields(t)}
    assert every - checked == {(CompileOptions, "passes")}  # any sequence of passes


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="put a QuantizeMxfp4 among them"):
        CompileOptions(quantize="mxfp4", passes=RAISING)
    gptq = MXFP4(method="gptq", calibrate=["a text"])
    with pytest.raises(ValueError, match="not one of 2 ranks"):
        CompileOptions(quantize=gptq, tensor_parallel=2)


def test_equal_options_are_equal_keys() -> None:
    same = CompileOptions(quantize=MXFP4(), dtype=torch.bfloat16)
    for dtype in ("bf16", "bfloat16"):
        given = CompileOptions(quantize="mxfp4", dtype=dtype)
        assert given == same and hash(given) == hash(same)
    assert CompileOptions(**same.keywords()) == same
    assert CompileOptions(unused="allow").data() == CompileOptions().data()
    assert CompileOptions(speculate="ngram") == CompileOptions(speculate=ingot.NGram())
    assert CompileOptions(speculate="ngram:3:5").speculation == ingot.NGram(3, min_match=5)
    assert CompileOptions(speculate="mtp").speculation == ingot.MTP()
    assert CompileOptions(speculate="mtp:3").predicted == 3
    head = CompileOptions(speculate="eagle3:2:C:/a:b/head")
    assert head.speculation == ingot.Eagle3(Path("C:/a:b/head"), k=2) and head.predicted == 2
    assert str(head.speculation) == "eagle3:2:C:/a:b/head"
    assert ingot.Eagle3("a").k == 4
    assert CompileOptions(speculate="ngram:3").predicted == CompileOptions().predicted == 0
    assert CompileOptions(speculate="draft:2:a:b").speculation == ingot.Draft(Path("a:b"), 2)
    assert CompileOptions(speculate=ingot.Draft("there")).predicted == 4
    for off in (None, "none"):
        assert CompileOptions(speculate=off).data() == CompileOptions().data()
        assert CompileOptions(speculate=off).speculation is None
    assert GenerateOptions(stop="a") == GenerateOptions(stop=["a"])
    both = GenerateOptions(stop=["a", 7])
    assert both.stop_strings == ["a"] and both.stop_tokens == [7]


@pytest.mark.parametrize("given", [3, None, b"head", Path])
def test_a_head_is_a_path(given: Any) -> None:
    with pytest.raises(TypeError, match="directory: expected the path of an EAGLE-3 head"):
        ingot.Eagle3(given)


def test_data_is_json_and_tells_options_apart() -> None:
    texts = [MXFP4(method="gptq", calibrate=[text]) for text in ("a", "b")]
    given = [
        CompileOptions(),
        CompileOptions(dtype="f32"),
        CompileOptions(quantize="mxfp4"),
        CompileOptions(passes=RAISING),
        CompileOptions(passes=()),
        CompileOptions(speculate="ngram"),
        CompileOptions(speculate="ngram:3"),
        CompileOptions(speculate="draft:3:a"),
        CompileOptions(speculate="draft:3:b"),
        *(CompileOptions(quantize=text) for text in texts),
    ]
    found = [json.dumps(one.data()) for one in given]
    assert len(set(found)) == len(given)
    assert CompileOptions(progress=False).data() == CompileOptions().data()
    assert json.loads(found[2])["quantize"]["group"] == 32


@pytest.mark.parametrize(
    ("function", "type_", "more"),
    [
        (api.compile, CompileOptions, {"example_inputs": None, "dynamic_shapes": None}),
        (api.compile_to, CompileOptions, {"overwrite": False}),
        (api.plan, CompileOptions, {"entry": None}),
        (TextModel.generate, GenerateOptions, {"stream": False}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_doors_show_the_options(function: Any, type_: type, more: dict[str, Any]) -> None:
    shown = inspect.signature(function).parameters.values()
    keywords = {p.name: p.default for p in shown if p.kind is p.KEYWORD_ONLY}
    assert keywords == {**more, **{f.name: f.default for f in fields(type_)}}


@pytest.mark.parametrize("kind", ["Compile", "Generate"])
def test_keywords_are_the_fields(kind: str) -> None:
    keywords = getattr(options, f"{kind}Keywords").__annotations__
    held = {f.name: f.type for f in fields(getattr(options, f"{kind}Options"))}
    assert {name: type_.__forward_arg__ for name, type_ in keywords.items()} == held


def test_unknown_keywords_are_refused() -> None:
    with pytest.raises(TypeError, match="max_sequence"):
        ingot.compile("nowhere", max_sequence=2)  # type: ignore[call-overload]


# ---- the command line


@pytest.mark.parametrize("name", ["compile", "run", "chat", "inspect", "verify"])
def test_flags_are_those_of_the_options(name: str) -> None:
    taken = inspect.signature(COMMANDS[name], eval_str=True).parameters
    text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).stdout
    held = [p.default for p in taken.values() if is_dataclass(p.default)]
    assert held
    for field in (f for options_ in held for f in fields(options_)):
        flag = (field.metadata.get("flag") or field.name.replace("_", "-")).split("/")[0]
        assert (f"--{flag} " in text) == (bool(field.metadata) or field.name in taken), flag


def test_a_command_is_one_file_and_a_line() -> None:
    """A new command appears with its flags, `--json` and errors, from a function alone."""
    code = '''
from ingot.frontends.cli import commands
from ingot.frontends.cli.flags import MANY, Directory
from ingot.frontends.options import CompileOptions
from ingot.frontends.cli.output import Shown
def command(directory: Directory, options: CompileOptions = MANY) -> Shown:
    """Say the dtype."""
    if options.max_sequences == 3: raise ValueError("three")
    return Shown(lambda: {"dtype": options.dtype}, [[f"dtype {options.dtype}"]])
commands.COMMANDS["dtype"] = command
from typer.testing import CliRunner
from ingot.frontends.cli.main import app
def run(*arguments):
    result = CliRunner().invoke(app, ["dtype", ".", "--dtype", "bfloat16", *arguments])
    print(result.exit_code, " ".join(result.output.split()))
run(); run("--json"); run("--max-sequences", "3")
'''
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["0 dtype bf16", '0 { "dtype": "bf16" }', "2 error: three"]


# ---- types, as pyright sees them

TYPED = """
from collections.abc import Iterator
from pathlib import Path
from typing import assert_type
import ingot, torch
from ingot.frontends.api import CompiledModule, TextEvent, WrittenIngot
from transformers import PreTrainedModel

def doors(model: PreTrainedModel, module: torch.nn.Module, x: torch.Tensor, one: list[int]) -> None:
    assert_type(ingot.compile("directory", dtype="bf16"), ingot.Model)
    assert_type(ingot.compile(Path("directory"), quantize=ingot.MXFP4(group=16)), ingot.Model)
    assert_type(ingot.compile(model, max_sequences=2), ingot.Model)
    assert_type(ingot.compile(model, speculate=ingot.NGram(k=3)), ingot.Model)
    assert_type(ingot.compile(model, speculate=ingot.Draft(Path("smaller"), k=2)), ingot.Model)
    assert_type(ingot.compile(module, example_inputs=(x,)), CompiledModule)
    assert_type(ingot.compile_to("directory", "path", overwrite=True), WrittenIngot)
    loaded = ingot.load("path")
    assert_type(loaded.generate("text", max_new_tokens=3), ingot.Completion)
    assert_type(loaded.generate(one, stop="x"), ingot.Completion)
    assert_type(loaded.generate(["text", "more"]), list[ingot.Completion])
    assert_type(loaded.generate([one, one], seed=1), list[ingot.Completion])
    assert_type(loaded.generate("text", stream=True), Iterator[TextEvent])
    assert_type(loaded.generate([one], stream=True), Iterator[TextEvent])
"""
WRONGLY = """
def wrong(module: torch.nn.Module) -> None:
    ingot.compile("directory", max_sequence=2)
    ingot.compile("directory", verify="yes")
    ingot.compile(module)
    ingot.load("path").generate("text", temperature="hot")
"""


@pytest.mark.slow
def test_types_of_the_doors(tmp_path: Path) -> None:
    (tmp_path / "typed.py").write_text(TYPED + WRONGLY, encoding="utf-8")
    # An editable install is found by a hook, which pyright does not run.
    (tmp_path / "ingot").symlink_to(Path(ingot.__file__).parent, target_is_directory=True)
    (tmp_path / "pyrightconfig.json").write_text('{"include": ["typed.py"]}', encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    lines = sorted({d["range"]["start"]["line"] for d in found if d["severity"] == "error"})
    first = TYPED.count("\n") + 2
    assert lines == [first, first + 1, first + 2, first + 3], found
