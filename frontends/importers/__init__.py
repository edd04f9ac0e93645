"""Importers: from a model to a graph.

`huggingface` (a model directory to a graph and its weights), over `meta_model` (a config as a model
on the meta device), `traced_ops` (attention and experts as custom ops), `torch_export` (an exported
program to a graph) with `aten_rules` (the translation of each operator). `weightless`: a checkpoint
from config.json alone; `source_error`: the error for an invalid model.
"""
