"""Gates of mixtures of experts: one launch a token, two for few tokens, more for many."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ....compiler.types import TensorType
from ...kernel_query import (
    LAUNCH_SECONDS,
    Arg,
    Call,
    Candidate,
    Declined,
    KernelQuery,
    Operand,
    Ref,
    Result,
    Temp,
    present,
)
from .gating_kernels import (
    choose_kernel,
    gate_kernel,
    norm_rows_kernel,
    tile_logits_kernel,
    token_partials_kernel,
)

# Columns of a row that are loaded at once for its norm; columns that are one partial sum of the
# product. Neither depends on the number of tokens.
_ROW_BLOCK, _CHUNK = 1024, 512
# Lanes that a choice may fill.
_LANES = 1024
# Tokens that two launches compute at most: every program reads its token's whole row.
_FEW = 4
# Bytes a second that one program, and that all together, get of what others read too.
_PROGRAM_BYTES, _SHARED_BYTES = 3e10, 6e12
# Seconds that the choice of one expert takes, most of it waiting for its reduction.
_PICK_SECONDS = 1e-7

_TYPES = {"f16": tl.float16, "bf16": tl.bfloat16, "f32": tl.float32}


def _dense_rows(x: Operand) -> bool:
    return x.packed is None and x.strides[-1] == 1 and x.type.dtype in _TYPES


def _choice(attrs: dict[str, Any], experts: int) -> dict[str, Any] | Declined:
    """Constants of `choose`."""
    groups = attrs.get("groups", 1) if attrs.get("topk_groups", 1) < attrs.get("groups", 1) else 1
    size = experts // groups
    k, shared = attrs["k"], attrs.get("shared", 0)
    lanes = {
        "GROUPS2": triton.next_power_of_2(groups),
        # Matrix products take sixteen rows at least.
        "SIZE2": triton.next_power_of_2(max(size, 16 // triton.next_power_of_2(groups))),
    }
    if (count := lanes["GROUPS2"] * lanes["SIZE2"]) > _LANES:
        return Declined(f"{experts} experts fill {count} lanes, expected at most {_LANES}")
    return {
        **lanes,
        "K": k,
        "SIGMOID": attrs["score"] == "sigmoid",
        "NORMALIZE": bool(attrs["normalize"]),
        "GROUPS": groups,
        "SIZE": size,
        "TOP": attrs.get("topk_groups", 1) if groups > 1 else 1,
        "TOP2": attrs.get("group_score", "max") == "top2",
        "SCALE": float(attrs.get("scale", 1.0)),
        "SHARED": shared,
        "COLUMNS": triton.next_power_of_2(k + shared),
    }


def _choosing(
    logits: Ref,
    step: int,
    parts: int,
    tokens: int,
    refs: dict[str, Ref | None],
    constants: dict[str, Any],
) -> Call:
    """The launch that chooses by logits in `parts` parts, whose rows are `step` apart."""
    given, missing = present(refs)
    return Call(
        choose_kernel,
        {
            "logits": logits,
            **given,
            "weights": Result(0),
            "indices": Result(1),
            "tokens": tokens,
        },
        (tokens, 1, 1),
        (Result(0), Result(1)),
        {**constants, **missing, "STEP": step, "PARTS": parts},
        num_warps=1,
    )


def router(query: KernelQuery) -> Candidate | Declined:
    """router(logits) or router(logits, correction): one launch, a program a token."""
    logits, correction = query.args[0], query.operand("correction")
    if not _dense_rows(logits) or not (correction is None or correction.dense):
        return Declined(f"logits {logits.type} or their correction are not dense")
    attrs = dict(query.attrs)
    constants = _choice(attrs, logits.shape[1])
    if isinstance(constants, Declined):
        return constants
    constants |= {"SUM_EPS": float(attrs.get("eps", 0.0)), "LOGITS": _TYPES[logits.type.dtype]}
    refs = {"bias": None, "correction": query.ref("correction")}
    call = _choosing(Arg(0), logits.strides[0], 1, logits.shape[0], refs, constants)
    return Candidate((call,), query.seconds(1) + attrs["k"] * _PICK_SECONDS, "a program a token")


class _Gate:
    """The operands of a moe_gating node, as the templates below need them."""

    def __init__(self, query: KernelQuery) -> None:
        self.attrs = dict(query.attrs)
        self.x, self.weight = query.args[:2]
        self.tokens, self.width = self.x.shape
        self.count = self.weight.shape[0]
        self.ref = query.ref
        self.delta = query.operand("delta")
        self.given = query.args[1:]
        self.seconds_to_choose = self.attrs["k"] * _PICK_SECONDS
        self.normed, self.added = self.ref("norm") is not None, self.delta is not None

    def declined(self) -> Declined | None:
        """Why no template here reads these operands."""
        rows = [self.x, *([self.delta] if self.delta else [])]
        for x in rows:
            if not _dense_rows(x):
                return Declined(f"rows of {x.type} are not dense floats")
        for x in self.given:
            if x.type.dtype not in _TYPES or not (x.dense or x in rows):
                return Declined(f"{x.type} is not dense floats")
        return None

    def row_refs(self) -> dict[str, Ref | None]:
        """What the norm of a row reads and writes."""
        return {
            **{name: self.ref(name) for name in ("delta", "norm", "post_norm")},
            "n": Result(2) if self.normed else None,
            "s": Result(2 + self.normed) if self.added else None,
        }

    def row_constants(self) -> dict[str, Any]:
        return {
            "EPS": self.attrs.get("eps") or 0.0,
            "POST_EPS": self.attrs.get("post_eps") or 0.0,
            "STEP": self.x.strides[0],
            "DELTA_STEP": self.delta.strides[0] if self.delta else 0,
        }

    def results_of_rows(self) -> tuple[Ref, ...]:
        return tuple(r for name, r in self.row_refs().items() if name in ("n", "s") and r)

    def dot(self) -> Any:
        """What the product takes: the logits' dtype, or where that is f32 and both operands are of
        one narrower dtype, that: its products are exact in f32."""
        logits, x, weight = self.attrs["logits"], self.x.type.dtype, self.weight.type.dtype
        return _TYPES[x if logits == "f32" and x == weight else logits]

    def choice(self) -> dict[str, Any] | Declined:
        constants = _choice(self.attrs, self.count)
        if isinstance(constants, Declined):
            return constants
        eps, logits = float(self.attrs.get("sum_eps", 0.0)), _TYPES[self.attrs["logits"]]
        return {**constants, "SUM_EPS": eps, "LOGITS": logits}

    def choosing(self, parts: int, constants: dict[str, Any]) -> Call:
        refs = {"bias": self.ref("bias"), "correction": self.ref("correction")}
        return _choosing(Temp("logits"), self.count, parts, self.tokens, refs, constants)

    def product(self) -> dict[str, Any]:
        """Constants of the product; in f32 fewer columns at once, for lack of registers."""
        dot = self.dot()
        block = 32 if dot == tl.float32 else 128
        return {"WIDTH": self.width, "CHUNK": _CHUNK, "BLOCK": block, "DOT": dot}


def one_launch(query: KernelQuery) -> Candidate | Declined:
    """The whole gate, a program a token: each reads the router's weight alone."""
    gate = _Gate(query)
    constants = gate.choice()
    if declined := gate.declined():
        return declined
    if isinstance(constants, Declined):
        return constants
    lanes = constants["GROUPS2"] * constants["SIZE2"]
    # More rows than these would take other matrix instructions than the other templates do, which
    # may sum in another order; and of f32 more registers than there are.
    most = 16 if gate.dot() == tl.float32 else 32
    if lanes > most:
        return Declined(f"{lanes} lanes for one program, expected at most {most}")
    refs = {**gate.row_refs(), "bias": gate.ref("bias"), "correction": gate.ref("correction")}
    given, missing = present(refs)
    call = Call(
        gate_kernel,
        {"x": Arg(0), "weight": Arg(1), **given, "weights": Result(0), "indices": Result(1)},
        (gate.tokens, 1, 1),
        (Result(0), Result(1), *gate.results_of_rows()),
        {
            **gate.row_constants(),
            **gate.product(),
            **missing,
            **constants,
            "ROW_BLOCK": _ROW_BLOCK,
        },
        num_stages=_stages(query),
    )
    read = gate.weight.nbytes
    seconds = max(read / _PROGRAM_BYTES, gate.tokens * read / _SHARED_BYTES)
    return Candidate(
        (call,), seconds + gate.seconds_to_choose + LAUNCH_SECONDS, "a program a token, whole"
    )


def _stages(query: KernelQuery) -> int:
    """Loads in flight: as many as shared memory holds."""
    return 3 if query.target.name.startswith("cuda") else 2


def few_tokens(query: KernelQuery) -> Candidate | Declined:
    """Two launches: sixteen experts and a chunk of the columns a program, then the choice."""
    gate = _Gate(query)
    constants = gate.choice()
    if declined := gate.declined():
        return declined
    if isinstance(constants, Declined):
        return constants
    if gate.tokens > _FEW:
        return Declined(f"{gate.tokens} tokens, expected at most {_FEW}")
    chunks = triton.cdiv(gate.width, _CHUNK)
    given, missing = present(gate.row_refs())
    grid = (gate.tokens, triton.cdiv(gate.count, 16), chunks)
    product = Call(
        token_partials_kernel,
        {
            "x": Arg(0),
            "weight": Arg(1),
            **given,
            "partials": Temp("logits"),
            "tokens": gate.tokens,
        },
        grid,
        (Temp("logits"), *gate.results_of_rows()),
        {
            **gate.row_constants(),
            **gate.product(),
            **missing,
            "COUNT": gate.count,
            "ROW_BLOCK": _ROW_BLOCK,
        },
        num_stages=_stages(query),
    )
    # Each program reads its token's rows before it starts.
    rows = (int(gate.normed) + gate.added) * gate.width * 4 / _PROGRAM_BYTES
    seconds = query.seconds(2) + rows + gate.seconds_to_choose
    return Candidate(
        (product, gate.choosing(chunks, constants)),
        seconds,
        f"the product in {grid[1]} x {chunks} parts a token",
        {"logits": TensorType("f32", (chunks, gate.tokens, gate.count))},
    )


def many_tokens(query: KernelQuery) -> Candidate | Declined:
    """Launches for the rows, if they have a norm or a sum; for the product, in tiles; to choose."""
    gate = _Gate(query)
    constants = gate.choice()
    if declined := gate.declined():
        return declined
    if isinstance(constants, Declined):
        return constants
    calls: list[Call] = []
    n: Ref = Arg(0)
    step = gate.x.strides[0]
    if gate.normed or gate.added:
        given, missing = present(gate.row_refs())
        calls.append(
            Call(
                norm_rows_kernel,
                {"x": Arg(0), **given},
                (gate.tokens, 1, 1),
                gate.results_of_rows(),
                {
                    **gate.row_constants(),
                    **missing,
                    "K": gate.width,
                    "BLOCK": _ROW_BLOCK,
                },
            )
        )
        # With a norm n is result 2; else it is s, which is.
        n, step = Result(2), gate.width
    tile = 16 if gate.tokens <= 16 else 64
    calls.append(
        Call(
            tile_logits_kernel,
            {"x": n, "weight": Arg(1), "logits": Temp("logits"), "tokens": gate.tokens},
            (triton.cdiv(gate.tokens, tile), triton.cdiv(gate.count, 16), 1),
            (Temp("logits"),),
            {**gate.product(), "STEP": step, "COUNT": gate.count, "TOKENS": tile},
            num_stages=_stages(query),
        )
    )
    calls.append(gate.choosing(1, constants))
    # A program reads its rows of the weight by itself.
    turn = 16 * gate.width * gate.weight.nbytes / gate.weight.type.numel / _PROGRAM_BYTES
    seconds = query.seconds(len(calls)) + float(turn) + gate.seconds_to_choose
    return Candidate(
        tuple(calls),
        seconds,
        f"tiles of {tile} tokens by sixteen experts",
        {"logits": TensorType("f32", (gate.tokens, gate.count))},
    )


TEMPLATES = {"router": (router,), "moe_gating": (one_launch, few_tokens, many_tokens)}
