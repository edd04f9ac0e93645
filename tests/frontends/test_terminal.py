"""Terminals: what files hold is shown, not acted on; ASCII is enough; warnings may be errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ingot.frontends.cli.commands.run import parse_ids
from ingot.frontends.cli.flags import UsageError
from ingot.frontends.cli.main import app
from ingot.frontends.cli.output import Shown, print_json, table, visible
from typer.testing import CliRunner

PICO = Path(__file__).parents[2] / "examples" / "pico"
EVIL = "a\x1b[31mb\x9b1m\x7f\r\u202ec\ud800"
SEEN = r"a\x1b[31mb\x9b1m\x7f\r\u202ec\ud800"


def test_what_a_terminal_would_act_on_is_escaped() -> None:
    assert visible(EVIL) == SEEN
    kept = "tab\tline\n é → 🙂 👩\u200d🔬"
    assert visible(kept) == kept


def test_output_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    Shown(dict, [table(EVIL, ["head"], [[EVIL]]), [EVIL]]).print(as_json=False)
    assert capsys.readouterr().out.count(SEEN) == 3
    print_json({EVIL: [EVIL]})
    text = capsys.readouterr().out
    assert json.loads(text) == {EVIL: [EVIL]} and "\x9b" not in text and "\x7f" not in text
    text.encode("utf-8")


def test_errors_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x\x1b[2Jy"}))
    result = CliRunner().invoke(app, ["compile", str(tmp_path)])
    assert result.exit_code == 1
    assert "\x1b[2J" not in result.stderr and r"\x1b[2J" in result.stderr


def test_empty_ids_are_refused() -> None:
    assert parse_ids("5, 6") == [5, 6]
    for text in ("", " ", ","):
        with pytest.raises(UsageError, match="--ids: expected token ids, found none"):
            parse_ids(text)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["ascii", "C locale"])
def test_terminals_of_ascii_alone(state: str) -> None:
    more = {"PYTHONIOENCODING": "ascii"} if state == "ascii" else {"LC_ALL": "C"}
    for command in (
        ["compile", PICO, "--max-tokens", "32"],
        ["inspect", PICO, "--max-tokens", "32", "--passes", "--all"],
        ["run", PICO, "--max-tokens", "32", "--prompt", "x", "--max-new-tokens", "4"],
        ["doctor"],
    ):
        arguments = [sys.executable, "-m", "ingot", *map(str, command)]
        done = subprocess.run(
            arguments, env={**os.environ, **more}, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        if state == "ascii":
            assert done.stdout.isascii() and done.stdout


API = """
import ingot, torch
model = ingot.compile({pico!r}, max_sequences=1, max_tokens_per_sequence=32)
assert len(model.generate("x", max_new_tokens=4).tokens) == 4
module = ingot.compile(torch.nn.Linear(2, 2), example_inputs=(torch.ones(1, 2),))
assert module(torch.ones(1, 2)).shape == (1, 2)
"""


@pytest.mark.slow
def test_warnings_may_be_errors(tmp_path: Path) -> None:
    script = tmp_path / "use.py"
    script.write_text(API.format(pico=str(PICO)), encoding="utf-8")
    run = ["-m", "ingot", "run", str(PICO), "--max-tokens", "32", "--prompt", "x"]
    for arguments in ([str(script)], run):
        done = subprocess.run(
            [sys.executable, "-W", "error", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
