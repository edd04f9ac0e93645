"""Calibration: which inputs each weight is encoded for, the door, and what a model gains."""

from __future__ import annotations

import gc
import sysconfig
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import ingot
import numpy as np
import pytest
import torch
from ingot.compiler.gptq import DAMPING, gptq, inverse_factor
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.microscaling import decode, encode
from ingot.compiler.ops.hadamard import hadamard
from ingot.compiler.ops.mxfp4 import mxfp4, mxfp4_encode
from ingot.compiler.torch_types import type_of
from ingot.compiler.weights import Entry, Weights
from ingot.frontends.progress import Progress
from ingot.frontends.text import calibration
from ingot.frontends.text.calibration import TextCalibration
from ingot.frontends.text.model_tokenizer import open_tokenizer
from ingot.passes.transforms.calibrate import Calibrated, calibrate, count_matrices
from ingot.passes.transforms.mxfp4_policy import MXFP4
from ingot.passes.transforms.quantize_mxfp4 import QuantizeMxfp4
from pass_checks import applied, graph_of, random_weights
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

PICO = Path(__file__).parents[2] / "examples" / "pico"

# Two layers; the second one's q and k read what the first one gives.
MODEL = """
graph @model(%tokens: i32[T], %positions: i32[T]) T=1..64 {
  %0 = embedding(%tokens, @embed)
  %1 = linear(%0, @router)
  %2, %3 = router(%1, k=2, score='softmax', normalize=True, dtype='f32')
  %4 = experts(%0, %2, %3, @gate_up, @down, activation='silu')
  %5 = linear(%4, @q)
  %6 = linear(%4, @k)
  %7 = mul(%5, %6)
  %8 = slice(@both, dim=0, start=0, stop=64)
  %9 = linear(%7, %8)
  %10 = linear(%9, @head)
  return %10
} where {
  @both: f32[96, 64]
  @down: f32[8, 64, 32]
  @embed: f32[50, 64]
  @gate_up: f32[8, 64, 64]
  @head: f32[50, 64]
  @k: f32[64, 64]
  @q: f32[64, 64]
  @router: f32[8, 64]
}
"""
# Of the eight experts, these tokens reach some.
SEQUENCES = [[1, 2, 3, 1, 2, 3, 4], [5], [1, 4, 4, 2]]


def keep(name: str, tensor: torch.Tensor) -> Entry:
    return Entry(type_of(tensor), lambda: tensor, "the test")


def run(graph: Graph, weights: Weights, **options: Any) -> tuple[Graph, Weights, Calibrated]:
    chosen = MXFP4(**options, calibrate=["text"])
    found = calibrate(graph, weights, SEQUENCES, chosen, bool(chosen.hadamard), keep)
    after, _ = applied(QuantizeMxfp4(chosen, found.encoded), graph)
    return after, weights.merged(found.entries), found


def inputs(ids: list[int]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(ids, dtype=torch.int32)
    return {"tokens": tokens, "positions": torch.arange(len(ids), dtype=torch.int32)}


def values(graph: Graph, weights: Weights, op: str) -> list[list[Any]]:
    """The operands of every `op` in `graph`, over all of SEQUENCES, in the order of the nodes."""
    found: list[list[Any]] = []
    for node in graph.nodes():
        if node.op.name == op:
            all_ = Graph("part", graph.params, node.args, graph.symbols)
            runs = [interpret(all_, inputs(ids), weights).outputs for ids in SEQUENCES]
            found.append([list(column) for column in zip(*runs, strict=True)])
    return found


def test_text(golden: Any) -> None:
    graph = graph_of(MODEL)
    golden(str(run(graph, random_weights(graph), method="gptq", hadamard=True)[0]))


def encoded(w: torch.Tensor, found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The codes for inputs `found` where they ought to be `exact`: by least squares, then gptq."""
    x, y, w64 = found.double(), exact.double(), w.double()
    gram = x.T @ x
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
    best = w64 + w64 @ (y - x).T @ x @ torch.linalg.inv(damped)
    return gptq(((w64 + best) / 2).float(), inverse_factor(gram.float()))[0]


@pytest.mark.parametrize("rotate", [False, True])
def test_each_weight_is_encoded_for_what_the_quantized_graph_gives_it(rotate: bool) -> None:
    """The codes are gptq's for the inputs in the *finished* graph, those of the first as target."""
    before = graph_of(MODEL)
    weights = random_weights(before)
    after, merged, found = run(before, weights, method="gptq", hadamard=rotate)

    def packed(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        done = found.encoded[name]
        return merged.load(done.codes), merged.load(done.scales)

    def turned(w: torch.Tensor) -> torch.Tensor:
        return hadamard.reference(w, block=32)[0] if rotate else w

    def same(codes: torch.Tensor, expected: torch.Tensor) -> bool:
        # Sums in another order may turn a tie, and what follows it in its row.
        return float((codes == expected).all(-1).double().mean()) > 0.9

    places = ("router", "q", "k", "s", "head")
    linears = dict(zip(places, values(after, merged, "linear"), strict=True))
    exacts = dict(zip(places, values(before, weights, "linear"), strict=True))
    site = "slice(both, dim=0, start=0, stop=64)"
    plain = {"q": weights.load("q"), "k": weights.load("k"), "s": weights.load("both")[:64]}
    for key, weight in plain.items():
        x, y = torch.cat(linears[key][0]), turned(torch.cat(exacts[key][0]))
        assert same(packed(site if key == "s" else key)[0], encoded(turned(weight), x, y)), key
    ((x, _, indices, gate_up, _),) = values(after, merged, "experts")
    ((y, *_),) = values(before, weights, "experts")
    reached = set()
    for e in range(8):
        pair = []
        for inputs_, first in ((x, gate_up[0][e]), (y, weights.load("gate_up")[e])):
            chosen = [a[(i == e).any(-1)] for a, i in zip(inputs_, indices, strict=True)]
            h = torch.cat(chosen) @ first.T
            pair.append((torch.cat(chosen), torch.nn.functional.silu(h[:, :32]) * h[:, 32:]))
        (rows, hidden), (exact_rows, exact_hidden) = pair
        w, v = turned(weights.load("gate_up")[e]), weights.load("down")[e]
        if len(rows):
            reached.add(e)
            expected = (
                encoded(w, rows, turned(exact_rows)),
                encoded(v, hidden, exact_hidden),
            )
        else:
            expected = encode(w)[0], encode(v)[0]
        for name, codes in zip(("gate_up", "down"), expected, strict=True):
            assert same(packed(name)[0][e], codes), (name, e)
    for name in ("gate_up", "down"):
        done = found.encoded[name]
        assert 0 < done.unreached == 8 - len(reached) and done.matrices == 8
        assert f"{done.unreached} of 8 matrices" in str(done)
    assert "unreached" not in str(found.encoded["q"]) and found.encoded["q"].unreached == 0


def test_what_is_reported_of_an_encoded_weight() -> None:
    before = graph_of(MODEL)
    weights = random_weights(before)
    _, merged, found = run(before, weights, method="gptq")
    done, w = found.encoded["q"], weights.load("q")
    after = decode(merged.load(done.codes), merged.load(done.scales), torch.float32)
    assert done.error == pytest.approx(float((w - after).norm() / w.norm()), rel=1e-4)
    graph, _ = applied(QuantizeMxfp4(MXFP4(method="gptq", calibrate=["x"]), found.encoded), before)
    x = torch.cat(values(graph, merged, "linear")[1][0])
    exact = torch.cat(values(before, weights, "linear")[1][0])
    expected = float((exact @ w.T - x @ after.T).norm() / (exact @ w.T).norm())
    assert done.product_error == pytest.approx(expected, rel=1e-3)
    mean = sum(e.product_error for e in found.encoded.values()) / len(found.encoded)
    assert found.product_error == pytest.approx(mean)


def test_products_are_nearer_than_by_rounding() -> None:
    before = graph_of(MODEL)
    weights = random_weights(before)
    by = {
        method: calibrate(before, weights, SEQUENCES, options, False, keep)
        for method, options in (
            ("rtn", MXFP4()),
            ("gptq", MXFP4(method="gptq", calibrate=["x"])),
        )
    }
    assert by["gptq"].product_error < 0.8 * by["rtn"].product_error


def test_matrices_are_counted() -> None:
    before, steps = graph_of(MODEL), []
    options = MXFP4(method="gptq", calibrate=["x"])
    calibrate(
        before, random_weights(before), SEQUENCES, options, True, keep, lambda: steps.append(1)
    )
    assert len(steps) == count_matrices(before, options) == 8 + 8 + 3


def test_a_weight_of_two_products_is_encoded_once() -> None:
    text = MODEL.replace("linear(%4, @k)", "linear(%4, @q)").replace("  @k: f32[64, 64]\n", "")
    before = graph_of(text)
    after, _, found = run(before, random_weights(before), method="gptq")
    assert set(found.encoded) == {"q", "gate_up", "down", "slice(both, dim=0, start=0, stop=64)"}
    users = after.users()
    (packed,) = (n for n in after.nodes() if n.op is mxfp4 and n.source == "q")
    assert len(users[packed.results[0]]) == 2


def test_weights_that_cannot_be_encoded_are_refused_by_name() -> None:
    before = graph_of(MODEL)
    held = {n: random_weights(before).load(n) for n in random_weights(before)}
    held["k"][1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"weight k: .*finite"):
        run(before, Weights.of(held), method="gptq")


def test_the_pass_needs_what_calibration_gives() -> None:
    options = MXFP4(method="gptq", calibrate=["text"])
    with pytest.raises(ValueError, match=r"method='gptq'.*need the weights"):
        applied(QuantizeMxfp4(options), graph_of(MODEL))


# ---- the door


def test_options() -> None:
    for wrong, message in (
        ({"method": "awq"}, "method: expected"),
        ({"hadamard": "yes"}, "hadamard: expected"),
        ({"hadamard": 1}, "hadamard: expected"),
        ({"method": "gptq"}, "calibrate: expected texts"),
        ({"hadamard": "auto"}, "calibrate: expected texts"),
        ({"calibrate": ["x"]}, "calibrate: expected none"),
        ({"method": "gptq", "calibrate": "a text"}, "calibrate: expected a list"),
        ({"method": "gptq", "calibrate": 3}, "calibrate: expected a list"),
        ({"method": "gptq", "calibrate": [3]}, "calibrate: expected each"),
        ({"method": "gptq", "calibrate": [[]]}, "calibrate: expected each"),
        ({"method": "gptq", "calibrate": [[1.5]]}, "calibrate: expected each"),
        ({"method": "gptq", "calibrate": [[True]]}, "calibrate: expected each"),
    ):
        with pytest.raises(ValueError, match=message):
            MXFP4(**wrong)
    options = MXFP4(method="gptq", calibrate=["text", [1, 2]])
    assert options == MXFP4(method="gptq", calibrate=("text", np.array([1, 2])))
    assert options.calibrate == ("text", (1, 2)) and hash(options) == hash(replace(options))


def test_sequences() -> None:
    def sequences(texts: Any, longest: int) -> Any:
        bar = Progress(enabled=False)
        return TextCalibration(None, longest, bar).sequences(texts, vocab_size=10)

    assert sequences([[1, 2, 3, 4, 5], [6]], 2) == [[1, 2], [3, 4], [5], [6]]
    assert len(sequences([[0] * 5000], 10**6)) == 3
    for wrong, message in (([[1, 10]], "from 0 to 9, found 10"), (["text"], "needs a tokenizer")):
        with pytest.raises(ValueError, match=message):
            sequences(wrong, 8)


def test_tensor_parallel_is_refused() -> None:
    options = MXFP4(method="gptq", calibrate=[[1, 2]])
    with pytest.raises(ValueError, match="quantize into a directory first"):
        ingot.compile(tiny_model("llama"), quantize=options, tensor_parallel=2)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_models(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calibration.tempfile, "tempdir", str(tmp_path))
    ids = torch.randint(0, 128, (3, 40), generator=torch.Generator().manual_seed(0)).tolist()
    options = MXFP4(group=16, method="gptq", hadamard="auto", calibrate=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        model = ingot.compile(
            tiny_model(name), quantize=options, max_tokens_per_sequence=64, progress=False
        )
        gc.collect()
    packed = [w for w in model.report.weights if w.format == "mxfp4g16"]
    assert packed and all("gptq" in w.reason and 0.03 < w.error < 0.2 for w in packed)
    assert all(0 < w.product_error < 1 for w in packed)
    (note,) = next(p.notes for p in model.report.passes if p.name == "quantize-mxfp4")
    assert "with Hadamard rotations" in note and note in str(model.report)
    assert not any(n.op is mxfp4_encode for n in model.graph("final").nodes())
    assert len(model.generate([1, 2, 3], max_new_tokens=4).tokens) == 4
    model.close()
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_auto_takes_the_smaller_error() -> None:
    """Outliers in one input channel of every weight: rotation spreads them."""
    source = tiny_model("llama")
    ids = [list(range(2, 60))]
    with torch.no_grad():
        for name, p in source.named_parameters():
            if p.ndim == 2 and "proj" in name:
                p[:, ::32] *= 20
    model = ingot.compile(
        source,
        quantize=MXFP4(hadamard="auto", calibrate=ids),
        max_tokens_per_sequence=64,
        progress=False,
    )
    (note,) = next(p.notes for p in model.report.passes if p.name == "quantize-mxfp4")
    assert "; rotated, of" in note
    assert all("rotated" in w.reason for w in model.report.weights if w.format == "mxfp4g32")


# ---- a real model


def standard_library(held_out: bool, sequences: int, length: int) -> list[list[int]]:
    """Token ids of sources that Pico was trained on or not (see train_pico.Document.held_out)."""
    library = Path(sysconfig.get_path("stdlib"))
    tokenizer = open_tokenizer(PICO)
    assert tokenizer
    found: list[list[int]] = []
    for file in sorted(library.glob("*.py")):
        if (zlib.crc32(file.name.encode()) % 25 == 0) == held_out:
            text = file.read_text(encoding="utf-8")
            ids = tokenizer.encode(text[len(text) // 3 :][: 8 * length])
            if len(ids) >= length:
                found.append(ids[:length])
    step = max(1, len(found) // sequences)
    return found[::step][:sequences]


def log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    return torch.from_numpy(model.logits(ids)).double().log_softmax(-1)


@pytest.mark.slow
def test_pico_reads_better_than_by_rounding() -> None:
    """Perplexity on sources that neither training nor calibration saw, and the divergence from what
    the unpacked model says: the surer measure.
    """
    held_out = standard_library(True, 24, 512)
    calibration_ids = standard_library(False, 24, 384)
    assert len(held_out) >= 4 and len(calibration_ids) == 24
    options = {
        "unpacked": None,
        "rtn": MXFP4(),
        "gptq": MXFP4(method="gptq", calibrate=calibration_ids),
    }
    said: dict[str, list[torch.Tensor]] = {}
    for name, packing in options.items():
        with ingot.compile(
            PICO, quantize=packing, max_sequences=64, max_tokens_per_sequence=512, progress=False
        ) as model:
            said[name] = [log_probabilities(model, ids) for ids in held_out]
    loss, divergence = {}, {}
    for name, log_q in said.items():
        targets = [torch.tensor(ids[1:]) for ids in held_out]
        pairs = zip(log_q, targets, strict=True)
        loss[name] = float(torch.cat([-q[:-1].gather(1, t[:, None]) for q, t in pairs]).mean())
        gaps = (p.exp() * (p - q) for p, q in zip(said["unpacked"], log_q, strict=True))
        divergence[name] = float(torch.cat([gap.sum(-1) for gap in gaps]).mean())
    print(loss, divergence)
    assert loss["gptq"] < loss["rtn"]
    assert divergence["gptq"] < 0.9 * divergence["rtn"]
