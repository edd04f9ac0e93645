"""What a program costs on the device that is here, beside its limits and its peers.

In the order in which to read them: `models` (configs by name), `random_weights` (made on the
device), `workload` (the inputs of a step), `traffic` (the bytes that a step must read), `parts`
(the launches of a step as functions of their own), `device_rates` (read bandwidth, GEMM rate),
`measure` (a program from its load to its figures), `peers` (the same model elsewhere), `run` (all
of it, from a name) and `plots`. `tune` measures kernels for tables of prices, which `explain`
reads.
"""
