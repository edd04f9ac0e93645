"""What a model's generation config asks for, of which `generate` does nothing by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fields of transformers' GenerationConfig that change which tokens come, and the values that do
# nothing, beside None, False and what is empty.
_OPTIONS = {
    "do_sample": (),
    "temperature": (1,),
    "top_k": (0,),
    "top_p": (1,),
    "min_p": (0,),
    "repetition_penalty": (1,),
}
_NOT_DONE = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "dola_layers": (),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "token_healing": (),
    "top_h": (1,),
    "typical_p": (1,),
    "watermarking_config": (),
}


def not_taken(config: Mapping[str, Any]) -> tuple[str, ...]:
    """A line for what Ingot cannot do of a generation config, and one for what `generate` takes as
    options: its defaults are its own."""
    options = _asked(config, _OPTIONS)
    if not config.get("do_sample"):  # then transformers takes the most likely tokens, too
        options = {n: v for n, v in options.items() if n == "repetition_penalty"}
    notes: list[str] = []
    if missing := _asked(config, _NOT_DONE):
        notes.append(f"generation_config: not supported, and not done: {_shown(missing)}")
    if options:
        notes.append(f"generation_config: done only if given to generate: {_shown(options)}")
    return tuple(notes)


def _asked(config: Mapping[str, Any], fields: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    given = {name: config.get(name) for name in fields}
    return {
        name: value
        for name, value in given.items()
        if isinstance(value, int | float | str | list | tuple | dict)
        if value is not False and value not in ("", [], (), {}) and value not in fields[name]
    }


def _shown(asked: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r:.40}" for name, value in asked.items())
