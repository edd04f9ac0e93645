"""torchao's MXFP4 blocks, for comparison: reads floats, writes codes and scales.

    python torchao_blocks.py IN OUT

IN and OUT are safetensors files: IN holds f32 tensors [blocks, group] whose names start with a
scale rule, OUT gets NAME.codes u8 [blocks, group / 2] and NAME.scales u8 [blocks, 1] for each. A
program of its own because transformers imports every quantizer that is installed beside it.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx

out: dict[str, torch.Tensor] = {}
for name, w in load_file(sys.argv[1]).items():
    mode = ScaleCalculationMode(name.partition(".")[0])
    scales, codes = to_mx(w, torch.float4_e2m1fn_x2, w.shape[-1], mode)[:2]
    out[f"{name}.codes"] = codes.view(torch.uint8).view(len(w), -1).clone()
    out[f"{name}.scales"] = scales.view(torch.uint8).view(len(w), 1).clone()
save_file(out, sys.argv[2])
