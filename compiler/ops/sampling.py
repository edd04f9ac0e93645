"""Choosing the next token of every row of logits, each row by its own settings."""

from __future__ import annotations

import math

import torch

from ..axes import rule
from ..dtypes import FLOATS
from ..ir import Op, Sample, per_element
from ..types import TensorType, Types, VerifyError

# The operands that hold one number a row, by name and kind.
SETTINGS = (
    ("temperature", "float"),
    ("top_k", "i32"),
    ("top_p", "float"),
    ("min_p", "float"),
    ("penalty", "float"),
    ("draw", "float"),
)
# Bits in a word of `seen`.
WORD = 32


# ---- sample: logits [L, V]; temperature, top_k i32, top_p, min_p, penalty, draw [L];
#      seen i32 [L, ceil(V / 32)]; top i32 [L]
#      -> token i32 [L], logprob f32 [L], and with `candidates` = C > 0
#         top_tokens i32 [L, C], top_logprobs f32 [L, C]
#
# Row by row, in the order and with the meanings of Hugging Face's logits processors:
#   score   = logit; of tokens whose bit in `seen` is set (bit v % 32 of word v // 32) divided by
#             `penalty` where it is not negative, else multiplied by it
#   token   = the first of the largest scores where temperature <= 0, otherwise drawn by
#             softmax((score - max) / temperature) over the tokens that are kept:
#             the k largest (0 < k < V) with all ties at the edge; of those the fewest most likely
#             that reach the mass top_p < 1, at least one, of ties at the edge the smallest ids;
#             of those the ones that are at least min_p > 0 times as likely as the most likely
#   drawn   = in order of ids, the first at which the cumulative mass exceeds draw · the whole
#   logprob = log softmax of the logits as they came, at the token
# The first `top` of the C candidates are the most likely tokens under the logits as they came, most
# likely first and ties by id, with their log-probabilities; the others are -1 and 0.
# A row that holds NaN or has no finite maximum gives token -1 and that maximum as logprob.


def _sample_infer(
    logits: TensorType,
    temperature: TensorType,
    top_k: TensorType,
    top_p: TensorType,
    min_p: TensorType,
    penalty: TensorType,
    draw: TensorType,
    seen: TensorType,
    top: TensorType,
    *,
    candidates: int = 0,
) -> Types:
    settings = (temperature, top_k, top_p, min_p, penalty, draw)
    vocab = logits.shape[-1] if logits.rank == 2 else 0
    if logits.dtype not in FLOATS or not isinstance(vocab, int) or vocab < 1:
        raise VerifyError(f"sample: expected float logits [L, V], V a number, found {logits}")
    rows = logits.shape[:1]
    for (name, kind), found in zip((*SETTINGS, ("top", "i32")), (*settings, top), strict=True):
        fits = found.dtype in FLOATS if kind == "float" else found.dtype == kind
        if not fits or found.shape != rows:
            raise VerifyError(f"sample: expected {name} {kind}[{rows[0]}], found {found}")
    words = -(-vocab // WORD)
    if seen != TensorType("i32", (*rows, words)):
        raise VerifyError(f"sample: expected seen i32[{rows[0]}, {words}], found {seen}")
    if not 0 <= candidates <= vocab:
        raise VerifyError(f"sample: expected candidates of 0 to {vocab}, found {candidates}")
    chosen = (TensorType("i32", rows), TensorType("f32", rows))
    if not candidates:
        return chosen
    shape = (*rows, candidates)
    return (*chosen, TensorType("i32", shape), TensorType("f32", shape))


def _sample_reference(
    logits: torch.Tensor, *operands: torch.Tensor, candidates: int = 0
) -> tuple[torch.Tensor, ...]:
    *settings, seen, top = operands
    tokens: list[int] = []
    logprobs: list[float] = []
    best = torch.full((len(logits), candidates), -1, dtype=torch.int32)
    likely = torch.zeros((len(logits), candidates))
    for row, x in enumerate(logits.double()):
        largest = float(x.max())
        if not math.isfinite(largest):
            tokens.append(-1)
            logprobs.append(largest)
            continue
        raw = x.log_softmax(0)
        temperature, top_k, top_p, min_p, penalty, draw = (s[row].item() for s in settings)
        scores = _penalized(x, seen[row], penalty)
        token = _chosen(scores, temperature, int(top_k), top_p, min_p, draw)
        tokens.append(token)
        logprobs.append(float(raw[token]))
        wanted = min(max(int(top[row]), 0), candidates)
        order = raw.argsort(descending=True, stable=True)[:wanted]
        best[row, :wanted] = order.int()
        likely[row, :wanted] = raw[order].float()
    chosen = (torch.tensor(tokens, dtype=torch.int32), torch.tensor(logprobs, dtype=torch.float32))
    return (*chosen, best, likely) if candidates else chosen


def _penalized(x: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    if penalty == 1:
        return x
    ids = torch.arange(len(x))
    marked = (seen.long()[ids // WORD] >> ids % WORD) & 1 == 1
    return torch.where(marked, torch.where(x < 0, x * penalty, x / penalty), x)


def _chosen(
    scores: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, draw: float
) -> int:
    if temperature <= 0:
        return int(scores.argmax())
    # Shifted first: the maximum stays 0 under any temperature, and no exponential overflows.
    scores = (scores - scores.max()) / temperature
    nothing = -math.inf
    if 0 < top_k < len(scores):
        least = scores.topk(top_k).values[-1]
        scores = scores.masked_fill(scores < least, nothing)
    if top_p < 1:
        ascending = scores[scores > nothing].sort().values
        outside = ascending.softmax(0).cumsum(0) <= 1 - top_p
        kept = len(ascending) - min(int(outside.sum()), len(ascending) - 1)
        edge = ascending[-kept]
        ties = (scores == edge).nonzero().squeeze(1)
        scores = scores.masked_fill(scores < edge, nothing)
        scores[ties[kept - int((scores > edge).sum()) :]] = nothing
    if min_p > 0:
        # p_i < min_p · p_max  ==  exp(s_i - 0) < min_p
        scores = scores.masked_fill(scores < min(math.log(min_p), 0.0), nothing)
    weights = scores.exp()
    kept = weights.nonzero().squeeze(1)
    cumulative = weights[kept].cumsum(0)
    index = int(torch.searchsorted(cumulative, draw * cumulative[-1], right=True))
    return int(kept[min(index, len(kept) - 1)])


def _row_types(dtype: str, rows: int, vocab: int) -> tuple[TensorType, ...]:
    settings = (TensorType("i32" if kind == "i32" else "f32", (rows,)) for _, kind in SETTINGS)
    words = TensorType("i32", (rows, -(-vocab // WORD)))
    return (TensorType(dtype, (rows, vocab)), *settings, words, TensorType("i32", (rows,)))


sample = Op(
    "sample",
    _sample_infer,
    _sample_reference,
    per_element(3, "logits"),  # a maximum, an exponential and a sum
    (
        Sample(_row_types("f32", 9, 40), {"candidates": 5}, high=8),
        Sample(_row_types("bf16", 4, 7), {"candidates": 7}, high=2**31 - 1),
        Sample(_row_types("f32", 6, 32), {}, high=3),
    ),
    axes=rule(
        "logits[l,v] temperature[l] top_k[l] top_p[l] min_p[l] penalty[l] draw[l] seen[l,w] top[l] "
        "-> [l], [l], [l,c], [l,c]; v w c whole"
    ),
)
