"""Kernels of latent attention and of the latent rows, against the references."""

from __future__ import annotations

import pytest
import torch
from attention_builds import build_attention, empty, index
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.compiler.ops.mla import cached_mla_attention, mla_attention, mla_latent
from ingot.compiler.ops.rope import FORMS
from kernel_checks import ALL_TARGETS, Strided, Weight, build_everywhere, check_node, run_node
from paged_batches import Batch, batch, chunks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _args(
    given: Batch, heads: int, rank: int, pe: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    q, q_pe = (torch.randn(len(given.slots), heads, n).to(dtype) for n in (rank, pe))
    return q, q_pe, given.cache(rank + pe, dtype=dtype), *given.index


# ---- mla_latent


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "half"), [(24, 5), (512, 32), (7, 1)])
def test_latent_rows(form: str, dtype: torch.dtype, rank: int, half: int) -> None:
    kv = torch.randn(5, rank + 2 * half).to(dtype)
    angle = torch.randn(5, half)
    args = (kv, Weight(torch.randn(rank)), angle.cos(), angle.sin())
    attrs = {"eps": 1e-3, "form": form}
    check_node(mla_latent, args, attrs)
    lowered = check_node(mla_latent, (Strided(kv), *args[1:]), attrs)
    assert lowered.choices[0].kernels == ("latent_kernel",)


# ---- cached_mla_attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "rank", "pe"), [(4, 32, 16), (3, 48, 16), (20, 16, 6)])
def test_decoding_several_slots(dtype: torch.dtype, heads: int, rank: int, pe: int) -> None:
    places = [(0, 150), (2, 0), (-1, 0), (1, 67)]
    args = _args(batch(places, 16, 10), heads, rank, pe, dtype)
    check_node(cached_mla_attention, args, {"scale": 0.2})


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_ranks_of_deepseek(dtype: torch.dtype) -> None:
    args = _args(batch([(1, 130), (0, 9)], 64, 3), 18, 512, 64, dtype)
    check_node(cached_mla_attention, args, {"scale": 0.05})


def test_verification_of_drafts_beside_other_slots() -> None:
    places = chunks((1, 126, 5), (0, 63, 3), (-1, 0, 2), (2, 0, 4))
    args = _args(batch(places, 64, 3), 5, 32, 16, torch.float32)
    check_node(cached_mla_attention, args, {"scale": 0.2})


def test_prefill_of_chunks_in_any_order() -> None:
    places = chunks((1, 0, 40), (0, 33, 20), (-1, 0, 5), (2, 7, 5))
    shuffled = [places[i] for i in torch.randperm(len(places)).tolist()]
    for order in (places, shuffled):
        args = _args(batch(order, 16, 4), 3, 32, 16, torch.bfloat16)
        check_node(cached_mla_attention, args, {"scale": 0.2})


def test_a_token_sums_alike_whatever_is_beside_it() -> None:
    whole = batch(chunks((0, 190, 3), (-1, 0, 1), (1, 100, 3)), 16, 13)
    q, q_pe, cache = _args(whole, 3, 32, 16, torch.bfloat16)[:3]
    attrs = {"scale": 0.2}
    (together,), _, _ = run_node(cached_mla_attention, (q, q_pe, cache, *whole.index), attrs)
    for token in (0, 2, 5):
        args = (q, q_pe, cache, *whole.beside_nothing(token).index)
        (alone,), _, _ = run_node(cached_mla_attention, args, attrs)
        assert torch.equal(alone[token], together[token])


@settings(max_examples=12)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    page_size, pages = data.draw(st.sampled_from([(16, 9), (32, 4), (128, 1)]))
    place = st.tuples(st.integers(-1, 2), st.integers(0, page_size * pages - 1))
    places = data.draw(st.lists(place, min_size=1, max_size=9))
    heads = data.draw(st.sampled_from([1, 3, 16, 20]))
    args = _args(batch(places, page_size, pages, slots=3), heads, 16, 16, torch.float32)
    check_node(cached_mla_attention, args, {"scale": 0.3})


# ---- mla_attention


@pytest.mark.parametrize("tokens", [1, 7, 70])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_one_sequence(tokens: int, dtype: torch.dtype) -> None:
    q, q_pe = (torch.randn(tokens, 4, n).to(dtype) for n in (32, 16))
    for rows in (torch.randn(tokens, 48).to(dtype), Strided(torch.randn(tokens, 48).to(dtype))):
        check_node(mla_attention, (q, q_pe, rows), {"scale": 0.2})


@pytest.mark.parametrize("target", ALL_TARGETS)
@pytest.mark.parametrize("tokens", [3, 66])
def test_tiles_of_every_target(target: str, tokens: int) -> None:
    args = _args(batch(chunks((1, 40, tokens), (0, 9, 1)), 64, 2), 3, 512, 16, torch.bfloat16)
    check_node(cached_mla_attention, args, {"scale": 0.1}, target)


# ---- builds


@pytest.mark.parametrize("tokens", [1, 2048])
def test_builds_for_every_target(tokens: int) -> None:
    bf16 = torch.bfloat16
    query = (empty(bf16, tokens, 128, 512), empty(bf16, tokens, 128, 64))
    args = (*query, empty(bf16, 1024, 64, 576), *index(tokens))
    build_attention(cached_mla_attention, args, {"scale": 0.05})


def test_latent_builds_for_every_target() -> None:
    table = empty(torch.float32, 8, 32)
    args = (empty(torch.bfloat16, 8, 576), empty(torch.bfloat16, 512), table, table)
    build_everywhere(mla_latent, args, {"eps": 1e-6, "form": "deinterleaved"})
