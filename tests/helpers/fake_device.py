"""A device and a model small enough to be sure of: serving tests replay this one.

The model's logits are a hash of every token up to the row, each with its position, computed in
integers: the result is the same in every batch and every bucket, and changes when one position is
missing, stale, doubled or out of order. The device reaches the context only through its own paged
cache, whose cells start as poison, and refuses every input that breaks the serving ABI.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ingot.runtime.driver import LAUNCHES, Array, DeviceFailedError, WeightLoader
from ingot.runtime.program import STEP, Buffer, Entry, Function, Program, Spec
from ingot.runtime.serving.abi import FED, sampling_inputs
from ingot.runtime.serving.sampling import Sampling, most_likely, sample, uniform
from ingot.runtime.serving.session import Session
from numpy.typing import NDArray

POISON = np.uint64(2**64 - 1)


def mix(x: Array) -> Array:
    """A hash of u64 (the finalizer of splitmix64)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys(tokens: Array, positions: Array) -> Array:
    """The cache cell u64 of each token; never the poison."""
    return mix(
        tokens.astype(np.uint64) * np.uint64(1 << 32) + positions.astype(np.uint64)
    ) >> np.uint64(1)


def head(context: Array, vocab: int) -> NDArray[np.float32]:
    """Logits f32[vocab] of one row whose context is the cells u64[n]."""
    with np.errstate(over="ignore"):
        state = context.sum(dtype=np.uint64)
        bits = mix(state + np.arange(vocab, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return ((bits >> np.uint64(40)).astype(np.float32) / 2**21) - 4


def expected_logits(tokens: Sequence[int], vocab: int) -> NDArray[np.float32]:
    """The logits f32[T, vocab] of a sequence, without any cache."""
    cells = keys(np.array(tokens), np.arange(len(tokens)))
    return np.stack([head(cells[: t + 1], vocab) for t in range(len(tokens))])


def expected_tokens(
    prompt: Sequence[int], count: int, sampling: Sampling, vocab: int
) -> tuple[list[int], list[float]]:
    """The `count` tokens and log-probabilities that follow `prompt`; `sampling` has a seed."""
    history = list(prompt)
    logprobs: list[float] = []
    for step in range(count):
        cells = keys(np.array(history), np.arange(len(history)))
        draw = uniform(sampling.seed or 0, step)
        token, logprob = sample(head(cells, vocab), sampling, history, draw)
        history.append(token)
        logprobs.append(logprob)
    return history[len(prompt) :], logprobs


def serving_program(
    *,
    buckets: Sequence[int] = (1, 2, 4, 8, 16, 32),
    vocab_size: int = 50,
    page_size: int = 4,
    max_sequences: int = 8,
    max_tokens_per_sequence: int = 64,
    pages: int = 128,
    candidates: int | None = None,
    rows: int | None = None,
) -> Program:
    """A program of the serving ABI with nothing in it to launch.

    With `candidates` its device samples. Entries have up to `rows` rows, by default a sequence one.
    """
    table = (max_sequences, -(-max_tokens_per_sequence // page_size))
    inputs = {name: Spec("i32", ("T",)) for name in ("tokens", "positions", "slots")}
    inputs |= {"page_table": Spec("i32", table), "logit_rows": Spec("i32", ("L",))}
    outputs = {"logits": Spec("f32", ("L", vocab_size))}
    if candidates is not None:
        inputs |= sampling_inputs(vocab_size)
        outputs |= {"token": Spec("i32", ("L",)), "logprob": Spec("f32", ("L",))}
    if candidates:
        outputs["top_tokens"] = Spec("i32", ("L", candidates))
        outputs["top_logprobs"] = Spec("f32", ("L", candidates))
    entries: list[Entry] = []
    for size in buckets:
        symbols = {"T": size, "L": min(size, rows or max_sequences)}
        buffers = [
            Buffer(name, spec.dtype, spec.bound(symbols), kind, 0, 0)
            for kind, specs in (("input", inputs), ("output", outputs))
            for name, spec in specs.items()
        ]
        entries.append(Entry(symbols, tuple(buffers), (), ()))
    meta = {
        "vocab_size": vocab_size,
        "page_size": page_size,
        "max_sequences": max_sequences,
        "max_tokens_per_sequence": max_tokens_per_sequence,
        "pages": pages,
    }
    symbols = {"T": (1, max(buckets)), "L": (1, rows or max_sequences)}
    fed = () if candidates is None else FED
    step = Function(symbols, inputs, outputs, (), tuple(entries), fed=fed)
    return Program("fake", {}, {}, {STEP: step}, 0, meta)


@dataclass
class FakeDriver:
    """Loads `FakeExecutable`s and keeps the last.

    `fail_at` is the replay that raises `failure`; one that computes the token `poison` raises.
    """

    target: str = "fake"
    fail_at: int | None = None
    failure: BaseException = field(default_factory=lambda: DeviceFailedError("it is gone"))
    poison: int | None = None
    executable: FakeExecutable | None = None

    def load(self, program: Program, weights: WeightLoader) -> FakeExecutable:
        weights("everything")
        self.executable = FakeExecutable(program, self)
        return self.executable


@dataclass
class FakeRun:
    """Replay `number`, which is looked at when it is waited for; see driver.Running."""

    executable: FakeExecutable
    number: int
    outputs: dict[str, Array]

    def wait(self) -> dict[str, Array]:
        device = self.executable
        assert device.launched - self.number <= LAUNCHES, "results that are gone"
        device.calls.append(("wait", self.number))
        return self.outputs


class FakeExecutable:
    """The model over a paged cache; `replays` records (entry, tokens that are not padding).

    `calls` records launches by the host's inputs, launches that are fed and what is waited for, in
    their order, with the number of the launch.
    """

    def __init__(self, program: Program, driver: FakeDriver) -> None:
        self.functions = program.functions
        self.meta: Mapping[str, Any] = program.meta
        self.driver = driver
        self.cells = np.full((self.meta["pages"], self.meta["page_size"]), POISON, np.uint64)
        self.at = np.full_like(self.cells, -1, dtype=np.int64)
        self.replays: list[tuple[str, int]] = []
        self.slots_seen: list[list[int]] = []
        self.fetched: list[list[str]] = []
        self.calls: list[tuple[str, int]] = []
        self.launched = 0
        self.left: tuple[Any, dict[str, Array]] = (None, {})
        self.broken_row: int | None = None
        self.closed = 0

    def run(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> dict[str, Array]:
        return self.launch(function, symbols, inputs, outputs).wait()

    def launch(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> FakeRun:
        assert not self.closed
        entry = self.functions[function].entry(symbols)
        declared = {b.name for b in entry.buffers if b.kind == "input"}
        (of, left), self.left = self.left, (None, {})
        fed = inputs.keys() != declared
        if fed:
            assert of == (function, dict(symbols)), "nothing was left for this launch"
            inputs = left | dict(inputs)
        found = self._compute(entry, inputs, outputs)
        if self.functions[function].fed:
            # Only here: an ingot is served without torch.
            import torch
            from ingot.compiler.ops.feed import feed

            given = [torch.from_numpy(np.array(inputs[name])) for name in feed.required[:6]]
            rest = [torch.from_numpy(np.array(inputs[name])) for name in feed.required[7:]]
            nexts = feed.reference(*given, torch.from_numpy(self._tokens), *rest)
            updated = {n: x.numpy() for n, x in zip(FED, nexts, strict=True)}
            kept = {name: np.array(array) for name, array in inputs.items()}
            self.left = (function, dict(symbols)), kept | updated
        self.launched += 1
        self.calls.append(("feed" if fed else "launch", self.launched))
        return FakeRun(self, self.launched, found)

    def _compute(
        self, entry: Entry, inputs: Mapping[str, Array], outputs: Collection[str] | None
    ) -> dict[str, Array]:
        self._check(entry, inputs)
        slots, positions, table = inputs["slots"], inputs["positions"], inputs["page_table"]
        real = np.flatnonzero(slots >= 0)
        if len(self.replays) == self.driver.fail_at:
            raise self.driver.failure
        self.replays.append((f"t{entry.symbols['T']}", len(real)))
        self.slots_seen.append(slots[real].tolist())

        size = self.meta["page_size"]
        pages = table[slots[real], positions[real] // size]
        if self.driver.poison is not None and self.driver.poison in inputs["tokens"][real]:
            self.cells[pages, positions[real] % size] = POISON
            raise IndexError(f"token {self.driver.poison}\nand more lines")
        self.cells[pages, positions[real] % size] = keys(inputs["tokens"][real], positions[real])
        self.at[pages, positions[real] % size] = positions[real]
        logits = np.empty((len(inputs["logit_rows"]), self.meta["vocab_size"]), np.float32)
        for row, token in enumerate(inputs["logit_rows"]):
            if slots[token] < 0:
                logits[row] = np.nan
                continue
            before = np.arange(positions[token] + 1)
            where = table[slots[token], before // size], before % size
            assert (self.at[where] == before).all(), "a position of the context was never written"
            logits[row] = head(self.cells[where], self.meta["vocab_size"])
            if row == self.broken_row:
                logits[row] = np.nan
        made = {"logits": logits, **self._choose(entry, inputs, logits)}
        self._tokens = made.get("token", np.zeros(0, np.int32))
        self.fetched.append(sorted(made if outputs is None else outputs))
        return {name: made[name] for name in self.fetched[-1]}

    def _choose(self, entry: Entry, inputs: Mapping[str, Array], logits: Array) -> dict[str, Array]:
        """What the host would choose, from the numbers that a device is given."""
        made: dict[str, Array] = {
            b.name: np.full(b.shape, -1, np.int32 if b.dtype == "i32" else np.float32)
            for b in entry.buffers
            if b.kind == "output" and b.name != "logits"
        }
        if not made:
            return made
        bits = np.unpackbits(inputs["seen"].view(np.uint8), axis=1, bitorder="little")
        for row, scores in enumerate(logits):
            if np.isnan(scores).any():
                made["logprob"][row] = np.nan
                continue
            sampling = Sampling(
                temperature=inputs["temperature"][row],
                top_k=inputs["top_k"][row],
                top_p=inputs["top_p"][row],
                min_p=inputs["min_p"][row],
                repetition_penalty=inputs["penalty"][row],
            )
            seen = np.flatnonzero(bits[row]).tolist()
            chosen = sample(scores, sampling, seen, inputs["draw"][row])
            made["token"][row], made["logprob"][row] = chosen
            for i, pair in enumerate(most_likely(scores, inputs["top"][row])):
                made["top_tokens"][row, i], made["top_logprobs"][row, i] = pair
        return made

    def close(self) -> None:
        self.closed += 1

    def _check(self, entry: Entry, inputs: Mapping[str, Array]) -> None:
        declared = {b.name: b.shape for b in entry.buffers if b.kind == "input"}
        assert {name: array.shape for name, array in inputs.items()} == declared
        dtypes = {b.name: b.dtype for b in entry.buffers if b.kind == "input"}
        for name, array in inputs.items():
            assert (
                array.dtype == {"f32": np.float32, "i32": np.int32, "i64": np.int64}[dtypes[name]]
            )
        tokens, positions, slots = inputs["tokens"], inputs["positions"], inputs["slots"]
        real = slots >= 0
        assert real.any(), "a replay of nothing but padding"
        assert not real[int(real.sum()) :].any(), "padding comes last"
        assert (slots[~real] == -1).all()
        assert slots.max() < self.meta["max_sequences"]
        assert ((tokens >= 0) & (tokens < self.meta["vocab_size"])).all()
        assert ((positions >= 0) & (positions < self.meta["max_tokens_per_sequence"])).all()
        rows = inputs["logit_rows"]
        assert ((rows >= 0) & (rows < len(tokens))).all()
        table = inputs["page_table"]
        assert ((table >= 0) & (table < self.meta["pages"])).all()
        owned: list[int] = []
        for slot in np.unique(slots[real]):
            mine = positions[real][slots[real] == slot]
            assert (np.diff(mine) == 1).all(), "positions of a slot increase"
            owned += table[slot, : mine.max() // self.meta["page_size"] + 1].tolist()
        assert len(set(owned)) == len(owned), "a page with two owners"


def session_of(program: Program, driver: FakeDriver | None = None, **options: Any) -> Session:
    """A session of `program` on a fake device."""
    executable = (driver or FakeDriver()).load(program, lambda _name: None)
    return Session(program, executable, **options)
