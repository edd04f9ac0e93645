"""Importers: from a model to a graph.

`huggingface` (a model directory or a model to a graph and its weights), over `meta_model` (a config
as a model on the meta device) and `in_memory` (a model that is traced as it is), `traced_ops`
(attention and experts as custom ops), `draft_head` (what drafts within a model) and
`prediction_layer` (the model's own) or
`eagle_head` (one beside it, whose config `eagle_config` reads), `attention_masks` (masks as
causality and a window),
`default_positions` (the positions that a model makes itself),
`module_tensors` (and a copy that shares them),
`online_rotations` (of activations, for weights that count on them),
`torch_export` (an exported program to a graph) with `aten_rules` (the translation of each
operator) and `indexing` (of indices that are tensors). `tracing`: one thread at a time;
`streamed_model`: the model itself, a layer in memory at a time; `refusals`: why a model is not
compiled; `weightless`: a checkpoint from config.json alone; `side_files`: files of a model
directory, read within bounds; `source_error`: the errors for models that cannot be read or
expressed.
`config_bounds` says what a config.json may ask for at most.
"""
