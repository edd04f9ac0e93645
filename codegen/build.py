"""Kernels built for any target on any machine: Triton to cubin or hsaco, in parallel, cached.

The cache is a folder of the user's: two files a kernel, named by its content hash, written whole or
not at all. Many processes may share it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from ..compiler.target import Target
from ..runtime.program import Kernel
from .kernel_source import KernelSource


class BuildError(Exception):
    """Triton cannot build a kernel, or what it built breaks a limit of the target."""


@dataclass(frozen=True)
class Built:
    """Device code and what is known of it."""

    binary: bytes
    facts: Mapping[str, Any]


def build(
    sources: Sequence[KernelSource],
    target: Target,
    progress: Callable[[int, int], None] | None = None,
    cache: Path | None = None,
    workers: int | None = None,
) -> dict[KernelSource, Kernel]:
    """The kernel of every source, from the cache or built now.

    `progress` hears how many of how many are done. `workers` threads build (default: as many as
    there are cores); `cache` is the folder, by default in the user's cache directory. BuildError
    names the kernel.
    """
    folder = cache or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(dict.fromkeys(sources))
    kernels: dict[KernelSource, Kernel] = {}
    missing: list[KernelSource] = []
    for source in wanted:
        cached = _read(folder, source.hash(target.name), target)
        if cached is None:
            missing.append(source)
        else:
            kernels[source] = _kernel(source, target, cached)

    def make(source: KernelSource) -> Built:
        built = build_one(source, target)
        _write(folder, source.hash(target.name), target, built)
        return built

    # Triton and the assemblers hold no lock while they work: threads are as good as processes,
    # which would have to start the caller's program anew.
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        jobs = {pool.submit(make, source): source for source in missing}
        try:
            for job in as_completed(jobs):
                kernels[jobs[job]] = _kernel(jobs[job], target, job.result())
                if progress:
                    progress(len(kernels), len(wanted))
        finally:
            for job in jobs:
                job.cancel()
    return kernels


def cache_folder() -> Path:
    """Where built kernels are kept: below XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ingot" / "kernels"


def compiled(source: KernelSource, target: Target) -> Any:
    """What triton.compile makes of `source` for `target`; BuildError where it fails."""
    backend, arch = target.name.split(":")
    gpu = GPUTarget(backend, int(arch[3:]) if backend == "cuda" else arch, target.warp)
    options: dict[str, Any] = {
        "num_warps": source.num_warps,
        "num_stages": source.num_stages,
        # Triton's default changes with its version; what is computed must not.
        "enable_fp_fusion": True,
    }
    if source.programmatic:
        options["launch_pdl"] = True
    name = source.function.__name__
    try:
        return triton.compile(source.ast_source(), target=gpu, options=options)
    except Exception as error:  # Triton raises whatever its passes raise
        raise BuildError(f"kernel {name} for {target.name}: {error}") from error


def build_one(source: KernelSource, target: Target) -> Built:
    """Device code for `target`; BuildError where Triton fails or a limit is passed."""
    made = compiled(source, target)
    backend = target.name.split(":")[0]
    text = made.asm["ptx" if backend == "cuda" else "amdgcn"]
    binary = made.asm["cubin" if backend == "cuda" else "hsaco"]
    facts = {
        "name": made.metadata.name,
        "shared": made.metadata.shared,
        **_assembly_facts(text, backend),
        **_resources(binary, text, backend),
    }
    _check(source.function.__name__, target, made.metadata, facts)
    return Built(binary, facts)


def _check(name: str, target: Target, metadata: Any, facts: Mapping[str, Any]) -> None:
    if metadata.shared > target.shared_bytes:
        raise BuildError(
            f"kernel {name} for {target.name}: expected at most {target.shared_bytes} bytes of "
            f"shared memory, found {metadata.shared}"
        )
    for kind in ("global_scratch_size", "profile_scratch_size"):
        if size := getattr(metadata, kind, 0):
            raise BuildError(f"kernel {name} for {target.name}: found {kind} {size}, expected 0")
    # A failed allocation in inline assembly leaves a message in the text, not an error.
    if facts.get("broken"):
        raise BuildError(f"kernel {name} for {target.name}: the assembler left an error behind")


# Matrix instructions and conversions by the names that they have in PTX and in AMD's assembly.
_COUNTED = {
    "cuda": {
        "wgmma": r"\bwgmma\.mma_async",
        "mma": r"\bmma\.sync",
        "tcgen05": r"\btcgen05\.mma",
    },
    "hip": {
        "mfma": r"\bv_mfma_",
        "scaled_conversions": r"\bv_cvt_scalef32_",
    },
}


def _assembly_facts(text: str, backend: str) -> dict[str, Any]:
    counts = {k: len(re.findall(p, text)) for k, p in _COUNTED[backend].items()}
    facts: dict[str, Any] = {k: n for k, n in counts.items() if n}
    if "could not allocate output register" in text:
        facts["broken"] = True
    return facts


def _resources(binary: bytes, text: str, backend: str) -> dict[str, int]:
    """Registers a thread, and what is spilled: bytes of stack (cuda), registers (hip)."""
    if backend == "hip":
        found = {
            "registers": r"\.vgpr_count:\s+(\d+)",
            "spills": r"\.vgpr_spill_count:\s+(\d+)",
            "scalar_spills": r"\.sgpr_spill_count:\s+(\d+)",
        }
        shown = text
    else:
        found = {"registers": r"\bREG:(\d+)", "spills": r"\bSTACK:(\d+)"}
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            tool = knobs.nvidia.cuobjdump.path
            command = [tool, "-res-usage", file.name]
            shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {k: int(m[1]) for k, p in found.items() if (m := re.search(p, shown))}


def _kernel(source: KernelSource, target: Target, built: Built) -> Kernel:
    facts = dict(built.facts)
    symbol, shared = facts.pop("name"), facts.pop("shared")
    return Kernel(
        source.hash(target.name),
        symbol,
        built.binary,
        source.num_warps,
        shared,
        tuple(a for _, a in source.parameters),
        source.programmatic,
        facts,
    )


def _suffix(target: Target) -> str:
    return "cubin" if target.name.startswith("cuda") else "hsaco"


def _read(folder: Path, key: str, target: Target) -> Built | None:
    """What the cache holds under `key`; None where it holds nothing whole."""
    try:
        held = json.loads((folder / f"{key}.json").read_text())
        binary = (folder / f"{key}.{_suffix(target)}").read_bytes()
    except (FileNotFoundError, ValueError):
        return None
    digest = hashlib.sha256(binary).hexdigest()
    whole = isinstance(held, dict) and held.get("sha256") == digest and "facts" in held
    return Built(binary, held["facts"]) if whole else None


def _write(folder: Path, key: str, target: Target, built: Built) -> None:
    """The binary first: who finds the facts finds both. A rename is whole or is not."""
    held = {"sha256": hashlib.sha256(built.binary).hexdigest(), "facts": dict(built.facts)}
    facts = json.dumps(held, sort_keys=True).encode()
    for suffix, content in ((_suffix(target), built.binary), ("json", facts)):
        handle, name = tempfile.mkstemp(dir=folder, prefix=".new-")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, folder / f"{key}.{suffix}")
