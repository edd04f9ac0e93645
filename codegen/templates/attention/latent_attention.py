"""Latent attention that rotates its queries and appends the rows of the step's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import triton

from ....compiler.ops.mla import cached_mla_attention
from ...kernel_query import Arg, Candidate, Declined, KernelQuery, Ref, Result
from ...prices import ROUND_TRIP_SECONDS
from .composed import joined, renamed
from .decode import decode_kernel
from .latent_rows import LatentRows, LatentWithin
from .mla import latent_rows, mla_attention, rows_call
from .rope import NOT_ROTATED

# Tokens of a step whose rows programs append that attend: one makes them one after the other.
_FEW_TOKENS = 8
# Arguments from kv on.
_KV = 2


def latent_attention(query: KernelQuery) -> Iterator[Candidate | Declined]:
    """latent_attention: a launch that makes rows, and attention; or for few tokens attention that
    makes those it reads."""
    rows = latent_rows(query, _KV)
    if isinstance(rows, Declined):
        yield rows
        return
    first = rows_call(query, rows, 1)
    before = Candidate((first,), query.target.launch_seconds, "a launch for rows of the latent")
    for attends in _attention(query, rows):
        if isinstance(attends, Declined):
            yield attends
            continue
        yield joined(before, attends)
        yield _within(query, rows, attends)


def _attention(query: KernelQuery, rows: LatentRows) -> Iterator[Candidate | Declined]:
    """Ways to attend to the cache as it is updated."""
    append = query.append
    assert append
    cache = Result(append.caches[1])
    index = (append.slots, append.positions, append.page_table)
    refs: tuple[Ref, ...] = (Arg(0), Arg(1), cache, *index)
    args = (*query.args[:2], query.results[cache.index], *(query.args[i.index] for i in index))
    scale = {"scale": query.attrs["scale"]}
    asked = KernelQuery(cached_mla_attention, scale, args, query.results[:1], query.target)
    answer = mla_attention(asked)
    by_ref: dict[Ref, Ref] = {Arg(i): ref for i, ref in enumerate(refs)}
    turned = rows.rotation if query.attrs["rotate"] else NOT_ROTATED
    for each in (answer,) if isinstance(answer, Declined) else answer:
        if isinstance(each, Declined):
            yield each
            continue
        attend, *others = (renamed(call, by_ref) for call in each.calls)
        attend = replace(attend, args={**attend.args, "rotation": turned})
        yield replace(each, calls=(attend, *others))


def _within(query: KernelQuery, rows: LatentRows, attends: Candidate) -> Candidate | Declined:
    """Attention that appends rows itself."""
    tokens, append = query.args[0].shape[0], query.append
    assert append
    call = attends.calls[0]
    if call.function is not decode_kernel or tokens > _FEW_TOKENS:
        return Declined(f"rows where they attend: {tokens} tokens, expected at most {_FEW_TOKENS}")
    if 1 in append.kept:
        return Declined("rows where they attend: they are read elsewhere")
    block = triton.next_power_of_2(tokens)
    latent = LatentWithin(rows, block, query.target.name.startswith("hip"))
    cache = Result(append.caches[1])
    alone = replace(
        call, args={**call.args, "latent": latent, "MAKES": "latent"}, writes=(*call.writes, cache)
    )
    return replace(
        attends,
        calls=(alone, *attends.calls[1:]),
        # A row comes at once where it is needed, and is read again.
        seconds=attends.seconds + 2 * tokens * ROUND_TRIP_SECONDS,
        reason=f"{attends.reason}; rows of the latent where they attend",
    )


TEMPLATES = {"latent_attention": (latent_attention,)}
