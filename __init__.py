"""Ingot: a compiler that turns a transformer into one short, static plan of kernels and replays it.

    import ingot
    model = ingot.compile("path/to/a/hugging-face/directory")
    print(model.generate("def main(", max_new_tokens=32).text)

The names below are the front door; they load on first use, so `import ingot` is instant and imports
neither torch nor triton. Behind it, a model goes down through the rooms once and never back up:
`frontends` (ways in), `passes` over the IR of `compiler`, `codegen`, `runtime`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .frontends.api import (
        MTP,
        MXFP4,
        Completion,
        Draft,
        Eagle3,
        IngotError,
        Model,
        NGram,
        compile,
        compile_to,
        load,
    )

__version__ = "0.1.0"
__all__ = [
    "MTP",
    "MXFP4",
    "Completion",
    "Draft",
    "Eagle3",
    "IngotError",
    "Model",
    "NGram",
    "__version__",
    "compile",
    "compile_to",
    "load",
]
# What serves an ingot for a GPU, and must not bring torch.
_LIGHT = ("MTP", "Draft", "Eagle3", "IngotError", "NGram", "load")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _LIGHT:
        from .frontends import loading as door
    else:
        from .frontends import api as door

    return getattr(door, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
