"""Compiles a model many times for a GPU, each time with empty caches; prints JSON: what failed.

Kernels are built in threads, of which Python 3.11's parser is not safe (`compiler/ast_lock.py`):
one in five compiles failed before they took turns. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from ingot.codegen.build import BuildError
from ingot.frontends.api import plan

PICO = Path(__file__).resolve().parents[1] / "pico"


def cold_compile(model: Path, target: str) -> str:
    """The error of one compile whose caches, Ingot's and Triton's, are empty; "" for none."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = os.environ["TRITON_CACHE_DIR"] = folder
        try:
            report = plan(model, target=target, progress=False).report
        except BuildError as error:
            return str(error)
        assert report.kernels_built and not report.kernels_cached
        return ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--model", type=Path, default=PICO)
    parser.add_argument("--target", default="cuda:sm_90")
    options = parser.parse_args()
    started = time.perf_counter()
    errors = [cold_compile(options.model, options.target) for _ in range(options.count)]
    facts = {
        "python": sys.version.split()[0],
        "compiles": len(errors),
        "failed": [error for error in errors if error],
        "seconds_each": (time.perf_counter() - started) / max(len(errors), 1),
    }
    print(json.dumps(facts, indent=2))
