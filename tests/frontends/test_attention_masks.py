"""Masks are read from transformers' mask functions, not from what attention is passed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from imported import assert_close, eager, logits_of
from ingot.compiler.ops.attention import attention
from ingot.frontends.importers.attention_masks import AttentionMask, described_masks, mask_of
from ingot.frontends.importers.huggingface import import_hugging_face
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

_TOKENS = torch.randint(3, 64, (40,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("longest", [1, 7, 64, 1000])
@pytest.mark.parametrize("window", [1, 2, 6, 63, 64, 333])
def test_windows_are_found(longest: int, window: int) -> None:
    found = mask_of(masking_utils.sliding_window_causal_mask_function(window), longest)
    assert found == AttentionMask(window=window if window < max(longest, 2) else 0)


def test_other_masks() -> None:
    assert mask_of(masking_utils.causal_mask_function, 64) == AttentionMask()
    assert mask_of(masking_utils.bidirectional_mask_function, 64) == AttentionMask(causal=False)
    chunks = masking_utils.chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int32))
    assert mask_of(chunks, 64).problem
    wide = masking_utils.sliding_window_bidirectional_mask_function(5)
    assert mask_of(wide, 64).problem
    first = masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 4)
    assert mask_of(first, 64).problem


def test_what_is_traced_is_text_and_of_no_image() -> None:
    """Other threads' models may well have images, whose tokens see each other."""
    ids = torch.tensor([[-1, 0, 0, -1]])

    def overlaid() -> bool:
        overlay = masking_utils.blockwise_overlay(ids)
        return bool(overlay(torch.tensor(0), torch.tensor(0), torch.tensor(1), torch.tensor(2)))

    with described_masks(64), ThreadPoolExecutor(1) as others:
        assert not overlaid() and others.submit(overlaid).result()
        masks = masking_utils.causal_mask_function, masking_utils.blockwise_overlay(ids.to("meta"))
        assert mask_of(masking_utils.or_masks(*masks), 64) == AttentionMask()
    assert overlaid()


@pytest.mark.parametrize("name", ["phimoe", "qwen2_moe"])
def test_windows_that_only_the_mask_knows(name: str) -> None:
    """Their attention is passed no window; the mask function has it from the config."""
    config = AutoConfig.for_model(
        name,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        use_sliding_window=True,
        max_window_layers=1,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    imported = import_hugging_face(model, dtype=None, max_tokens=64)
    windows = [n.attrs.get("window", 0) for n in imported.graph.nodes() if n.op is attention]
    assert 8 in windows
    assert_close(logits_of(imported, _TOKENS), eager(model, _TOKENS), 1e-4)


def test_a_window_longer_than_every_sequence_is_none() -> None:
    imported = import_hugging_face(tiny_model("mistral"), dtype=None, max_tokens=16)
    assert all(n.attrs.get("window", 0) == 0 for n in imported.graph.nodes() if n.op is attention)
