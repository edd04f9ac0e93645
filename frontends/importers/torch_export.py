"""Imports a functional torch.export program into the IR, by one rule per operator.

Shapes are kept as traced; `canonicalize` drops unit dims later. An operator without a rule becomes
an `aten.*` node. Every node's type is compared with the one that torch traced.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ...compiler.ir import Graph, Op, Value
from ...compiler.ops import pointwise, shape
from ...compiler.ops.aten import NOT_ATTRIBUTES, aten_op
from ...compiler.ops.leaf import constant, literal, param
from ...compiler.torch_types import dtype_name, type_of
from ...compiler.types import Dim, TensorType, VerifyError, dim, symbol
from ...compiler.weights import Entry, Weights
from .aten_rules import RULES


class ImportFailure(Exception):
    """The program cannot be expressed in the IR; names the operator and its source line."""


class ImportMismatch(ImportFailure):
    """The imported graph computes other numbers than the model; names where, as far as known."""


@dataclass(frozen=True)
class Imported:
    """A graph, the constants of the program, and the names of all weights that it reads."""

    graph: Graph
    constants: Weights
    referenced: frozenset[str]


def import_program(
    program: ExportedProgram,
    name: str,
    *,
    symbols: Mapping[str, range],
    inputs: Mapping[str, Callable[[TensorType], tuple[Value, Value]]] | None = None,
    strip: str = "",
) -> Imported:
    """The graph of `program`, which must be functional (`run_decompositions({})`).

    `symbols` names the dynamic dims in order of appearance and bounds them. Each user input becomes
    a parameter, unless `inputs` has a function under its name that gives, for the traced type, the
    parameter to declare and the value to use. `strip` is a prefix of module paths and weight names
    that is dropped. ImportFailure names the first operator that cannot be imported.
    """
    return Importer(program, dict(symbols), dict(inputs or {}), strip).run(name)


def _held(tensor: Any) -> Entry:
    return Entry(type_of(tensor), lambda: tensor.detach().cpu(), "the traced program")


@dataclass
class Importer:
    """The state of one import: `node` is the current fx node; rules use the methods below."""

    program: ExportedProgram
    bounds: dict[str, range]
    inputs: dict[str, Callable[[TensorType], tuple[Value, Value]]]
    strip: str
    env: dict[torch.fx.Node, Any] = field(default_factory=dict[torch.fx.Node, Any])
    dims: dict[str, sympy.Symbol] = field(default_factory=dict[str, sympy.Symbol])
    node: Any = None

    # ---- the walk

    def run(self, name: str) -> Imported:
        self._refuse_mutation()
        params, constants = self._bind_placeholders()
        outputs: tuple[Value, ...] = ()
        for node in self.program.graph.nodes:
            self.node = node
            if node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "output":
                outputs = tuple(self._output(n) for n in node.args[0])
        bounds = {n: self.bounds[n] for n in self.bounds}
        graph = Graph(name, tuple(params), outputs, bounds)
        referenced = (n.attrs["name"] for n in graph.nodes() if n.op is constant)
        return Imported(graph, constants, frozenset(referenced))

    def _output(self, node: Any) -> Value:
        if not isinstance(node, torch.fx.Node) or not isinstance(self.env[node], Value):
            raise ImportFailure(f"an output is {node}: only tensors can be outputs")
        return self.env[node]

    def _refuse_mutation(self) -> None:
        for spec in self.program.graph_signature.output_specs:
            if spec.kind is not OutputKind.USER_OUTPUT:
                raise ImportFailure(
                    f"the program writes into {spec.target or 'an input'} ({spec.kind.name}): "
                    "only modules that leave their buffers and inputs as they are can be compiled"
                )

    def _bind_placeholders(self) -> tuple[list[Value], Weights]:
        placeholders = {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}
        params: list[Value] = []
        held: dict[str, Entry] = {}
        for spec in self.program.graph_signature.input_specs:
            node = placeholders[spec.arg.name]
            if not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            self.node = node
            if spec.kind is InputKind.USER_INPUT:
                type_ = self.type_of(node)
                make = self.inputs.get(node.name)
                declared = param(name=node.name, type=type_)
                declared, value = make(type_) if make else (declared, declared)
                params.append(declared)
                self.env[node] = value
                continue
            target = str(spec.target).removeprefix(self.strip)
            self.env[node] = constant(name=target, type=self.type_of(node))
            if spec.kind is InputKind.CONSTANT_TENSOR:
                tensor: Any = self.program.constants[str(spec.target)]
                if node.users and tensor.is_meta:
                    raise ImportFailure(
                        "the code makes a tensor of Python numbers on the device of its weights, "
                        "where it is lost before they are loaded: give the model in memory, in its "
                        "own dtype"
                    )
                held[target] = _held(tensor)
        return params, Weights(held)

    def _call(self, node: torch.fx.Node) -> Any:
        target: Any = node.target
        name = str(target.name() if hasattr(target, "name") else target).replace("::", ".")
        name = name if name.count(".") > 1 else f"{name}.default"
        if (
            node.target in _SYMBOLIC
            or "val" in node.meta
            and isinstance(node.meta["val"], torch.SymInt | torch.SymBool | torch.SymFloat)
        ):
            return self.dim_of(node.meta["val"])
        if _draws(node):
            raise ImportFailure(
                f"{name} at {self.source()} draws random numbers: expected code that computes the "
                "same from the same inputs"
            )
        args = [self.arg(a) for a in node.args]
        kwargs = {k: self.arg(v) for k, v in node.kwargs.items()}
        try:
            if node.target is operator.getitem:
                self._check("getitem", args[0][args[1]])
                return args[0][args[1]]
            if name in RULES:
                result = RULES[name](self, *args, **kwargs)
                result = self.fallback(name, args, kwargs) if result is NotImplemented else result
            else:
                result = self.fallback(name, args, kwargs)
        except VerifyError as error:
            raise ImportFailure(f"{name} at {self.source()}: {error}") from error
        self._check(name, result)
        return result

    def _check(self, name: str, result: Any) -> None:
        """Check that imported types equal the traced ones; of several results, those in use."""
        tensor = self.node.meta.get("val")
        if not isinstance(result, Value) or not isinstance(tensor, torch.Tensor):
            return
        if result.type != self.tensor_type(tensor):
            raise ImportFailure(
                f"{name} at {self.source()}: torch traced {self.tensor_type(tensor)}, "
                f"the import gives {result.type}"
            )

    # ---- what rules use

    def arg(self, value: Any) -> Any:
        """An fx argument with nodes replaced by their imported values."""
        if isinstance(value, torch.fx.Node):
            return self.env[value]
        if isinstance(value, list | tuple):
            return [self.arg(v) for v in value]
        return value

    def emit(self, op: Op, *args: Value, **attrs: Any) -> Value:
        """Append a node with the source location of the current operator."""
        return op.node(args, attrs, self.source()).results[0]

    def source(self) -> str:
        """The module path and source line of the current operator."""
        stack = self.node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        # A module under several names goes by the expression that got it: layers.slice(None, 2).0
        path = re.sub(r"^L\['self'\]\.?|\.slice\([^()]*\)", "", path).removeprefix(self.strip)
        lines = re.findall(r'File "([^"]+)", line (\d+)', self.node.meta.get("stack_trace") or "")
        place = f" @{lines[-1][0].rsplit('/', 1)[-1]}:{lines[-1][1]}" if lines else ""
        return f"{path}{place}"

    def dim_of(self, size: Any) -> Any:
        """A size as a dim over the declared symbols."""
        if isinstance(size, int):
            return size
        if not isinstance(size, torch.SymInt):
            return None
        expression = size.node.expr
        for s in sorted(expression.free_symbols, key=str):
            if free_unbacked_symbols(s):
                raise ImportFailure(
                    f"the code at {self.source()} makes tensors whose sizes depend on the values "
                    "of others: not supported"
                )
            if s.name not in self.dims:
                unused = [n for n in self.bounds if symbol(n) not in self.dims.values()]
                if not unused:
                    raise ImportFailure(f"more dynamic dims than {list(self.bounds)}: {s}")
                self.dims[s.name] = symbol(unused[0])
        return dim(expression.xreplace({s: self.dims[s.name] for s in expression.free_symbols}))

    def tensor_type(self, tensor: torch.Tensor) -> TensorType:
        """The type of a traced tensor."""
        return TensorType(dtype_name(tensor.dtype), tuple(self.dim_of(d) for d in tensor.shape))

    def type_of(self, node: torch.fx.Node) -> TensorType:
        return self.tensor_type(node.meta["val"])

    @property
    def result(self) -> TensorType:
        """The traced type of the current operator."""
        return self.type_of(self.node)

    def to_shape(self, x: Value, target: tuple[Dim, ...]) -> Value:
        """`x` viewed as `target`."""
        return x if x.type.shape == target else self.emit(shape.view, x, shape=target)

    def to_dtype(self, x: Any, dtype: str) -> Value:
        """A tensor cast, or a number as a literal, of `dtype`."""
        if not isinstance(x, Value):
            return literal(value=x, dtype=dtype)
        return x if x.type.dtype == dtype else self.emit(pointwise.cast, x, dtype=dtype)

    def fallback(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """An `aten.*` node for an operator without a rule."""
        if not name.startswith("aten."):
            raise ImportFailure(f"operator {name} at {self.source()} is unknown")
        op = aten_op(name)
        schema = self.node.target._schema
        operands: list[Value] = []
        attrs: dict[str, Any] = {}
        for i, argument in enumerate(schema.arguments):
            given = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            if argument.name in NOT_ATTRIBUTES:
                continue
            if isinstance(given, Value):
                operands.append(given)
            elif isinstance(given, list) and any(isinstance(v, Value) for v in given):
                optional = "Optional" in str(argument.type)
                present = tuple(v is not None for v in given)
                attrs[argument.name] = present if optional else len(given)
                operands += [v for v in given if v is not None]
            elif "Tensor" in str(argument.type) and isinstance(given, int | float):
                operands.append(literal(value=given, dtype=_NUMBER_DTYPES[type(given)]))
            elif isinstance(given, torch.dtype):
                attrs[argument.name] = dtype_name(given)
            elif given != argument.default_value or given is None:
                attrs[argument.name] = tuple(given) if isinstance(given, list) else given
        results = op.node(tuple(operands), attrs, self.source()).results
        traced = self.node.meta.get("val")
        return results if isinstance(traced, tuple | list) else results[0]


def _draws(node: torch.fx.Node) -> bool:
    """Whether an operator is random; dropout that is off, also that of attention, is not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    target: Any = node.target
    named = {a.name: a.default_value for a in target._schema.arguments}
    given = {**named, **dict(zip(named, node.args, strict=False)), **node.kwargs}
    off = any(given.get(name) is False for name in ("train", "training"))
    return not off and all(given.get(name, 1) != 0 for name in ("p", "dropout_p"))


# What torch makes of a Python number where a tensor belongs.
_NUMBER_DTYPES = {bool: "bool", int: "i64", float: "f32"}
_SYMBOLIC = {operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod}
