"""The replay of a program.

Of ours it imports the tables `compiler.dtypes` and `compiler.target` alone; torch only in
`devices/cpu` and `devices/collectives`, which moves its tensors between processes; triton nowhere.

Read `program` first (the contract with codegen; standard library only), then `driver` (what a
device must do). Folders: `devices` (CPU, CUDA, HIP), `serving` (continuous batching over a paged
cache) and `artifact` (the ingot on disk).
"""
