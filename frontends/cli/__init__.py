"""The command line: `main` over `api`, one file a command.

`run`, `chat`, `ingot`, `report`, `graph`, `kernels`, `verify` and `quantize` are its commands, over
`inspect_view` (the page that shows a graph), `launches` (what a step of a GPU program is),
`model_check` (the comparison with one of `references`) and `doctor` (what this machine has).
"""
