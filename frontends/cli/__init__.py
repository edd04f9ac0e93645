"""The command line: `main` over the `commands`, one file each.

Shared: `flags` (of options, and others), `models` (compiled from a directory or loaded from an
ingot) and `output` (tables, lines, JSON). Views: `inspect_view` (a graph as text), `graph` (as
DOT), `report` (the compilation), `kernels` (a GPU program), `ingot` (the artifact), `benchmark`
(its figures), and `model_check` (a model compared with one of `references`).
"""
