"""Parts of weights: what a rank does not hold, it does not read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ingot.codegen.constants import evaluate_constant
from ingot.compiler.ir import Graph, Value
from ingot.compiler.ops.leaf import constant
from ingot.compiler.ops.pointwise import add
from ingot.compiler.ops.shape import full, permute, slice_
from ingot.compiler.pipeline import PassContext, run_pipeline
from ingot.compiler.torch_types import type_of
from ingot.compiler.types import TensorType
from ingot.compiler.weights import Bounds, Entry, Weights, within
from ingot.frontends.checkpoints import safetensors_files
from ingot.frontends.checkpoints.checkpoint import open_checkpoint, weights_of
from ingot.frontends.checkpoints.safetensors_files import File
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.frontends.importers.meta_model import build_meta_model, read_config
from ingot.passes.raising.canonicalize import Canonicalize
from ingot.passes.raising.raise_ops import RaiseOps
from ingot.passes.transforms.shard_tensor_parallel import ShardTensorParallel
from safetensors.torch import save_file
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

MIB = 1 << 20
W = torch.arange(48.0).view(4, 6, 2)


class Recorder(Weights):
    """A store that remembers which part of which weight was loaded."""

    def __init__(self, entries: Any) -> None:
        super().__init__(entries)
        self.loaded: list[tuple[str, Bounds]] = []

    def load_part(self, name: str, bounds: Bounds) -> torch.Tensor:
        self.loaded.append((name, bounds))
        return super().load_part(name, bounds)


def test_slices_of_a_weight_are_loaded_alone() -> None:
    w = constant(name="w", type=type_of(W))
    part = slice_(slice_(w, dim=0, start=1, stop=3), dim=1, start=2, stop=6)
    part = slice_(part, dim=1, start=1, stop=3)
    stepped = slice_(part, dim=1, start=0, stop=2, step=2)
    turned = permute(stepped, dims=(2, 0, 1))
    store = Recorder(Weights.of({"w": W}))
    assert torch.equal(evaluate_constant(turned, store), W[1:3, 3:5:2].permute(2, 0, 1))
    assert store.loaded == [("w", ((1, 3), (3, 5), (0, 2)))]
    assert evaluate_constant(part, store).data_ptr() == W[1:3, 3:5].data_ptr()  # no copy


def test_weights_that_lie_elsewhere_are_folded_there() -> None:
    """With what ops make out of nothing; the device `meta` stands for a GPU."""
    w = constant(name="w", type=type_of(W))
    raised = add(w, full(value=1.0, shape=W.shape, dtype="f32"))
    assert torch.equal(evaluate_constant(raised, Weights.of({"w": W})), W + 1)
    elsewhere = evaluate_constant(raised, Weights.of({"w": W.to("meta")}))
    assert (elsewhere.device.type, elsewhere.shape) == ("meta", W.shape)


def test_stores_that_cannot_load_parts_do_not_keep_the_rest() -> None:
    store = Weights({"w": Entry(type_of(W), W.clone, "the test")})
    part = store.load_part("w", ((1, 3), (0, 6), (0, 2)))
    assert torch.equal(part, W[1:3]) and part.untyped_storage().nbytes() == part.nbytes


def test_part_of_another_type_is_told() -> None:
    entry = Entry(type_of(W), W.clone, "the test", lambda bounds: W)
    with pytest.raises(TypeError, match=r"expected f32\[1, 6, 2\], loaded f32\[4, 6, 2\]"):
        Weights({"w": entry}).load_part("w", ((0, 1), (0, 6), (0, 2)))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Weights]:
    """Stores over files, with and without a cast, stacked, fused and plain; and over a model."""
    found: list[Weights] = []
    for name in ("qwen3_moe", "mixtral", "gpt_oss", "phi3"):
        directory = tmp_path_factory.mktemp(name)
        model = tiny_model(name, dtype=torch.bfloat16)
        model.save_pretrained(directory)
        for dtype in (None, torch.float32):
            meta = build_meta_model(
                read_config(directory),
                dtype,
                attn_implementation="eager",
                experts_implementation="eager",
            )
            found.append(open_checkpoint(directory, meta).weights)
            found.append(weights_of(model, meta))
    return found


@given(data=st.data())
def test_part_is_what_lies_within_the_bounds(data: st.DataObject, stores: list[Weights]) -> None:
    store = data.draw(st.sampled_from(stores))
    name = data.draw(st.sampled_from(sorted(store)))
    bounds: list[tuple[int, int]] = []
    for size in store[name].type.shape:
        start = data.draw(st.integers(0, int(size) - 1))
        bounds.append((start, data.draw(st.integers(start + 1, int(size)))))
    found = store.load_part(name, tuple(bounds))
    assert torch.equal(found, within(store.load(name), tuple(bounds)))


def folded(graph: Graph) -> list[Value]:
    """What something computes with of that which depends on weights alone."""
    values = dict.fromkeys(a for n in graph.nodes() if not n.is_constant for a in n.args)
    return [v for v in values if v.node.is_constant and v.op.name != "literal"]


def test_a_rank_reads_its_share_of_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gate and up it reads its rows from the files; of no weight that is cut it loads more."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    model = import_hugging_face(tmp_path, dtype=None, max_tokens=64)
    before = run_pipeline(model.graph, (Canonicalize(), RaiseOps()))[-1].graph
    read = 0
    preadv = os.preadv

    def counted(*args: Any) -> int:
        nonlocal read
        count = preadv(*args)
        read += count
        return count

    monkeypatch.setattr(safetensors_files.os, "preadv", counted)
    layers, experts, rows, hidden = 2, 8, 2 * 32, 64
    for ranks in (2, 4):
        shared: int | None = None
        for rank in range(ranks):
            graph = ShardTensorParallel(ranks, rank)(before, PassContext())
            store = Recorder(model.weights)
            read = held = 0
            for value in folded(graph):
                held += evaluate_constant(value, store).nbytes
            assert read == layers * experts * rows * hidden * 4 // ranks
            loaded = [
                (name, [stop - start for start, stop in bounds]) for name, bounds in store.loaded
            ]
            for name, sizes in loaded:
                if "experts" in name or "_proj" in name:
                    assert sizes != list(model.weights[name].type.shape), name
            total = sum(torch.Size(sizes).numel() * 4 for _, sizes in loaded)
            assert total == held  # nothing is loaded to be cut afterwards
            shared = shared or held
            assert held == shared


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
def test_other_pages_of_a_mapped_file_are_not_touched(tmp_path: Path) -> None:
    """Measured: resident pages of the mapping after a sixteenth of a tensor was read."""
    file = tmp_path / "big.safetensors"
    save_file({"w": torch.ones(4096, 4096)}, file)  # 64 MiB
    stored = File(file).tensors["w"]
    entry = Entry(
        TensorType("f32", (4096, 4096)),
        stored.read,
        str(file),
        lambda bounds: within(stored.read(), bounds),
    )
    part = Weights({"w": entry}).load_part("w", ((256, 512), (0, 4096)))
    assert part.sum() == 256 * 4096
    assert 4 * MIB <= resident(file) <= 8 * MIB  # whole huge pages around it, at most


def resident(file: Path) -> int:
    """Bytes of `file` that are mapped into this process's memory now."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
