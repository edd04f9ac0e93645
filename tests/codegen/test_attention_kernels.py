"""Attention kernels with keys and values a head, against the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_builds import build_attention, empty, index
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.codegen import select
from ingot.codegen.kernel_backend import NoKernelError
from ingot.codegen.kernel_query import Candidate, Declined, KernelQuery
from ingot.codegen.lower import lower
from ingot.codegen.templates.attention import attend_plan, grouped_query
from ingot.codegen.templates.attention.decode import decode_kernel
from ingot.compiler.ops.attention import attention, cached_attention
from ingot.compiler.ops.mla import cached_mla_attention
from ingot.compiler.target import target_of
from interpreted import InterpretedBackend
from kernel_checks import ALL_TARGETS, Strided, check_node, graph_of_node, run_node
from paged_batches import Batch, batch, chunks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _args(
    given: Batch, heads: int, kv_heads: int, d: int, v: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    q = torch.randn(len(given.slots), heads, d).to(dtype)
    keys = given.cache(kv_heads, d, dtype=dtype)
    return q, keys, given.cache(kv_heads, v, dtype=dtype), *given.index


@pytest.fixture(params=[True, False], ids=["one launch", "two launches"])
def joined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context in parts by each form in turn, whatever it costs."""

    def template(query: KernelQuery) -> list[Candidate | Declined]:
        answer = grouped_query.attention(query)
        assert not isinstance(answer, Declined)
        found = list(answer)
        return [c for c in found if bool(c.counters) == request.param] or [*found]

    monkeypatch.setattr(select, "_TABLES", ({"cached_attention": (template,)},))


# ---- few tokens


@pytest.mark.usefixtures("joined")
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


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    "attrs", [{"window": 5}, {"window": 90}, {"softcap": 2.0}, {"window": 1, "softcap": 0.5}]
)
def test_windows_and_soft_caps(dtype: torch.dtype, attrs: dict[str, Any]) -> None:
    args = _args(batch([(0, 200), (1, 3), (0, 65)], 16, 13), 2, 1, 16, 16, dtype)
    check_node(cached_attention, args, {"scale": 0.5, **attrs})


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("context", [64, 208])
@pytest.mark.parametrize("window", [0, 7])
def test_sinks(context: int, window: int) -> None:
    given = batch([(0, context - 1), (-1, 9), (1, 20)], 16, context // 16)
    args = _args(given, 4, 2, 16, 16, torch.bfloat16)
    for sinks in (torch.randn(4), torch.randn(4).bfloat16()):
        check_node(cached_attention, args, {"sinks": sinks, "scale": 0.3, "window": window})


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_program_on_every_multiprocessor(slots: int) -> None:
    """So that launches overlap on NVIDIA, also where there is less to do; not on AMD."""
    places = [(slot, 70 * slot) for slot in range(slots)]
    args = _args(batch(places, 64, 10, slots=8), 8, 2, 16, 16, torch.bfloat16)
    for target, spread in (("cuda:sm_90", True), ("hip:gfx942", False)):
        lowered = check_node(cached_attention, args, {"scale": 0.3}, target)
        ((launch,),) = (e.launches for e in lowered.program.functions["step"].entries)
        assert (launch.grid == (132, 1, 1)) == spread


def test_verification_of_drafts_beside_other_slots() -> None:
    places = chunks((1, 130, 5), (0, 63, 3), (-1, 0, 2), (2, 0, 4))
    args = _args(batch(places, 64, 3), 4, 2, 16, 16, torch.float32)
    check_node(cached_attention, args, {"scale": 0.3})


@pytest.mark.usefixtures("joined")
def test_padding_alone_gives_zeros() -> None:
    args = _args(batch([(-1, 0), (-1, 5)], 16, 8, slots=2), 2, 1, 16, 16, torch.bfloat16)
    (found,), _, _ = run_node(cached_attention, args, {"scale": 0.3})
    assert not found.any()


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("window", [0, 1, 40, 500])
@pytest.mark.parametrize("last", [63, 64, 319, 700])
def test_parts_of_several_tiles(
    parts: int, window: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window may begin in a later part than the one in which it ends."""
    monkeypatch.setattr(attend_plan, "_MOST_PARTS", parts)
    places = [(0, last), (0, last - 1), (1, 77)]
    args = _args(batch(places, 64, 11, slots=2), 2, 1, 16, 16, torch.bfloat16)
    lowered = check_node(cached_attention, args, {"scale": 0.3, "window": window})
    assert f"{parts} parts" in lowered.choices[0].reason
    assert lowered.choices[0].kernels[0] == "decode_kernel"


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.usefixtures("joined")
def test_a_token_sums_alike_whatever_is_beside_it(window: int) -> None:
    places = chunks((0, 190, 3), (1, 100, 2), (-1, 0, 1), (2, 5, 1), (1, 102, 2))
    whole = batch(places, 16, 13)
    q, *caches = _args(whole, 4, 2, 16, 16, torch.bfloat16)[:3]
    attrs = {"scale": 0.3, "window": window}
    (together,), _, _ = run_node(cached_attention, (q, *caches, *whole.index), attrs)
    for token in (2, 4, 8):
        args = (q, *caches, *whole.beside_nothing(token).index)
        (alone,), _, _ = run_node(cached_attention, args, attrs)
        assert torch.equal(alone[token], together[token])


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


@pytest.mark.parametrize(("heads", "groups", "d"), [(4, 2, 512), (3, 3, 144), (4, 1, 256)])
def test_wide_heads(heads: int, groups: int, d: int) -> None:
    args = _args(batch(chunks((1, 60, 3), (0, 9, 1)), 64, 2), heads, groups, d, d, torch.bfloat16)
    check_node(cached_attention, args, {"scale": 0.05})


# Heads, key/value heads, dims of keys and of values, and window, of models as they are served.
SERVED = (
    (12, 12, 64, 64, 128),
    (64, 8, 64, 64, 128),
    (32, 32, 80, 80, 0),
    (32, 8, 96, 96, 0),
    (96, 8, 42, 42, 0),
    (40, 8, 128, 128, 0),
    (64, 8, 128, 128, 0),
    (32, 4, 128, 128, 128),
    (32, 2, 128, 128, 0),
    (32, 32, 144, 144, 128),
    (64, 4, 192, 128, 0),
    (8, 2, 256, 256, 512),
    (16, 16, 464, 464, 0),
    (16, 2, 512, 512, 0),
)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, pytest.param(64, marks=pytest.mark.sweep), 2048])
@pytest.mark.parametrize("served", SERVED, ids=str)
def test_sizes_that_are_served_build_for_every_target(served: tuple[int, ...], tokens: int) -> None:
    heads, groups, d, v, window = served
    q = empty(torch.bfloat16, tokens, heads, d)
    caches = (empty(torch.bfloat16, 512, 64, groups, n) for n in (d, v))
    named = {"scale": 0.1, **({"window": window} if window else {})}
    build_attention(cached_attention, (q, *caches, *index(tokens, pages=64)), named)


def test_heads_of_512_dims_build_for_every_target() -> None:
    q, cache = empty(torch.bfloat16, 1, 16, 512), empty(torch.bfloat16, 512, 64, 2, 512)
    build_attention(cached_attention, (q, cache, cache, *index(1, pages=64)), {"scale": 0.1})


@pytest.mark.parametrize("target", ALL_TARGETS)
@pytest.mark.parametrize("d", [512, 1024])
def test_tiles_are_as_long_as_shared_memory_allows(target: str, d: int) -> None:
    """Keys and values of their own take twice what rows that are both take. On NVIDIA tiles of
    latents are short, so that two programs are on a multiprocessor."""
    tiles: list[tuple[int, int]] = []
    for op, caches in ((cached_attention, 2), (cached_mla_attention, 1)):
        q = empty(torch.bfloat16, 1, 16, d)
        more = () if caches == 2 else (empty(torch.bfloat16, 1, 16, 64),)
        wide = d if caches == 2 else d + 64
        heads = (2,) if caches == 2 else ()
        rows = [empty(torch.bfloat16, 512, 64, *heads, wide)] * caches
        graph, weights, _, _ = graph_of_node(op, (q, *more, *rows, *index(1)), {"scale": 0.1})
        backend = InterpretedBackend(target_of(target))
        lower(graph, weights, backend.target, [{}], ["out0"], backend=backend)
        (source,) = (s for s in backend.sources.values() if s.function is decode_kernel)
        constants = dict(source.constants)
        tiles.append((constants["BLOCK_M"], constants["parts.TILE"]))
    (m, own), (_, shared) = tiles
    assert m == 16
    if target.startswith("cuda"):
        assert (own, shared) == {512: (32, 16), 1024: (16, 16)}[d]
    else:
        assert 16 <= own <= shared <= 64


def test_pages_that_are_no_power_of_two_are_told() -> None:
    args = _args(batch([(0, 3)], 24, 2), 2, 1, 16, 16, torch.float32)
    with pytest.raises(NoKernelError, match=r"power of two of at least 16, found 24"):
        run_node(cached_attention, args, {"scale": 0.3})
