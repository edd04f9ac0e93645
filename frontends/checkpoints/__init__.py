"""Hugging Face checkpoints: lazy reading from safetensors, dequantization, and MXFP4 export.

`checkpoint` opens one over `safetensors_files` (mapped files, sharded writing), `entries` (stored
tensors as parameters), `conversions`
(transformers' renames, stacks and concatenations), `quantized` (codes and scales as one weight),
`quantization_config` (the scheme that config.json declares, read through `config_section` and
`patterns`),
`rotations` (of activations, which a scheme may declare), `unused` (tensors without a parameter, and
why) and `dequantize` (FP8, NVFP4, INT4 to floats). `export_quantized` writes MXFP4.
"""
