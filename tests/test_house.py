"""The house keeps to its plan: who imports whom, no cycles, one package list, an instant door.

Each rule is a function from a source tree to its breaches: no breach in this tree, and one in each
small broken tree at the end of the file.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]

# Room -> rooms, or single files of them, that it may import besides itself. "ingot" is the root
# package: `__init__.py` and `__main__.py` at the top.
MAY_IMPORT = {
    "compiler": set[str](),
    "passes": {"compiler"},
    "runtime": {"compiler/dtypes.py", "compiler/target.py"},
    "codegen": {"compiler", "runtime"},
    "frontends": {"compiler", "passes", "codegen", "runtime", "ingot"},
    "ingot": {"frontends", "runtime"},
}
ROOMS = MAY_IMPORT.keys() - {"ingot"}
TOP_FILES = {"__init__.py", "__main__.py"}
TOP_FOLDERS = {*ROOMS, "tests", "examples"}

# The doors, which must open before what is behind them has been imported: it is heavy or an extra.
DOORS = {
    "__init__.py",
    "frontends/api.py",
    "frontends/compilation.py",
    "frontends/cli/commands/*.py",
    "frontends/cli/models.py",
    "frontends/drivers.py",
    "frontends/loading.py",
    "frontends/options.py",
}
STANDARD_LIBRARY_ONLY = MAY_IMPORT["runtime"]
IMPORT_SECONDS = 0.2


@dataclass(frozen=True)
class Import:
    """One imported module. Of ours, `target` is its path in the tree, `room/file.py`."""

    file: str
    line: int
    module: str
    target: str | None
    relative: bool
    in_function: bool
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target or self.module}"


def room_of(path: str) -> str:
    room, slash, _ = path.partition("/")
    return room if slash else "ingot"


def top_name(module: str) -> str:
    return module.partition(".")[0]


def package_files(root: Path) -> list[str]:
    """Every Python file of the package, as a path in the tree."""
    files = [root / name for name in TOP_FILES]
    files += [file for room in ROOMS for file in (root / room).rglob("*.py")]
    return sorted(file.relative_to(root).as_posix() for file in files if file.exists())


def imports_of(root: Path, file: str) -> Iterator[Import]:
    """What `file` imports, wherever in it that stands; relative imports resolved to files.

    A relative import that leaves the package keeps its dots; so does one made from a string.
    """
    folder = ("ingot", *Path(file).parent.parts)

    def path_of(module: str) -> str | None:
        """The file that holds a module of ours; one that is not there yet counts as a file."""
        if top_name(module) != "ingot":
            return None
        place = "/".join(module.split(".")[1:])
        if not place or (root / place).is_dir():
            return f"{place}/__init__.py".lstrip("/")
        return f"{place}.py"

    def from_modules(node: ast.ImportFrom) -> Iterator[str]:
        if node.level > len(folder):
            yield "." * node.level + (node.module or "")
            return
        base = folder[: len(folder) - node.level + 1] if node.level else ()
        module = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = path_of(f"{module}.{alias.name}")
            yield f"{module}.{alias.name}" if inner and (root / inner).exists() else module

    def modules(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            return list(dict.fromkeys(from_modules(node)))
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called.endswith(("import_module", "__import__")):
                return [str(node.args[0].value)]
        return []

    def visit(node: ast.AST, in_function: bool, typing_only: bool) -> Iterator[Import]:
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        for module in modules(node):
            target = path_of(module)
            yield Import(file, node.lineno, module, target, relative, in_function, typing_only)
        for_types: list[ast.stmt] = []
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for_types = node.body
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function, typing_only or child in for_types)

    return visit(ast.parse((root / file).read_text(encoding="utf-8")), False, False)


def all_imports(root: Path) -> list[Import]:
    return [found for file in package_files(root) for found in imports_of(root, file)]


# ---- the rules: a tree to its breaches


def table_breaches(root: Path) -> list[str]:
    """Imports of a room that the table does not allow."""
    return [
        f"{found}: {room_of(found.file)} may not import {room_of(found.target)}"
        for found in all_imports(root)
        if found.target is not None
        and room_of(found.target) != room_of(found.file)
        and not {room_of(found.target), found.target} & MAY_IMPORT[room_of(found.file)]
    ]


def absolute_breaches(root: Path) -> list[str]:
    """Imports of ours that are not relative, and relative ones that leave the package."""
    return [
        f"{found}: make it relative, inside the package"
        for found in all_imports(root)
        if found.module.startswith(".")
        or (not found.relative and top_name(found.module) in {*ROOMS, "ingot"})
    ]


def cycle_breaches(root: Path) -> list[str]:
    """Import cycles between files; an import inside a function counts, one for types does not."""
    graph = nx.DiGraph(
        (found.file, found.target)
        for found in all_imports(root)
        if found.target is not None and not found.typing_only
    )
    return [" -> ".join([*cycle, cycle[0]]) for cycle in nx.simple_cycles(graph)]


def function_breaches(root: Path) -> list[str]:
    """Imports of ours inside a function, where no door needs them."""
    return [
        f"{found} inside a function"
        for found in all_imports(root)
        if found.target is not None
        and found.in_function
        and not any(fnmatch(found.file, door) for door in DOORS)
    ]


def runtime_breaches(root: Path) -> list[str]:
    """What would bring torch or triton into the replay of a GPU program."""
    breaches: list[str] = []
    for found in all_imports(root):
        top = top_name(found.module)
        if found.file in STANDARD_LIBRARY_ONLY and top not in sys.stdlib_module_names:
            breaches.append(f"{found}: it is for the standard library alone")
        if room_of(found.file) != "runtime":
            continue
        if top in ("triton", "torch"):
            breaches.append(f"{found}: runtime/ replays without it")
    return breaches


def package_breaches(root: Path) -> list[str]:
    """Differences between the package list in pyproject.toml and the folders that hold code."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    folders = {Path(file).parent for file in package_files(root)}
    found = {".".join(("ingot", *folder.parts)) for folder in folders}
    return [
        *(f"pyproject.toml does not list {name}" for name in sorted(found - set(listed))),
        *(f"pyproject.toml lists {name}, which has no code" for name in set(listed) - found),
        *(
            f"{f}/__init__.py is missing"
            for f in folders
            if not (root / f / "__init__.py").exists()
        ),
    ]


def top_level_breaches(root: Path) -> list[str]:
    """Code at the top of the tree beside the rooms, the tests and the examples."""
    built = {"build", "dist"}
    folders = [
        path.name
        for path in root.iterdir()
        if path.is_dir()
        and not path.name.startswith(".")
        and path.name not in built
        and not (path / "pyvenv.cfg").exists()
        and next(path.rglob("*.py"), None)
    ]
    files = [path.name for path in root.glob("*.py")]
    return [
        *(f"{name}/ is no room of this house" for name in sorted(set(folders) - TOP_FOLDERS)),
        *(f"{name} belongs in a room" for name in sorted(set(files) - TOP_FILES)),
    ]


def guide_breaches(root: Path) -> list[str]:
    """Files that the docstring of their room's `__init__.py` does not name."""
    breaches: list[str] = []
    for file in map(Path, package_files(root)):
        if file.name in TOP_FILES:
            continue
        guide = root / file.parent / "__init__.py"
        text = ast.get_docstring(ast.parse(guide.read_text(encoding="utf-8"))) or ""
        if f"`{file.stem}`" not in text:
            breaches.append(
                f"the docstring of {file.parent}/__init__.py does not name `{file.stem}`"
            )
    return breaches


def written_table_breaches(root: Path) -> list[str]:
    """Rows of the table in CONTRIBUTING.md that say something else than `MAY_IMPORT`."""
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    written = {
        cells[0].strip("`/"): {name.strip("`/ ") for name in cells[2].split(",")}
        - {"nothing of ours"}
        for cells in rows
        if len(cells) == 3
    }
    rooms = {room: MAY_IMPORT[room] - {"ingot"} for room in ROOMS}
    rooms["__init__.py"] = MAY_IMPORT["ingot"]
    return [
        f"CONTRIBUTING.md: {room} may import {sorted(written.get(room, []))}, not {sorted(allowed)}"
        for room, allowed in rooms.items()
        if written.get(room) != allowed
    ]


RULES = [
    table_breaches,
    absolute_breaches,
    cycle_breaches,
    function_breaches,
    runtime_breaches,
    package_breaches,
    top_level_breaches,
    guide_breaches,
    written_table_breaches,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_breach(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


# ---- the front door


def run_python(code: str, cwd: Path) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_import_is_instant_and_light(tmp_path: Path) -> None:
    code = """
import json, sys, time
start = time.process_time()
import ingot
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(sys.modules), ingot.__file__, dir(ingot)]))
"""
    runs = [json.loads(run_python(code, tmp_path)) for _ in range(5)]
    seconds = min(run[0] for run in runs)
    _, modules, file, names = runs[0]
    assert Path(file).samefile(ROOT / "__init__.py"), "another ingot is installed: pip install -e ."
    assert {"compile", "load", "Model", "Completion", "__version__"} <= set(names)
    assert not {"torch", "triton"} & set(modules)
    assert seconds < IMPORT_SECONDS


def test_runtime_replays_without_torch(tmp_path: Path) -> None:
    files = [f for f in package_files(ROOT) if f.startswith("runtime/")]
    names = [f"ingot.{f[:-3].replace('/', '.').removesuffix('.__init__')}" for f in files]
    code = f"import sys, {', '.join(names)}; print(*{{'torch', 'triton'}} & set(sys.modules))"
    assert run_python(code, tmp_path).split() == []


def test_front_door_knows_its_names() -> None:
    import ingot
    from ingot.frontends import api

    for name in set(ingot.__all__) - {"__version__"}:
        assert getattr(ingot, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="no attribute 'compiel'"):
        ingot.compiel  # noqa: B018


# ---- the fixture `golden`


def test_golden_writes_compares_and_shows_the_difference(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    written = pytester.path / "golden" / "test_a" / "test_it-x-1.txt"

    def run(text: str, *options: str) -> tuple[int, str]:
        test = f"""
            import pytest
            @pytest.mark.parametrize("v", ["x/1"])
            def test_it(golden, v): golden({text!r})
        """
        pytester.makepyfile(test_a=test)
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)
        return result.ret, result.stdout.str()

    code, said = run("one\ntwo")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "create it with: pytest --update-golden 'test_a.py::test_it[x/1]'" in said
    assert not written.exists()
    assert run("one\ntwo", "--update-golden")[0] == pytest.ExitCode.OK
    assert written.read_text(encoding="utf-8") == "one\ntwo\n"
    assert run("one\ntwo")[0] == pytest.ExitCode.OK
    code, said = run("one\n2")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "-two\n+2" in said
    assert written.read_text(encoding="utf-8") == "one\ntwo\n"


# ---- every rule finds its breach

BROKEN: dict[str, tuple[Callable[[Path], list[str]], dict[str, str | None], str]] = {
    "room": (
        table_breaches,
        {"compiler/a.py": "from ..passes.b import c"},
        "may not import passes",
    ),
    "room by its package": (table_breaches, {"passes/a.py": "from .. import runtime"}, "runtime"),
    "room in a function": (
        table_breaches,
        {"runtime/a.py": "def f():\n    from ..compiler import ir"},
        "a.py:2 imports compiler",
    ),
    "room for types": (
        table_breaches,
        {
            "codegen/a.py": "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from ..frontends.api import Model"
        },
        "may not import frontends",
    ),
    "room from below": (
        table_breaches,
        {"compiler/ops/a.py": "from ...codegen import b"},
        "codegen",
    ),
    "front door from inside": (table_breaches, {"passes/a.py": "from .. import load"}, "ingot"),
    "absolute": (
        absolute_breaches,
        {"passes/a.py": "import ingot.compiler.ir"},
        "make it relative",
    ),
    "room as a module": (
        absolute_breaches,
        {"passes/a.py": "from compiler.ir import b"},
        "relative",
    ),
    "by a string": (
        absolute_breaches,
        {"passes/a.py": "import importlib\nimportlib.import_module('.ir', 'ingot.compiler')"},
        "a.py:2",
    ),
    "out of the package": (absolute_breaches, {"passes/a.py": "from ...other import b"}, "a.py:1"),
    "cycle": (
        cycle_breaches,
        {"compiler/a.py": "from .b import x", "compiler/b.py": "from . import a"},
        "compiler/a.py -> compiler/b.py",
    ),
    "cycle dodged in a function": (
        cycle_breaches,
        {"compiler/a.py": "from .b import x", "compiler/b.py": "def f():\n    from .a import y"},
        "->",
    ),
    "cycle through a package": (
        cycle_breaches,
        {"compiler/ops/__init__.py": "from ..a import x", "compiler/a.py": "from .ops import y"},
        "compiler/ops/__init__.py",
    ),
    "import in a function": (
        function_breaches,
        {"passes/a.py": "class A:\n    def f(self):\n        from ..compiler import ir"},
        "a.py:3",
    ),
    "torch in runtime": (
        runtime_breaches,
        {"runtime/serving/session.py": "import torch.nn"},
        "torch",
    ),
    "triton in a driver": (
        runtime_breaches,
        {"runtime/devices/cuda.py": "import triton"},
        "triton",
    ),
    "shared table beyond the standard library": (
        runtime_breaches,
        {"compiler/dtypes.py": "import numpy"},
        "standard library",
    ),
    "shared table that imports": (
        runtime_breaches,
        {"compiler/target.py": "from .types import Dim"},
        "compiler/target.py:1 imports compiler/types.py: it is for the standard library alone",
    ),
    "compiler beside the shared tables": (
        table_breaches,
        {"runtime/a.py": "from ..compiler.dtypes import DTYPES\nfrom ..compiler import types"},
        "a.py:2 imports compiler",
    ),
    "package not listed": (package_breaches, {"codegen/templates/__init__.py": ""}, "not list"),
    "package without init": (package_breaches, {"codegen/templates/a.py": ""}, "is missing"),
    "package gone": (package_breaches, {"passes/__init__.py": None}, "has no code"),
    "new folder": (top_level_breaches, {"utils/deep/a.py": ""}, "utils/ is no room"),
    "new file": (top_level_breaches, {"helpers.py": ""}, "helpers.py belongs"),
    "file without a guide": (guide_breaches, {"runtime/new.py": ""}, "name `new`"),
    "table without a row": (
        written_table_breaches,
        {"CONTRIBUTING.md": "| `compiler/` | the IR | `runtime/` |"},
        "compiler may import ['runtime'], not []",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_breach_is_found(case: str, tmp_path: Path) -> None:
    rule, changes, expected = BROKEN[case]
    sound = {f"{room}/__init__.py": "" for room in ROOMS} | {"__init__.py": ""}
    listed = sorted({"ingot", *(f"ingot.{room}" for room in ROOMS)})
    sound["pyproject.toml"] = f"[tool.setuptools]\npackages = {json.dumps(listed)}"
    sound["CONTRIBUTING.md"] = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name, text in sound.items():
        write(tmp_path / name, text)
    assert rule(tmp_path) == []
    for name, text in changes.items():
        write(tmp_path / name, text)
    assert expected in "\n".join(rule(tmp_path))


def test_types_alone_may_point_back(tmp_path: Path) -> None:
    write(tmp_path / "passes" / "a.py", "from .b import B\nimport math")
    guarded = "import typing\nif typing.TYPE_CHECKING:\n    from .a import A"
    write(tmp_path / "passes" / "b.py", guarded)
    assert [str(found) for found in all_imports(tmp_path)] == [
        "passes/a.py:1 imports passes/b.py",
        "passes/a.py:2 imports math",
        "passes/b.py:1 imports typing",
        "passes/b.py:3 imports passes/a.py",
    ]
    assert [*cycle_breaches(tmp_path), *absolute_breaches(tmp_path)] == []


def write(path: Path, text: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        path.unlink()
    else:
        path.write_text(text, encoding="utf-8")
