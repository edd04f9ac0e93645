"""Model importers and the public API. May import every other room.

Entry points: `api` (`compile`; read it first) with `options`, `compilation` (a language model
through the passes to a program) with `import_check` (the imported graph against the model itself)
and `quantization_check` (what a checkpoint says against what was read of it), what they give
(`model`, `weight_report`; `module` for what is no language model, over `module_check`, which calls
it again, `held_weights` and `module_inputs`), `aot` (a lowered model to an ingot), `loading` (an
ingot to tokens; for GPUs without torch) with `cpu_ingot` (the program of one for the cpu),
`speculate` (how tokens are drafted, and what it brought) and `draft_model` (a smaller model in the
same graph), `drivers` (which target is run by what) and `progress`. What people look at: `layers`
(of a graph), `launches` (of a program) and `show` (numbers). Folders: `cli` (the command line over
`api`), `bench` (speed on the device that is here), `importers` (a model to a graph), `checkpoints`
(weights, read and written) and `text` (tokens to text and back).
"""
