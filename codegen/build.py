"""Kernels built for any target on any machine: Triton to cubin or hsaco, in parallel, cached.

The cache is a folder of the user's: two files a kernel, named by its content hash, which stands in
them too, written whole or not at all. Many processes may share it: what one is building the others
wait for, so that nothing is built twice. It only grows, by some 30 KB a kernel, and may be deleted
whenever nothing is being built: what is missing is built again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import triton
from filelock import FileLock, Timeout
from triton import knobs
from triton.backends.compiler import GPUTarget

from ..compiler.target import Target
from ..runtime.program import Kernel
from .kernel_source import KernelSource

# Of a file system that has no locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
# No kernel takes as long to build: who holds a lock for so long is stuck, and not waited for.
_PATIENCE_SECONDS = 600.0


class BuildError(Exception):
    """A kernel cannot be built or kept, or what was built breaks a limit of the target."""


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

    `progress` hears how many of how many are done: first those that the cache held, then each that
    is built. `workers` threads build (default: as many as
    there are cores); `cache` is the folder, by default in the user's cache directory. BuildError
    names the kernel, or the folder where nothing can be written.
    """
    folder = cache or cache_folder()
    wanted = list(dict.fromkeys(sources))
    kernels: dict[KernelSource, Kernel] = {}
    missing: list[KernelSource] = []
    for source in wanted:
        cached = _read(folder, source.hash(target.name), target)
        if cached is None:
            missing.append(source)
        else:
            kernels[source] = _kernel(source, target, cached)
    if progress:
        progress(len(kernels), len(wanted))

    def make(source: KernelSource, patience: float) -> Built | None:
        """Built by now or here; None where another is building it for longer than `patience`."""
        key = source.hash(target.name)
        with _build_lock(folder, key, patience) as mine:
            built = _read(folder, key, target)
            if built is None and mine:
                built = build_one(source, target)
                _write(folder, key, target, built)
            return built

    # Triton's passes and the assemblers hold no lock while they work, and the rest is Python:
    # threads are as good as processes, which would have to start the caller's program anew.
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        jobs = {pool.submit(make, source, 0.0): source for source in missing}
        try:
            while jobs:
                for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                    source, built = jobs.pop(job), job.result()
                    if built is None:  # the others first: several processes share the work
                        jobs[pool.submit(make, source, _PATIENCE_SECONDS)] = source
                        continue
                    kernels[source] = _kernel(source, target, built)
                    if progress:
                        progress(len(kernels), len(wanted))
        finally:
            for job in jobs:
                job.cancel()
    return kernels


def cache_folder() -> Path:
    """Where built kernels are kept: below XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ingot" / "kernels"


# Registers of a multiprocessor, and the most that a thread may have, on NVIDIA.
_REGISTERS, _MOST_REGISTERS = 65536, 255
# Shared memory that is lost for each block on a multiprocessor, in bytes, on NVIDIA.
_SHARED_OF_BLOCK = 1024


def _part_of_registers(source: KernelSource, target: Target) -> int | None:
    """How many a thread may take, so that as many programs fit as are to be resident. ptxas, if it
    is not told, may take fewer, for programs that are not to come, and spill."""
    if source.resident is None:
        return None
    threads = source.num_warps * target.warp * source.resident
    return min(_MOST_REGISTERS, _REGISTERS // threads)


def _part_of_shared(source: KernelSource, target: Target) -> int:
    """The bytes of shared memory of which one program more than are to be resident does not fit;
    of what spreads a second one."""
    if source.resident is None or not target.name.startswith("cuda"):
        return 0
    # The multiprocessor takes a kilobyte for each block itself.
    whole = target.shared_bytes + _SHARED_OF_BLOCK
    part = whole // (2 if source.spreads else source.resident + 1) - _SHARED_OF_BLOCK
    return (part // 128 + 1) * 128


def compiled(source: KernelSource, target: Target, registers: int | None = None) -> Any:
    """What triton.compile makes of `source` for `target`; BuildError where it fails.

    `registers` is how many a thread may take on NVIDIA in place of what the source says.
    """
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
    most = registers or _part_of_registers(source, target)
    if backend == "cuda" and most:
        options["maxnreg"] = most
    name = source.function.__name__
    try:
        return triton.compile(source.ast_source(), target=gpu, options=options)
    except Exception as error:  # Triton raises whatever its passes raise
        cause = f"{type(error).__name__}: {error}"
        raise BuildError(f"kernel {name} for {target.name}: {cause}") from error


def build_one(source: KernelSource, target: Target) -> Built:
    """Device code for `target`; BuildError where Triton fails or a limit is passed.

    ptxas spills a little where one more block then fits on a multiprocessor. Such a kernel is built
    again with all registers, and what spills less is taken. Of a `resident` source fewer programs
    fit then than were asked for: its registers, which `ingot inspect --kernels` shows, tell.
    """
    built = _build(source, target)
    if not target.name.startswith("cuda") or not built.facts["spills"]:
        return built
    most = min(_MOST_REGISTERS, _REGISTERS // (source.num_warps * target.warp))
    again = _build(source, target, most)
    return min(built, again, key=lambda each: each.facts["spills"])


def _build(source: KernelSource, target: Target, registers: int | None = None) -> Built:
    made = compiled(source, target, registers)
    backend = target.name.split(":")[0]
    text = made.asm["ptx" if backend == "cuda" else "amdgcn"]
    binary = made.asm["cubin" if backend == "cuda" else "hsaco"]
    if source.programmatic:
        _check_pdl_wait(source.function.__name__, target, text)
    facts = {
        "name": made.metadata.name,
        "shared": max(made.metadata.shared, _part_of_shared(source, target)),
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


def _check_pdl_wait(name: str, target: Target, ptx: str) -> None:
    """A kernel that does not wait would be launched too soon, and no one would be told."""
    for action in ("launch_dependents", "wait"):
        if (count := len(re.findall(rf"\bgriddepcontrol\.{action}\b", ptx))) != 1:
            raise BuildError(
                f"kernel {name} for {target.name}: expected one griddepcontrol.{action} "
                f"(see templates.pdl), found {count}"
            )


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
    """What the cache holds under `key`; None where it holds nothing whole, or another kernel."""
    try:
        held = json.loads((folder / f"{key}.json").read_text())
        binary = (folder / f"{key}.{_suffix(target)}").read_bytes()
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(held, dict) or held.get("key") != key:
        return None
    facts = held.get("facts")
    whole = held.get("sha256") == hashlib.sha256(binary).hexdigest()
    return Built(binary, facts) if whole and _are_facts(facts) else None


def _are_facts(found: Any) -> TypeGuard[dict[str, Any]]:
    """Whether `found` is what `build_one` says of a kernel: its name, and figures by name."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return False
    figures = [value for name, value in found.items() if name != "name"]
    return "shared" in found and all(type(value) is int and value >= 0 for value in figures)


@contextmanager
def _build_lock(folder: Path, key: str, patience: float) -> Generator[bool]:
    """Whether `key` is ours to build: False where another holds its lock and `patience` is 0.

    Locks are the operating system's, where it has them, and end with the process that holds them,
    however it ends. A few files serve all kernels: one may wait for another's. Where the file
    system has no locks, or one is held for longer than any build takes, a kernel may be built
    twice: writing is safe without.
    """
    mine = True
    with ExitStack() as held:
        with _writing(folder):
            (folder / "locks").mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(FileLock(folder / "locks" / key[:2]).acquire(patience))
            except Timeout:
                mine = patience > 0
            except NotImplementedError:  # what older versions of filelock make of ENOSYS
                pass
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        yield mine


def _write(folder: Path, key: str, target: Target, built: Built) -> None:
    """The binary first: who finds the facts finds both. A rename is whole or is not."""
    digest = hashlib.sha256(built.binary).hexdigest()
    held = {"key": key, "sha256": digest, "facts": dict(built.facts)}
    facts = json.dumps(held, sort_keys=True).encode()
    for suffix, content in ((_suffix(target), built.binary), ("json", facts)):
        with _writing(folder):
            handle, name = tempfile.mkstemp(dir=folder, prefix=".new-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.replace(name, folder / f"{key}.{suffix}")
            except OSError:
                with suppress(OSError):
                    os.unlink(name)
                raise


@contextmanager
def _writing(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise BuildError(
            f"kernel cache {folder}: expected a folder to write to, found {error.strerror}; "
            "XDG_CACHE_HOME says where it lies"
        ) from error
