"""A small serving program for a GPU that is not there, and ingots of it.

Its code is an ELF header and nothing behind it, so no device could run it; a fake driver can serve
it, and everything about it can be checked and damaged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fake_elf import code_for
from ingot.codegen.lower import Lowered
from ingot.compiler.ir import Graph
from ingot.compiler.text import parse
from ingot.frontends.aot import Exportable, export
from ingot.runtime.artifact.manifest import MANIFEST
from ingot.runtime.program import (
    STEP,
    Argument,
    Buffer,
    Entry,
    Function,
    Kernel,
    Launch,
    Program,
    Slice,
    Spec,
)

TARGET = "cuda:sm_90"
VOCAB, PAGE, SEQUENCES, TOKENS, PAGES = 64, 4, 2, 32, 16
WIDTH = 32
GRAPH = """
graph @tiny(%tokens: i32[T]) T=1..32 {
  %0 = embedding(%tokens, @embed.weight) : bf16[T, 32]
  return %0
} where {
  @embed.weight: bf16[64, 32]
}
"""


SM_90 = code_for(TARGET)
GFX950 = code_for("hip:gfx950")


def program(target: str = TARGET, code: bytes = SM_90) -> Program:
    """Two buckets of two kernels each: pointers, numbers, strides, a state, promises."""
    kernels = {
        "gather": Kernel(
            "gather",
            "gather_kernel",
            code,
            4,
            1024,
            (Argument("*i32", 16), Argument("*bf16", 16), Argument("*f32"), Argument("i32", 16)),
            facts={"registers": 32, "spills": 0},
        ),
        "head": Kernel(
            "head",
            "head_kernel",
            code + b"head",
            8,
            0,
            (Argument("*f32"), Argument("*bf16"), Argument("*f32"), Argument("f32")),
            programmatic=True,
        ),
    }
    buffers = {
        b.name: b
        for b in (
            Buffer("@embed.weight", "bf16", (VOCAB, WIDTH), "weight", VOCAB * WIDTH * 2),
            Buffer("@folded.0", "f32", (WIDTH,), "weight", WIDTH * 4),
            Buffer("@codes", "u8", (WIDTH, 8), "weight", WIDTH * 8),
            Buffer("cache.0", "bf16", (PAGES * PAGE, WIDTH), "state", PAGES * PAGE * WIDTH * 2),
        )
    }
    entries = tuple(entry(size) for size in (1, 4))
    meta = {
        "vocab_size": VOCAB,
        "page_size": PAGE,
        "max_sequences": SEQUENCES,
        "max_tokens_per_sequence": TOKENS,
        "pages": PAGES,
    }
    step = Function(
        {"T": (1, 4), "L": (1, SEQUENCES)},
        {
            **{name: Spec("i32", ("T",)) for name in ("tokens", "positions", "slots")},
            "page_table": Spec("i32", (SEQUENCES, 8)),
            "logit_rows": Spec("i32", ("L",)),
        },
        {"logits": Spec("f32", ("L", VOCAB))},
        ("cache.0",),
        entries,
    )
    return Program(target, kernels, buffers, {STEP: step}, 8192, meta)


def entry(size: int) -> Entry:
    rows = min(size, SEQUENCES)
    buffers = (
        Buffer("tokens", "i32", (size,), "input", 4 * size, 0),
        Buffer("positions", "i32", (size,), "input", 4 * size, 256),
        Buffer("slots", "i32", (size,), "input", 4 * size, 512),
        Buffer("page_table", "i32", (SEQUENCES, 8), "input", 64, 768),
        Buffer("logit_rows", "i32", (rows,), "input", 4 * rows, 1024),
        Buffer("%0.0", "f32", (size, 2 * WIDTH), "scratch", size * WIDTH * 8, 2048),
        Buffer("logits", "f32", (rows, VOCAB), "output", rows * VOCAB * 4, 4096),
    )
    hidden = Slice("%0.0", "f32", (size, WIDTH), 0, (2 * WIDTH, 1))
    weight = Slice("@embed.weight", "bf16", (VOCAB, WIDTH))
    launches = (
        Launch("gather", (Slice("tokens", "i32", (size,)), weight, hidden, 16), (size, 1, 1), "e"),
        Launch(
            "head",
            (
                hidden,
                Slice("cache.0", "bf16", (PAGE, WIDTH), PAGE * WIDTH * 2),
                Slice("logits", "f32", (rows, VOCAB)),
                float("-inf"),
            ),
            (2, rows, 1),
            "linear model.lm_head",
        ),
    )
    return Entry({"T": size, "L": rows}, buffers, launches, ((0, 1),))


def weights() -> Mapping[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "@embed.weight": torch.randn(VOCAB, WIDTH, generator=generator).bfloat16(),
        "@folded.0": torch.randn(WIDTH, generator=generator),
        "@codes": torch.randint(0, 255, (WIDTH, 8), generator=generator).to(torch.uint8),
    }


def exportable(made: Program | None = None, files: Mapping[str, bytes] | None = None) -> Exportable:
    held = weights()
    lowered = Lowered(made or program(), lambda name: held[name])
    options = {"max_sequences": 2, "quantize": {"method": "rtn", "group": 32}, "dtype": None}
    return Exportable(lowered, graph(), "tiny", "bf16", frozenset({2}), options, dict(files or {}))


def graph() -> Graph:
    return parse(GRAPH)


def write(path: Path, made: Program | None = None, **options: Any) -> Path:
    """An ingot at `path`."""
    export(exportable(made), path, **options)
    return path


def rewrite(place: Path, name: str, data: bytes, listed: bool = True) -> None:
    """Another content for a file, with its new hash in the manifest if `listed`."""
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_bytes(data)
    if listed:
        fact = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        edit(place, MANIFEST, lambda m: m["files"].update({name: fact}))


def edit(place: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change the JSON in a file, and its hash."""
    value = json.loads((place / name).read_bytes())
    change(value)
    rewrite(place, name, json.dumps(value).encode(), name != MANIFEST)
