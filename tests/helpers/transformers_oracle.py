"""A served model compared with eager attention in transformers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ingot.codegen.cpu import CpuDriver
from ingot.codegen.lower import lower, serving_bindings
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import Pass, run_pipeline
from ingot.compiler.target import CPU
from ingot.frontends.importers.huggingface import HuggingFaceModel
from ingot.passes.pipelines import causal_lm
from ingot.passes.serving.insert_kv_cache import InsertKvCache
from ingot.runtime.serving.session import Session
from transformers import PreTrainedModel

PROMPTS = tuple(
    tuple(torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in (5, 23, 40)  # the longest outgrows the sliding windows, and one page while decoding
)


NEW_TOKENS = 32


MAX_TOKENS = 96


TOLERANCE = 1e-4  # of max |Δ| against max |logit|


RAISED = ("raise-ops", "insert-kv-cache", "gather-logits")


def serving_passes() -> tuple[Pass, ...]:
    return causal_lm(max_sequences=len(PROMPTS), max_tokens_per_sequence=MAX_TOKENS)


def served(
    model: HuggingFaceModel,
    require_match: Sequence[str] = RAISED,
    passes: Sequence[Pass] | None = None,
) -> tuple[Graph, Session]:
    """The final graph of `model`, and a session that serves it on the CPU."""
    insert = InsertKvCache()
    passes = serving_passes() if passes is None else passes
    graph = run_pipeline(model.graph, passes, require_match=require_match)[-1].graph
    pages_per_slot = -(-MAX_TOKENS // insert.page_size)
    meta = {
        "vocab_size": graph.outputs[0].type.shape[-1],
        "page_size": insert.page_size,
        "max_sequences": len(PROMPTS),
        "max_tokens_per_sequence": MAX_TOKENS,
        "pages": len(PROMPTS) * pages_per_slot,
    }
    lowered = lower(
        graph, model.weights, CPU, serving_bindings(len(PROMPTS), 64), ("logits",), meta
    )
    return graph, Session(lowered.program, CpuDriver().load(lowered.program, lowered.load_weight))


def eager_logits(model: PreTrainedModel, tokens: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def eager_tokens(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """What transformers' own greedy `generate` appends to `prompt`."""
    ids = torch.tensor([prompt])
    options = dict(do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    model.generation_config.eos_token_id = None
    found = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return found[0, len(prompt) :].tolist()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def assert_same(session: Session, model: PreTrainedModel, *, generate: bool = True) -> float:
    """The three prompts in one batch give transformers' tokens and logits; the largest error.

    Without `generate` the logits alone are compared, along the tokens that the session chose.
    """
    vocabulary = model.config.get_text_config().vocab_size
    batch = session.generate(PROMPTS, max_new_tokens=NEW_TOKENS, top_logprobs=vocabulary)
    worst = 0.0
    for prompt, sequence in zip(PROMPTS, batch, strict=True):
        assert sequence.finish_reason == "length", sequence.message
        generated = sequence.history[len(prompt) :]
        expected = eager_logits(model, sequence.history)
        scale = np.abs(expected).max()
        batched = np.empty((NEW_TOKENS, vocabulary))
        for row, top in zip(batched, sequence.top_logprobs, strict=True):
            row[[token for token, _ in top]] = [logprob for _, logprob in top]
        scored = log_softmax(expected[len(prompt) - 1 : -1])
        alone = session.logits(prompt)
        worst = max(
            worst,
            np.abs(batched - scored).max() / scale,
            np.abs(alone - expected[: len(prompt)]).max() / scale,
        )
        assert worst <= TOLERANCE
        assert not generate or generated == expected[len(prompt) - 1 : -1].argmax(-1).tolist()
    # The tokens are those of transformers' own loop, which takes long: of one prompt.
    assert not generate or generated == eager_tokens(model, prompt)
    return worst
