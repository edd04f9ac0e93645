"""Ways in and doors. May import every other room.

The doors: `api` (`compile`, the whole way from model to tokens: read it first), what it gives
(`model` over `text_model`, `weight_report` and `completion`; `module` for what is no language
model), `aot` (a lowered model to an ingot), `loading` (an ingot to tokens; for GPUs without torch)
with `relower` (the program of a cpu ingot), `drivers` (which target is run by what), the text on
both sides (`tokenizer`, `chat` over `model_files`), `calibration` (the texts over which weights are
encoded), `progress`, and `cli` (the command line over `api`: `cli_run`, `cli_chat`, `cli_ingot`,
`cli_report`, `cli_graph`, `cli_kernels`, `cli_verify` and `cli_quantize` are its commands, over
`inspect_view`, the page that shows a graph, `launches`, what a step of a GPU program is,
`model_check`, the comparison with one of `references`, and `doctor`).

The way in, top down: `huggingface` (a model directory to a graph and its weights), over
`meta_model` (a config as a model without weights), `traced_ops` (attention and experts as one node
each), `torch_export` (a traced program to a graph) with `aten_rules` (what each operator becomes),
`checkpoint` and `safetensors_files` (weights, read lazily; `source_error` says what is wrong;
`weightless` stands in where there are none), over
`conversions` (what transformers does to them) and `quantized` (several stored tensors as one
weight) with `quantization_config` (what the config promises) and `dequantize` (formats that become
dense).

The way out: `export_quantized` (a directory in MXFP4 for others to read) and `safetensors_writer`.
"""
