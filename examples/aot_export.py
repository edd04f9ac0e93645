"""Compile a model into an ingot, load that, and see that it says the same.

    python examples/aot_export.py [MODEL] [-o OUT.ingot]

MODEL is a Hugging Face directory, by default the small one beside this file. OUT is a zip where it
ends in .ingot, else a directory; without it the ingot is thrown away.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import ingot

PROMPTS = ["def main(", "import os\n", "class Stack:\n"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("model", nargs="?", default=here / "pico", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="where the ingot goes and stays")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a prompt (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = options.output or Path(scratch) / f"{options.model.name}.ingot"
        return 0 if export_and_compare(options.model, path, options.tokens) else 1


def export_and_compare(model: Path, path: Path, tokens: int) -> bool:
    start = perf_counter()
    compiled = ingot.compile(model, progress=sys.stderr.isatty())
    print(f"compiled {model.name} in {perf_counter() - start:.1f} s")
    start = perf_counter()
    compiled.export(path)
    size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")))
    print(f"exported {path.name} in {perf_counter() - start:.2f} s, {size / 2**20:.1f} MiB")

    start = perf_counter()
    loaded = ingot.load(path)
    print(f"loaded in {perf_counter() - start:.2f} s")
    before = compiled.generate(PROMPTS, max_new_tokens=tokens)
    start = perf_counter()
    after = loaded.generate(PROMPTS, max_new_tokens=tokens)
    seconds = perf_counter() - start
    equal = [a.tokens for a in after] == [b.tokens for b in before]
    count = sum(len(completion.tokens) for completion in after)
    print(f"generated {count} tokens in {seconds:.2f} s: {'the same' if equal else 'OTHERS'}")
    print(PROMPTS[0] + after[0].text)

    code = f"import ingot; print(ingot.load({str(path)!r}).generate({PROMPTS[0]!r}).text)"
    start = perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    print(f"a new process loads it and answers in {perf_counter() - start:.1f} s")
    return equal


if __name__ == "__main__":
    sys.exit(main())
