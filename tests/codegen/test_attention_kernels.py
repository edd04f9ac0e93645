"""Attention kernels with keys and values a head, against the references."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_builds import build_attention, empty, index
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.codegen.kernel_backend import NoKernelError
from ingot.codegen.templates.attention.attend import Splits, split_start, splits_of
from ingot.compiler.ops.attention import attention, cached_attention
from kernel_checks import ALL_TARGETS, Strided, check_node, run_node
from paged_batches import Batch, batch, chunks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _args(
    given: Batch, heads: int, kv_heads: int, d: int, v: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    q = torch.randn(len(given.slots), heads, d).to(dtype)
    keys = given.cache(kv_heads, d, dtype=dtype)
    return q, keys, given.cache(kv_heads, v, dtype=dtype), *given.index


# ---- few tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
def test_decoding_several_slots(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    places = [(0, 150), (2, 0), (-1, 0), (1, 67)]
    check_node(
        cached_attention, _args(batch(places, 16, 10), *heads, 16, 16, dtype), {"scale": 0.3}
    )


@pytest.mark.parametrize(("d", "v"), [(24, 20), (8, 6), (192, 128)])
def test_heads_of_any_size(d: int, v: int) -> None:
    args = _args(batch([(0, 70), (0, 71)], 64, 2), 2, 1, d, v, torch.bfloat16)
    check_node(cached_attention, args, {"scale": d**-0.5})


def test_more_heads_a_group_than_rows_a_block() -> None:
    args = _args(batch([(1, 99), (0, 3)], 32, 4), 20, 1, 16, 16, torch.float32)
    check_node(cached_attention, args, {"scale": 0.3})


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    "attrs", [{"window": 5}, {"window": 90}, {"softcap": 2.0}, {"window": 1, "softcap": 0.5}]
)
def test_windows_and_soft_caps(dtype: torch.dtype, attrs: dict[str, Any]) -> None:
    args = _args(batch([(0, 200), (1, 3), (0, 65)], 16, 13), 2, 1, 16, 16, dtype)
    check_node(cached_attention, args, {"scale": 0.5, **attrs})


@pytest.mark.parametrize("context", [64, 208])
@pytest.mark.parametrize("window", [0, 7])
def test_sinks(context: int, window: int) -> None:
    given = batch([(0, context - 1), (-1, 9), (1, 20)], 16, context // 16)
    args = _args(given, 4, 2, 16, 16, torch.bfloat16)
    for sinks in (torch.randn(4), torch.randn(4).bfloat16()):
        check_node(cached_attention, args, {"sinks": sinks, "scale": 0.3, "window": window})


def test_verification_of_drafts_beside_other_slots() -> None:
    places = chunks((1, 130, 5), (0, 63, 3), (-1, 0, 2), (2, 0, 4))
    args = _args(batch(places, 64, 3), 4, 2, 16, 16, torch.float32)
    check_node(cached_attention, args, {"scale": 0.3})


def test_padding_alone_gives_zeros() -> None:
    args = _args(batch([(-1, 0), (-1, 5)], 16, 8, slots=2), 2, 1, 16, 16, torch.bfloat16)
    (found,), _, _ = run_node(cached_attention, args, {"scale": 0.3})
    assert not found.any()


@pytest.mark.parametrize("last", [2047, 2048, 5000])
def test_contexts_in_which_splits_grow(last: int) -> None:
    args = _args(batch([(0, last), (0, 77)], 1024, 5), 1, 1, 16, 16, torch.float32)
    lowered = check_node(cached_attention, args, {"scale": 0.3})
    assert lowered.choices[0].kernels == ("attend_kernel", "combine_kernel")


@given(st.integers(1, 200_000), st.sampled_from([(64, 32), (128, 32), (16, 4)]))
def test_splits_meet_and_cover_every_context(context: int, sizes: tuple[int, int]) -> None:
    count = splits_of(context, *sizes)
    starts = [split_start.fn(i, Splits(count, *sizes, 0)) for i in range(count + 1)]
    lengths = [b - a for a, b in pairwise(starts)]
    assert starts[0] == 0 and starts[count - 1] < context <= starts[count]
    assert lengths == [sizes[0] << (i // sizes[1]) for i in range(count)]


@pytest.mark.parametrize("window", [0, 70])
def test_a_token_sums_alike_whatever_is_beside_it(window: int) -> None:
    places = chunks((0, 190, 3), (1, 100, 2), (-1, 0, 1), (2, 5, 1), (1, 102, 2))
    whole = batch(places, 16, 13)
    q, *caches = _args(whole, 4, 2, 16, 16, torch.bfloat16)[:3]
    attrs = {"scale": 0.3, "window": window}
    (together,), _, _ = run_node(cached_attention, (q, *caches, *whole.index), attrs)
    for token in (2, 4, 8):
        args = (q[token : token + 1], *caches, *whole.only([token]).index)
        (alone,), _, _ = run_node(cached_attention, args, attrs)
        assert torch.equal(alone[0], together[token])


@settings(max_examples=12)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    page_size, pages = data.draw(st.sampled_from([(16, 9), (32, 4), (128, 1)]))
    place = st.tuples(st.integers(-1, 2), st.integers(0, page_size * pages - 1))
    places = data.draw(st.lists(place, min_size=1, max_size=9))
    group, kv_heads = data.draw(st.sampled_from([(1, 2), (3, 1), (5, 1), (4, 2)]))
    attrs = {"scale": 0.4, "window": data.draw(st.sampled_from([0, 0, 1, 20, 100]))}
    d, v = data.draw(st.sampled_from([(16, 16), (20, 8)]))
    given_batch = batch(places, page_size, pages, slots=3)
    args = _args(given_batch, group * kv_heads, kv_heads, d, v, torch.float32)
    check_node(cached_attention, args, attrs)


# ---- many tokens


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("attrs", [{}, {"window": 30}])
def test_prefill_of_chunks(dtype: torch.dtype, attrs: dict[str, Any]) -> None:
    places = chunks((1, 0, 40), (0, 33, 20), (-1, 0, 5), (2, 7, 2))
    args = _args(batch(places, 16, 4), 2, 1, 16, 16, dtype)
    check_node(cached_attention, args, {"sinks": torch.randn(2), "scale": 0.3, **attrs})


def test_many_tokens_in_any_order() -> None:
    places = chunks((1, 0, 30), (0, 33, 20), (-1, 0, 5), (2, 7, 15))
    shuffled = [places[i] for i in torch.randperm(len(places)).tolist()]
    args = _args(batch(shuffled, 64, 1), 3, 1, 24, 16, torch.float32)
    check_node(cached_attention, args, {"scale": 0.3})


def test_decoding_more_slots_than_a_block_has_rows() -> None:
    places = [(slot, 3 * slot % 32) for slot in range(70)]
    args = _args(batch(places, 16, 2), 1, 1, 16, 16, torch.bfloat16)
    check_node(cached_attention, args, {"scale": 0.3})


# ---- one sequence without a cache


@pytest.mark.parametrize("tokens", [1, 7, 90])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_one_sequence(tokens: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(tokens, h, d).to(dtype) for h, d in ((4, 24), (2, 24), (2, 20)))
    check_node(attention, (q, k, v), {"scale": 0.3})
    check_node(attention, (q, k, v), {"scale": 0.3, "causal": False})
    attrs = {"scale": 0.3, "window": 3, "softcap": 2.0}
    check_node(attention, (q, k, v), {"sinks": torch.randn(4), **attrs})


def test_more_keys_than_queries() -> None:
    args = tuple(torch.randn(t, 2, 16) for t in (5, 75, 75))
    for causal in (True, False):
        check_node(attention, args, {"scale": 0.3, "causal": causal, "window": 9})


def test_heads_that_are_slices() -> None:
    args = [Strided(torch.randn(9, 2, 16).bfloat16()) for _ in range(3)]
    lowered = check_node(attention, args, {"scale": 0.3})
    assert lowered.choices[0].kernels == ("attend_kernel",)


@pytest.mark.parametrize("target", ALL_TARGETS)
@pytest.mark.parametrize("tokens", [3, 66])
def test_tiles_of_every_target(target: str, tokens: int) -> None:
    args = _args(batch(chunks((1, 40, tokens), (0, 9, 1)), 64, 2), 2, 1, 16, 16, torch.bfloat16)
    check_node(cached_attention, args, {"scale": 0.1}, target)


# ---- builds


def test_decoding_builds_for_every_target() -> None:
    q, cache = empty(torch.bfloat16, 1, 32, 128), empty(torch.bfloat16, 1024, 64, 8, 128)
    build_attention(cached_attention, (q, cache, cache, *index(1)), {"scale": 0.1})


def test_prefill_with_sinks_builds_for_every_target() -> None:
    q, cache = empty(torch.bfloat16, 2048, 64, 64), empty(torch.bfloat16, 1024, 64, 8, 64)
    named = {"sinks": empty(torch.bfloat16, 64), "scale": 0.1, "window": 128}
    build_attention(cached_attention, (q, cache, cache, *index(2048)), named)


def test_pages_that_are_no_power_of_two_are_told() -> None:
    args = _args(batch([(0, 3)], 24, 2), 2, 1, 16, 16, torch.float32)
    with pytest.raises(NoKernelError, match=r"power of two of at least 16, found 24"):
        run_node(cached_attention, args, {"scale": 0.3})
