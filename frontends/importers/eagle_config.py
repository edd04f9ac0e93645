"""What the config.json of an EAGLE-3 head says, read or refused in a line.

The layout is that of SafeAILab's EAGLE, SpecForge and ModelOpt, which SGLang and vLLM read: a llama
config with a few keys more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from .config_bounds import check_config_file
from .side_files import read_json_object
from .source_error import SourceError

# A head of one layer, by the names that trainers and servers gave it; the last with a vocabulary.
_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM")
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_OWN = ("draft_vocab_size", "target_hidden_size", "norm_before_residual", _LAYER_IDS)
# Keys that say what every head here is, and which.
_FIXED: Mapping[str, object] = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "num_aux_hidden_states": 3,
    "tie_word_embeddings": False,
    "is_causal": True,
}
_FIXED_WITHIN: Mapping[str, object] = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
}
_WITHIN = (_LAYER_IDS, "next_layer_regular", "parallel_draft_heads_num_layers")
# Keys of how a config was written, and llama's older ones.
_WITHOUT_MEANING = ("torch_dtype", "target_model_type", "rope_theta", "rope_scaling")


@dataclass(frozen=True)
class EagleConfig:
    """A head's config for a model.

    Its feature joins the three `hidden_states` of these indices: 0 is the embedding, i what layer i
    takes. It predicts `draft_vocab` tokens of the model's. With `norm_before_residual` the residual
    of attention is the normed feature.
    """

    llama: LlamaConfig
    hidden_states: tuple[int, int, int]
    draft_vocab: int
    norm_before_residual: bool


def read_eagle_config(directory: Path, target: PreTrainedConfig) -> EagleConfig:
    """The config of the head in `directory` for a model of the config `target`.

    SourceError says what a head has that this version does not compute, or that does not fit.
    """
    path = directory / "config.json"
    given = read_json_object(path)
    check_config_file(path)
    _refuse_variants(path, given)
    names = LlamaConfig().to_dict().keys() | {*_WITHOUT_MEANING}
    try:
        llama = LlamaConfig(**{n: v for n, v in given.items() if n in names})
    except Exception as error:  # transformers' own checks
        told = " ".join(str(error).split())
        raise SourceError(f"{path}: no llama config: {type(error).__name__}: {told}") from error
    text = target.get_text_config()
    for name, found, wanted in (
        ("vocab_size", llama.vocab_size, text.vocab_size),
        (
            "target_hidden_size",
            given.get("target_hidden_size") or llama.hidden_size,
            text.hidden_size,
        ),
    ):
        if found != wanted:
            raise SourceError(
                f"{path}: the head is of another model: {name} {found!r:.40}, where "
                f"{text.model_type} has {wanted}"
            )
    draft_vocab = given.get("draft_vocab_size") or llama.vocab_size
    if not _is_index(draft_vocab) or not 1 <= draft_vocab <= llama.vocab_size:
        raise SourceError(
            f"{path}: draft_vocab_size: expected 1 to the {llama.vocab_size} tokens of the model, "
            f"found {draft_vocab!r:.40}"
        )
    return EagleConfig(
        llama,
        _hidden_states(path, given, text.num_hidden_layers),
        draft_vocab,
        bool(given.get("norm_before_residual")),
    )


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_variants(path: Path, given: Mapping[str, Any]) -> None:
    """SourceError for what is no head of this layout."""
    kinds = given.get("architectures")
    if "speculators_model_type" in given or "speculators_config" in given:
        raise SourceError(
            f"{path}: the layout of the library speculators: expected that of EAGLE-3 heads with "
            f"architectures [{_ARCHITECTURES[0]!r}], in which this version reads them"
        )
    if not isinstance(kinds, list) or not kinds or kinds[0] not in _ARCHITECTURES:
        raise SourceError(
            f"{path}: architectures: expected an EAGLE-3 head, {', '.join(_ARCHITECTURES[:2])}, "
            f"found {kinds!r:.80}"
        )
    if kinds[0] == _ARCHITECTURES[-1] and "draft_vocab_size" not in given:
        raise SourceError(
            f"{path}: expected an EAGLE-3 head, which has a draft_vocab_size, found a model"
        )
    within = given.get("eagle_config") or {}
    if not isinstance(within, Mapping):
        raise SourceError(f"{path}: eagle_config: expected an object, found {within!r:.40}")
    llama = LlamaConfig().to_dict().keys() | {*_WITHOUT_MEANING}
    for place, keys, fixed, known in (
        ("", given, _FIXED, {*llama, *_OWN, "eagle_config"}),
        ("eagle_config.", within, _FIXED_WITHIN, {*_WITHIN}),
    ):
        for key, value in keys.items():
            if key in fixed and value not in (None, fixed[key]):
                raise SourceError(
                    f"{path}: {place}{key}: expected {fixed[key]!r}, found {value!r:.40}: this "
                    "version has no EAGLE-3 heads of that kind"
                )
            if key not in fixed and key not in known and value not in (None, False, 0, "", [], {}):
                raise SourceError(
                    f"{path}: {place}{key} {value!r:.40} is not known of EAGLE-3 heads, and may "
                    "change what they compute; take it out if it does not"
                )


def _hidden_states(path: Path, given: Mapping[str, Any], layers: int) -> tuple[int, int, int]:
    """The indices of the hidden states: those that vLLM reads, those that ModelOpt, SpecForge and
    SGLang do, which count the layers that give them, or the paper's."""
    found: Any = given.get(_LAYER_IDS)
    place, behind = _LAYER_IDS, 0
    if not found and given.get("eagle_config"):
        found, place, behind = given["eagle_config"].get(_LAYER_IDS), f"eagle_config.{place}", 1
    if not found:
        found, place, behind = (2, layers // 2, layers - 3), "the layers of the paper", 0
    fits = isinstance(found, Sequence) and len(found) == 3 and all(map(_is_index, found))
    if not fits or not all(0 <= index + behind < layers for index in found):
        raise SourceError(
            f"{path}: {place}: expected three layers of the model, 0 to {layers - 1 - behind}, "
            f"found {list(found) if isinstance(found, Sequence) else found!r:.40}"
        )
    first, second, third = (index + behind for index in found)
    return first, second, third
