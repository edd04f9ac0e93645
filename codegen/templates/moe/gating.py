"""Gates of mixtures of experts: one launch for few tokens or two, more for many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from ....compiler.types import TensorType
from ...kernel_query import Arg, Call, Candidate, Declined, KernelQuery, Operand, Ref, Result, Temp
from ...prices import (
    PICK_SECONDS,
    PROGRAM_BYTES,
    RANKING_SECONDS,
    ROUND_TRIP_SECONDS,
    SHARED_BYTES,
)
from ..arrival import arrivals_of
from ..pdl import spread
from ..rowwise.norms import input_rows, rows_call
from .choose import COMPARED, Choice
from .gating_kernels import (
    Router,
    choose_kernel,
    gate_kernel,
    tile_logits_kernel,
    token_partials_kernel,
)

# Columns of a row that are loaded at once for its norm; columns of a block of the product and of a
# chunk, in f32 fewer for lack of registers. None depends on the number of tokens.
_ROW_BLOCK = 1024
_WIDE, _NARROW = (32, 256), (128, 512)
# Lanes that a choice may fill.
_LANES = 1024
# Tokens that two launches compute at most: every program reads its token's whole row.
_FEW = 4

_TYPES = {"f16": tl.float16, "bf16": tl.bfloat16, "f32": tl.float32}


def _dense_rows(x: Operand) -> bool:
    return x.packed is None and x.strides[-1] == 1 and x.type.dtype in _TYPES


def _choice(query: KernelQuery, experts: int, logits: str, sum_eps: float) -> Choice | Declined:
    """What is chosen by logits that are rounded to the dtype `logits`."""
    attrs: Mapping[str, Any] = query.attrs
    limited = attrs.get("topk_groups", 1) < attrs.get("groups", 1)
    groups = attrs.get("groups", 1) if limited else 1
    size = experts // groups
    k, shared = attrs["k"], attrs.get("shared", 0)
    groups2 = triton.next_power_of_2(groups)
    # Matrix products take sixteen rows at least.
    size2 = triton.next_power_of_2(max(size, 16 // groups2))
    if groups2 * size2 > _LANES:
        return Declined(
            f"{experts} experts fill {groups2 * size2} lanes, expected at most {_LANES}"
        )
    return Choice(
        bias=query.ref("bias"),
        correction=query.ref("correction"),
        weights=Result(0),
        indices=Result(1),
        LOGITS=_TYPES[logits],
        K=k,
        SHARED=shared,
        GROUPS=groups,
        GROUPS2=groups2,
        SIZE=size,
        SIZE2=size2,
        TOP=attrs.get("topk_groups", 1) if groups > 1 else 1,
        TOP2=attrs.get("group_score", "max") == "top2",
        COLUMNS=triton.next_power_of_2(k + shared),
        SIGMOID=attrs["score"] == "sigmoid",
        NORMALIZE=bool(attrs["normalize"]),
        SCALE=float(attrs.get("scale", 1.0)),
        SUM_EPS=float(sum_eps),
    )


def _lanes(choice: Choice) -> int:
    return choice.GROUPS2 * choice.SIZE2


def _seconds(choice: Choice) -> float:
    """What a choice takes, with its logits in registers."""
    compared = _lanes(choice) <= COMPARED.value
    return RANKING_SECONDS if compared else choice.K * PICK_SECONDS


def _choosing(logits: Ref, choice: Choice, tokens: int, step: int, parts: int) -> Call:
    """The launch that chooses by logits in `parts` parts, whose rows are `step` apart."""
    return Call(
        choose_kernel,
        {"logits": logits, "choice": choice, "tokens": tokens, "STEP": step, "PARTS": parts},
        (tokens, 1, 1),
        (Result(0), Result(1)),
        num_warps=max(1, min(8, _lanes(choice) // 32)),
    )


def router(query: KernelQuery) -> Candidate | Declined:
    """router(logits) or router(logits, correction): one launch, a program a token."""
    logits, correction = query.args[0], query.operand("correction")
    if not _dense_rows(logits) or not (correction is None or correction.dense):
        return Declined(f"logits {logits.type} or their correction are not dense")
    tokens, experts = logits.shape
    choice = _choice(query, experts, logits.type.dtype, query.attrs.get("eps", 0.0))
    if isinstance(choice, Declined):
        return choice
    call = _choosing(Arg(0), choice, tokens, logits.strides[0], 1)
    return Candidate((call,), query.seconds(1) + _seconds(choice), "a program a token")


class _Gate:
    """The operands of a moe_gating node, as the templates below need them."""

    def __init__(self, query: KernelQuery) -> None:
        attrs = query.attrs
        self.query = query
        self.x, self.weight = query.args[:2]
        self.tokens, self.width = self.x.shape
        self.count = self.weight.shape[0]
        self.choice = _choice(query, self.count, attrs["logits"], attrs.get("sum_eps", 0.0))
        normed, added = query.ref("norm") is not None, query.ref("delta") is not None
        eps = attrs.get("eps") or 0.0
        self.rows = input_rows(query, eps if normed else None, attrs.get("post_eps"))
        self.n = Result(2) if normed else None
        self.s = Result(2 + normed) if added else None
        named = (query.operand(x) for x in ("norm", "post_norm", "bias", "correction"))
        self.constant = all(x.constant for x in (self.weight, *filter(None, named)))
        self.results_of_rows = tuple(r for r in (self.n, self.s) if r)
        # Warps that share a row, whose sums hang on them, and a choice: of many lanes one a thread.
        many = isinstance(self.choice, Choice) and _lanes(self.choice) > 128
        self.warps = 8 if many else 4
        # As many loads in flight as shared memory holds.
        self.stages = 3 if query.target.name.startswith("cuda") else 2

    def declined(self) -> Declined | None:
        """Why no template here reads these operands."""
        delta = self.query.operand("delta")
        rows = [self.x, *([delta] if delta else [])]
        for x in rows:
            if not _dense_rows(x):
                return Declined(f"rows of {x.type} are not dense floats")
        for x in self.query.args[1:]:
            if x.type.dtype not in _TYPES or not (x.dense or x in rows):
                return Declined(f"{x.type} is not dense floats")
        return self.choice if isinstance(self.choice, Declined) else None

    def router(self) -> Router:
        """The product, in the logits' dtype, or where that is f32 and both operands are of one
        narrower dtype, that: its products are exact in f32."""
        logits, x, weight = self.query.attrs["logits"], self.x.type.dtype, self.weight.type.dtype
        dot = x if logits == "f32" and x == weight else logits
        block, chunk = _WIDE if dot == "f32" else _NARROW
        return Router(Arg(1), self.width, self.count, chunk, block, _TYPES[dot])


def one_launch(query: KernelQuery) -> Candidate | Declined:
    """The whole gate, a program a token: each reads the router's weight alone."""
    gate = _Gate(query)
    if declined := gate.declined():
        return declined
    choice, product = gate.choice, gate.router()
    assert isinstance(choice, Choice)
    lanes = _lanes(choice)
    # More rows than these would take other matrix instructions than the other templates do, which
    # may sum in another order; and of f32 more registers than there are.
    most = 16 if tl.float32 == product.DOT else 32
    if lanes > most:
        return Declined(f"{lanes} lanes for one program, expected at most {most}")
    call = Call(
        gate_kernel,
        {
            "rows": gate.rows,
            "router": product,
            "choice": choice,
            "n": gate.n,
            "s": gate.s,
            "ROW_BLOCK": _ROW_BLOCK,
        },
        (gate.tokens, 1, 1),
        (Result(0), Result(1), *gate.results_of_rows),
        num_stages=gate.stages,
    )
    read = gate.weight.nbytes
    seconds = max(read / PROGRAM_BYTES, gate.tokens * read / SHARED_BYTES)
    return Candidate(
        (call,),
        seconds + _seconds(choice) + query.target.launch_seconds,
        "a program a token, whole",
    )


def few_tokens(query: KernelQuery) -> Iterator[Candidate | Declined]:
    """Sixteen experts and a chunk of the columns a program, and the choice: by the last program of
    a token, or in a launch of its own."""
    gate = _Gate(query)
    if declined := gate.declined():
        yield declined
        return
    assert isinstance(gate.choice, Choice)
    if gate.tokens > _FEW:
        yield Declined(f"{gate.tokens} tokens, expected at most {_FEW}")
        return
    target, product = query.target, gate.router()
    chunks = triton.cdiv(gate.width, product.CHUNK)
    sixteens = triton.cdiv(gate.count, 16)
    programs, resident = spread(target, gate.tokens * sixteens * chunks)
    logits = Temp("logits")
    partials = Call(
        token_partials_kernel,
        {
            "rows": gate.rows,
            "router": product,
            "n": gate.n,
            "s": gate.s,
            "partials": logits,
            "choice": None,
            "arrivals": None,
            "tokens": gate.tokens,
            "PARTS": chunks,
            "ROWS": 8 if target.name.startswith("cuda") else 16,
            "ROW_BLOCK": _ROW_BLOCK,
            "AHEAD": gate.constant,
        },
        (programs, 1, 1),
        (logits, *gate.results_of_rows),
        num_warps=gate.warps,
        num_stages=gate.stages,
        resident=resident,
    )
    folded = {"choice": gate.choice, "arrivals": arrivals_of(target, "arrived")}
    whole = replace(
        partials,
        args={**partials.args, **folded},
        writes=(*partials.writes, Result(0), Result(1)),
    )
    # Each program reads its token's rows before it starts; the partials are read once more.
    rows = len(gate.results_of_rows) * gate.width * 4 / PROGRAM_BYTES
    seconds = query.seconds(1) + rows + _seconds(gate.choice) + ROUND_TRIP_SECONDS
    temps = {"logits": TensorType("f32", (chunks, gate.tokens, gate.count))}
    reason = f"the product in {sixteens} x {chunks} parts a token"
    yield Candidate(
        (whole,),
        seconds + target.arrival_seconds,
        f"{reason}, of which the last chooses",
        temps,
        {"arrived": gate.tokens},
    )
    choosing = _choosing(logits, gate.choice, gate.tokens, gate.count, chunks)
    yield Candidate((partials, choosing), seconds + target.launch_seconds, reason, temps)


def many_tokens(query: KernelQuery) -> Candidate | Declined:
    """Launches for the rows, if they have a norm or a sum; for the product, in tiles; to choose."""
    gate = _Gate(query)
    if declined := gate.declined():
        return declined
    assert isinstance(gate.choice, Choice)
    calls: list[Call] = []
    n: Ref = Arg(0)
    step = gate.x.strides[0]
    if gate.results_of_rows:
        calls.append(rows_call(gate.rows, gate.x.shape, gate.n, gate.s, _ROW_BLOCK, gate.warps))
        # With a norm n is result 2; else it is s, which is.
        n, step = Result(2), gate.width
    tile = 16 if gate.tokens <= 16 else 64
    calls.append(
        Call(
            tile_logits_kernel,
            {
                "x": n,
                "router": gate.router(),
                "logits": Temp("logits"),
                "tokens": gate.tokens,
                "STEP": step,
                "TOKENS": tile,
            },
            (triton.cdiv(gate.tokens, tile), triton.cdiv(gate.count, 16), 1),
            (Temp("logits"),),
            num_stages=gate.stages,
        )
    )
    calls.append(_choosing(Temp("logits"), gate.choice, gate.tokens, gate.count, 1))
    # A program reads its rows of the weight by itself.
    alone = 16 * gate.width * gate.weight.nbytes / gate.weight.type.numel / PROGRAM_BYTES
    return Candidate(
        tuple(calls),
        query.seconds(len(calls)) + float(alone) + _seconds(gate.choice),
        f"tiles of {tile} tokens by sixteen experts",
        {"logits": TensorType("f32", (gate.tokens, gate.count))},
    )


TEMPLATES = {"router": (router,), "moe_gating": (one_launch, few_tokens, many_tokens)}
