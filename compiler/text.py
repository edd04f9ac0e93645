"""Reading the textual IR back: `parse(str(graph))` has the structure of `graph`.

The form is one line a node, `%3, %4 = topk(%2, dim=-1, k=2) : f32[T, 2], i64[T, 2]`. Parameters and
results are written %name, weights @name (their types stand in the `where` block), scalar literals
dtype(number); optional operands by name, `linear(%2, @w, bias=@b)`. Lines that start with # are
comments. Each call is read with Python's own parser, as
data: nothing is evaluated but arithmetic on dims.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import sympy

from .ast_lock import parse_expression
from .dtypes import DTYPES
from .ir import Graph, Node, Op, Value, show_attr
from .ops.aten import aten_op
from .ops.leaf import constant, literal, param
from .types import TensorType, VerifyError, dim, symbol

_HEAD = re.compile(r"graph @(\S+?)\((.*)\)((?: \w+=\d+\.\.\d+)*) \{$")
# A string, which is left as it is, or a reference.
_REF = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[%@][\w.\-/]+""")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(sympy, name) for name in ("floor", "ceiling", "Mod", "Min", "Max")
}


def _quotient(a: Any, b: Any) -> Any:
    return sympy.Integer(a) / b if isinstance(a, int) else a / b


def _power(a: Any, b: Any) -> Any:
    # Text may come from anywhere: 9**9**9 would keep the reader busy for ever.
    if not isinstance(b, int) or abs(b) > _MAX_EXPONENT:
        raise ParseError(f"expected an exponent within ±{_MAX_EXPONENT}, found {b}")
    return a**b


_MAX_EXPONENT = 16
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _quotient,
    ast.Pow: _power,
}


class ParseError(Exception):
    """The text is not IR; the message quotes the line."""


@cache
def parse_type(text: str) -> TensorType:
    """A type as printed, `bf16[T, 4096]`."""
    found = re.fullmatch(r"\s*(\w+)\[(.*)\]\s*", text)
    if not found or found[1] not in DTYPES:
        raise ParseError(f"expected a type such as f32[T, 64], found {text!r}")
    dims = _attr(parse_expression(f"[{found[2]}]"))
    for d in dims:
        if isinstance(d, bool) or not isinstance(d, int | sympy.Expr):
            raise ParseError(f"expected a dim, found {d!r}")
    return TensorType(found[1], tuple(dim(d) for d in dims))


def _attr(tree: ast.expr) -> Any:
    if isinstance(tree, ast.Constant):
        return tree.value
    if isinstance(tree, ast.List):
        return tuple(_attr(item) for item in tree.elts)
    if isinstance(tree, ast.Name):
        return {"inf": math.inf, "nan": math.nan}.get(tree.id, symbol(tree.id))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_number(tree.operand)
    if isinstance(tree, ast.BinOp) and type(tree.op) in _ARITHMETIC:
        return _ARITHMETIC[type(tree.op)](_number(tree.left), _number(tree.right))
    if isinstance(tree, ast.Call) and ast.unparse(tree.func) in _FUNCTIONS and not tree.keywords:
        return _FUNCTIONS[ast.unparse(tree.func)](*map(_number, tree.args))
    raise ParseError(f"not an attribute: {ast.unparse(tree)}")


def _number(tree: ast.expr) -> Any:
    value = _attr(tree)
    if not isinstance(value, int | float | sympy.Expr):
        raise ParseError(f"expected a number, found {ast.unparse(tree)}")
    return value


def _reference(match: re.Match[str]) -> str:
    return f"_ref[{match[0]!r}]" if match[0][0] in "%@" else match[0]


def _argument(tree: ast.expr, values: Mapping[str, Value]) -> Value:
    match tree:
        case ast.Subscript(ast.Name(), ast.Constant(key)):
            if str(key) not in values:
                raise ParseError(f"{key} is used before it is defined")
            return values[str(key)]
        case ast.Call(ast.Name(dtype), [number], []):
            return literal(value=_attr(number), dtype=dtype)
        case _:
            raise ParseError(f"not an argument: {ast.unparse(tree)}")


def _parse_node(line: str, values: dict[str, Value]) -> None:
    left, _, rest = line.partition(" = ")
    call_text, _, type_text = rest.rpartition(" : ")
    call = parse_expression(_REF.sub(_reference, call_text))
    if not isinstance(call, ast.Call):
        raise ParseError("expected an op applied to arguments")
    name = ast.unparse(call.func)
    op = aten_op(name) if name.startswith("aten.") else Op.registry.get(name)
    if op is None:
        raise ParseError(f"unknown op {name!r}")
    args = tuple(_argument(a, values) for a in call.args)
    named: dict[str, Any] = {}
    for keyword in call.keywords:
        is_operand = keyword.arg in op.optional or isinstance(keyword.value, ast.Subscript)
        found = _argument(keyword.value, values) if is_operand else _attr(keyword.value)
        named[keyword.arg or ""] = found
    node = op.node(args, named)
    written = tuple(map(parse_type, re.findall(r"\w+\[[^\]]*\]", type_text)))
    if written != node.types:
        given = ", ".join(map(str, node.types))
        raise VerifyError(f"{name}: written as {type_text}, but the op gives {given}")
    names = [n.strip() for n in left.split(",")]
    if len(names) != len(node.results):
        raise ParseError(f"{name} has {len(node.results)} results, found {len(names)} names")
    if again := [n for n in names if n in values]:
        raise ParseError(f"{', '.join(again)} is defined before")
    values.update(zip(names, node.results, strict=True))


def _parse_head(line: str) -> tuple[str, tuple[Value, ...], dict[str, range]]:
    head = _HEAD.match(line)
    if not head:
        raise ParseError("expected `graph @name(%parameter: type, ...) SYMBOL=low..high {`")
    name, params_text, symbols_text = head.groups()
    symbols: dict[str, range] = {}
    for item in symbols_text.split():
        symbol_name, low, high = re.split(r"=|\.\.", item)
        symbols[symbol_name] = range(int(low), int(high) + 1)
    pairs = re.findall(r"%([\w.\-/]+): (\w+\[[^\]]*\])", params_text)
    return name, tuple(param(name=n, type=parse_type(t)) for n, t in pairs), symbols


@contextmanager
def _quoting(number: int, line: str) -> Generator[None]:
    try:
        yield
    except VerifyError as error:
        raise VerifyError(f"line {number}: {error}\n  {line}") from error
    except (ParseError, SyntaxError, ValueError, TypeError, ArithmeticError) as error:
        raise ParseError(f"line {number}: {error}\n  {line}") from error


def parse(text: str) -> Graph:
    """The graph that `text` describes; ParseError or VerifyError quotes the offending line."""
    rows = [(i, row.strip()) for i, row in enumerate(text.splitlines(), 1)]
    rows = [(i, row) for i, row in rows if row and not row.startswith("#")]
    head, *rest = rows or [(0, "")]
    with _quoting(*head):
        name, params, symbols = _parse_head(head[1])
    values = {f"%{p.attrs['name']}": p for p in params}
    for number, line in rest:
        if line.startswith("@"):
            with _quoting(number, line):
                key, _, type_text = line.partition(": ")
                values[key] = constant(name=key[1:], type=parse_type(type_text))
    outputs: tuple[Value, ...] = ()
    updates: dict[str, Value] = {}
    for number, line in rest:
        if line.startswith(("}", "@")):
            continue
        with _quoting(number, line):
            if line == "return" or line.startswith("return "):
                outputs = tuple(_root(v, values) for v in line[len("return ") :].split(", ") if v)
            elif line.startswith("update "):
                key, _, value = line[len("update %") :].partition(" = ")
                updates[key] = _root(value, values)
            else:
                _parse_node(line, values)
    return Graph(name, params, outputs, symbols, updates)


def _root(text: str, values: Mapping[str, Value]) -> Value:
    return _argument(parse_expression(_REF.sub(_reference, text)), values)


def _canonical(graph: Graph) -> Any:
    """All that a graph says, but sources: nodes in order, with numbers in place of arguments."""
    numbers: dict[Node, Any] = {}
    lines: list[Any] = []
    for node in (*(p.node for p in graph.params), *graph.nodes()):
        if node in numbers:
            continue
        # Attributes by their text: 1, 1.0 and True are three, and nan is one.
        attrs = {k: show_attr(v) for k, v in node.attrs.items()}
        args = [(numbers[a.node], a.index) for a in node.args]
        line = (node.op.name, attrs, node.types, node.given, args)
        if node.op in (literal, constant):
            numbers[node] = line
        else:
            numbers[node] = len(lines)
            lines.append(line)
    roots = [(numbers[r.node], r.index) for r in graph.roots]
    head = (graph.name, len(graph.params), len(graph.outputs), dict(graph.symbols))
    return (*head, [*graph.updates], lines, roots)


def same_structure(a: Graph, b: Graph) -> bool:
    """Whether two graphs say the same: equal names, symbols, parameters, and isomorphic nodes.

    Literals and constants are compared by content, all other nodes one to one.
    """
    return _canonical(a) == _canonical(b)
