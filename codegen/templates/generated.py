"""Triton functions out of generated text."""

from __future__ import annotations

import hashlib
import linecache
from typing import Any

import triton
import triton.language as tl

from .gemm.activations import activated, gated
from .pdl import pdl_wait
from .rowwise.arithmetic import expm1, float_power, integer_power, softplus, tanh

# What a text may call beside tl.
_HELPERS = (activated, expm1, float_power, gated, integer_power, pdl_wait, softplus, tanh)


def from_text(text: str, name: str) -> Any:
    """The `@triton.jit` function called `name` that `text` defines.

    `tl`, `triton` and the functions of _HELPERS are there. Equal texts give
    functions of equal hash. The text is kept in its attribute `generated`, and where Python looks
    for the lines of a file: Triton reads its functions from there.
    """
    file = f"<generated {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    scope |= {helper.__name__: helper for helper in _HELPERS}
    exec(compile(text, file, "exec"), scope)
    function = scope[name]
    function.generated = text
    return function
