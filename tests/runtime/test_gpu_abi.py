"""The drivers' C interfaces as the vendors' headers have them: layouts, constants, symbols."""

from __future__ import annotations

import ctypes
import re
import subprocess
from ctypes import Structure, sizeof
from pathlib import Path
from typing import Any

import pytest
from fake_gpu import COMPILE_SECONDS, CUDA, HIP, Vendor, compiler, headers
from ingot.runtime.devices import cuda, device_api, hip
from ingot.runtime.devices.device_api import DeviceApi, DriverMissingError, open_library

INCLUDE = {"hip": "hip/hip_runtime_api.h", "cuda": "cuda.h"}


def constants(vendor: Vendor, expressions: list[str], folder: Path) -> dict[str, int]:
    """Integer C expressions over the vendor's headers, evaluated."""
    lines = [f'printf("%lld\\n", (long long)({text}));' for text in expressions]
    source = f"""
#define __HIP_PLATFORM_AMD__
#include <{INCLUDE[vendor.name]}>
#include <stddef.h>
#include <stdio.h>
int main(void) {{ {" ".join(lines)} return 0; }}
"""
    program = folder / "constants"
    program.with_suffix(".c").write_text(source, encoding="utf-8")
    command = [compiler(), f"-I{headers(vendor)}", str(program.with_suffix(".c")), "-o", program]
    subprocess.run(command, check=True, timeout=COMPILE_SECONDS)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return dict(zip(expressions, map(int, printed.split()), strict=True))


def layout(c_name: str, structure: type[Structure], **renamed: str) -> dict[str, int]:
    """Size, and offset and size of each field that is read or written, as C expressions."""
    found = {f"sizeof({c_name})": sizeof(structure)}
    for name, *_ in structure._fields_:
        if name.startswith(("unread", "reserved1")):
            continue
        place = getattr(structure, name)
        found[f"offsetof({c_name}, {renamed.get(name, name)})"] = place.offset
        found[f"sizeof((({c_name} *)0)->{renamed.get(name, name)})"] = place.size
    return found


HIP_FACTS: dict[str, int] = {
    **layout("hipKernelNodeParams", hip.KernelNodeParams),
    **layout("hipDeviceProp_tR0600", hip.DeviceProperties),
    "hipStreamNonBlocking": device_api.NON_BLOCKING,
    "hipHostMallocDefault": 0,
    "hipEventDefault": 0,
    "hipSuccess": 0,
    "hipErrorDeinitialized": 4,
    "hipErrorECCNotCorrectable": 214,
    "hipErrorIllegalAddress": 700,
    "hipErrorLaunchTimeOut": 702,
    "hipErrorContextIsDestroyed": 709,
    "hipErrorAssert": 710,
    "hipErrorLaunchFailure": 719,
    "hipErrorUnknown": 999,
}
CUDA_STICKY = {
    "CUDA_ERROR_DEINITIALIZED",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    "CUDA_ERROR_MPS_CLIENT_TERMINATED",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_UNKNOWN",
}
CUDA_FACTS: dict[str, int] = {
    **layout("CUDA_KERNEL_NODE_PARAMS_v2", cuda.KernelNodeParams),
    **layout("CUDA_KERNEL_NODE_PARAMS_v3", cuda.KernelNodeParams),
    **layout("CUgraphNodeParams", cuda.GraphNodeParams),
    **layout("CUgraphEdgeData", cuda.EdgeData),
    "CU_GRAPH_NODE_TYPE_KERNEL": 0,
    "CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC": cuda.PROGRAMMATIC_EDGE[0],
    "CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC": cuda.PROGRAMMATIC_EDGE[2],
    "CU_STREAM_NON_BLOCKING": device_api.NON_BLOCKING,
    "CU_EVENT_DEFAULT": 0,
    "CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK": cuda.MAX_THREADS_PER_BLOCK,
    "CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X": cuda.MAX_GRID_DIM[0],
    "CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y": cuda.MAX_GRID_DIM[1],
    "CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z": cuda.MAX_GRID_DIM[2],
    "CU_DEVICE_ATTRIBUTE_WARP_SIZE": cuda.WARP_SIZE,
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": cuda.COMPUTE_CAPABILITY[0],
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": cuda.COMPUTE_CAPABILITY[1],
    "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": (
        cuda.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    ),
    "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": cuda.MAX_DYNAMIC_SHARED_SIZE_BYTES,
    "CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT": cuda.PREFERRED_SHARED_MEMORY_CARVEOUT,
    "CU_SHAREDMEM_CARVEOUT_MAX_SHARED": cuda.ALL_SHARED,
    "CUDA_SUCCESS": 0,
}


@pytest.mark.parametrize(("vendor", "facts"), [(HIP, HIP_FACTS), (CUDA, CUDA_FACTS)])
def test_layouts_and_constants(vendor: Vendor, facts: dict[str, int], tmp_path: Path) -> None:
    assert constants(vendor, list(facts), tmp_path) == facts


def test_sticky_codes_have_these_names(tmp_path: Path) -> None:
    found = constants(CUDA, sorted(CUDA_STICKY), tmp_path)
    assert set(found.values()) == cuda.STICKY - {226, 721}  # CONTAINED, TENSOR_MEMORY_LEAK: newer
    codes = {code for name, code in HIP_FACTS.items() if name.startswith("hipError")}
    assert codes == hip.STICKY


def declarations(vendor: Vendor, folder: Path) -> dict[str, list[str]]:
    """The arguments of every function that the vendor's headers declare, macros expanded."""
    source = folder / "declarations.c"
    defines = "#define __HIP_PLATFORM_AMD__\n#define __CUDA_API_VERSION_INTERNAL\n"
    source.write_text(f"{defines}#include <{INCLUDE[vendor.name]}>\n", encoding="utf-8")
    command = [compiler(), "-E", "-P", f"-I{headers(vendor)}", str(source)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS
    )
    text = " ".join(done.stdout.split())
    found: dict[str, list[str]] = {}
    for name, arguments in re.findall(r"\b((?:cu|hip)[A-Z]\w*) ?\(([^()]*)\) ?;", text):
        found[name] = [] if arguments.strip() in ("", "void") else arguments.split(",")
    return found


@pytest.mark.parametrize(
    ("vendor", "api", "more"),
    [(HIP, hip.HipApi, {}), (CUDA, cuda.CudaApi, {cuda.ADD_NODE: cuda.ADD_NODE_SIGNATURE})],
)
def test_signatures(
    vendor: Vendor, api: type[DeviceApi], more: dict[str, tuple[Any, ...]], tmp_path: Path
) -> None:
    """As many arguments as the headers declare, pointers where they have pointers."""
    bound = api.signatures() | more
    numbers = (ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_ulonglong)
    declarations_of = declarations(vendor, tmp_path)
    for name, types in bound.items():
        declared = declarations_of[name]
        assert len(declared) == len(types), (name, declared)
        for text, bound_type in zip(declared, types, strict=True):
            if "*" in text:
                assert bound_type not in numbers, (name, text)
            elif re.search(r"\b(unsigned|int|size_t|CUdevice)\b", text):
                assert bound_type in numbers, (name, text)


@pytest.mark.parametrize(
    ("api", "more"), [(hip.HipApi, hip.TEXTS), (cuda.CudaApi, (cuda.ADD_NODE,))]
)
def test_symbols_of_the_real_library(api: type[DeviceApi], more: tuple[str, ...]) -> None:
    try:
        library = open_library(api.libraries)
    except DriverMissingError as missing:
        pytest.skip(str(missing))
    assert [name for name in (*api.signatures(), *more) if not hasattr(library, name)] == []
