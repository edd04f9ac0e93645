"""Ingots that are sound load; damaged and hostile ones are refused, each in one line, quickly."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import struct
import time
import zipfile
from base64 import b64encode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tiny_ingot
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.compiler.dtypes import DTYPES
from ingot.runtime.artifact import files
from ingot.runtime.artifact import manifest as manifests
from ingot.runtime.artifact.manifest import MANIFEST
from ingot.runtime.artifact.reader import IngotError, open_ingot
from ingot.runtime.artifact.safetensors_file import read_tensors
from ingot.runtime.artifact.writer import IngotWriter
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save
from tiny_ingot import edit, rewrite

SHARED, ENTRY, SHARD = "plan/program.json", "plan/entry-0.json", "weights/00001.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory ingot; tests damage copies of it."""
    return tiny_ingot.write(tmp_path_factory.mktemp("sound") / "tiny")


@pytest.fixture
def place(tmp_path: Path, sound: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "inside" / "tiny"))


# ---- sound ones


@pytest.mark.parametrize("name", ["tiny", "tiny.ingot"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    path = tiny_ingot.write(tmp_path / name, shard_bytes=4096)
    artifact = open_ingot(path)
    made = tiny_ingot.program()
    assert artifact.program == made
    assert path.is_file() == name.endswith(".ingot")
    assert artifact.manifest.target == "cuda:sm_90" and artifact.manifest.stop_tokens == (2,)
    assert dict(artifact.manifest.symbols) == {"T": (1, 4), "L": (1, 2)}
    assert artifact.manifest.options["quantize"] == {"method": "rtn", "group": 32}
    assert len(artifact.weight_files) == 2, "shards of 4096 bytes"
    load = artifact.weights(made.buffers)
    for weight, expected in tiny_ingot.weights().items():
        found = load(weight)
        assert found.flags.aligned and found.ctypes.data % 4 == 0
        assert torch.equal(torch.from_numpy(found).view(expected.dtype), expected)
    load("@embed.weight")[0, 0] = 7  # private memory
    assert torch.equal(
        torch.from_numpy(open_ingot(path).weights(made.buffers)("@embed.weight")).view(
            torch.bfloat16
        ),
        tiny_ingot.weights()["@embed.weight"],
    )


def test_equal_models_are_equal_bytes(tmp_path: Path) -> None:
    paths = [tiny_ingot.write(tmp_path / f"{i}.ingot") for i in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_zip_of_a_directory_is_an_ingot(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.ingot"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in place.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(place).as_posix())
    assert open_ingot(path).program == tiny_ingot.program()


def test_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of more than 4 GiB, which only the limit is too low for."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    path = tiny_ingot.write(tmp_path / "large.ingot")
    assert b"PK\x06\x06" in path.read_bytes()
    artifact = open_ingot(path)
    assert artifact.program == tiny_ingot.program()
    artifact.weights(tiny_ingot.program().buffers)
    locals_ = [m.header_offset for m in zipfile.ZipFile(path).infolist()]
    assert sorted(locals_) == locals_ and zipfile.ZipFile(path).testzip() is None


# ---- damaged directories


def manifest(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda place: edit(place, MANIFEST, change)


def plan(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda place: edit(place, name, change)


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header of the shard and keep its data."""

    def damage(place: Path) -> None:
        data = (place / SHARD).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        rewrite(place, SHARD, len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def replaced(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    """Other bytes in a file, which the manifest knows nothing of."""

    def damage(place: Path) -> None:
        data = (place / name).read_bytes()
        assert old in data
        (place / name).write_bytes(data.replace(old, new, 1))

    return damage


def flip_weight(place: Path) -> None:
    data = bytearray((place / SHARD).read_bytes())
    data[-1] ^= 1
    (place / SHARD).write_bytes(data)


def cut_shard(place: Path) -> None:
    rewrite(place, SHARD, (place / SHARD).read_bytes()[:-1])


def link(name: str) -> Callable[[Path], None]:
    """The file becomes a link to a copy of itself outside."""

    def damage(place: Path) -> None:
        outside = place.parent.parent / "outside"
        shutil.move(place / name, outside)
        (place / name).symlink_to(outside)

    return damage


def link_folder(place: Path) -> None:
    shutil.move(place / "plan", place.parent.parent / "outside")
    (place / "plan").symlink_to(place.parent.parent / "outside")


def fifo(place: Path) -> None:
    (place / "graphs" / "final.ir").unlink()
    os.mkfifo(place / "graphs" / "final.ir")


def huge_header(place: Path) -> None:
    rewrite(place, SHARD, (2**62).to_bytes(8, "little") + b"{}")


def move_kernel(place: Path) -> None:
    """The code of one kernel under the name of another."""
    first, second = sorted((place / "kernels").iterdir())
    rewrite(place, f"kernels/{first.name}", second.read_bytes())


def listed_extra(name: str, data: bytes = b"x") -> Callable[[Path], None]:
    return lambda place: rewrite(place, name, data)


def renamed(name: str) -> Callable[[Any], Any]:
    def change(m: Any) -> None:
        m["files"][name] = m["files"].pop("graphs/final.ir")

    return change


def a_launch(e: Any) -> Any:
    return e["launches"][0]


def code_of_amd(place: Path) -> None:
    digest = hashlib.sha256(tiny_ingot.GFX950).digest()
    edit(place, SHARED, lambda p: _point(p, b64encode(digest).decode()))
    name = hashlib.sha256(tiny_ingot.GFX950).hexdigest()
    old = hashlib.sha256(tiny_ingot.SM_90).hexdigest()
    (place / f"kernels/{old}.cubin").unlink()
    edit(place, MANIFEST, lambda m: m["files"].pop(f"kernels/{old}.cubin"))
    rewrite(place, f"kernels/{name}.cubin", tiny_ingot.GFX950)


def _point(shared: Any, sha256: str) -> None:
    next(iter(shared["kernels"].values()))["binary"] = sha256


def offsets(name: str, start: int, end: int) -> Callable[[Any], Any]:
    return lambda h: h[name].update(data_offsets=[start, end])


# The manifest of such an ingot as the first format had it.
VERSION_1 = (
    '{"format":"ingot","version":1,"made_with":"torch 2.13.0+cpu","target":"cuda:sm_90",'
    '"model_type":"tiny","dtype":"bf16","symbols":{"T":[1,32]},'
    '"entries":[{"name":"T=1,L=1","symbols":{"T":1,"L":1},"launches":2},'
    '{"name":"T=4,L=2","symbols":{"T":4,"L":2},"launches":2}],'
    '"meta":{"vocab_size":64,"page_size":4,"max_sequences":2,"max_tokens_per_sequence":32,'
    '"pages":16},"stop_tokens":[2],"generation":{},"files":{"graphs/final.ir":{"size":148,'
    '"sha256":"31cbd54e0e0138d5b618625b91dcb69fc2c4b63b451b772b6427e9df15e3e6df"}}}\n'
)
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing there": (shutil.rmtree, "expected an ingot, found No such file"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "expected manifest.json, found none"),
    "manifest cut short": (lambda p: (p / MANIFEST).write_bytes(b'{"for'), "expected JSON"),
    "another format": (manifest(lambda m: m.update(format="zip")), "found 'zip', version 4"),
    "another version": (manifest(lambda m: m.update(version=2)), "found 'ingot', version 2"),
    "version of another type": (manifest(lambda m: m.update(version=True)), "version True"),
    "version of a float": (manifest(lambda m: m.update(version=4.0)), "expected int, found float"),
    "version 1": (
        lambda p: (p / MANIFEST).write_text(VERSION_1),
        "expected format 'ingot', version 4, found 'ingot', version 1: export the model again",
    ),
    "manifest lacks a key": (manifest(lambda m: m.pop("meta")), "expected 'meta'"),
    "manifest has a key more": (manifest(lambda m: m.update(run="sh")), "unknown field run"),
    "manifest is a list": (
        lambda p: (p / MANIFEST).write_bytes(b"[]"),
        "expected object, found array",
    ),
    "no such target": (manifest(lambda m: m.update(target="tpu:v5")), "expected cpu, cuda"),
    "target of its kind": (
        manifest(lambda m: m.update(target="cuda:sm_70")),
        "found cuda:sm_7",
    ),
    "target of another GPU": (
        manifest(lambda m: m.update(target="hip:gfx950")),
        "expected the code",
    ),
    "cpu target": (manifest(lambda m: m.update(target="cpu")), "folded.ir"),
    "absolute name": (manifest(renamed("/etc/passwd")), "expected flat names"),
    "name that climbs": (manifest(renamed("../final.ir")), "expected flat names"),
    "name that climbs out of a folder": (manifest(renamed("graphs/../../x")), "flat names"),
    "dots alone": (manifest(renamed("graphs/..")), "expected flat names"),
    "hidden": (manifest(renamed("graphs/.x")), "expected flat names"),
    "name with a backslash": (manifest(renamed("graphs\\x")), "expected flat names"),
    "name with a null": (manifest(renamed("graphs/x\0")), "expected printable text, found"),
    "name in a folder of its own": (manifest(renamed("bin/x")), "expected flat names"),
    "manifest lists itself": (manifest(renamed(MANIFEST)), "expected flat names"),
    "negative size": (
        manifest(lambda m: m["files"]["graphs/final.ir"].update(size=-1)),
        "graphs/final.ir: size: expected int >= 0, found -1",
    ),
    "size of a float": (
        manifest(lambda m: m["files"]["graphs/final.ir"].update(size=1e3)),
        "size: expected int, found float",
    ),
    "no hash": (
        manifest(lambda m: m["files"]["graphs/final.ir"].update(sha256="x")),
        "sha256: expected str matching regex",
    ),
    "missing file": (lambda p: (p / SHARD).unlink(), f"{SHARD}: expected this file"),
    "extra file": (lambda p: (p / "graphs/a.ir").write_text(""), "only what manifest.json lists"),
    "extra file of Python": (lambda p: (p / "run.py").write_text(""), "run.py: expected only"),
    "extra folder": (lambda p: (p / "bin").mkdir(), "bin: expected a regular file"),
    "hidden file": (lambda p: (p / ".git").write_text(""), "expected flat names"),
    "listed file of Python": (listed_extra("plan/run.py"), "found plan/run.py too"),
    "listed file beside weights": (listed_extra("weights/x.bin"), "safetensors files in weights/"),
    "weights elsewhere": (listed_extra("graphs/x.safetensors"), "safetensors files in weights/"),
    "kernel that nothing uses": (listed_extra(f"kernels/{'0' * 64}.cubin"), "0.cubin too"),
    "pickle of a tokenizer": (listed_extra("tokenizer/tokenizer.pkl"), "tokenizer.pkl too"),
    "size changed": (lambda p: (p / ENTRY).write_bytes(b"{}"), "bytes, found 2"),
    "content changed": (replaced("graphs/final.ir", b"embedding", b"embedd1ng"), "expected sha256"),
    "weight changed": (flip_weight, f"{SHARD}: expected sha256"),
    "kernel under another's name": (move_kernel, "expected the code of that sha256, found none"),
    "link": (link(ENTRY), "expected a regular file"),
    "linked manifest": (link(MANIFEST), "expected a regular file"),
    "linked weights": (link(SHARD), "expected a regular file"),
    "linked folder": (link_folder, "plan: expected a folder"),
    "fifo": (fifo, "expected a regular file"),
    "graph of no text": (lambda p: rewrite(p, "graphs/final.ir", b"\xff"), "expected UTF-8"),
    "plan of no JSON": (lambda p: rewrite(p, ENTRY, b"\x80"), "expected JSON"),
    "plan without an entry": (
        lambda p: [(p / ENTRY).unlink(), edit(p, MANIFEST, lambda m: m["files"].pop(ENTRY))],
        f"{ENTRY}: expected this file",
    ),
    "entries that differ": (
        manifest(lambda m: m["entries"][0].update(launches=3)),
        "as the plan, found",
    ),
    "meta that differs": (manifest(lambda m: m["meta"].update(pages=15)), "found another"),
    "meta without bounds": (
        manifest(lambda m: m["meta"].update(pages=2**40)),
        "pages: expected int <= 16777216, found 1099511627776",
    ),
    "page table without bounds": (
        manifest(
            lambda m: m["meta"].update(
                page_size=1, max_sequences=2**16, max_tokens_per_sequence=2**28
            )
        ),
        "page table: expected at most 67108864 pages",
    ),
    "stop token outside": (manifest(lambda m: m.update(stop_tokens=[64])), "from 0 to 63"),
    "no serving program": (
        plan(ENTRY, lambda e: e["buffers"][0].__setitem__(0, "tok")),
        "kernel gather_kernel, argument 0: expected a buffer",
    ),
    "inputs of another form": (
        plan(ENTRY, lambda e: e["buffers"].append(["more", "i32", [1], "input", 4, 0])),
        "expected inputs",
    ),
    "code for another GPU": (code_of_amd, "expected code for cuda:sm_90, found hip:gfx950"),
    "code outside": (
        plan(SHARED, lambda p: _point(p, "../" * 20)),
        "kernels[...].binary: invalid base64 encoded string",
    ),
    "a hash cut short": (plan(SHARED, lambda p: _point(p, "aaaa")), "of 32 bytes, found 3"),
    "entries of another function": (
        manifest(lambda m: m["entries"][0].update(function="draft")),
        "functions: expected 'draft', found none of that name",
    ),
    "slice outside": (
        plan(ENTRY, lambda e: a_launch(e)["args"][0].__setitem__(3, 8)),
        "expected bytes within the 4 bytes of tokens",
    ),
    "slice that overflows": (
        plan(ENTRY, lambda e: a_launch(e)["args"][0].__setitem__(3, 2**63)),
        "launches[0].args[0][3]: expected int <= 281474976710656, found 9223372036854775808",
    ),
    "grid": (plan(ENTRY, lambda e: a_launch(e).update(grid=[1, 1 << 16, 1])), "grid y"),
    "cycle": (plan(ENTRY, lambda e: e.update(dependencies=[[0, 1], [1, 0]])), "found [1, 0]"),
    "argument of another kind": (
        plan(ENTRY, lambda e: a_launch(e)["args"].__setitem__(3, {"run": 1})),
        "launches[0].args[3]: expected int | float | array, found object",
    ),
    "text with a control character": (
        plan(ENTRY, lambda e: a_launch(e).update(label="\x1b[2J")),
        "expected printable text",
    ),
    "weight that the plan lacks": (
        tensors(lambda h: h.update(more=h.pop("@codes"))),
        "weights: expected '@codes', found no such tensor",
    ),
    "weight of another dtype": (
        tensors(lambda h: h["@folded.0"].update(dtype="I32")),
        "expected f32[32], found i32[32]",
    ),
    "weight of another shape": (
        tensors(lambda h: h["@folded.0"].update(shape=[4, 8])),
        "expected f32[32], found f32[4, 8]",
    ),
    "dtype of no such name": (tensors(lambda h: h["@codes"].update(dtype="O8")), "found 'O8'"),
    "shape that overflows": (
        tensors(lambda h: h["@codes"].update(shape=[2**40, 2**40])),
        "found 256",
    ),
    "tensor before the data": (
        tensors(offsets("@codes", -4, 252)),
        "data_offsets[0]: expected int >= 0, found -4",
    ),
    "tensor beyond the data": (
        tensors(offsets("@codes", 2**40, 2**40 + 256)),
        "expected it at byte",
    ),
    "tensors that overlap": (tensors(offsets("@codes", 0, 256)), "expected it at byte"),
    "tensors with a hole": (tensors(lambda h: h.pop("@embed.weight")), "expected it at byte"),
    "data left over": (tensors(lambda h: h.pop("@codes")), "bytes of tensors, found"),
    "data cut short": (cut_shard, "bytes of tensors, found"),
    "header without end": (huge_header, "expected a header of at most"),
    "shard of nothing": (lambda p: rewrite(p, SHARD, b""), "expected a safetensors file, found 0"),
    "metadata of another kind": (
        tensors(lambda h: h.update(__metadata__={"format": ["pt"]})),
        "__metadata__: [...]: expected str, found array",
    ),
}


def use(path: Path) -> None:
    """Everything that loading does before a device is asked."""
    artifact = open_ingot(path)
    artifact.weights(tiny_ingot.program().buffers)


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_refused(case: str, place: Path, tmp_path: Path) -> None:
    damage, expected = DAMAGES[case]
    use(place)
    damage(place)
    before = listing(tmp_path)
    with pytest.raises(IngotError) as caught:
        use(place)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert str(place) in str(caught.value), "the error names the ingot"
    assert listing(tmp_path) == before


def listing(path: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.lstat().st_mtime_ns) for p in path.rglob("*"))


# ---- zips


def members(place: Path) -> dict[str, bytes]:
    files = [p for p in place.rglob("*") if p.is_file()]
    return {p.relative_to(place).as_posix(): p.read_bytes() for p in sorted(files)}


def zipped(
    path: Path, files: Mapping[str, bytes] | list[tuple[str, bytes]], **options: Any
) -> None:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in files.items() if isinstance(files, Mapping) else files:
            archive.writestr(zipfile.ZipInfo(name), data, options.get("compression"))


def twice(path: Path, files: dict[str, bytes]) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        zipped(path, [*files.items(), ("graphs/final.ir", b"other")])


def patched(old: bytes, new: bytes, last: bool = False) -> Callable[[Path, Any], None]:
    """Other bytes at the first or last place where `old` stands."""

    def damage(path: Path, files: Any) -> None:
        zipped(path, files)
        data = path.read_bytes()
        at = data.rindex(old) if last else data.index(old)
        path.write_bytes(data[:at] + new + data[at + len(old) :])

    return damage


def field(offset: int, form: str, value: int, record: bytes) -> Callable[[Path, Any], None]:
    """Another number in the last record of a kind."""

    def damage(path: Path, files: Any) -> None:
        zipped(path, files)
        data = bytearray(path.read_bytes())
        struct.pack_into(form, data, data.rindex(record) + offset, value)
        path.write_bytes(data)

    return damage


def appended(data: bytes) -> Callable[[Path, Any], None]:
    def damage(path: Path, files: Any) -> None:
        zipped(path, files)
        path.write_bytes(path.read_bytes() + data)

    return damage


def prefixed(path: Path, files: Any) -> None:
    zipped(path, files)
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())


def lying_zip64(path: Path, files: Any) -> None:
    """A zip64 end record that tells of another directory than the plain one."""
    zipped(path, files)
    data = path.read_bytes()
    at = len(data) - 22
    count, size, start = struct.unpack_from("<HII", data, at + 10)
    end = struct.pack(
        "<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count - 1, count - 1, size, start
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, at, 1)
    path.write_bytes(data[:at] + end + locator + data[at:])


def commented(path: Path, files: Any) -> None:
    zipped(path, files)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"x"


def with_name(name: str) -> Callable[[Path, Any], None]:
    return lambda path, files: zipped(path, {**files, name: b"x"})


def folder(path: Path, files: Any) -> None:
    zipped(path, {"graphs/": b"", **files})


CENTRAL, END, LOCAL = b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04"
ZIPS: dict[str, tuple[Callable[[Path, dict[str, bytes]], Any], str]] = {
    "nothing": (lambda p, f: p.write_bytes(b""), "found an empty file"),
    "no zip": (lambda p, f: p.write_bytes(b"GGUF" * 99), "expected a zip without a comment"),
    "cut short": (lambda p, f: [zipped(p, f), os.truncate(p, 9000)], "cut short, perhaps"),
    "compressed": (
        lambda p, f: zipped(p, f, compression=zipfile.ZIP_DEFLATED),
        "expected a stored entry, found method 8",
    ),
    "a name twice": (twice, "expected it once in the zip, found it twice"),
    "a name that climbs": (with_name("../evil"), "expected flat names"),
    "a name that climbs from a folder": (with_name("graphs/../../evil"), "expected flat names"),
    "an absolute name": (with_name("/etc/evil"), "expected flat names"),
    "a name beyond ASCII": (with_name("graphs/é"), "expected names of printable ASCII"),
    "a name of two lines": (with_name("graphs/a\nb"), "expected names of printable ASCII"),
    "a folder": (folder, "expected flat names"),
    "an extra file": (with_name("graphs/x.ir"), "only what manifest.json lists"),
    "a manifest less": (lambda p, f: zipped(p, {"graphs/final.ir": b""}), "expected manifest.json"),
    "bytes before": (prefixed, "expected its directory to end at"),
    "bytes behind": (appended(b"\0" * 30), "expected a zip without a comment"),
    "a comment": (
        commented,
        "expected a zip without a comment",
    ),
    "a lie about the count": (
        field(8, "<I", 0, END),
        "expected its directory at byte 0, found it at",
    ),
    "a lie about the directory": (field(16, "<I", 7, END), "expected its directory to end"),
    "a lie about the place": (field(42, "<I", 0, CENTRAL), "expected it at byte"),
    "a lie about the size": (field(24, "<I", 1 << 30, CENTRAL), "expected a stored entry"),
    "sizes that need zip64": (
        field(20, "<Q", 2**64 - 1, CENTRAL),
        "expected a zip64 field for its sizes",
    ),
    "a header of another name": (patched(b"graphs/", b"grapes/"), "its header at"),
    "a header that is none": (patched(LOCAL, b"PK\x03\x05", last=True), "its header at"),
    "a header of another size": (field(22, "<I", 1, LOCAL), "expected a stored entry"),
    "encryption": (field(8, "<H", 1, CENTRAL), "expected no flags, found 0x1"),
    "streaming": (field(6, "<H", 8, LOCAL), "expected no flags, found 0x8"),
    "volumes": (field(4, "<H", 1, END), "expected one volume"),
    "zip64 that lies": (lying_zip64, "expected two end records that agree"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_zip_is_refused(case: str, sound: Path, tmp_path: Path) -> None:
    damage, expected = ZIPS[case]
    path = tmp_path / "tiny.ingot"
    damage(path, members(sound))
    with pytest.raises(IngotError) as caught:
        use(path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.ingot"]


def test_neither_file_nor_directory(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(IngotError, match="expected a directory or a file, found neither"):
        open_ingot(tmp_path / "fifo")


# ---- fuzz: whatever stands there, the answer is an ingot or an IngotError


def refusal(read: Callable[[], Any]) -> str:
    """What the IngotError says, if one comes; any other is the test's failure."""
    try:
        read()
    except IngotError as error:
        return str(error)
    return ""


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**48, 2**63, 2**64, 10**30])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["tokens", "@codes", "input", "bf16", "*f32", "../x", "gather", "0" * 64]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    return found + [
        p for _, key in found if isinstance(value[key], dict | list) for p in places(value[key])
    ]


@settings(max_examples=150)
@given(data=st.data(), name=st.sampled_from([MANIFEST, SHARED, ENTRY]))
def test_fuzzed_json_is_an_ingot_or_an_error(sound: Path, data: st.DataObject, name: str) -> None:
    value = json.loads((sound / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(value)))
        action = data.draw(st.sampled_from(["set", "delete", "copy", "swap"]))
        if action == "delete":
            del container[key]
        elif action == "copy":
            other, place = data.draw(st.sampled_from(places(value)))
            container[key] = copy.deepcopy(other[place])
        elif action == "swap":
            text = str(container[key])
            container[key] = data.draw(st.sampled_from([text, [container[key]], {"x": 1}]))
        else:
            container[key] = data.draw(values)
        if not places(value):
            break
    place = sound.parent / "fuzzed"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound, place)
    rewrite(place, name, json.dumps(value).encode(), name != MANIFEST)
    assert "\n" not in refusal(lambda: use(place))


@settings(max_examples=200)
@given(
    edits=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4),
    tail=st.booleans(),
)
def test_fuzzed_zip_is_an_ingot_or_an_error(
    sound: Path, edits: list[tuple[int, int]], tail: bool
) -> None:
    path = sound.parent / "fuzzed.ingot"
    if not (good := sound.parent / "good.ingot").exists():
        zipped(good, members(sound))
    data = bytearray(good.read_bytes())
    span = 1500 if tail else len(data)
    for at, value in edits:
        data[len(data) - 1 - at % span] = value
    path.write_bytes(data)
    assert "\n" not in refusal(lambda: use(path))


@given(st.binary(max_size=64) | st.builds(lambda b: len(b).to_bytes(8, "little") + b, st.binary()))
def test_fuzzed_safetensors(data: bytes) -> None:
    assert "\n" not in refusal(lambda: read_tensors(memoryview(data), "x"))


described = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4", "U16", "X"]),
        "shape": st.lists(st.integers(-1, 3), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 24), min_size=2, max_size=2),
    },
    optional={"more": st.just(1)},
)


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from("abc"), described, max_size=3), st.integers(0, 24))
def test_what_the_library_refuses_is_refused(header: dict[str, Any], size: int) -> None:
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(size)
    try:
        known = {name: (t["dtype"], t["shape"]) for name, t in deserialize(data)}
    except SafetensorError:
        assert refusal(lambda: read_tensors(memoryview(data), "x"))
        return
    if not refusal(lambda: read_tensors(memoryview(data), "x")):
        found = read_tensors(memoryview(data), "x")
        stored = {n: (DTYPES[t.dtype].safetensors, [*t.shape]) for n, t in found.items()}
        assert stored == known


def test_safetensors_of_the_library(tmp_path: Path) -> None:
    held: dict[str, Any] = {
        "a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.array(3, np.int64),
        "c": np.zeros((0, 4), np.float32),
        "d": np.array([True, False]),
    }
    found = read_tensors(memoryview(bytearray(save(held, {"k": "v"}))), "x")
    assert found.keys() == held.keys()
    for name, array in held.items():
        np.testing.assert_array_equal(found[name].array(), array)


EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
TWICE = "x: expected every key once, found one of an object twice"
HEADERS: dict[str, tuple[Callable[[], str], str]] = {
    "tensors": (
        lambda: ",".join(f'"{i}":{EMPTY}' for i in range(1 << 18 | 1)),
        "x: expected at most 262144 tensors, found more",
    ),
    "metadata": (
        lambda: '"__metadata__":{' + ",".join(f'"{i}":"1"' for i in range(3 << 20)) + "}",
        "x: expected at most 2097152 keys of JSON, found more",
    ),
    "numbers": (
        lambda: ",".join(f'"{i}":1' for i in range(3 << 20)),
        "x: expected at most 2097152 keys of JSON, found more",
    ),
    "sizes": (
        lambda: f'"a":{EMPTY.replace("[0],", "[" + "0," * (40 << 20) + "0],")}',
        "x: 'a': expected at most 8388608 values of JSON, found more",
    ),
    "depth": (
        lambda: '"a":' + "[" * (90 << 20),
        "x: expected an object of JSON, found none: maximum recursion depth exceeded",
    ),
    "a name twice": (lambda: f'"a":{EMPTY},"a":{EMPTY}', TWICE),
    "a field twice": (
        lambda: f'"a":{EMPTY.replace("{", "{" + chr(34) + "shape" + chr(34) + ":[1],")}',
        TWICE,
    ),
    "metadata of numbers": (
        lambda: '"__metadata__":{"a":1}',
        "x: __metadata__: [...]: expected str, found int",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_read_in_seconds(case: str) -> None:
    make, words = HEADERS[case]
    text = f"{{{make()}}}".encode()
    data = memoryview(len(text).to_bytes(8, "little") + text)
    start = time.process_time()
    assert refusal(lambda: read_tensors(data, "x")).startswith(words)
    assert time.process_time() - start < 10  # 30 and more in Python's objects


def test_words_of_the_format_are_names_and_metadata_too() -> None:
    held = {name: np.zeros(2, np.uint8) for name in ("dtype", "shape", 'a"dtype"', "a:b")}
    data = save(held, {"dtype": "shape", "data_offsets": '"dtype"', "k": "dtype"})
    assert read_tensors(memoryview(bytearray(data)), "x").keys() == held.keys()


# ---- writing


def test_the_writer_keeps_its_word(tmp_path: Path) -> None:
    with IngotWriter(tmp_path / "x") as out:
        for name in ("../x", "a/b", MANIFEST, ""):
            with pytest.raises(ValueError, match="no name for another file"):
                out.add(name, b"")
        out.add("graphs/a.ir", b"")
        with pytest.raises(ValueError, match="no name for another file"):
            out.add("graphs/a.ir", b"")
        with (
            pytest.raises(ValueError, match="expected 2 bytes, wrote 3"),
            out.file("plan/b", 2) as w,
        ):
            w(b"abc")
    assert list(tmp_path.iterdir()) == [], "left without finish: nothing stays"


def test_file_names() -> None:
    for name in ("manifest.json", "graphs/final.ir", "kernels/" + "a" * 64 + ".cubin"):
        assert manifests.is_file_name(name)
    for name in ("", "/", "graphs/", "graphs/a/b", "a\n", "graphs/a\n", "x" * 129, "weights/é"):
        assert not manifests.is_file_name(name)


# ---- what is read, and how much of it


def test_files_that_nothing_asks_for_are_not_read(place: Path) -> None:
    for name in ("kernels/0.cubin", "plan/other.json", "extra.json"):
        rewrite(place, name, b"x" * 100)
    read: list[str] = []
    with patch.object(files._Directory, "read", _spied(read)), pytest.raises(IngotError):
        open_ingot(place)
    assert SHARED in read and not {"kernels/0.cubin", "plan/other.json", "extra.json"} & {*read}


def test_nothing_is_read_where_the_target_has_other_files(place: Path) -> None:
    edit(place, MANIFEST, lambda m: m.update(target="cpu"))
    read: list[str] = []
    with (
        patch.object(files._Directory, "read", _spied(read)),
        pytest.raises(IngotError, match="folded"),
    ):
        open_ingot(place)
    assert read == [MANIFEST]


def _spied(read: list[str]) -> Any:
    original = files._Directory.read

    def spy(self: Any, name: str) -> bytes:
        read.append(name)
        return original(self, name)

    return spy


@pytest.mark.parametrize(
    ("names", "size", "what"),
    [
        (("graphs/final.ir",), 1 << 26, "graphs/final.ir: expected at most"),
        ([f"plan/entry-{i}.json" for i in range(9, 19)], 1 << 24, "plan: expected at most"),
        ([f"kernels/{i}.cubin" for i in range(40)], 1 << 25, "all files but weights: expected"),
    ],
)
def test_sums_of_sizes_are_bounded(place: Path, names: list[str], size: int, what: str) -> None:
    for name in names:
        rewrite(place, name, b"")
        os.truncate(place / name, size)  # sparse: a large file costs its author nothing
        edit(place, MANIFEST, lambda m, n=name: m["files"][n].update(size=size))
    start = time.process_time()
    with pytest.raises(IngotError, match=what) as caught:
        open_ingot(place)
    assert "\n" not in str(caught.value) and time.process_time() - start < 1
