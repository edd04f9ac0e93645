"""The command line: `main` over the `commands`, one file each.

What they share: `flags` (those of options, and others), `models` (compiled from a directory or
loaded from an ingot) and `output` (tables, lines, JSON). What they show: `inspect_view` (a graph as
a page), `graph` (as a picture), `report` (what the compiler did), `launches` and `kernels` (a step
of a GPU program), `ingot` (what one holds), and `model_check` (a model beside one of `references`).
"""
