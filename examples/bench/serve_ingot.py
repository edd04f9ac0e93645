"""One ingot, loaded and decoded in a process of its own; prints JSON.

    python serve_ingot.py INGOT PROMPT_TOKENS NEW_TOKENS

Nothing here needs torch or triton. That nothing is compiled is shown too: processes that are
started are recorded, and compilers are looked for among the modules at the end.
"""

from __future__ import annotations

import json
import random
import sys
from statistics import median
from time import perf_counter
from typing import Any

STARTS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.fork")
COMPILERS = ("torch", "triton", "transformers", "torch_mlir")
REPLAYS, RUNS = 200, 3

started: list[str] = []


def watch(event: str, args: tuple[Any, ...]) -> None:
    if event in STARTS:
        started.append(f"{event} {args[:1]}")


sys.addaudithook(watch)  # before the imports: what those start counts too

import ingot  # noqa: E402
from ingot.frontends.bench.workload import Workload, step_inputs  # noqa: E402
from ingot.frontends.drivers import driver_for, present_target  # noqa: E402
from ingot.runtime.program import STEP  # noqa: E402


class KeepingDriver:
    """A driver that keeps what it loads, so that replays can be timed on the device."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.target = driver.target
        self.program: Any = None
        self.executable: Any = None

    def load(self, program: Any, weights: Any) -> Any:
        self.program = program
        self.executable = self._driver.load(program, weights)
        return self.executable


def main() -> None:
    path, prompt_tokens, new_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    driver: Any = KeepingDriver(driver_for(present_target()))
    start = perf_counter()
    model = ingot.load(path, driver=driver)
    load_seconds = perf_counter() - start
    draw = random.Random(0)

    def decode(count: int) -> tuple[float, float]:
        """Seconds to the first token of a new prompt, and tokens a second after it."""
        prompt = [draw.randrange(model.session.meta.vocab_size) for _ in range(prompt_tokens)]
        begin = perf_counter()
        times = [
            perf_counter() - begin
            for event in model.session.stream([prompt], max_new_tokens=count)
            if event.token is not None
        ]
        return times[0], (len(times) - 1) / (times[-1] - times[0])

    decode(8)  # the first use of anything is not what is measured
    runs = [decode(new_tokens) for _ in range(RUNS)]
    entry, meta = driver.program.entries[0], model.session.meta
    step = driver.program.functions[STEP]
    inputs = step_inputs(step, meta, entry.symbols, Workload(1, 1, prompt_tokens))
    found = {
        "load_seconds": load_seconds,
        "prefill_ms": 1e3 * median(first for first, _ in runs),
        "tokens_per_second": median(rate for _, rate in runs),
        "replay_ms": median(driver.executable.measure(STEP, entry.symbols, inputs, REPLAYS)),
        "launches": len(entry.launches),
        "arena_bytes": driver.program.arena_bytes,
        "processes_started": started,
        "compiler_modules": [name for name in COMPILERS if name in sys.modules],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
