"""The fusions in their order over traced models: what each finds, and that nothing changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
import torch
from ingot.codegen.cpu import CpuDriver
from ingot.codegen.lower import lower, serving_bindings
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import PassResult, run_pipeline
from ingot.compiler.target import CPU
from ingot.compiler.validate import check_rewrite
from ingot.frontends.importers.huggingface import HuggingFaceModel, import_hugging_face
from ingot.passes.fusion.fuse_collective_norm import FuseCollectiveNorm
from ingot.passes.fusion.fuse_linear_residual import FuseLinearResidual
from ingot.passes.fusion.fuse_norm_linear import FuseNormLinear
from ingot.passes.fusion.fuse_swiglu import FuseSwiglu
from ingot.passes.pipelines import RAISING
from ingot.passes.transforms.mxfp4_policy import MXFP4
from ingot.passes.transforms.quantize_mxfp4 import QuantizeMxfp4
from ingot.runtime.serving.session import Session
from pass_checks import forms, ops, plain_serving
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

FUSIONS = (FuseSwiglu(), FuseCollectiveNorm(), FuseLinearResidual(), FuseNormLinear())
SLOTS, LENGTH = 3, 64
SERVING = plain_serving(SLOTS, LENGTH)

# Two layers each. q, k and v are products by themselves here, so that the norm before them stays,
# where it is one: fuse-qkv-rope makes them one product.
SUM = "the sum goes into the epilogue of a product"
NORM = "the norm goes into the prologue of a product"
OUTSIDE = "rms_norm inside the match is used outside"
SCALED = "the product is scaled before the residual is added"
PRE_NORM = (
    {"two-products": 2, "product-residual": 4, "norm-linear": 3},
    {SUM: 4, OUTSIDE: 6},
)
SANDWICH = (
    {"two-products": 2, "add-rms-norm": 1, "norm-linear": 3, "sandwich-linear": 3},
    {NORM: 3, OUTSIDE: 3},
)
FOUND: dict[str, tuple[Mapping[str, int], Mapping[str, int]]] = {
    "llama": PRE_NORM,
    "qwen2": PRE_NORM,
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
    "granite": (
        {"two-products": 2, "add-rms-norm": 1, "norm-linear": 3, "sum-linear": 3},
        {NORM: 3, SCALED: 3, OUTSIDE: 3},
    ),
    "olmo2": (  # the norm is over what is added: the second layer's v_proj computes the sum
        {"two-products": 2, "norm-linear": 1, "sandwich-linear": 4},
        {NORM: 1},
    ),
    "phi3": (  # q, k and v are one product, gate and up too
        {"one-product": 2, "product-residual": 4, "norm-linear": 5},
        {SUM: 4},
    ),
    "minicpm3": (
        {"two-products": 2, "add-rms-norm": 2, "norm-linear": 6, "sum-linear": 2},
        {NORM: 2, SCALED: 2, OUTSIDE: 2},
    ),
    "glm4": (
        {"one-product": 2, "add-rms-norm": 1, "norm-linear": 3, "sandwich-linear": 3},
        {NORM: 3, OUTSIDE: 3},
    ),
    "cohere2": (  # attention and MLP side by side, behind layer norms
        {"two-products": 2, "product-residual": 4},
        {"a layer_norm is no prologue": 1, "layer_norm inside the match is used outside": 8},
    ),
    "gpt_oss": ({"product-residual": 4, "norm-linear": 1}, {SUM: 4, OUTSIDE: 8}),
    "deepseek_v3": (  # routed and shared experts and the residual are added in one go
        {"two-products": 2, "product-product-residual": 1, "product-residual": 3, "norm-linear": 6},
        {SUM: 4, OUTSIDE: 6},
    ),
}


@cache
def imported(name: str, dtype: torch.dtype = torch.float32) -> HuggingFaceModel:
    return import_hugging_face(tiny_model(name, dtype=dtype), dtype=None, max_tokens=LENGTH)


def fused(graph: Graph, before: tuple = ()) -> tuple[Graph, list[PassResult]]:
    """The graph that the fusions get, and what each of them made of it."""
    if before:
        graph = run_pipeline(graph, before)[-1].graph
    return graph, run_pipeline(graph, FUSIONS, check=check_rewrite)


def assert_found(name: str, results: list[PassResult]) -> Counter[str]:
    """As often as expected; the reasons of what was declined, and how often."""
    found, declined = FOUND[name]
    assert sum((r.matches for r in results), Counter[str]()) == found
    reasons = Counter(text.rpartition(": ")[2] for r in results for text in r.declined)
    assert reasons.keys() == declined.keys()
    return reasons


def assert_same(model: HuggingFaceModel, before: Graph, after: Graph, inputs: dict) -> None:
    expected, found = (interpret(g, inputs, model.weights) for g in (before, after))
    for a, b in zip(expected.outputs, found.outputs, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    for key, a in expected.updates.items():
        assert (a - found.updates[key]).abs().max() <= 1e-4 * a.abs().max()


@pytest.mark.parametrize("name", FOUND)
def test_without_a_cache(name: str) -> None:
    model = imported(name)
    before, results = fused(model.graph, RAISING)
    assert assert_found(name, results) == FOUND[name][1]
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 2, 7, 33):
        ids = torch.randint(0, 128, (tokens,), generator=generator).int()
        inputs = {"tokens": ids, "positions": torch.arange(tokens).int()}
        assert_same(model, before, results[-1].graph, inputs)


@pytest.mark.parametrize("name", FOUND)
def test_with_a_cache(name: str) -> None:
    model = imported(name)
    before, results = fused(model.graph, SERVING)
    assert_found(name, results)
    generator = torch.Generator().manual_seed(0)
    for slots, positions, rows in (
        ([0], [0], [0]),
        ([0] * 9, range(9), [8]),
        ([2, 0, 1, 1, 1, -1], [5, 40, 7, 8, 9, 0], [4, 0, 1]),
    ):
        inputs = {
            name: torch.randn([int(d) for d in p.type.shape], generator=generator)
            for name in before.updates
            for p in (before.param(name),)
        }
        inputs |= {
            "tokens": torch.randint(0, 128, (len(slots),), generator=generator).int(),
            "positions": torch.tensor(list(positions)).int(),
            "slots": torch.tensor(slots).int(),
            "page_table": torch.arange(SLOTS).int().view(SLOTS, 1),
            "logit_rows": torch.tensor(rows).int(),
        }
        assert_same(model, before, results[-1].graph, inputs)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_in_bf16_as_much_is_found(name: str) -> None:
    _, results = fused(imported(name, torch.bfloat16).graph, SERVING)
    assert_found(name, results)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_packed_weights_stay_packed(name: str) -> None:
    """Of all products but lm_head's, which keeps its dtype."""
    model = imported(name)
    before, results = fused(model.graph, (*RAISING, QuantizeMxfp4(MXFP4(scale="even"))))
    assert_found(name, results)
    after = results[-1].graph
    products = [n for n in after.nodes() if n.op.name == "linear" and (n.given or n.attrs)]
    packed = [n for n in products if n.args[1].op.name == "mxfp4"]
    assert len(packed) == len(products) - 1
    inputs = {"tokens": torch.arange(5).int(), "positions": torch.arange(5).int()}
    assert_same(model, before, after, inputs)


@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3"])
def test_a_session_of_the_fused_graph_gives_what_transformers_computes(name: str) -> None:
    model = tiny_model(name)
    source = imported(name)
    graph = fused(source.graph, SERVING)[1][-1].graph
    meta = {"vocab_size": 128, "page_size": 64, "max_sequences": SLOTS, "pages": SLOTS}
    meta["max_tokens_per_sequence"] = LENGTH
    lowered = lower(graph, source.weights, CPU, serving_bindings(SLOTS, LENGTH), ("logits",), meta)
    tokens = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with (
        Session(lowered.program, CpuDriver().load(lowered.program, lowered.load_weight)) as session,
        torch.no_grad(),
    ):
        found = session.logits(tokens)
        expected = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_what_is_left_of_a_dense_layer() -> None:
    """Beside q, k, v and attention: two products with a residual, and the gated unit."""
    after = fused(imported("llama").graph, SERVING)[1][-1].graph
    left = forms(after)
    assert (left["linear residual"], left["linear norm gate"], left["linear norm"]) == (4, 2, 1)
    assert not ops(after).keys() & {"add", "glu", "silu"}
