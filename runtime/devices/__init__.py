"""Drivers: load a program into device memory and replay its entries.

`device_api` (the interface of a GPU driver, and its errors), `native_api` (functions that CUDA and
HIP share, through ctypes), `cuda` and `hip` (the two bindings), `gpu_driver` (loads programs
through either), `graph_executable` (one CUDA or HIP graph per entry) with `host_arrays` (dtype
conversion), `staging` (pinned memory for inputs and outputs) and `gpu_memory` (arena, state,
weights). Checks shared with the ingot reader: `check_program` (validity of a GPU program) and `elf`
(the target of device code).
"""
