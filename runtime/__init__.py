"""The replay of a program. Imports nothing of ours; torch only in `cpu` and in `collectives`, which
moves its tensors between processes; triton nowhere.

Read in this order: `program` (the contract with codegen; standard library only), `driver` (what a
device must do), `cpu` (the driver that runs the references), `collectives` (ranks that exchange
tensors). For GPUs: `device_api` (what a graph runtime asks of a driver, and its errors),
`native_api` (what CUDA and HIP share, through ctypes), `cuda` and `hip` (the two bindings and their
drivers), `graph_executable` (a program as one explicit graph an entry) and its parts `host_arrays`,
`staging` (inputs and outputs on their way) and `gpu_memory` (arena, state, weights). What both the
executable and the ingot need: `check_program` (what a GPU program must hold to, whatever runs it),
`elf` (which target code is for) and `dtypes`. Above the drivers:
`buckets` (what entries take and give), `kv_cache` (pages and slots), `sampling`, `sequence` (one
request), `choosing` (next tokens, by the host or by the device), `scheduler` (who runs next),
`session` (continuous batching over all of these).

The ingot, from the top: `artifact` (reading one: what cannot be proved is refused) over `manifest`,
`ingot_files` (a directory or, by `stored_zip`, a zip), `strict_json` (JSON from strangers),
`plan_json` (a program as JSON and back) and `safetensors_data`; and `ingot_writer` (there whole or
not at all).
"""
