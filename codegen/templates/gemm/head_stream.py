"""Products by head of few tokens with MXFP4 weights in fragments, which are a stream (NVIDIA).

Every token's row of a head is a choice of moe.expert_stream, and the head is its expert. The rings
are filled with a weight that is a constant before the wait, x is copied after it.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...kernel_query import Call, Declined
from ..moe.expert_stream import constants, expert_stream_kernel
from ..pdl import RESIDENT
from .product import GemmLaunch, Product

# The most tokens: each reads the weight for itself.
_MOST_TOKENS = 8


def variant(product: Product) -> Iterator[GemmLaunch | Declined]:
    """One launch for up to eight tokens of bf16 and weights in fragments."""
    packed, x = product.held.packed, product.query.args[0]
    if product.heads == 1:
        yield Declined("head stream: there is one weight for all rows")
    elif packed is None or not packed.fragments:
        yield Declined("head stream: the weight does not lie in fragments")
    elif product.tokens > _MOST_TOKENS:
        yield Declined(f"head stream: {product.tokens} tokens, expected at most {_MOST_TOKENS}")
    elif not x.aligned or product.x.STEP % 8 or product.x.HEAD % 8:
        yield Declined("head stream: the rows of x do not begin at multiples of 16 bytes")
    else:
        shares = constants(
            product.tokens * product.heads, 1, *packed.tiles, product.query.target.multiprocessors
        )
        if isinstance(shares, Declined):
            yield shares
            return
        args = {
            "x": product.x,
            "indices": None,
            "weights": None,
            "weight": product.weight,
            "bias": None,
            "epilogue": product.epilogue,
            "N": product.n,
            "EACH": product.heads,
            "Y_HEAD": product.y_head,
            **shares,
            "AHEAD": product.held.constant,
        }
        call = Call(
            expert_stream_kernel,
            args,
            (shares["PROGRAMS"], 1, 1),
            (product.epilogue.y,),
            num_warps=shares["W"],
            resident=RESIDENT,
        )
        yield GemmLaunch(call, "stream", "a stream of each head's fragments")
