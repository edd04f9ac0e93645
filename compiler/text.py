"""Reading the textual IR back: `parse(str(graph))` has the structure of `graph`.

The form is one line a node, `%3, %4 = topk(%2, dim=-1, k=2) : f32[T, 2], i64[T, 2]`. Parameters and
results are written %name, weights @name (their types stand in the `where` block), scalar literals
dtype(number); optional operands by name, `linear(%2, @w, bias=@b)`. Lines that start with # are
comments. Each call is read with Python's own parser, as data: nothing is evaluated but arithmetic
on dims.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from .ast_lock import parse_expression
from .attribute_text import ParseError, parse_attribute, parse_type
from .ir import Graph, Node, Op, Value, show_attr
from .ops.aten import aten_op
from .ops.leaf import constant, literal, param
from .types import VerifyError
from .untrusted import check_untrusted

# All patterns are linear in the text: words are taken whole, and no bracket is looked for twice.
_TYPE = re.compile(r"\b\w++\[[^\[\]]*+\]")
_PARAM = re.compile(r"%([\w.\-/]++): (\w++\[[^\[\]]*+\])")
_SYMBOL = re.compile(r"(\w+)=(\d+)\.\.(\d+)")
# A string, which is left as it is (one that does not end is refused later), or a reference.
_REF = re.compile(r"""'(?:[^'\\]|\\.?)*+(?:'|$)|"(?:[^"\\]|\\.?)*+(?:"|$)|[%@][\w.\-/]+""")
_SHOWN, _SAID = 300, 1000  # characters of a line that are quoted, and of what is said of it
# What text out of an ingot may have at most. The largest models have some thousand nodes.
_MOST_CHARACTERS, _MOST_IN_LINE, _MOST_NODES, _MOST_SYMBOLS = 1 << 25, 1 << 18, 1 << 16, 16


def _reference(match: re.Match[str]) -> str:
    return f"_ref[{match[0]!r}]" if match[0][0] in "%@" else match[0]


def _argument(tree: ast.expr, values: Mapping[str, Value]) -> Value:
    match tree:
        case ast.Subscript(ast.Name(), ast.Constant(key)):
            if str(key) not in values:
                raise ParseError(f"{key} is used before it is defined")
            return values[str(key)]
        case ast.Call(ast.Name(dtype), [number], []):
            return literal(value=parse_attribute(number), dtype=dtype)
        case _:
            raise ParseError(f"not an argument: {ast.unparse(tree)}")


def _op_name(tree: ast.expr) -> str:
    """A name, or names with dots between: `aten.packet.overload`."""
    names: list[str] = []
    while isinstance(tree, ast.Attribute):
        names.append(tree.attr)
        tree = tree.value
    if not isinstance(tree, ast.Name):
        raise ParseError("expected the name of an op before its arguments")
    return ".".join((tree.id, *reversed(names)))


def _parse_node(line: str, values: dict[str, Value], trusted: bool) -> None:
    left, _, rest = line.partition(" = ")
    call_text, _, type_text = rest.rpartition(" : ")
    call = parse_expression(_REF.sub(_reference, call_text))
    if not isinstance(call, ast.Call):
        raise ParseError("expected an op applied to arguments")
    name = _op_name(call.func)
    if not trusted:
        check_untrusted(name)
    op = aten_op(name) if name.startswith("aten.") else Op.registry.get(name)
    if op is None:
        raise ParseError(f"unknown op {name!r}")
    args = tuple(_argument(a, values) for a in call.args)
    named: dict[str, Any] = {}
    for keyword in call.keywords:
        is_operand = keyword.arg in op.optional or isinstance(keyword.value, ast.Subscript)
        found = _argument(keyword.value, values) if is_operand else parse_attribute(keyword.value)
        if keyword.arg is None or keyword.arg in named:
            raise ParseError(f"{name}: expected every attribute by its name, once")
        named[keyword.arg] = found
    written = tuple(map(parse_type, _TYPE.findall(type_text)))
    if not trusted:
        check_untrusted(name, tuple(a.type for a in args), named)
    node = op.node(args, named)
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
    begin, _, rest = line.partition("(")
    params_text, _, symbols_text = rest.rpartition(")")
    name = begin.removeprefix("graph @")
    found = [_SYMBOL.fullmatch(item) for item in symbols_text.removesuffix("{").split()]
    if name == begin or not name or " " in name or not symbols_text.endswith(" {"):
        raise ParseError(_EXPECTED_HEAD)
    if len(found) > _MOST_SYMBOLS:
        raise ParseError(f"expected at most {_MOST_SYMBOLS} symbols, found {len(found)}")
    symbols: dict[str, range] = {}
    for item in found:
        if item is None:
            raise ParseError(_EXPECTED_HEAD)
        symbols[item[1]] = range(int(item[2]), int(item[3]) + 1)
    pairs = _PARAM.findall(params_text)
    return name, tuple(param(name=n, type=parse_type(t)) for n, t in pairs), symbols


_EXPECTED_HEAD = "expected `graph @name(%parameter: type, ...) SYMBOL=low..high {`"


@contextmanager
def _quoting(number: int, line: str) -> Generator[None]:
    try:
        yield
    except VerifyError as error:
        raise VerifyError(f"line {number}: {str(error)[:_SAID]}\n  {line[:_SHOWN]}") from error
    except (ParseError, SyntaxError, ValueError, TypeError, ArithmeticError) as error:
        raise ParseError(f"line {number}: {str(error)[:_SAID]}\n  {line[:_SHOWN]}") from error
    except (RecursionError, MemoryError) as error:  # of Python's parser, which has a limit for each
        raise ParseError(f"line {number}: nested too deeply\n  {line[:_SHOWN]}") from error


def parse(text: str, *, trusted: bool = True) -> Graph:
    """The graph that `text` describes; ParseError or VerifyError quotes the offending line.

    Text that is not `trusted` may be anything: it is bounded in size, and may hold only ops that
    are safe to run on any values (`untrusted.check_untrusted`).
    """
    if not trusted and len(text) > _MOST_CHARACTERS:
        raise ParseError(f"expected at most {_MOST_CHARACTERS} characters, found {len(text)}")
    rows = [(i, row.strip()) for i, row in enumerate(text.splitlines(), 1)]
    rows = [(i, row) for i, row in rows if row and not row.startswith("#")]
    head, *rest = rows or [(0, "")]
    if not trusted:
        _check_lines(rows)
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
                _parse_node(line, values, trusted)
    return Graph(name, params, outputs, symbols, updates)


def _check_lines(rows: list[tuple[int, str]]) -> None:
    nodes = sum(not line.startswith("@") for _, line in rows)
    if nodes > _MOST_NODES:
        raise ParseError(f"expected at most {_MOST_NODES} nodes, found {nodes}")
    for number, line in rows:
        if len(line) > _MOST_IN_LINE:
            found = f"found {len(line)}"
            raise ParseError(f"line {number}: expected at most {_MOST_IN_LINE} characters, {found}")


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


__all__ = ["ParseError", "parse", "parse_type", "same_structure"]
