"""Full-size models with random weights: what compiling, loading and decoding cost, beside peers.

    python examples/bench/full_size.py [MODEL ...] [--target cuda:sm_90] [--layers N]

MODEL is a name that `ingot bench` knows or a directory with a config.json. A checkpoint is written
and compiled into an ingot; both are thrown away unless --keep DIR says where they stay. Where the
machine has the target's device, the ingot is loaded and decoded in a process of its own, and in the
same run the device's read bandwidth and decoding in transformers are measured. Every figure is
printed as JSON too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

from ingot.compiler.text import parse
from ingot.frontends.bench.device_rates import bytes_per_second
from ingot.frontends.bench.models import MODELS, config_of
from ingot.frontends.bench.peers import measure_peer
from ingot.frontends.bench.traffic import NOTHING, traffic_by_label
from ingot.frontends.bench.workload import Workload
from ingot.frontends.drivers import driver_here, present_target
from ingot.runtime.artifact.reader import FINAL_GRAPH, open_ingot
from random_checkpoint import write_checkpoint

HERE = Path(__file__).parent
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog=f"models: {', '.join(MODELS)}"
    )
    parser.add_argument("models", nargs="*", default=["qwen3-8b", "deepseek-v2-lite"])
    parser.add_argument("--target", default="auto", help="default: the GPU of this machine")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--quantize", choices=("mxfp4", "none"), default="mxfp4")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens (%(default)s)")
    parser.add_argument("--keep", type=Path, help="where checkpoint and ingot go and stay")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    options = parser.parse_args()
    here = present_target()
    target = here if options.target == "auto" else options.target
    if not target.startswith(("cuda", "hip")):
        parser.error("this machine has no GPU: name the --target to compile for")
    bandwidth = 0.0
    if target == here:
        bandwidth = bytes_per_second(driver_here(target))
        print(f"{target}: reads {bandwidth / 1e12:.2f} TB/s", flush=True)
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.keep or Path(scratch)
            print(json.dumps(_measure(name, folder, target, bandwidth, options)), flush=True)


def _measure(
    name: str, folder: Path, target: str, bandwidth: float, options: argparse.Namespace
) -> dict[str, Any]:
    """One model from its config to its figures; those of a device only with a `bandwidth`."""
    config = config_of(name, options.layers)
    stem = Path(name).name
    source, path = folder / stem, folder / f"{stem}-{target.replace(':', '-')}.ingot"
    source.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"model": name, "target": target, "layers": config.num_hidden_layers}
    _tell(f"{name}, {config.num_hidden_layers} layers, for {target}")
    start = perf_counter()
    found["checkpoint_bytes"] = write_checkpoint(config, source)
    found["write_seconds"] = perf_counter() - start
    _tell(f"  checkpoint of {found['checkpoint_bytes'] / GIB:.1f} GiB")
    found |= _compile(source, path, target, options.quantize)
    _tell(
        f"  compiled in {found['compile_seconds']:.1f} s to {found['ingot_bytes'] / GIB:.2f} GiB; "
        f"peak memory {found['peak_bytes'] / GIB:.2f} GiB, "
        f"{found['peak_anonymous_bytes'] / GIB:.2f} GiB of it backed by no file"
    )
    artifact = open_ingot(path)
    assert artifact.program is not None
    found["kernels"] = len(artifact.program.kernels)
    graph = parse(artifact.graphs[FINAL_GRAPH], trusted=False)
    read = traffic_by_label(graph, Workload(1, 1, options.prompt))
    found["bytes_per_token"] = sum(read.values(), NOTHING).bytes
    if not bandwidth:
        _tell("  not run: its device is not here")
        return found
    sizes = [options.prompt, options.tokens]
    found |= _json([HERE / "serve_ingot.py", path, *sizes])
    share = found["tokens_per_second"] * found["bytes_per_token"] / bandwidth
    found |= {"bytes_per_second": bandwidth, "of_bandwidth": share}
    _tell(
        f"  loaded in {found['load_seconds']:.2f} s; processes started: "
        f"{found['processes_started'] or 'none'}, compilers imported: "
        f"{found['compiler_modules'] or 'none'}"
    )
    _tell(
        f"  prefill {found['prefill_ms']:.1f} ms, then {found['tokens_per_second']:.1f} tokens/s: "
        f"{share:.1%} of the read bandwidth for {found['bytes_per_token'] / 1e9:.2f} GB a token; "
        f"a replay of {found['launches']} launches takes {found['replay_ms']:.3f} ms"
    )
    if options.keep is None:
        shutil.rmtree(source)
    if not options.no_peer:
        source.mkdir(exist_ok=True)
        config.save_pretrained(source)
        found["transformers"] = peer = measure_peer(source, "hf-eager", options.prompt, 32)
        _tell(f"  transformers, bf16, not compiled: {peer}")
    return found


def _tell(line: str) -> None:
    print(line, flush=True)


def _compile(source: Path, path: Path, target: str, quantize: str) -> dict[str, Any]:
    """`ingot compile` with no kernel cache, in a process of its own: seconds and peak memory."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "ingot", "compile", source, "-o", path, "--overwrite"]
        command += ["--target", target, "--json"]
        command += ["--quantize", quantize] if quantize != "none" else []
        start = perf_counter()
        child = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, "XDG_CACHE_HOME": cache},
            stdout=subprocess.PIPE,
        )
        peaks = _Peaks(child.pid)
        out, _ = child.communicate()
        seconds = perf_counter() - start
        peaks.stop()
    if child.returncode:
        raise SystemExit(f"ingot compile ended with {child.returncode}")
    return {
        "compile_seconds": seconds,
        "stages": json.loads(out)["seconds"],
        "peak_bytes": peaks.found["VmHWM"],
        "peak_anonymous_bytes": peaks.found["RssAnon"],
        "ingot_bytes": path.stat().st_size,
    }


class _Peaks:
    """The peaks of a process's memory, sampled: all that is resident, and what no file backs."""

    def __init__(self, pid: int) -> None:
        self.found = {"VmHWM": 0, "RssAnon": 0}
        self._status = Path(f"/proc/{pid}/status")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            try:
                lines = self._status.read_text(encoding="ascii").splitlines()
            except OSError:  # it ended
                return
            for line in lines:
                name, _, rest = line.partition(":")
                if name in self.found:
                    self.found[name] = max(self.found[name], int(rest.split()[0]) * 1024)


def _json(command: list[Any]) -> dict[str, Any]:
    """What another script prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
