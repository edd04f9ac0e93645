"""Drivers: a program in device memory, replayed.

`device_api` (what a graph runtime asks of a driver, and its errors), `native_api` (what CUDA and
HIP share, through ctypes), `cuda` and `hip` (the two bindings and their drivers),
`graph_executable` (a program as one explicit graph an entry) and its parts `host_arrays`, `staging`
(inputs and outputs on their way) and `gpu_memory` (arena, state, weights). What both the executable
and the ingot need: `check_program` (what a GPU program must hold to, whatever runs it) and `elf`
(which target code is for).
"""
