"""The IR, and all that knows only the IR. Imports nothing of ours.

Read in this order: `dtypes` and `target` (the tables of dtypes and of targets, which the runtime
reads too), `types` (dims, tensor types), `attribute_kinds` (what attributes may be), `torch_types`
(their torch names), `ambient` (torch's state around a call), `microscaling` (MXFP4), `gptq`
(rounding to it with the least error of products), `axes` (how the dims of operands and results
correspond), `ir` (ops, nodes, values, graphs), `weights` (what constants name), `ops/` (one block
an op), `untrusted` (which of them an ingot may hold), `ast_lock` (one thread at a time in Python's
parser), `attribute_text` (types and attributes out of text), `text` (the printed form and its
parser), `verify` (what every graph must keep), `interpret` (what a graph means), `ranks` (the
graphs of several ranks, run at once), `rewrite` (rules as values), `validate` (a rewrite, before
and after, compared), `pipeline` (passes in order, each verified).
"""
