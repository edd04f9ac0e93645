"""What IR out of an ingot may hold: ops of which any operands are safe to run.

The ops of the IR are: their references check every index. Of torch's own operators (`aten.*`) those
of a list are. An ingot is exported only where it may be loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .ir import Graph, Op
from .ops.aten import check_operands, check_operator
from .types import Types, VerifyError


def check_untrusted(
    name: str, types: Types | None = None, attrs: Mapping[str, Any] | None = None
) -> None:
    """Raise VerifyError unless an ingot may hold the op called `name`.

    With the types of its operands and its attributes, unless it may be given these. Nothing of the
    op runs.
    """
    if name.startswith("aten."):
        check_operator(name)
        if types is not None:
            check_operands(name, types, attrs or {})
    elif name in Op.registry and Op.registry[name].collective:
        raise VerifyError(f"{name}: expected a whole model in an ingot, found the part of a rank")


def check_exportable(graph: Graph) -> None:
    """Raise VerifyError at the first node that an ingot may not hold."""
    for node in graph.nodes():
        check_untrusted(node.op.name, tuple(a.type for a in node.args), node.attrs)
