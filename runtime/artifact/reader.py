"""Opens an ingot and validates all of it before any part is used.

Device code cannot be validated: run it only from trusted sources. The hashes of the manifest detect
corruption; they do not authenticate the author.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from ..devices.check_program import check_program
from ..driver import WeightLoader
from ..program import Buffer, Program
from ..serving.abi import ServingAbi
from .files import Files, open_files
from .manifest import FOLDERS, MANIFEST, MAX_BYTES, FileFact, Manifest, read_manifest
from .plan_json import read_program
from .safetensors_file import Tensor, read_tensors
from .strict_json import IngotError, decode, shown

CPU = "cpu"
SHARED_PLAN = "plan/program.json"
FINAL_GRAPH = "graphs/final.ir"
FOLDED_GRAPH = "graphs/folded.ir"
CODE = {"cuda": "cubin", "hip": "hsaco"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
TEMPLATES = "additional_chat_templates/"
_MAX_PLAN = 1 << 27  # bytes of the JSON files of the plan together
_MAX_GRAPH = 1 << 25  # bytes of one graph
_MAX_MODEL_FILES = 1 << 28  # bytes of the tokenizer's files together
_MAX_SMALL = 1 << 30  # bytes of all files but weights together
_HASH_THREADS = 16


def plan_name(entry: int) -> str:
    """The file of entry number `entry`."""
    return f"plan/entry-{entry}.json"


def code_name(target: str, sha256: str) -> str:
    """The file of a kernel's code."""
    return f"kernels/{sha256}.{CODE[target.partition(':')[0]]}"


@dataclass(frozen=True)
class Artifact:
    """A validated ingot, except for the content of its weights.

    `program` is None for the cpu target, whose program is built from `graphs`: the textual IR by
    file name. `model_files` are the tokenizer's, by their names in a model directory.
    """

    path: Path
    manifest: Manifest
    program: Program | None
    graphs: Mapping[str, str]
    model_files: Mapping[str, bytes]

    @property
    def weight_files(self) -> Mapping[str, FileFact]:
        """The shards of the weights, by name."""
        files = self.manifest.files
        return {name: fact for name, fact in files.items() if name.startswith("weights/")}

    def tensors(self) -> Mapping[str, Tensor]:
        """Map every shard and check its hash and header; the tensors by name."""
        with _naming(self.path), open_files(self.path) as files:
            mapped = {name: files.map(name) for name in self.weight_files}
            with ThreadPoolExecutor(min(_HASH_THREADS, os.cpu_count() or 1)) as pool:
                proofs = [
                    pool.submit(_check_hash, name, mapped[name], fact)
                    for name, fact in self.weight_files.items()
                ]
                for proof in proofs:
                    proof.result()
            tensors: dict[str, Tensor] = {}
            for name, data in mapped.items():
                found = read_tensors(data, name)
                if twice := tensors.keys() & found.keys():
                    raise IngotError(
                        f"{name}: expected each weight once, found {shown(min(twice))}"
                    )
                tensors.update(found)
        return tensors

    def weights(self, buffers: Mapping[str, Buffer]) -> WeightLoader:
        """Map and check every shard; returns a loader of the weights among `buffers`.

        IngotError unless the shards hold exactly those, of their dtypes and shapes. A dtype that
        numpy lacks is an integer array of its bits. Arrays keep their mapping open.
        """
        tensors = self.tensors()
        with _naming(self.path):
            _check_weights(tensors, buffers)
        return lambda name: tensors[name].array()


def open_ingot(path: str | Path) -> Artifact:
    """Read the ingot at `path`, a directory or a zip, and validate all but its weights.

    IngotError, in one line, names the file, what was expected and what was found.
    """
    path = Path(path)
    with _naming(path), open_files(path) as files:
        manifest = _manifest(files)
        _check_names(files, manifest)
        _check_sizes(manifest)
        small = {name for name in manifest.files if not name.startswith("weights/")}
        graphs = {name for name in small if _is_graph(name)}
        expected = {FINAL_GRAPH, FOLDED_GRAPH} if manifest.target == CPU else {FINAL_GRAPH}
        if graphs != expected:
            raise IngotError(f"expected {sorted(expected)}, found {sorted(graphs)}")
        tokenizer = {name for name in small if _is_model_file(name)}
        reads = _Reads(files, manifest)
        program = None if manifest.target == CPU else _program(manifest, reads)
        if rest := small - graphs - tokenizer - reads.names:
            raise IngotError(f"expected files of target {manifest.target}, found {min(rest)} too")
        texts = {name: _text(name, reads(name)) for name in sorted(graphs)}
        models = {name.removeprefix("tokenizer/"): reads(name) for name in sorted(tokenizer)}
    return Artifact(path, manifest, program, texts, models)


def read_ingot_manifest(path: str | Path) -> Manifest:
    """The manifest of the ingot at `path`; other files are not read."""
    path = Path(path)
    with _naming(path), open_files(path) as files:
        return _manifest(files)


@contextmanager
def _naming(path: Path) -> Generator[None]:
    try:
        yield
    except IngotError as error:
        raise IngotError(f"{path}: {error}") from error


def _manifest(files: Files) -> Manifest:
    if MANIFEST not in files.sizes:
        raise IngotError(f"expected {MANIFEST}, found none: no ingot, or an unfinished one")
    if (size := files.sizes[MANIFEST]) > MAX_BYTES:
        raise IngotError(f"{MANIFEST}: expected at most {MAX_BYTES} bytes of JSON, found {size}")
    return read_manifest(files.read(MANIFEST))


def _check_names(files: Files, manifest: Manifest) -> None:
    """Check that the files are exactly those of the manifest, of its sizes."""
    there = files.sizes.keys() - {MANIFEST}
    if extra := there - manifest.files.keys():
        raise IngotError(f"{min(extra)}: expected only what {MANIFEST} lists, found it too")
    for name, fact in manifest.files.items():
        if name not in there:
            raise IngotError(f"{name}: expected this file by {MANIFEST}, found none")
        if files.sizes[name] != fact.size:
            raise IngotError(f"{name}: expected {fact.size} bytes, found {files.sizes[name]}")
        if name.startswith("weights/") != name.endswith(".safetensors"):
            raise IngotError(f"{name}: expected safetensors files in weights/ alone")


def _check_sizes(manifest: Manifest) -> None:
    """Check that what will be read fits, before any of it is."""

    def check(what: str, most: int, *beginnings: str) -> None:
        found = sum(f.size for n, f in manifest.files.items() if n.startswith(beginnings))
        if found > most:
            raise IngotError(f"{what}: expected at most {most} bytes, found {found}")

    for name in (FINAL_GRAPH, FOLDED_GRAPH):
        check(name, _MAX_GRAPH, name)
    check("plan", _MAX_PLAN, "plan/")
    check("tokenizer", _MAX_MODEL_FILES, "tokenizer/", TEMPLATES)
    check("all files but weights", _MAX_SMALL, *(f"{n}/" for n in FOLDERS if n != "weights"))


class _Reads:
    """Reads files, with their hashes checked, when they are asked for; `names` are those."""

    def __init__(self, files: Files, manifest: Manifest) -> None:
        self._files, self._facts = files, manifest.files
        self.names: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._facts

    def __call__(self, name: str) -> bytes:
        data = self._files.read(name)
        _check_hash(name, data, self._facts[name])
        self.names.add(name)
        return data


def _check_hash(name: str, data: bytes | memoryview, fact: FileFact) -> None:
    if len(data) != fact.size:
        raise IngotError(f"{name}: expected {fact.size} bytes, found {len(data)}")
    found = hashlib.sha256(data).hexdigest()
    if found != fact.sha256:
        raise IngotError(f"{name}: expected sha256 {fact.sha256}, found {found}")


def _is_graph(name: str) -> bool:
    return name.startswith("graphs/")


def _is_model_file(name: str) -> bool:
    if name.startswith(TEMPLATES):
        return name.endswith(".jinja")
    return name.removeprefix("tokenizer/") in TOKENIZER_FILES and name.startswith("tokenizer/")


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IngotError(f"{name}: expected UTF-8 text, found other bytes") from error


def _program(manifest: Manifest, reads: _Reads) -> Program:
    """The program of the plan and the kernels, which are all that is read."""
    target = manifest.target
    if target.partition(":")[0] not in CODE:
        raise IngotError(f"{MANIFEST}: target: expected cpu, cuda:… or hip:…, found {target}")

    def plan(name: str) -> Any:
        if name not in reads:
            raise IngotError(f"{name}: expected this file of a {target} ingot, found none")
        return decode(reads(name), dict[str, Any], name, _MAX_PLAN)

    @cache  # kernels may share their code
    def binary(sha256: str) -> bytes:
        name = code_name(target, sha256)
        if name not in reads or manifest.files[name].sha256 != sha256:
            raise IngotError(f"{name}: expected the code of that sha256, found none")
        return reads(name)

    names = [(entry.function, plan_name(i)) for i, entry in enumerate(manifest.entries)]
    entries = [(function, name, plan(name)) for function, name in names]
    program = read_program(plan(SHARED_PLAN), entries, binary, SHARED_PLAN)
    try:
        check_program(program)
        ServingAbi(program)
    except ValueError as error:  # a ProgramError, or a program that serves no text
        raise IngotError(f"plan: {error}") from error
    check_manifest(manifest, program)
    return program


def check_manifest(manifest: Manifest, program: Program) -> None:
    """IngotError unless sizes and entries of the manifest are those of the program."""
    if program.target != manifest.target:
        raise IngotError(
            f"{MANIFEST}: target: expected {program.target}, as the plan, found {manifest.target}"
        )
    if dict(program.meta) != asdict(manifest.meta):
        raise IngotError(f"plan: expected the meta of {MANIFEST}, found another")
    stated = [(e.function, dict(e.symbols), e.launches) for e in manifest.entries]
    found = [
        (name, dict(e.symbols), len(e.launches))
        for name, function in program.functions.items()
        for e in function.entries
    ]
    for said, is_ in zip(stated, found, strict=True):
        if said != is_:
            raise IngotError(f"{MANIFEST}: entries: expected {is_}, as the plan, found {said}")


def _check_weights(tensors: Mapping[str, Tensor], buffers: Mapping[str, Buffer]) -> None:
    expected = {name: b for name, b in buffers.items() if b.kind == "weight"}
    if missing := expected.keys() - tensors.keys():
        raise IngotError(f"weights: expected {shown(min(missing))}, found no such tensor")
    if extra := tensors.keys() - expected.keys():
        raise IngotError(f"weights: expected only what the plan names, found {shown(min(extra))}")
    for name, buffer in expected.items():
        tensor = tensors[name]
        if (tensor.dtype, tensor.shape) != (buffer.dtype, buffer.shape):
            raise IngotError(
                f"weights: {shown(name)}: expected {buffer.dtype}{list(buffer.shape)}, "
                f"found {tensor.dtype}{list(tensor.shape)}"
            )
