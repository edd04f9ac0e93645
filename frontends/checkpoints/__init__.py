"""Weights: read lazily from safetensors, whatever format they are in, and written.

`checkpoint` and `safetensors_files` read them, over `conversions` (what transformers does to them)
and `quantized` (several stored tensors as one weight) with `quantization_config` (what the config
promises) and `dequantize` (formats that become dense). `model_files` finds the files of a
directory. The way out: `export_quantized` (a directory in MXFP4 for others to read).
"""
