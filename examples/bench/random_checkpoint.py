"""Checkpoints of full-size models with random weights, as transformers would save them, in bf16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from ingot.runtime.artifact.safetensors_file import Item, ShardWriter, shards_of
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

_SHARD_BYTES = 4 << 30
# Elements of the pool that all weights are cut from: drawing billions of numbers takes minutes.
_POOL = 1 << 26


def write_checkpoint(config: PreTrainedConfig, directory: Path) -> int:
    """Write config and weights in shards, as the published model has them; gives the bytes.

    Norms are 1; all else is drawn from N(0, 0.02).
    """
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = revert_weight_conversion(model, model.state_dict())
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    torch.manual_seed(0)
    pool = (torch.randn(_POOL) * 0.02).bfloat16()
    files: dict[str, str] = {}
    written = 0
    items = [_item(name, tensor, pool) for name, tensor in tensors.items()]
    for number, shard in enumerate(shards_of(items, _SHARD_BYTES), 1):
        file = f"model-{number:05}.safetensors"
        with (directory / file).open("wb") as out:
            ShardWriter(shard).write(out.write, lambda nbytes: None)
        written += sum(item.nbytes for item in shard)
        files |= {name: file for item in shard for name in item.types}
    index = {"metadata": {"total_size": written}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return written


def _item(name: str, tensor: torch.Tensor, pool: torch.Tensor) -> Item:
    """A tensor to be written in pieces: beside the pool nothing is in memory."""

    def load() -> Iterator[memoryview]:
        left = tensor.numel()
        if "norm" in name and tensor.dim() == 1:
            yield _bytes(torch.ones(left, dtype=torch.bfloat16))
            return
        while left > 0:
            start = int(torch.randint(_POOL // 2, ()))
            part = pool[start : start + min(left, _POOL // 2)]
            yield _bytes(part)
            left -= part.numel()

    return Item({name: ("bf16", tuple(tensor.shape))}, load)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())
