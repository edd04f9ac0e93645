"""The coverage table: every architecture that is promised, from a saved directory to tokens.

A tiny random model is saved, imported from its files, compiled and served; transformers' eager
attention in f32 says what is right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from ingot.codegen.lower import lower, serving_bindings
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.target import CPU
from ingot.frontends.huggingface import HuggingFaceModel, import_hugging_face
from ingot.passes.insert_kv_cache import InsertKvCache
from ingot.passes.pipelines import causal_lm
from ingot.runtime.cpu import CpuDriver
from ingot.runtime.session import Session
from tiny_models import COVERAGE, MODELS, tiny_model
from transformers import PreTrainedModel

PROMPTS = tuple(
    tuple(torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in (5, 23, 40)  # the longest outgrows the sliding windows, and one page while decoding
)
NEW_TOKENS = 32
MAX_TOKENS = 96
TOLERANCE = 1e-4  # of max |Δ| against max |logit|

# What raise-ops is there to replace: nothing of these may be left in a raised graph.
SPELLED_OUT = {
    *("rsqrt", "sqrt", "pow", "mean", "sum", "amax", "softmax", "topk", "gather"),
    *("cos", "sin", "sigmoid", "silu", "gelu", "relu", "neg", "slice_scatter", "attention"),
}


def served(model: HuggingFaceModel) -> tuple[Graph, Session]:
    """The final graph of `model`, and a session that serves it on the CPU."""
    insert = InsertKvCache()
    passes = causal_lm(max_sequences=len(PROMPTS), max_tokens_per_sequence=MAX_TOKENS)
    graph = run_pipeline(
        model.graph, passes, require_match=("raise-ops", "insert-kv-cache", "gather-logits")
    )[-1].graph
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
    return graph, Session(lowered.program, CpuDriver(), lowered.load_weight)


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


def assert_same(session: Session, model: PreTrainedModel) -> float:
    """The three prompts in one batch give transformers' tokens and logits; the largest error."""
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
        assert generated == eager_tokens(model, prompt)
    return worst


def expected_ops(model: PreTrainedModel) -> Counter[str]:
    """How often each raised op must occur, from the modules that the model is made of."""
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    kinds = [(type(m).__name__, m) for m in model.modules()]
    norms = Counter(
        "rms_norm" if "RMSNorm" in name else "layer_norm"
        for name, _ in kinds
        if re.search(r"Norm$", name)
    )
    stacks = sum(
        isinstance(down := getattr(m, "down_proj", None), torch.nn.Parameter) and down.ndim == 3
        for _, m in kinds
    )
    dense = sum(name.endswith("MLP") and not hasattr(m, "experts") for name, m in kinds)
    rotated = sum(getattr(config, "no_rope_layers", None) or [1] * layers)
    if config.model_type == "cohere2":  # full attention knows no positions
        rotated = config.layer_types.count("sliding_attention")
    return norms + Counter(
        cached_attention=layers,
        kv_append=layers,
        rope=2 * rotated,
        router=stacks,
        experts=stacks,
        glu=dense,
    )


def assert_raised(graph: Graph, expected: Counter[str]) -> None:
    """Everything that has an op of its own became that op, and nothing of it is left over."""
    found = Counter(node.op.name for node in graph.nodes())
    assert {op: found[op] for op in expected} == dict(expected)
    left = {op for op in found if op in SPELLED_OUT or op.startswith("aten.")}
    assert not left, f"left over: {left}\n{graph}"


@pytest.mark.parametrize("name", COVERAGE)
def test_serves_what_transformers_computes(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    sharded = MODELS.index(name) % 2 == 1
    model.save_pretrained(tmp_path, max_shard_size="100KB" if sharded else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    imported = import_hugging_face(tmp_path, dtype=None, max_tokens=MAX_TOKENS)
    graph, session = served(imported)
    assert_raised(graph, expected_ops(model))
    with session:
        print(f"{name}: max relative error {assert_same(session, model):.1e}")


@pytest.mark.parametrize("name", MODELS[len(COVERAGE) :])
def test_serves_others(name: str) -> None:
    model = tiny_model(name)
    graph, session = served(import_hugging_face(model, dtype=None, max_tokens=MAX_TOKENS))
    assert_raised(graph, expected_ops(model))
    with session:
        assert_same(session, model)
