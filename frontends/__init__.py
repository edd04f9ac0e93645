"""Ways in and doors. May import every other room.

Ways in: `torch_export` (a traced program to a graph), `huggingface` (a model directory to a graph
and its weights). Doors: `api` (`compile`, `load`, `Model`: the whole way from model to tokens, read
it first), `cli` (the command line over `api`).
"""
