"""Importers: from a model to a graph.

`huggingface` (a model directory to a graph and its weights), over `meta_model` (a config as a model
without weights), `traced_ops` (attention and experts as one node each), `torch_export` (a traced
program to a graph) with `aten_rules` (what each operator becomes). `weightless` stands in where
there are no weights; `source_error` says what is wrong with a source.
"""
