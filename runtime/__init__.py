"""The replay of a program.

Of ours it imports the tables `compiler.dtypes` and `compiler.target` alone, and neither torch nor
triton: the cpu target is run by `codegen.cpu`.

Read `program` first (the contract with codegen, and the schema of the plan), then `driver` (what a
device must do) and `host_memory` (how much of it there is). Folders: `devices` (CUDA, HIP),
`serving` (continuous batching over a paged cache) and `artifact` (the ingot on disk).
"""
