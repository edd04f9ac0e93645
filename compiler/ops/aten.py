"""aten.*: any functional torch operator that no importer rule knows, as a node.

The type rule runs the operator on meta tensors, the reference is the operator itself. Tensor
operands are the node's arguments in schema order; the rest of the schema's arguments are
attributes: a tensor list is the number of its tensors, a list of optional tensors says which are
present, an absent optional tensor is None. Dtypes are IR names; device, layout and memory format
do not appear.

An ingot may hold few of these operators (`check_operator`): its text can come from anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from threading import RLock
from typing import Any

import sympy
import torch

from ..attribute_kinds import KINDS
from ..axes import AxisRule, elementwise, rule
from ..dtypes import DTYPES, FLOATS
from ..ir import Op
from ..torch_types import torch_dtype, type_of
from ..types import (
    Dim,
    TensorType,
    Types,
    VerifyError,
    attr_symbols,
    bind_attr,
    dim,
    free_symbols,
    symbol,
)

# Where dims are probed to find shapes as polynomials: primes, so that products stay apart.
_PROBES = (211, 223)
# Two more, one small and even, one large: shapes may be polynomials of odd or near sizes only.
_CHECKS = (96, 1031)
_MOST_SYMBOLS = 4  # each doubles the number of probes
NOT_ATTRIBUTES = frozenset(("device", "layout", "pin_memory", "memory_format"))

# What an ingot may hold: operators that compute every element of their results, from their operands
# alone, and compare each index with the size of its dim before they use it.
# Of these the overloads that torch tags as pointwise:
_POINTWISE = """
    abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_not
    bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min copysign cos cosh deg2rad div elu eq
    erf erfc erfinv exp exp2 expm1 floor fmax fmin fmod frac ge gelu gt hardshrink hardsigmoid
    hardtanh heaviside hypot isfinite isinf isnan isneginf isposinf le leaky_relu lerp lgamma log
    log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt
    masked_fill max maximum min minimum mish mul nan_to_num ne neg pow rad2deg reciprocal relu relu6
    remainder round rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink
    sqrt square sub tan tanh threshold true_divide trunc where xlogy
"""
# Element by element too, though torch has no tag for it.
_ELEMENTWISE = """
    __and__.Scalar __and__.Tensor __or__.Scalar __or__.Tensor __xor__.Scalar __xor__.Tensor
    complex.default floor_divide.Scalar floor_divide.default hardswish.default imag.default
    log_sigmoid.default masked_fill.Tensor polar.default real.default rsub.Tensor
    view_as_complex.default view_as_real.default where.ScalarOther where.ScalarSelf
"""
_ALONG_DIMS = """
    _log_softmax.default _softmax.default all.default all.dim amax.default amin.default any.default
    any.dim argmax.default argmin.default cummax.default cumprod.default cumsum.default
    linalg_vector_norm.default log_softmax.int logcumsumexp.default logsumexp.default max.default
    max.dim mean.default mean.dim min.default min.dim prod.default prod.dim_int sort.default
    sort.stable std.correction sum.default sum.dim_IntList topk.default var.correction
"""
_MOVES = """
    alias.default cat.default clone.default constant_pad_nd.default diagonal.default expand.default
    flatten.using_ints flip.default movedim.int permute.default repeat.default
    repeat_interleave.self_int reshape.default roll.default select.int slice.Tensor split.Tensor
    split_with_sizes.default squeeze.default squeeze.dim squeeze.dims stack.default t.default
    transpose.int tril.default triu.default unbind.int unflatten.int unsqueeze.default view.default
"""
_BY_INDEX = """
    gather.default index.Tensor index_select.default scatter.src scatter.value scatter_add.default
"""
_PRODUCTS = """
    addmm.default baddbmm.default bmm.default convolution.default dot.default layer_norm.default
    linear.default matmul.default mm.default mv.default native_layer_norm.default outer.default
    rms_norm.default
"""
_OUT_OF_NOTHING = """
    arange.default arange.start arange.start_step full.default ones.default ones_like.default
    scalar_tensor.default zeros.default zeros_like.default _to_copy.default
"""
_PACKETS = frozenset(_POINTWISE.split())
_INDEXED = frozenset(f"aten.{name}" for name in _BY_INDEX.split())
_NAMES = _INDEXED | {
    f"aten.{name}"
    for names in (_ELEMENTWISE, _ALONG_DIMS, _MOVES, _PRODUCTS, _OUT_OF_NOTHING)
    for name in names.split()
}
# Divisions that trap where integers overflow: -2^63 by -1.
_FLOATS_ONLY = frozenset(("aten.div.Tensor_mode", "aten.div.Scalar_mode"))


def overload_of(name: str) -> Any:
    """The torch operator that `aten.<packet>.<overload>` names; VerifyError if there is none."""
    parts = name.split(".")
    packet = getattr(torch.ops.aten, parts[1], None) if len(parts) == 3 else None
    if packet is None or parts[2] not in packet.overloads():
        raise VerifyError(f"torch {torch.__version__} has no operator {name!r}")
    return getattr(packet, parts[2])


def check_operator(name: str) -> None:
    """Raise VerifyError unless an ingot may hold the operator; it does not run."""
    packet = name.split(".")[1] if name.count(".") == 2 else ""
    if name in _NAMES or (packet in _PACKETS and _is_pointwise(overload_of(name))):
        return
    raise VerifyError(f"{name[:80]}: expected an operator that an ingot may hold, found another")


def _is_pointwise(overload: Any) -> bool:
    return torch.Tag.pointwise in overload.tags and not overload._schema.is_mutable


def check_operands(name: str, types: Types, attrs: Mapping[str, Any]) -> None:
    """Raise VerifyError unless an ingot may hold the operator with these operands."""
    shown = ", ".join(map(str, types))
    if name in _FLOATS_ONLY and not all(t.dtype in FLOATS for t in types):
        raise VerifyError(f"{name}: expected floats in an ingot, found {shown}")
    if name in _INDEXED and any(t.dtype not in ("i32", "i64") for t in _indices(name, types)):
        raise VerifyError(f"{name}: expected i32 or i64 indices, found {shown}")
    if attrs.get("transposed"):
        raise VerifyError(f"{name}: expected no transposed convolution in an ingot, found one")


def _indices(name: str, types: Types) -> Types:
    return types[1:] if name == "aten.index.Tensor" else types[1:2]


def _of_x(text: str) -> AxisRule:
    """The rule `text` of one operand x, whatever its name is."""
    of_x = rule(text)
    return lambda operands, results, attrs: of_x(
        dict(zip(("x",), operands.values(), strict=True)), results, attrs
    )


# Operators whose dims correspond in ways that torch has no tag for.
AXES: Mapping[str, AxisRule] = {
    "aten.polar.default": elementwise,
    "aten.view_as_complex.default": _of_x("x[*,c] -> [*]; c whole"),
    "aten.view_as_real.default": _of_x("x[*] -> [*,c]; c whole"),
}


def _axes_of(name: str, overload: Any) -> AxisRule | None:
    return elementwise if torch.Tag.pointwise in overload.tags else AXES.get(name)


def aten_op(name: str) -> Op:
    """The op for `aten.<packet>.<overload>`, registered on first use.

    VerifyError when torch has no such operator or it writes into its arguments.
    """
    with _REGISTERING:  # an op is one object, for all threads
        return _registered(name)


_REGISTERING = RLock()


@cache
def _registered(name: str) -> Op:
    overload = overload_of(name)
    if overload._schema.is_mutable:
        raise VerifyError(f"{name} writes into its arguments; functionalise the program first")

    @lru_cache(1 << 8)
    def inferred(types: Types, kinds: str, attrs: tuple[tuple[str, Any], ...]) -> Types:
        return _infer(name, overload, types, dict(attrs))

    def infer(*types: TensorType, **attrs: Any) -> Types:
        # Attributes by their text, too: 1, 1.0 and True are equal, and are three.
        return inferred(types, repr(attrs), tuple(attrs.items()))

    def reference(*tensors: torch.Tensor, **attrs: Any) -> Any:
        device = tensors[0].device if tensors and isinstance(tensors[0], torch.Tensor) else "cpu"
        return _call(overload, iter(tensors), attrs, device)

    return Op(name, infer, reference, axes=_axes_of(name, overload))


def _check_kinds(name: str, overload: Any, attrs: Mapping[str, Any]) -> None:
    """Check the attributes that stand for tensors and dtypes.

    Of all others torch checks the kinds when it runs the operator on meta tensors.
    """
    for argument in overload._schema.arguments:
        label, kind = argument.name, KINDS.get(_STAND_FOR.get(str(argument.type), ""))
        if argument.name == "dtype":
            kind = KINDS["str | None"]
        if kind is None or (label not in attrs and argument.has_default_value()):
            continue
        if label not in attrs or not kind.takes(attrs[label]):
            found = f"{attrs[label]!r:.80}" if label in attrs else "none"
            raise VerifyError(f"{name}: expected {kind.words} for {label}, found {found}")


# What an attribute is in place of tensors, by the kind of the operator's argument.
_STAND_FOR = {"List[Tensor]": "int", "List[Optional[Tensor]]": "tuple[bool, ...]"}


def _call(overload: Any, tensors: Iterator[Any], attrs: Mapping[str, Any], device: Any) -> Any:
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    if unknown := attrs.keys() - {a.name for a in overload._schema.arguments}:
        raise ValueError(f"expected arguments of {overload._schema}, found {sorted(unknown)}")
    for argument in overload._schema.arguments:
        name, kind = argument.name, str(argument.type)
        if kind == "Tensor" or (kind == "Optional[Tensor]" and attrs.get(name, 0) is not None):
            value = next(tensors)
        elif kind == "List[Tensor]":
            value = [next(tensors) for _ in range(attrs[name])]
        elif kind == "List[Optional[Tensor]]":
            value = [next(tensors) if present else None for present in attrs[name]]
        elif name == "device":
            value = device
        elif name in NOT_ATTRIBUTES or name not in attrs:
            value = argument.default_value
        elif name == "dtype" and attrs[name] is not None:
            if attrs[name] not in DTYPES:
                raise ValueError(f"expected a dtype, found {attrs[name]!r:.80}")
            value = torch_dtype(attrs[name])
        else:
            value = attrs[name]
        if argument.kwarg_only:
            keywords[name] = value
        else:
            positional.append(value)
    if surplus := len(list(tensors)):
        raise ValueError(f"expected tensors for {overload._schema}, found {surplus} more")
    return overload(*positional, **keywords)


def _run_on_meta(
    name: str, overload: Any, types: Types, attrs: Mapping[str, Any], at: Mapping[str, int]
) -> Types:
    """Result types with every symbol bound as in `at`."""
    operands = [t.bind(at) for t in types]
    tensors = (torch.empty(t.shape, dtype=torch_dtype(t.dtype), device="meta") for t in operands)  # pyright: ignore
    bound = {k: bind_attr(v, at) for k, v in attrs.items()}
    try:
        found = _call(overload, tensors, bound, "meta")
    except (RuntimeError, NotImplementedError, ValueError, IndexError, StopIteration) as error:
        shown = ", ".join(map(str, operands))
        told = next(iter(str(error).splitlines()), type(error).__name__)
        raise VerifyError(f"{name}: torch refuses ({shown}) with {bound}: {told}") from error
    results = found if isinstance(found, tuple | list) else (found,)
    if not all(isinstance(r, torch.Tensor) for r in results):
        raise VerifyError(f"{name}: expected tensors as results, found {results}")
    return tuple(type_of(r) for r in results)


def _infer(name: str, overload: Any, types: Types, attrs: Mapping[str, Any]) -> Types:
    _check_kinds(name, overload, attrs)
    names = sorted(
        set().union(*(free_symbols(t.shape) for t in types), *map(attr_symbols, attrs.values()))
    )
    if len(names) > _MOST_SYMBOLS:
        raise VerifyError(f"{name}: expected at most {_MOST_SYMBOLS} symbols, found {names[:9]}")
    probes: list[dict[str, int]] = [
        dict(zip(names, p, strict=True)) for p in itertools.product(_PROBES, repeat=len(names))
    ]
    seen = [_run_on_meta(name, overload, types, attrs, at) for at in probes]
    if len(set(map(len, seen))) > 1:
        raise VerifyError(f"{name}: the number of results depends on {', '.join(names)}")
    found: list[TensorType] = []
    for i, first in enumerate(seen[0]):
        dims = tuple(
            _interpolate(names, probes, [types[i].shape[axis] for types in seen])
            for axis in range(first.rank)
        )
        found.append(TensorType(first.dtype, dims))
    for size in _CHECKS if names else ():
        check = dict.fromkeys(names, size)
        expected = _run_on_meta(name, overload, types, attrs, check)
        if not _agree(found, expected, check):
            shown = ", ".join(map(str, expected))
            raise VerifyError(
                f"{name}: expected result shapes that are polynomials of {', '.join(names)}; "
                f"at {size} found {shown}"
            )
    return tuple(found)


def _agree(found: list[TensorType], expected: Types, at: Mapping[str, int]) -> bool:
    try:
        return tuple(t.bind(at) for t in found) == expected
    except ValueError:  # a dim that is no integer here
        return False


def _interpolate(names: list[str], probes: list[dict[str, int]], sizes: list[Any]) -> Dim:
    """The polynomial, linear in each symbol, that takes `sizes` at `probes` (Lagrange)."""
    if len(set(sizes)) == 1:
        return int(sizes[0])
    total: Any = sympy.Integer(0)
    low, high = _PROBES
    for at, size in zip(probes, sizes, strict=True):
        term: Any = sympy.Integer(size)
        for n in names:
            other = high if at[n] == low else low
            term *= (symbol(n) - other) / sympy.Integer(at[n] - other)
        total += term
    return dim(total)
