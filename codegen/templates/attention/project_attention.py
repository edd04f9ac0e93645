"""Attention by heads out of one product: made by a launch of their own, or where they attend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import triton

from ....compiler.ops.attention import cached_attention
from ....compiler.types import TensorType
from ...kernel_query import (
    Append,
    Arg,
    Call,
    Candidate,
    Counter,
    Declined,
    KernelQuery,
    Operand,
    Ref,
    Result,
    Temp,
    dense_strides,
)
from ...prices import ROUND_TRIP_SECONDS
from ..pdl import spread
from ..rowwise.rows import Pages
from .composed import joined, renamed
from .decode import decode_kernel
from .decode_registers import MOST_HEADS, TILE, WARPS, register_decode_kernel
from .grouped_query import attention
from .heads import (
    THREAD_ELEMENTS,
    head_part,
    product_of,
    products,
    project_heads,
    rotation_of,
)
from .heads_within import Heads
from .parts import Parts

# Tokens of a step, and rows of a block of the attention, whose heads its programs make, at most.
_FEW_TOKENS = 8
_FEW_ROWS = 16


def project_attention(query: KernelQuery) -> Iterator[Candidate | Declined]:
    """project_attention: the product, a launch that makes heads of it and appends keys and values,
    and attention; or for few tokens the product, and attention that makes what it takes."""
    assert query.append
    attends: list[Candidate] = []
    for each in _attention(query, query.append):
        if isinstance(each, Declined):
            yield each
        else:
            attends.append(each)
    made = {Result(0): Temp("q")}
    q = _queries(query).type
    for heads in project_heads(query):
        if isinstance(heads, Declined):
            yield heads
            continue
        calls = tuple(renamed(call, made) for call in heads.calls)
        before = replace(heads, calls=calls, temps={**heads.temps, "q": q})
        yield from (joined(before, each) for each in attends)
    fused: list[Candidate] = []
    for each in attends:
        for make in (_within, _in_registers):
            made_within = make(query, query.append, each)
            if isinstance(made_within, Declined):
                yield made_within
            else:
                fused.append(made_within)
    if fused:
        reason = "the product in f32{note}; heads where they attend, written into the cache"
        for product in products(query, reason):
            if isinstance(product, Candidate):
                yield from (joined(product, each) for each in fused)


def _queries(query: KernelQuery) -> Operand:
    """The queries [T, H, D], which are nobody's result."""
    heads, dims = query.attrs["heads"][0], query.attrs["dims"][0]
    shape = (query.args[0].shape[0], heads, dims)
    return Operand(TensorType(query.args[0].type.dtype, shape), dense_strides(shape))


def _attention(query: KernelQuery, append: Append) -> Iterator[Candidate | Declined]:
    """Ways to attend, by queries in the scratch `q` and the caches as they are updated."""
    caches = [Result(append.caches[part]) for part in (1, 2)]
    index = (append.slots, append.positions, append.page_table)
    refs: list[Ref] = [Temp("q"), *caches, *index]
    args = [_queries(query), *(query.results[c.index] for c in caches)]
    args += [query.args[ref.index] for ref in index]
    sinks = query.ref("sinks")
    if sinks:
        refs.append(sinks)
        args.append(query.args[sinks.index])
    attrs = {
        name: query.attrs[name] for name in ("scale", "window", "softcap") if name in query.attrs
    }
    given = ("sinks",) if sinks else ()
    asked = KernelQuery(
        cached_attention, attrs, tuple(args), query.results[:1], query.target, None, given
    )
    by_ref: dict[Ref, Ref] = {Arg(i): ref for i, ref in enumerate(refs)}
    answer = attention(asked)
    for each in (answer,) if isinstance(answer, Declined) else answer:
        if isinstance(each, Declined):
            yield each
        else:
            yield replace(each, calls=tuple(renamed(call, by_ref) for call in each.calls))


def _within(query: KernelQuery, append: Append, attends: Candidate) -> Candidate | Declined:
    """Attention that makes heads itself."""
    call = attends.calls[0]
    if call.function is not decode_kernel:
        return Declined("heads where they attend: too many tokens")
    threads = call.num_warps * query.target.warp
    if why := _not_within(query, append, call, threads):
        return Declined(f"heads where they attend: {why}")
    parts = [head_part(query, part) for part in range(3)]
    rows = max(_FEW_TOKENS, THREAD_ELEMENTS * threads // min(parts[1].D, parts[2].D))
    heads = Heads(
        product_of(query),
        *(part._replace(out=None, cache=None) for part in parts),
        rotation_of(query),
        triton.next_power_of_2(rows),
        query.target.name.startswith("hip"),
    )
    caches = (Result(append.caches[part]) for part in (1, 2))
    empty = call.args["query"]._replace(data=None)
    alone = replace(
        call,
        args={**call.args, "query": empty, "heads": heads, "MAKES": "heads"},
        writes=(*call.writes, *caches),
    )
    # The product's columns come at once where queries would, and what is appended is read again.
    seconds = attends.seconds + ROUND_TRIP_SECONDS
    return replace(attends, calls=(alone, *attends.calls[1:]), seconds=seconds)


def _in_registers(query: KernelQuery, append: Append, attends: Candidate) -> Candidate | Declined:
    """Attention of one token that makes heads itself and holds its context in registers."""
    call, target = attends.calls[0], query.target
    if why := _not_in_registers(query, append, call):
        return Declined(f"a context in registers: {why}")
    heads, kv_heads, _ = query.attrs["heads"]
    pages: Pages = call.args["pages"]
    tiles = triton.cdiv(pages.PER_SLOT * pages.SIZE, TILE)
    count = max(1, min(target.multiprocessors // kv_heads, tiles))
    v = query.attrs["dims"][2]
    temps = {
        "sums": TensorType("f32", (1, heads, count, v)),
        "tops": TensorType("f32", (1, heads, count)),
        "totals": TensorType("f32", (1, heads, count)),
    }
    programs, resident = spread(target, kv_heads * count)
    parts = (head_part(query, part)._replace(out=None, cache=None) for part in range(3))
    caches = (Result(append.caches[part]) for part in (1, 2))
    args = {
        "product": product_of(query),
        **dict(zip(("query", "key", "value"), parts, strict=True)),
        "rotation": rotation_of(query),
        **{name: call.args[name] for name in ("keys", "values", "pages")},
        "variant": call.args["variant"]._replace(sinks=query.ref("sinks")),
        "out": Result(0),
        "parts": Parts(*map(Temp, temps), v, count, TILE, triton.next_power_of_2(count)),
        "counters": Counter("arrived"),
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "W": WARPS,
    }
    alone = Call(
        register_decode_kernel,
        args,
        (programs, 1, 1),
        (Result(0), *caches, *map(Temp, temps)),
        num_warps=WARPS,
        resident=resident,
    )
    # Where a page lies and what is in it have been read before.
    seconds = attends.seconds - ROUND_TRIP_SECONDS
    reason = f"a context in registers, {count} parts, which the last joins"
    return Candidate((alone,), seconds, reason, temps, {"arrived": kv_heads})


def _not_in_registers(query: KernelQuery, append: Append, call: Call) -> str:
    """Why attention does not hold its context in registers; empty where it does."""
    heads, dims, attrs = query.attrs["heads"], query.attrs["dims"], query.attrs
    if not query.target.name.startswith("cuda"):
        return "expected an NVIDIA target"
    if call.function is not decode_kernel or query.args[0].shape[0] != 1:
        return f"{query.args[0].shape[0]} tokens, expected one"
    if not call.args["AHEAD"]:
        return "a launch before writes the index of the cache"
    if not all(query.results[append.caches[part]].early for part in (1, 2)):
        return "a launch before writes the cache"
    if call.args["arrivals"] is None:
        return "the last program joins the parts"
    if query.args[0].type.dtype != "bf16":
        return f"expected bf16, found {query.args[0].type.dtype}"
    if append.kept & {1, 2}:
        return "keys or values are read elsewhere"
    if len({*dims}) > 1 or dims[0] not in (64, 128):
        return f"expected heads of 64 or 128 dims, found {dims}"
    if heads[1] != heads[2] or not 1 <= heads[0] // heads[1] <= MOST_HEADS:
        return f"expected at most {MOST_HEADS} heads to a key, found {heads}"
    if heads[1] > query.target.multiprocessors:
        return f"{heads[1]} heads of keys, more than programs"
    if attrs.get("softcap") or attrs.get("norm_of", "head") == "part":
        return "expected no softcap, and no norm of all heads together"
    rotation, turned = rotation_of(query), tuple(attrs.get("rotate") or (False,) * 3)
    if turned not in ((False,) * 3, (True, True, False)):
        return "expected queries and keys to be rotated, or nothing"
    if any(turned) and (rotation.FORM != "half" or rotation.START % 4 or rotation.HALF % 4):
        return "expected dims that are rotated by halves, in fours"
    constants = [query.operand(name) for name in ("bias", "norm_0", "norm_1", "norm_2")]
    if any(x and (x.type.dtype != "bf16" or not x.constant or not x.dense) for x in constants):
        return "expected a bias and norms that are constants of bf16"
    return ""


def _not_within(query: KernelQuery, append: Append, call: Call, threads: int) -> str:
    """Why attention does not make heads itself; empty where it does."""
    tokens, dims = query.args[0].shape[0], query.attrs["dims"]
    normed = any(query.ref(f"norm_{part}") for part in range(3))
    if tokens > _FEW_TOKENS:
        return f"{tokens} tokens, expected at most {_FEW_TOKENS}"
    if call.args["BLOCK_M"] > _FEW_ROWS:
        return f"blocks of {call.args['BLOCK_M']} rows, expected at most {_FEW_ROWS}"
    if append.kept & {1, 2}:
        return "keys or values are read elsewhere"
    if normed and query.attrs.get("norm_of") == "part":
        return "a norm is of all heads together"
    if any(d < 16 or d & (d - 1) for d in dims):
        return f"expected dims of powers of two from 16 on, found {dims}"
    if normed and call.args["BLOCK_M"] * dims[0] < THREAD_ELEMENTS * threads:
        return f"norms of {dims[0]} dims would add up in another order"
    return ""


TEMPLATES = {"project_attention": (project_attention,)}
# Operands that are read in packed form.
PACKED_WEIGHTS = {"project_attention": ("weight",)}
