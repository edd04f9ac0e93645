"""Random EAGLE-3 heads for tiny models, in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel


def eagle_config(model: PreTrainedModel, **more: Any) -> dict[str, Any]:
    """The config.json of a head for `model`, with the keys of `more` (None takes one out)."""
    text = model.config.get_text_config()
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": text.hidden_size,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "max_position_embeddings": 64,
        "vocab_size": text.vocab_size,
        "draft_vocab_size": text.vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **more,
    }
    return {name: value for name, value in config.items() if value is not None}


def eagle_tensors(
    config: dict[str, Any], *, fed: int, embedding: bool = False, head: bool = True, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Random tensors under the published names; `fed` are the dims of the model's hidden states.

    With a draft vocabulary smaller than the model's, d2t and t2d choose tokens of all of it.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", hidden // heads)
    vocab, draft = config["vocab_size"], config["draft_vocab_size"]
    shapes = {
        "fc.weight": (hidden, 3 * fed),
        "midlayer.self_attn.q_proj.weight": (heads * size, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (groups * size, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (groups * size, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, heads * size),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "norm.weight": (hidden,),
        **({"lm_head.weight": (draft, hidden)} if head else {}),
        **({"embed_tokens.weight": (vocab, hidden)} if embedding else {}),
    }
    draw = torch.Generator().manual_seed(seed)
    made = {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    made |= {name: 1 + tensor for name, tensor in made.items() if name.endswith("norm.weight")}
    if draft < vocab:
        ids = torch.randperm(vocab, generator=draw)[:draft].sort().values
        made["d2t"] = ids - torch.arange(draft)
        made["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
    return made


def write_eagle(
    directory: Path,
    model: PreTrainedModel,
    *,
    embedding: bool = False,
    head: bool = True,
    seed: int = 1,
    **more: Any,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Write a head for `model` into `directory`; its config and its tensors."""
    config = eagle_config(model, **more)
    fed = model.config.get_text_config().hidden_size
    tensors = eagle_tensors(config, fed=fed, embedding=embedding, head=head, seed=seed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return config, tensors
