"""Python's parser, by one thread at a time."""

from __future__ import annotations

import ast
from threading import RLock

# Up to Python 3.12 all threads of a process share the recursion counter of the `ast` module: where
# a garbage collection switches threads while one of them is given a tree, both may fail with
# "SystemError: AST constructor recursion depth mismatch". Held by all of Ingot that makes trees.
AST_LOCK = RLock()


def parse_expression(text: str) -> ast.expr:
    """The syntax tree of an expression; errors are those of ast.parse."""
    with AST_LOCK:
        return ast.parse(text, mode="eval").body
