"""`ingot doctor`: versions, devices and supported targets of this machine."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.table import Table

from ....compiler.target import TARGETS
from ...drivers import present_target
from ..output import Shown, table

_REQUIRED = (
    "torch",
    "triton",
    "filelock",
    "msgspec",
    "networkx",
    "sympy",
    "numpy",
    "safetensors",
    "tokenizers",
    "typer",
    "rich",
    "jinja2",
)
_OPTIONAL = {
    "transformers": "Hugging Face directories: pip install 'ingot[hf]'",
}


@dataclass(frozen=True)
class Device:
    """A device, and the library that reports it. `target` is "" for an unsupported device."""

    name: str
    seen_by: str
    target: str = ""


@dataclass(frozen=True)
class TargetState:
    """Whether this version builds and runs programs for a target, and why not."""

    name: str
    title: str
    builds: bool
    runs: bool
    note: str


@dataclass(frozen=True)
class Diagnosis:
    """`versions` has None for a package that is not installed; `extras` says what each is for."""

    python: str
    platform: str
    ingot: str
    versions: dict[str, str | None]
    extras: dict[str, str]
    devices: tuple[Device, ...]
    targets: tuple[TargetState, ...]
    graphviz: bool


def command() -> Shown:
    """Say what this machine has, and what Ingot can do on it."""
    found = diagnose()
    return Shown(lambda: asdict(found), _tables(found))


def diagnose() -> Diagnosis:
    """Inspect this process and machine; nothing is allocated on any device."""
    names = (*_REQUIRED, *_OPTIONAL)
    return Diagnosis(
        python=sys.version.split()[0],
        platform=f"{platform.system()} {platform.machine()}",
        ingot=_version("ingot") or "not installed",
        versions={name: _version(name) for name in names},
        extras=dict(_OPTIONAL),
        devices=(_cpu(), *(tuple(_through_torch()) or tuple(_through_drivers()))),
        targets=tuple(_targets()),
        graphviz=shutil.which("dot") is not None,
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> Device:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    threads = torch.get_num_threads()
    return Device(f"{os.cpu_count()} cores, {memory:.0f} GiB, {threads} threads", "system", "cpu")


def _through_torch() -> Iterator[Device]:
    import torch

    if not torch.cuda.is_available():
        return
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        if torch.version.hip:
            target = "hip:" + facts.gcnArchName.split(":")[0]
        else:
            target = f"cuda:sm_{facts.major}{facts.minor}"
        known = target if target in TARGETS else ""
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        yield Device(f"{facts.name}, {memory} ({target})", "torch", known)


def _through_drivers() -> Iterator[Device]:
    """GPUs that this build of torch does not see, from their drivers."""
    drivers = (
        ("libcuda.so.1", "cuInit", "cuDeviceGetCount", "cuDeviceGetName"),
        ("libamdhip64.so", "hipInit", "hipGetDeviceCount", "hipDeviceGetName"),
    )
    for file, init, count, name in drivers:
        try:
            library = ctypes.CDLL(file)
        except OSError:
            continue
        found = ctypes.c_int(0)
        if library[init](0) or library[count](ctypes.byref(found)):
            yield Device(f"no usable GPU: {init} or {count} failed", file)
            continue
        for i in range(found.value):
            title = ctypes.create_string_buffer(256)
            failed = library[name](title, 256, i)
            text = "unnamed GPU" if failed else title.value.decode(errors="replace")
            yield Device(f"{text}; not seen by this build of torch", file)


def _targets() -> Iterator[TargetState]:
    here, triton = present_target(), _version("triton")
    for target in TARGETS.values():
        if not target.is_gpu:
            yield TargetState(target.name, target.title, True, True, "through the references")
            continue
        built = "kernels by triton" if triton else "kernels need triton"
        found = "a device is here" if target.name == here else "no such device here"
        runs = target.name == here and triton is not None
        yield TargetState(target.name, target.title, triton is not None, runs, f"{built}; {found}")


def _tables(found: Diagnosis) -> list[Table]:
    packages = [["python", found.python, ""], ["ingot", found.ingot, ""]]
    for name, version in found.versions.items():
        extra = found.extras.get(name)
        missing = "for " + extra if extra else "required: pip install ingot"
        packages.append([name, version or "not installed", "" if version else missing])
    packages.append(["graphviz", "found" if found.graphviz else "not found", "for inspect --svg"])
    devices = [[d.name, d.seen_by, d.target] for d in found.devices]
    targets = [[t.name, t.title, _yes(t.builds), _yes(t.runs), t.note] for t in found.targets]
    return [
        table(f"Software on {found.platform}", ["package", "version", ""], packages),
        table("Devices", ["device", "seen by", "target"], devices),
        table("Targets of this version", ["target", "devices", "builds", "runs", ""], targets),
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "no"
