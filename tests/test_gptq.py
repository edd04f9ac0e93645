"""GPTQ: its numbers, the run over a calibration text, and what a model gains."""

from __future__ import annotations

import gc
import math
import sysconfig
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import ingot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.compiler.gptq import gptq, inverse_factor
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.microscaling import SCALE_RULES, decode, encode
from ingot.compiler.ops.hadamard import hadamard
from ingot.compiler.ops.mxfp4 import mxfp4, mxfp4_encode
from ingot.compiler.torch_types import type_of
from ingot.compiler.weights import Entry, Weights
from ingot.frontends import calibration
from ingot.frontends.calibration import token_sequences
from ingot.frontends.tokenizer import Tokenizer
from ingot.passes.calibrate import Calibrated, calibrate, count_matrices
from ingot.passes.quantize_mxfp4 import MXFP4, QuantizeMxfp4
from pass_checks import applied, graph_of, random_weights
from tiny_models import tiny_model

PICO = Path(__file__).parents[1] / "examples" / "pico"


def cost(w: torch.Tensor, packed: tuple[torch.Tensor, ...], gram: torch.Tensor) -> float:
    """|x·(w - ŵ)ᵀ|² for inputs with this Gram matrix."""
    lost = w.double() - decode(*packed, torch.float64)
    return float(((lost @ gram.double()) * lost).sum())


def correlated(seed: int, inner: int, rows: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [48, K], and the Gram matrix of inputs that lie mostly in a few directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inner, inner, generator=generator) * torch.logspace(0, -2, inner)[:, None]
    x = torch.randn(rows, inner, generator=generator) @ mix
    return torch.randn(48, inner, generator=generator), x.T @ x


# ---- the numbers


@given(st.integers(0, 2**31), st.sampled_from((16, 32)), st.sampled_from(SCALE_RULES))
@settings(max_examples=20)
def test_never_worse_than_rounding_where_inputs_are_correlated(
    seed: int, group: int, scale: str
) -> None:
    w, gram = correlated(seed, 96)
    assert cost(w, gptq(w, gram, group, scale), gram) < cost(w, encode(w, group, scale), gram)


def test_much_better_than_rounding_on_average() -> None:
    ratios = []
    for seed in range(8):
        w, gram = correlated(seed, 96)
        ratios.append(cost(w, gptq(w, gram), gram) / cost(w, encode(w), gram))
    assert sum(ratios) / len(ratios) < 0.6


def naive(
    w: torch.Tensor, gram: torch.Tensor, group: int, scale: str, damping: float
) -> torch.Tensor:
    """Optimal Brain Quantization in the columns' order, the inverse updated after each: f64.

    (Frantar & Alistarh 2022, arXiv:2208.11580, eqs. 3 and 5.)
    """
    w, gram = w.double().clone(), gram.double()
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram))
    inverse = torch.linalg.inv(damped)
    out = torch.empty_like(w)
    for k in range(w.shape[1]):
        if k % group == 0:
            scales = encode(w[:, k : k + group].float(), group, scale)[1]
        column = w[:, [k]].expand(-1, group).float()
        codes = at_scale(column, scales)
        out[:, k] = decode(codes, scales, torch.float64)[:, 0]
        step = (w[:, k] - out[:, k]) / inverse[k, k]
        w -= step[:, None] * inverse[k]
        inverse -= torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return out


def at_scale(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`x` [N, group] at given scales: brute force over the codes; ties to the even code."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]).double()
    unit = 2.0 ** (scales.double() - 127)
    gap = (x.double().abs()[..., None] - unit[..., None] * values).abs()
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # even codes first
    best = torch.arange(8)[order.argsort()][gap[..., order.argsort().argsort()].argmin(-1)]
    best = torch.where(
        gap.gather(-1, best[..., None])[..., 0] == gap.amin(-1), best, gap.argmin(-1)
    )
    code = (best + 8 * (x < 0)).to(torch.uint8)
    return code[..., ::2] | (code[..., 1::2] << 4)


@pytest.mark.parametrize("scale", ["even", "floor", "ceil"])
@pytest.mark.parametrize("group", [16, 32])
def test_the_same_as_updating_the_inverse_after_each_column(group: int, scale: str) -> None:
    w, gram = correlated(3, 64)
    expected = naive(w, gram, group, scale, 0.01)
    found = decode(*gptq(w, gram, group, scale, 0.01), torch.float64)
    # Numbers near a tie may fall either way: f32 and f64 part there, and never meet again.
    rows = (found == expected).all(1).double().mean()
    assert rows > 0.8


def test_the_factor_of_the_inverse() -> None:
    _, gram = correlated(0, 64)
    factor = inverse_factor(gram, 0.02).double()
    damped = gram.double() + 0.02 * gram.double().diagonal().mean() * torch.eye(64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(
        factor.T @ factor @ damped, torch.eye(64).double(), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("scale", SCALE_RULES)
def test_independent_inputs_leave_rounding_to_nearest(scale: str) -> None:
    w = torch.randn(16, 64)
    assert all(map(torch.equal, gptq(w, torch.eye(64), 32, scale), encode(w, 32, scale)))


def test_numbers_far_from_one() -> None:
    w, gram = correlated(1, 64)
    codes, scales = gptq(w, gram)
    for factor in (2.0**-100, 2.0**100):
        again = gptq(w * factor, gram)
        assert torch.equal(again[0], codes)
        assert bool((again[1].int() - scales.int() == math.log2(factor)).all())
    zero = gptq(torch.zeros(4, 64), gram)
    assert not decode(*zero, torch.float32).any()


def test_what_is_refused() -> None:
    w, gram = correlated(0, 64)
    for wrong in (torch.zeros(64, 64), torch.full((64, 64), torch.nan)):
        with pytest.raises(ValueError, match="Gram matrix"):
            gptq(w, wrong)
    w[3, 4] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        gptq(w, gram)


# ---- the run over a text

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


@pytest.mark.parametrize("rotate", [False, True])
def test_each_weight_is_encoded_for_what_the_quantized_graph_gives_it(rotate: bool) -> None:
    """The codes are gptq's for the Gram matrix of the inputs in the *finished* graph."""
    before = graph_of(MODEL)
    weights = random_weights(before)
    after, merged, found = run(before, weights, method="gptq", hadamard=rotate)

    def packed(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        done = found.encoded[name]
        return merged.load(done.codes), merged.load(done.scales)

    def turned(w: torch.Tensor) -> torch.Tensor:
        return hadamard.reference(w, block=32)[0] if rotate else w

    linears = dict(
        zip(("router", "q", "k", "s", "head"), values(after, merged, "linear"), strict=True)
    )
    site = "slice(both, dim=0, start=0, stop=64)"
    plain = {"q": weights.load("q"), "k": weights.load("k"), "s": weights.load("both")[:64]}
    for key, weight in plain.items():
        x = torch.cat(linears[key][0])
        expected = gptq(turned(weight), x.T @ x)
        assert all(map(torch.equal, packed(site if key == "s" else key), expected)), key
    ((x, _, indices, gate_up, _),) = values(after, merged, "experts")
    reached = set()
    for e in range(8):
        mine = [a[(i == e).any(-1)] for a, i in zip(x, indices, strict=True)]
        rows = torch.cat(mine)
        hidden = torch.cat([a @ gate_up[0][e].T for a in mine])
        hidden = torch.nn.functional.silu(hidden[:, :32]) * hidden[:, 32:]
        for name, read in (("gate_up", rows), ("down", hidden)):
            w = weights.load(name)[e]
            w = turned(w) if name == "gate_up" else w
            codes = packed(name)[0][e]
            expected = gptq(w, read.T @ read) if len(rows) else encode(w)
            same = (codes == expected[0]).double().mean()
            assert same > 0.99, (name, e)  # sums in another order may turn a tie
        reached |= {e} if len(rows) else set()
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
    expected = float((x @ (w - after).T).norm() / (x @ w.T).norm())
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
    with pytest.raises(ValueError, match=r"gate_up: method='gptq'.*calibration"):
        applied(QuantizeMxfp4(options), graph_of(MODEL))


# ---- the door


def test_options() -> None:
    for wrong, message in (
        ({"method": "awq"}, "method: expected"),
        ({"hadamard": "yes"}, "hadamard: expected"),
        ({"method": "gptq"}, "calibrate: expected texts"),
        ({"hadamard": "auto"}, "calibrate: expected texts"),
        ({"calibrate": ["x"]}, "calibrate: expected none"),
        ({"method": "gptq", "calibrate": "a text"}, "calibrate: expected a list"),
        ({"method": "gptq", "calibrate": 3}, "calibrate: expected a list"),
        ({"method": "gptq", "calibrate": [3]}, "calibrate: expected each"),
        ({"method": "gptq", "calibrate": [[]]}, "calibrate: expected each"),
        ({"method": "gptq", "calibrate": [[1.5]]}, "calibrate: expected each"),
    ):
        with pytest.raises(ValueError, match=message):
            MXFP4(**wrong)
    options = MXFP4(method="gptq", calibrate=["text", [1, 2]])
    assert options.calibrate == ("text", (1, 2)) and hash(options) == hash(replace(options))


def test_sequences() -> None:
    assert token_sequences([[1, 2, 3, 4, 5], [6]], None, 2, 10) == [[1, 2], [3, 4], [5], [6]]
    assert len(token_sequences([[0] * 5000], None, 10**6, 10)) == 3
    for wrong, message in (([[1, 10]], "from 0 to 9, found 10"), (["text"], "needs a tokenizer")):
        with pytest.raises(ValueError, match=message):
            token_sequences(wrong, None, 8, 10)


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
    assert all(w.product_error < w.error for w in packed)
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
    tokenizer = Tokenizer.open(PICO)
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
    held_out = standard_library(True, 6, 512)
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
            PICO, quantize=packing, max_sequences=1, max_tokens_per_sequence=512, progress=False
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
