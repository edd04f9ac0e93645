"""What passes change otherwise than by rewrites: each reason has a whole-graph test of its own."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import ingot
import pytest
from ingot import passes
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.validate import RewriteCheck
from ingot.frontends.draft_model import with_draft_model
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.passes.pipelines import causal_lm
from ingot.passes.transforms.mxfp4_policy import MXFP4
from ingot.passes.transforms.shard_tensor_parallel import ShardTensorParallel
from mtp_checkpoints import write_mtp

pytestmark = pytest.mark.usefixtures("shared_traces")

# By pass and reason: the test that compares what the whole graph computes before and after.
TESTS = {
    ("shard-tensor-parallel", "one rank computes its part of values"): (
        "test_shard_tensor_parallel.py::test_model"
    ),
    ("quantize-mxfp4", "weights are rounded"): (
        "test_quantize_mxfp4.py::test_the_graph_computes_with_the_rounded_weights"
    ),
    ("insert-kv-cache", "parameters, outputs and state are new"): (
        "test_insert_kv_cache.py::test_any_mix_of_slots_chunks_and_padding"
    ),
    ("sample-on-device", "parameters and outputs are new"): (
        "test_sample_on_device.py::test_the_logits_stay_and_the_rest_is_the_op"
    ),
    ("draft-next-tokens", "what was predicted is drafted"): (
        "test_draft_next_tokens.py::test_what_was_there_stays_and_drafts_are_the_layer_s"
    ),
    ("draft-next-tokens", "a model of its own drafts behind the sampled tokens"): (
        "test_draft_next_tokens.py::test_what_was_there_stays_and_a_model_drafts"
    ),
    ("feed-next-step", "inputs are updated"): (
        "test_feed_next_step.py::test_the_outputs_stay_and_the_inputs_are_the_op_s"
    ),
}


def test_every_declared_change_has_a_test(tmp_path: Path) -> None:
    """The pipeline with everything that may be asked for declares these changes and no others."""
    write_mtp(tmp_path, "glm4_moe")
    predicting = import_hugging_face(tmp_path, dtype=None, max_tokens=64, predict=ingot.MTP())
    plain = import_hugging_face(tmp_path, dtype=None, max_tokens=64)
    options: Any = {"dtype": None, "weightless": False, "allow_unused": False}
    drafting = with_draft_model(plain, tmp_path, None, **options)
    steps = causal_lm(
        max_sequences=2,
        max_tokens_per_sequence=64,
        quantize=MXFP4(group=16),
        shard=ShardTensorParallel(2, 0),
        sample=True,
        draft=1,
    )
    results = run_pipeline(predicting.graph, steps, check=RewriteCheck())
    results += run_pipeline(drafting.graph, steps)
    assert {(r.name, reason) for r in results for reason in r.unchecked} == TESTS.keys()


def test_no_other_place_declares_a_change() -> None:
    trees = [ast.parse(f.read_text()) for f in Path(*passes.__path__).rglob("*.py")]
    calls = [
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "declare"
    ]
    # What drafts of both kinds is declared at one place.
    assert len(calls) == len(TESTS) - 1


@pytest.mark.parametrize("test", TESTS.values())
def test_the_tests_exist(test: str) -> None:
    file, name = test.split("::")
    tree = ast.parse(Path(__file__).with_name(file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
