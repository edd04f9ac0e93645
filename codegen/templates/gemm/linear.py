"""Products with a weight: every kernel of this folder that takes one, over every form of its input.

A file of the folder that defines `variant` adds its kernels to the candidates; nothing lists them.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from math import prod

from ...kernel_query import Arg, Candidate, Declined, KernelQuery, Operand, Result, even_step
from ...price_table import Launched
from ...prices import BY_HEAD, NORMED, gemm_seconds
from ..rowwise.norms import row_step
from .epilogue import Epilogue, epilogue_of
from .product import Norm, Product, Rows, Variant
from .prologue import ProductInput, inputs
from .weight import weight_of


def _variants() -> tuple[Variant, ...]:
    package = __package__ or ""
    folder = import_module(package).__path__
    names = sorted(m.name for m in pkgutil.iter_modules(folder) if m.name != "linear")
    modules = [import_module(f"{package}.{name}") for name in names]
    return tuple(m.variant for m in modules if hasattr(m, "variant"))


VARIANTS = _variants()


# How a candidate is described, of its kernel's name, what the weight is held in, and where the norm
# of the input is computed.
_REASON = "{name}, {held} weight{note}"


def candidates(
    product: Product, given: ProductInput | None = None, reason: str = _REASON
) -> Iterator[Candidate | Declined]:
    """Each launch that computes a product, after the launches that its input takes."""
    query, weight_bytes = product.query, product.held.nbytes
    given = given or ProductInput(product.x.data, product.x.STEP)
    held = "MXFP4" if product.packed else product.held.type.dtype
    other = query.moved_bytes() - weight_bytes
    for variant in VARIANTS:
        for answer in variant(product):
            if isinstance(answer, Declined):
                yield answer
                continue
            does = NORMED if product.norm else BY_HEAD if product.heads > 1 else ""
            priced = Launched(
                f"{answer.kernel}{answer.form} {held}{does}",
                product.tokens,
                product.heads * product.weight.N,
                product.weight.K,
            )
            seconds = len(given.calls) * query.target.launch_seconds + gemm_seconds(
                query.target,
                answer.kernel,
                priced,
                weight_bytes,
                other,
                packed=product.packed,
                programs=prod(answer.call.grid),
            )
            described = reason.format(name=answer.name, held=held, note=given.note)
            calls = (*given.calls, replace(answer.call, priced=priced))
            yield Candidate(calls, seconds, described, given.temps)


def normed_products(
    query: KernelQuery,
    epilogue: Epilogue,
    halved: bool = False,
    sum_result: int = 1,
    reason: str = _REASON,
) -> Iterator[Candidate | Declined]:
    """A product of all rows of argument 0 by argument 1; what the node does to its input first is
    done within the product, or by a launch before it."""
    held = query.args[1]
    if not held.packed and not held.dense:
        yield Declined(f"the weight {held.type} is not dense")
        return
    residual = query.operand("residual")
    if residual and epilogue.residual and row_step(residual) is None:
        yield Declined("the rows of the residual do not lie in one step")
        return
    norm = query.operand("norm")
    for given in inputs(query, sum_result):
        if isinstance(given, Declined):
            yield given
            continue
        product = Product(
            query,
            Rows(given.x, given.step, 0),
            weight_of(query, 1, halved),
            held,
            epilogue,
            prod(query.args[0].shape[:-1]),
            held.shape[0] // 2 if halved else held.shape[0],
        )
        if given.norm and norm:
            within = Norm(given.norm, query.attrs["eps"])
            product = replace(product, norm=within, norm_dtype=norm.type.dtype)
        yield from candidates(product, given, reason)


def linear(query: KernelQuery) -> Iterator[Candidate | Declined]:
    """linear: norm or sum of the input, the product, its epilogue; with a gate, gate and up rows
    in one program."""
    gate = query.attrs.get("gate")
    epilogue = epilogue_of(
        query,
        Result(0),
        query.results[0].shape[-1],
        bias=query.ref("bias"),
        activation=gate,
        gated=gate is not None,
        residual=True,
    )
    return normed_products(query, epilogue, halved=gate is not None)


def head_linear(query: KernelQuery) -> Iterator[Candidate | Declined]:
    """head_linear: x [T, H, K], weight [H, N, K]; a grid over heads."""
    x, held, y = query.args[0], query.args[1], query.results[0]
    if x.strides[-1] != 1 or not (held.packed or held.dense):
        yield Declined("the rows of x or of the weight are not dense")
        return
    yield from candidates(
        Product(
            query,
            Rows(Arg(0), x.strides[0], x.strides[1]),
            weight_of(query, 1),
            held,
            epilogue_of(query, Result(0), y.strides[0]),
            x.shape[0],
            held.shape[-2],
            heads=x.shape[1],
            y_head=y.strides[1],
        )
    )


def matmul(query: KernelQuery) -> Iterator[Candidate | Declined]:
    """matmul: x [..., M, K] by y [..., K, N], a grid over the batch of either or both."""
    x, y, out = query.args[0], query.args[1], query.results[0]
    if x.strides[-1] != 1 or y.packed is not None:
        yield Declined("the rows of x are not dense")
        return
    steps = [_batch_step(o, out.shape[:-2]) for o in (x, y)]
    if None in steps:
        yield Declined(f"{x.type} and {y.type} do not step through the batch evenly")
        return
    (m, _), (k, n) = x.shape[-2:], y.shape[-2:]
    lies = (y.strides[-1], y.strides[-2], steps[1] or 0)
    yield from candidates(
        Product(
            query,
            Rows(Arg(0), x.strides[-2], steps[0] or 0),
            weight_of(query, 1, shape=(n, k), steps=lies),
            y,
            epilogue_of(query, Result(0), n),
            m,
            n,
            heads=prod(out.shape[:-2]),
            y_head=m * n,
        )
    )


def _batch_step(x: Operand, batch: tuple[int, ...]) -> int | None:
    """How far apart the matrices of x lie over `batch`: 0 if all share one, None if unevenly."""
    lead, strides = x.shape[:-2], x.strides[:-2]
    if prod(lead) == 1:
        return 0
    if lead != batch[len(batch) - len(lead) :] or prod(lead) != prod(batch):
        return None
    return even_step(lead, strides)


TEMPLATES = {
    "matmul": (matmul,),
    "linear": (linear,),
    "head_linear": (head_linear,),
}
# Operands that are read in packed form.
PACKED_WEIGHTS = {"linear": ("weight",), "head_linear": ("weight",)}
