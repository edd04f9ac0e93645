"""`ingot doctor`: versions, devices and supported targets of this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from rich.table import Table

from ....compiler.target import TARGETS
from ....runtime.devices.cuda import CudaDriver
from ....runtime.devices.device_api import DeviceError, DriverMissingError
from ....runtime.devices.hip import HipDriver
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
    "matplotlib": "the plots of ingot bench: pip install 'ingot[bench]'",
}


def command() -> Shown:
    """Say what this machine has, and what Ingot can do on it."""
    data = {
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "ingot": _version("ingot") or "not installed",
        "versions": {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)},
        "extras": _OPTIONAL,
        "devices": [_cpu(), *_gpus()],
        "targets": list(_targets()),
        "graphviz": shutil.which("dot") is not None,
    }
    return Shown(lambda: data, _tables(data))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, str]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = f"{os.cpu_count()} cores, {memory:.0f} GiB, {torch.get_num_threads()} threads"
    return {"name": name, "seen_by": "system", "target": "cpu"}


def _gpus() -> Iterator[dict[str, str]]:
    """Every GPU, or why its driver finds none; `target` is "" for one that is not supported."""
    for driver in (CudaDriver, HipDriver):
        seen_by = driver.api.libraries[0]
        for ordinal in count():
            try:
                info = driver(ordinal).info
            except DriverMissingError:
                break
            except DeviceError as error:
                if ordinal == 0:
                    yield {"name": f"no usable GPU: {error}", "seen_by": seen_by, "target": ""}
                break
            name = f"{info.name}, {info.memory_bytes / 2**30:.0f} GiB ({info.target})"
            target = info.target if info.target in TARGETS else ""
            yield {"name": name, "seen_by": seen_by, "target": target}


def _targets() -> Iterator[dict[str, Any]]:
    """Whether this version builds and runs programs for each target, and why not."""
    here, triton = present_target(), _version("triton") is not None
    for target in TARGETS.values():
        builds = runs = True
        note = "through the references"
        if target.is_gpu:
            present = target.name == here
            builds, runs = triton, triton and present
            note = "kernels by triton; " if triton else "kernels need triton; "
            note += "a device is here" if present else "no such device here"
        row = {"name": target.name, "title": target.title}
        yield {**row, "builds": builds, "runs": runs, "note": note}


def _tables(data: Mapping[str, Any]) -> list[Table]:
    packages = [["python", data["python"], ""], ["ingot", data["ingot"], ""]]
    for name, version in data["versions"].items():
        extra = _OPTIONAL.get(name)
        missing = "for " + extra if extra else "required: pip install ingot"
        packages.append([name, version or "not installed", "" if version else missing])
    graphviz = "found" if data["graphviz"] else "not found"
    packages.append(["graphviz", graphviz, "for inspect --svg"])
    devices = [[*device.values()] for device in data["devices"]]
    targets = [
        ["yes" if cell is True else "no" if cell is False else cell for cell in target.values()]
        for target in data["targets"]
    ]
    return [
        table(f"Software on {data['platform']}", ["package", "version", ""], packages),
        table("Devices", ["device", "seen by", "target"], devices),
        table("Targets of this version", ["target", "devices", "builds", "runs", ""], targets),
    ]
