"""Ops of absorbed latent attention: against plain torch, through the paged cache, to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ingot.compiler.ops import attention, linear, mla, norm, rope
from ingot.compiler.torch_types import dtype_name, type_of
from ingot.compiler.types import TensorType, VerifyError, symbol
from op_cases import cost_of
from op_checks import SOME, TOKENS, assert_same_bits, both, error, parsed, seeded, tokens_of

T = symbol("T")
HEADS, RANK, PE = 3, 10, 4


def queries(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q_latent [T, H, R], q_pe [T, H, P] and latent [T, R + P]."""
    sizes = ((tokens, HEADS, RANK), (tokens, HEADS, PE), (tokens, RANK + PE))
    g = seeded(seed)
    return [torch.randn(*size, generator=g).to(dtype) for size in sizes]


# ---- head_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_linear_is_a_product_for_each_head(dtype: torch.dtype) -> None:
    x, w = torch.randn(7, 3, 9, generator=seeded()), torch.randn(3, 5, 9, generator=seeded(1))
    x, w = x.to(dtype), w.to(dtype)
    (found,) = linear.head_linear.reference(x, w)
    expected = torch.einsum("thk,hnk->thn", x.double(), w.double())
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype)) or error(found, expected) < 1e-6
    cost = cost_of(linear.head_linear, (type_of(x), type_of(w)), (type_of(found),))
    assert cost.flops == 2 * 7 * 3 * 5 * 9
    assert cost.bytes == sum(t.nbytes for t in (x, w, found))


@pytest.mark.parametrize(
    "args",
    [
        ("f32[7, 3, 9]", "f32[2, 5, 9]"),
        ("f32[7, 3, 9]", "f32[3, 9, 5]"),
        ("f32[7, 27]", "f32[3, 5, 9]"),
        ("f32[7, 3, 9]", "f32[3, 9]"),
        ("f32[7, 3, 9]", "bf16[3, 5, 9]"),
        ("i32[7, 3, 9]", "i32[3, 5, 9]"),
    ],
)
def test_head_linear_refuses(args: tuple[str, ...]) -> None:
    message = r"head_linear: expected x \[T, H, K\] and weight \[H, N, K\] of one float dtype"
    with pytest.raises(VerifyError, match=message):
        linear.head_linear.types(tuple(map(parsed, args)), {})


@both
@pytest.mark.parametrize(("k", "n"), [(16, 8), (5, 7), (64, 64), (24, 1), (128, 512)])
def test_head_linear_gives_each_token_the_same_bits(dtype: torch.dtype, k: int, n: int) -> None:
    w = torch.randn(HEADS, n, k, generator=seeded(1)).to(dtype)
    by_head = lambda x: linear.head_linear.reference(x, w)[0]  # noqa: E731
    assert_same_bits(by_head, tokens_of(HEADS, k, dtype=dtype), counts=SOME)


# ---- mla_attention


def naive(q_latent: torch.Tensor, q_pe: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """softmax(0.4 · (q_latent · c_kv + q_pe · k_pe)) · c_kv over what a token sees, in f64."""
    rank = q_latent.shape[-1]
    c_kv, k_pe = latent[:, :rank].double(), latent[:, rank:].double()
    scores = torch.einsum("thr,sr->ths", q_latent.double(), c_kv)
    scores = 0.4 * (scores + torch.einsum("thp,sp->ths", q_pe.double(), k_pe))
    later = torch.ones(len(latent), len(latent)).triu(1).bool()
    weights = scores.masked_fill(later[:, None], -math.inf).softmax(-1)
    return torch.einsum("ths,sr->thr", weights, c_kv)


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mla_attention_is_its_formula(tokens: int, dtype: torch.dtype) -> None:
    args = queries(tokens, dtype=dtype)
    (found,) = mla.mla_attention.reference(*args, scale=0.4)
    assert found.dtype == dtype
    rounding = 1e-6 if dtype == torch.float32 else 4e-3  # one rounding of the result
    assert error(found, naive(*args)) < rounding


def test_absorbed_attention_is_attention_over_expanded_keys_and_values() -> None:
    """(q W_UK) · c == q · (W_UK c), and (Σ w c) W_UV == Σ w (W_UV c)."""
    _, q_pe, latent = queries(9)
    c_kv, k_pe = latent[:, :RANK], latent[:, RANK:]
    g = seeded(3)
    q_nope, w_uk = torch.randn(9, HEADS, 6, generator=g), torch.randn(HEADS, 6, RANK, generator=g)
    w_uv = torch.randn(HEADS, 5, RANK, generator=g)
    k_nope, v = (torch.einsum("hnr,sr->shn", w, c_kv) for w in (w_uk, w_uv))
    k = torch.cat((k_nope, k_pe[:, None].expand(-1, HEADS, -1)), -1)
    (expected,) = attention.attention.reference(torch.cat((q_nope, q_pe), -1), k, v, scale=0.4)
    (q_latent,) = linear.head_linear.reference(q_nope, w_uk.transpose(1, 2))
    (mixed,) = mla.mla_attention.reference(q_latent, q_pe, latent, scale=0.4)
    (found,) = linear.head_linear.reference(mixed, w_uv)
    assert error(found, expected) < 1e-6


# ---- cached_mla_attention

LENGTHS = (13, 1, 9)
Step = list[tuple[int, int]]  # (slot, tokens) in the order they are fed; slot -1 is padding


def serve(
    lengths: tuple[int, ...], steps: list[Step], page_size: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """The output of every token of every slot, fed in `steps` through a cache that held NaN."""
    sequences = [queries(n, 100 + i, dtype) for i, n in enumerate(lengths)]
    pages = -(-max(lengths) // page_size) + 1
    order = torch.randperm(len(lengths) * pages, generator=seeded(5))
    table = order.view(len(lengths), pages).int()
    cache = torch.full((table.numel(), page_size, RANK + PE), math.nan, dtype=dtype)
    done, out = [0] * len(lengths), [list[torch.Tensor]() for _ in lengths]
    for step in steps:
        rows: list[tuple[int, int]] = []
        for slot, count in step:
            start = done[slot] if slot >= 0 else 0
            rows += [(slot, start + i) for i in range(count)]
            if slot >= 0:
                done[slot] += count
        slots, positions = (torch.tensor([r[i] for r in rows], dtype=torch.int32) for i in (0, 1))
        q_latent, q_pe, latent = (
            torch.stack([sequences[s][j][p] if s >= 0 else x[0] * math.nan for s, p in rows])
            for j, x in enumerate(sequences[0])
        )
        index = (slots, positions, table)
        (cache,) = attention.kv_append.reference(cache, latent, *index)
        (result,) = mla.cached_mla_attention.reference(q_latent, q_pe, cache, *index, scale=0.4)
        for (slot, _), row in zip(rows, result, strict=True):
            if slot >= 0:
                out[slot].append(row)
            else:
                assert not row.any(), "padding attends to nothing"
    assert done == list(lengths)
    return [torch.stack(rows) for rows in out]


STEPS: dict[str, list[Step]] = {
    "at once": [list(enumerate(LENGTHS))],
    "one by one": [[(slot, 1)] for slot, n in enumerate(LENGTHS) for _ in range(n)],
    "mixed": [[(-1, 1), (2, 4), (0, 5)], [(0, 6), (1, 1), (-1, 2)], [(2, 5), (-1, 1), (0, 2)]],
}


@pytest.mark.parametrize("page_size", [1, 4, 64])
def test_cached_mla_attention_is_mla_attention_over_each_sequence(page_size: int) -> None:
    results = [serve(LENGTHS, steps, page_size) for steps in STEPS.values()]
    for slot, n in enumerate(LENGTHS):
        (expected,) = mla.mla_attention.reference(*queries(n, 100 + slot), scale=0.4)
        for result in results:
            assert error(result[slot], expected) < 2e-6
            assert torch.equal(result[slot], results[0][slot])


@both
@pytest.mark.parametrize("page_size", [3, 64])
def test_cached_mla_attention_gives_each_token_the_same_bits(
    dtype: torch.dtype, page_size: int
) -> None:
    lengths = (TOKENS, 5)
    together = serve(lengths, [[(0, TOKENS), (1, 5)]], page_size, dtype)
    for n in SOME:
        steps: list[Step] = [[(0, n), (1, n % 6)], [(1, 5 - n % 6), (-1, 2), (0, TOKENS - n)]]
        for a, b in zip(serve(lengths, steps, page_size, dtype), together, strict=True):
            assert torch.equal(a, b), f"{n} tokens first"


INDEX = ("i32[T]", "i32[T]", "i32[2, 3]")
Q = ("bf16[T, 4, 8]", "bf16[T, 4, 2]")


def test_the_cache_is_read_once() -> None:
    types = tuple(map(parsed, (*Q, "bf16[6, 4, 10]", *INDEX)))
    results = mla.cached_mla_attention.types(types, {"scale": 1.0})
    cost = cost_of(mla.cached_mla_attention, types, results, scale=1.0)
    context = 3 * 4  # pages a slot · tokens a page
    assert results == types[:1]
    assert cost.flops == 2 * T * 4 * (8 + 2 + 8) * context
    assert cost.bytes == 2 * T * 4 * (8 + 2 + 8) + 2 * context * 10 * 2


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("bf16[T, 4, 8]", "bf16[T, 3, 2]", "bf16[6, 4, 10]", *INDEX), "static heads"),
    (("bf16[T, 4, 7]", "bf16[T, 4, 2]", "bf16[6, 4, 10]", *INDEX), "static heads"),
    (("bf16[T, 4, 8]", "bf16[T, 4, 0]", "bf16[6, 4, 8]", *INDEX), "static heads"),
    (("bf16[T, 32]", "bf16[T, 4, 2]", "bf16[6, 4, 10]", *INDEX), r"q_latent \[T, H, R\]"),
    (("f32[T, 4, 8]", "bf16[T, 4, 2]", "bf16[6, 4, 10]", *INDEX), "one float dtype"),
    (("bf16[T, 4, T]", "bf16[T, 4, 2]", "bf16[6, 4, 10]", *INDEX), "static heads"),
    ((*Q, "bf16[4, 10]", *INDEX), r"a cache \[pages, size, R \+ P\]"),
    ((*Q, "bf16[6, 4, 1, 10]", *INDEX), r"a cache \[pages, size, R \+ P\]"),
    ((*Q, "bf16[6, 4, 10]", "i32[7]", *INDEX[1:]), r"slots and positions i32\[T\]"),
    ((*Q, "bf16[6, 4, 10]", *INDEX[:2], "i32[3]"), "page table"),
]


@pytest.mark.parametrize(("args", "message"), REFUSED)
def test_cached_mla_attention_refuses(args: tuple[str, ...], message: str) -> None:
    with pytest.raises(VerifyError, match=f"cached_mla_attention: expected .*{message}"):
        mla.cached_mla_attention.types(tuple(map(parsed, args)), {"scale": 1.0})


@pytest.mark.parametrize("latent", ["bf16[7, 10]", "bf16[T, 1, 10]", "bf16[T, 11]", "f32[T, 10]"])
def test_mla_attention_refuses(latent: str) -> None:
    with pytest.raises(VerifyError, match="mla_attention: expected .* found"):
        mla.mla_attention.types(tuple(map(parsed, (*Q, latent))), {"scale": 1.0})


# ---- mla_latent


@pytest.mark.parametrize("form", rope.FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mla_latent_is_the_norm_beside_the_rotated_part(dtype: torch.dtype, form: str) -> None:
    g = seeded()
    kv, weight = torch.randn(5, RANK + PE, generator=g), torch.randn(RANK, generator=g)
    tables = tuple(torch.randn(5, PE // 2, generator=g) for _ in range(2))
    kv, weight = kv.to(dtype), weight.to(dtype)
    (found,) = mla.mla_latent.reference(kv, weight, *tables, eps=1e-5, form=form)
    (c_kv,) = norm.rms_norm.reference(kv[:, :RANK], weight=weight, eps=1e-5)
    (k_pe,) = rope.rope.reference(kv[:, RANK:], *tables, form=form)
    assert torch.equal(found, torch.cat((c_kv, k_pe), -1))
    types = tuple(type_of(x) for x in (kv, weight, *tables))
    assert mla.mla_latent.types(types, {"eps": 1e-5, "form": form}) == (type_of(found),)
    assert types[0].dtype == dtype_name(dtype)


@both
@pytest.mark.parametrize("form", rope.FORMS)
def test_mla_latent_gives_each_token_the_same_bits(dtype: torch.dtype, form: str) -> None:
    weight = torch.randn(RANK, generator=seeded(1)).to(dtype)
    tables = tokens_of(2, PE // 2, dtype=dtype, seed=2)

    def latent(kv: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        cos, sin = tables[:, 0], tables[:, 1]
        return mla.mla_latent.reference(kv, weight, cos, sin, eps=1e-6, form=form)[0]

    assert_same_bits(latent, tokens_of(RANK + PE, dtype=dtype), tables, counts=SOME)


LATENT = ("f32[T, 14]", "f32[10]", "f32[T, 2]", "f32[T, 2]")


@pytest.mark.parametrize(
    ("changes", "attrs", "message"),
    [
        ({}, {"form": "mirrored"}, "form is one of half, interleaved, deinterleaved"),
        ({0: "f32[T, 15]"}, {}, r"kv of 10 \+ 2 · 2 columns, found f32\[T, 15\]"),
        ({1: "f32[10, 1]"}, {}, "expected floats kv"),
        ({2: "f32[7, 2]", 3: "f32[7, 2]"}, {}, "expected floats kv"),
        ({3: "f32[T, 3]"}, {}, "expected floats kv"),
        ({0: "i32[T, 14]"}, {}, "expected floats kv"),
    ],
)
def test_mla_latent_refuses(changes: dict[int, str], attrs: Any, message: str) -> None:
    args = tuple(parsed(changes.get(i, text)) for i, text in enumerate(LATENT))
    with pytest.raises(VerifyError, match=f"mla_latent: .*{message}"):
        mla.mla_latent.types(args, {"eps": 1e-6, "form": "half", **attrs})


def test_a_row_of_latent_is_what_the_cache_appends() -> None:
    cache, rows = TensorType("bf16", (6, 4, RANK + PE)), TensorType("bf16", (T, RANK + PE))
    index = tuple(map(parsed, INDEX))
    cost = cost_of(attention.kv_append, (cache, rows, *index), (cache,))
    assert cost.bytes == 2 * (RANK + PE) * 2 * T  # read once, written once
