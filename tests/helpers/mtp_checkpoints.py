"""Tiny checkpoints with a layer of multi-token prediction, in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpModel


def mtp_model(model: PreTrainedModel, seed: int = 1, layers: int = 1) -> MtpModel:
    """transformers' own prediction layers for `model`, every tensor of them random."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made = MtpModel(model, layers).eval().requires_grad_(False)
        for name, tensor in sorted(own_tensors(made).items()):
            spread = 0.1 * torch.randn(tensor.shape)
            tensor.copy_(spread + 1 if name.endswith("norm.weight") else spread)
        made.layers.to(model.dtype)
    return made


def own_tensors(made: MtpModel) -> dict[str, torch.Tensor]:
    """The tensors of the layers, without those that the model shares."""
    return {n: t for n, t in made.state_dict().items() if n.startswith("layers.")}


def published(made: MtpModel, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors under the names of the published checkpoints: DeepSeek-V3's, GLM-4.5's."""
    first = model.config.num_hidden_layers
    stored: dict[str, torch.Tensor] = {}
    for index in range(made.num_mtp_layers):
        place, inner = f"model.layers.{first + index}.", f"layers.{index}."
        for name, tensor in own_tensors(made).items():
            if not name.startswith(inner):
                continue
            rest = name.removeprefix(inner).removeprefix("mtp_block.")
            rest = rest.replace("post_norm.", "shared_head.norm.")
            if rest.endswith("experts.gate_up_proj"):
                stem = rest.removesuffix("gate_up_proj")
                for i, expert in enumerate(tensor):
                    gate, up = expert.chunk(2)
                    stored[f"{place}{stem}{i}.gate_proj.weight"] = gate
                    stored[f"{place}{stem}{i}.up_proj.weight"] = up
            elif rest.endswith("experts.down_proj"):
                stem = rest.removesuffix("down_proj")
                for i, expert in enumerate(tensor):
                    stored[f"{place}{stem}{i}.down_proj.weight"] = expert
            else:
                stored[place + rest] = tensor
        stored[f"{place}embed_tokens.weight"] = model.get_input_embeddings().weight.detach()
        stored[f"{place}shared_head.head.weight"] = model.get_output_embeddings().weight.detach()
    return {name: tensor.clone().contiguous() for name, tensor in stored.items()}


def write_mtp(
    directory: Path, name: str, *, seed: int = 0, layers: int = 1, **overrides: Any
) -> tuple[PreTrainedModel, MtpModel]:
    """A tiny `name` model with prediction layers, written to `directory`; and both in memory."""
    model = tiny_model(name, seed=seed, num_nextn_predict_layers=layers, **overrides)
    made = mtp_model(model, seed + 1, layers)
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    save_file({**load_file(file), **published(made, model)}, file, metadata={"format": "pt"})
    model.config.name_or_path = str(directory)
    return model, made


def without_stop(directory: Path) -> None:
    """Let generation from `directory` end at no token."""
    for name in ("config.json", "generation_config.json"):
        file = directory / name
        held = json.loads(file.read_text())
        held["eos_token_id"] = None
        file.write_text(json.dumps(held))
