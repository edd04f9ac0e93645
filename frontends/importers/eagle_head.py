"""EAGLE-3 heads: one decoder layer that drafts from three hidden states of a model.

Li et al. 2025 (arXiv:2503.01840): `fc` makes a feature of what a low, a middle and a high layer of
the model take. The layer attends over the pair of the normed embedding of the token that follows
and the normed feature; behind it a norm and a head, often over the most frequent tokens alone. A
head lies in a directory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from ...compiler.ir import Value
from ...compiler.ops.draft import likeliest
from ...compiler.ops.leaf import constant
from ...compiler.ops.shape import take
from ...compiler.types import TensorType
from ...compiler.weights import Entry, Weights
from ..checkpoints.checkpoint import check_held, stored_tensors
from ..checkpoints.conversions import Destination
from ..checkpoints.entries import check_type, entries_of
from ..checkpoints.safetensors_files import Stored, holds_weights, listed
from .draft_head import DraftHead
from .eagle_config import EagleConfig, read_eagle_config
from .meta_model import MetaModel, ready
from .source_error import SourceError
from .tracing import one_at_a_time

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
# What is added to each id of the draft vocabulary, and which of the model's tokens are in it.
_OFFSETS, _INVERSE = "d2t", "t2d"
_IDS = "target_ids"


class _Layer(nn.Module):
    """The decoder layer: attention over pairs [1, T, 2H], beside a residual [1, T, H]."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        llama = config.llama
        self.normed_residual = config.norm_before_residual
        self.self_attn = LlamaAttention(llama, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            plain: nn.Linear = getattr(self.self_attn, name)
            wide = nn.Linear(2 * llama.hidden_size, plain.out_features, llama.attention_bias)
            setattr(self.self_attn, name, wide)
        self.mlp = LlamaMLP(llama)
        self.hidden_norm, self.input_layernorm, self.post_attention_layernorm = (
            LlamaRMSNorm(llama.hidden_size, llama.rms_norm_eps) for _ in range(3)
        )

    def forward(
        self, embedded: torch.Tensor, hidden: torch.Tensor, rotary: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        normed: torch.Tensor = self.hidden_norm(hidden)
        residual = normed if self.normed_residual else hidden
        pairs = torch.cat((self.input_layernorm(embedded), normed), dim=-1)
        attended, _ = self.self_attn(pairs, position_embeddings=rotary)
        hidden = residual + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _Head(LlamaPreTrainedModel):
    """The modules of a head under their published names; embedding and head only where `own`."""

    def __init__(self, llama: Any, *, eagle: EagleConfig, fed: int, own: Collection[str]) -> None:
        super().__init__(llama)
        self.fc = nn.Linear(3 * fed, llama.hidden_size, bias=False)
        self.midlayer = _Layer(eagle)
        self.norm = LlamaRMSNorm(llama.hidden_size, llama.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(llama)
        if _EMBEDDING in own:
            self.embed_tokens = nn.Embedding(llama.vocab_size, llama.hidden_size)
        if _HEAD in own:
            self.lm_head = nn.Linear(llama.hidden_size, eagle.draft_vocab, bias=False)
        if _OFFSETS in own:
            self.register_buffer(_IDS, torch.empty(eagle.draft_vocab, dtype=torch.int32))


@dataclass(frozen=True, eq=False)
class EagleHead(DraftHead):
    """The head in `directory`, on the meta device: `model` is a _Head.

    Where it has no embedding or no head of its own, those are the model's. Where it drafts from a
    part of the vocabulary, `target_ids` i32[draft_vocab] are its tokens in the model's ids.
    """

    directory: Path
    config: EagleConfig
    stored: Mapping[str, Stored] | None  # None without weights

    prefix: ClassVar[str] = "eagle3."

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """See DraftHead."""
        return dict(self.model.named_children())

    def features(self, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """See DraftHead."""
        model: Any = self.model
        return model.fc(torch.cat([hidden_states[i] for i in self.config.hidden_states], dim=-1))

    def step(
        self, hidden: torch.Tensor, following: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See DraftHead."""
        model: Any = self.model
        own = getattr(model, "embed_tokens", None)
        table: Any = (self.trunk.get_input_embeddings() if own is None else own).weight
        rotary = model.rotary_emb(hidden, positions)
        return model.midlayer(nn.functional.embedding(following, table), hidden, rotary)

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """See DraftHead."""
        model: Any = self.model
        own = getattr(model, "lm_head", None)
        head: Any = self.trunk.get_output_embeddings() if own is None else own
        return head(model.norm(state))

    def drafted(self, logits: Value) -> Value:
        """See DraftHead."""
        chosen = likeliest(logits)
        if _IDS not in self.types():
            return chosen
        ids = constant(name=f"{self.prefix}{_IDS}", type=TensorType("i32", logits.type.shape[1:]))
        return take(ids, chosen)

    def weights(self) -> dict[str, Entry]:
        """Entries by the names beside the model's: headers are read, and no tensor.

        SourceError names a tensor that is missing, of another shape or dtype, or unknown.
        """
        types = self.types()
        entries = dict(Weights.of(self.buffers, "computed from the config"))
        if self.stored is None:
            alone = f"{self.directory}: config.json alone"
            entries |= {
                name: Entry(types[name], self._missing, alone) for name in self.stored_names()
            }
            return self.prefixed(entries)
        known = {*types, _OFFSETS, _INVERSE}
        if unknown := [name for name in self.stored if name not in known]:
            raise SourceError(
                f"{self.directory}: {listed(unknown)}: not known of EAGLE-3 heads of one layer"
            )
        read = {n: s for n, s in self.stored.items() if n in types}
        made, _ = entries_of(read, {n: Destination(n) for n in read}, self)
        if _OFFSETS in self.stored:
            made[_IDS] = self._target_ids(self.stored[_OFFSETS])
        check_held(self, made.keys(), self.directory)
        return self.prefixed(entries | made)

    def _missing(self) -> torch.Tensor:
        raise SourceError(f"{self.directory}: holds no weights: such a head can only be inspected")

    def _target_ids(self, offsets: Stored) -> Entry:
        """The table i32 of the tokens of the draft vocabulary: offsets are added to the own ids."""
        vocab, size = self.config.llama.vocab_size, self.config.draft_vocab
        expected = TensorType("i64", (size,))
        check_type(_OFFSETS, expected, offsets.type, f"{offsets.file.path.name} stores")

        def load() -> torch.Tensor:
            ids = offsets.read() + torch.arange(size)
            if wrong := ids[(ids < 0) | (ids >= vocab)].tolist():
                raise SourceError(
                    f"{offsets.file.path}: {_OFFSETS} gives the token {wrong[0]} "
                    f"({len(wrong)} of {size} are not among the {vocab} of the model)"
                )
            return ids.int()

        return Entry(TensorType("i32", (size,)), load, f"{offsets.file.path}: {_OFFSETS}")


@one_at_a_time()
def eagle_head(
    directory: str | PathLike[str], meta: MetaModel, *, weightless: bool = False
) -> EagleHead:
    """The EAGLE-3 head in `directory` for the model of `meta`, in that one's dtype.

    With `weightless` it may hold no weights: then they only have types. SourceError for what is no
    head, is of another kind, or does not fit the model.
    """
    directory, trunk = Path(directory), meta.model
    if not directory.is_dir():
        raise SourceError(f"speculate: {directory}: no such directory of an EAGLE-3 head")
    config = read_eagle_config(directory, trunk.config)
    llama, text = config.llama, trunk.config.get_text_config()
    stored: Mapping[str, Stored] | None = None
    if not weightless or holds_weights(directory):
        stored, files = stored_tensors(directory)
        for file in files:
            for name, dtype in file.foreign.items():
                raise SourceError(f"{file.path}: {name} is stored as {dtype}: expected floats")
    fits, whole = llama.hidden_size == text.hidden_size, config.draft_vocab == llama.vocab_size
    own = {
        _EMBEDDING: not fits if stored is None else _EMBEDDING in stored,
        _HEAD: stored is None or _HEAD in stored,
        _OFFSETS: not whole if stored is None else _OFFSETS in stored,
    }
    needed: dict[str, tuple[bool, str]] = {
        _EMBEDDING: (not fits, f"the model's has {text.hidden_size} dims, not {llama.hidden_size}"),
        _HEAD: (
            not fits or own[_OFFSETS] or not whole,
            f"the model's is no {config.draft_vocab} x {llama.hidden_size}",
        ),
        _OFFSETS: (not whole, f"which says what the {config.draft_vocab} draft tokens are"),
    }
    for name, (wanted, why) in needed.items():
        if wanted and not own[name]:
            raise SourceError(f"{directory}: no tensor for {name}: {why}")
    build: Callable[..., Any] = _Head._from_config
    with torch.device("meta"):
        model = build(
            llama,
            eagle=config,
            fed=text.hidden_size,
            own={name for name, here in own.items() if here},
            dtype=trunk.dtype,
            attn_implementation="ingot",
        )
    try:
        made = ready(model, trunk.dtype)
    except SourceError as error:
        raise SourceError(f"{directory}: {error}") from error
    return EagleHead(made.model, made.buffers, made.tied, trunk, directory, config, stored)
