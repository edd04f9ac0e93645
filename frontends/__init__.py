"""Ways in and doors. May import every other room.

The way in, top down: `huggingface` (a model directory to a graph and its weights), over
`meta_model` (a config as a model without weights), `traced_ops` (attention and experts as one node
each), `torch_export` (a traced program to a graph), `checkpoint` and `safetensors_files` (weights,
read lazily). The doors: `api` (`compile`, `load`, `Model`: the whole way from model to tokens, read
it first) and `cli` (the command line over `api`).
"""
