"""Drivers: load a program into device memory and replay its entries.

`device_api` (the functions of a GPU driver, through ctypes, and its errors), `cuda` and `hip` (the
two bindings), `graph_executable` (loads a program through either: one CUDA or HIP graph per entry)
with `host_arrays` (dtype conversion), `staging` (pinned memory for inputs and outputs) and
`gpu_memory` (arena, state, weights). Checks shared with the ingot reader: `check_program` (validity
of a GPU program) and `elf` (the target of device code).
"""
