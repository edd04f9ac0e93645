"""Checkpoints on disk against the models that wrote them and against from_pretrained."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ingot.compiler.torch_types import dtype_name, type_of
from ingot.frontends.checkpoints import safetensors_files
from ingot.frontends.checkpoints.checkpoint import Checkpoint, open_checkpoint, weights_of
from ingot.frontends.importers.meta_model import (
    MetaModel,
    build_meta_model,
    named_tensors,
    read_config,
)
from ingot.frontends.importers.source_error import SourceError
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

STACKED = "model.layers.0.mlp.experts.gate_up_proj"


def meta_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> MetaModel:
    """A meta model under transformers' own attention: these tests trace nothing."""
    return build_meta_model(
        config, dtype, attn_implementation="eager", experts_implementation="eager"
    )


def opened(directory: Path, dtype: torch.dtype | None = None) -> Checkpoint:
    return open_checkpoint(directory, meta_model(read_config(directory), dtype))


def assert_holds(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Every parameter and buffer of `model` is in the checkpoint, bit for bit."""
    expected = dict(named_tensors(model))
    assert set(checkpoint.weights) == expected.keys()
    for name, tensor in expected.items():
        loaded = checkpoint.weights.load(name)
        assert type_of(loaded) == type_of(tensor), name
        assert torch.equal(loaded, tensor), name


def saved(directory: Path, name: str, **overrides) -> dict[str, torch.Tensor]:
    """A tiny model saved as one file in `directory`; its stored tensors, to be changed."""
    tiny_model(name, **overrides).save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def store(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors")


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shard", "dtype"),
    [("1GB", torch.float32), ("100KB", torch.bfloat16)],
    ids=["single", "sharded"],
)
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_the_saved_one(
    name: str, shard: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_model(name, dtype=dtype).save_pretrained(tmp_path, max_shard_size=shard)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    checkpoint = opened(tmp_path)
    assert_holds(checkpoint, loaded)
    assert checkpoint.unused == {}
    assert (len(checkpoint.files) > 1) is (shard == "100KB")
    assert checkpoint.total_bytes == sum(
        t.nbytes for file in checkpoint.files for t in load_file(file).values()
    )


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize(
    ("on_disk", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["widened", "narrowed"],
)
def test_another_dtype_casts_as_from_pretrained_does(
    name: str, on_disk: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
    tiny_model(name, dtype=on_disk).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=wanted)
    assert_holds(opened(tmp_path, wanted), loaded)


@pytest.mark.parametrize(
    ("name", "on_disk"),
    [
        ("qwen3_moe", "model.layers.0.mlp.experts.7.gate_proj.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.7.w2.weight"),
        ("deepseek_v3", "model.layers.1.mlp.experts.7.up_proj.weight"),
        ("ernie4_5_moe", "model.layers.1.mlp.experts.7.down_proj.weight"),
    ],
)
def test_experts_are_stacked_from_the_original_layout(
    name: str, on_disk: str, tmp_path: Path
) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    assert on_disk in load_file(tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    assert_holds(checkpoint, model)
    stack = next(name for name in checkpoint.weights if name.endswith("experts.gate_up_proj"))
    assert "16 tensors" in checkpoint.weights[stack].origin


def test_more_than_ten_experts_are_in_numeric_order(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", num_experts=12)
    model.save_pretrained(tmp_path)
    assert_holds(opened(tmp_path), model)


def test_one_stored_tensor_for_several(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "hrm_text",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_hidden_layers=8,
        num_layers_per_stack=1,
        head_dim=16,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert any("gqkv_proj" in name for name in load_file(tmp_path / "model.safetensors"))
    assert_holds(opened(tmp_path), model)


@given(data=st.data())
def test_any_distribution_over_shards_gives_the_same(data, tmp_path_factory) -> None:
    directory = tmp_path_factory.mktemp("shards")
    model = tiny_model("qwen3_moe", num_experts=3, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    places = data.draw(st.lists(st.integers(0, 3), min_size=len(tensors), max_size=len(tensors)))
    for (name, tensor), place in zip(tensors.items(), places, strict=True):
        shards.setdefault(f"part{place}.safetensors", {})[name] = tensor
    for file, part in shards.items():
        save_file(part, directory / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    checkpoint = opened(directory)
    assert_holds(checkpoint, model)
    assert {path.name for path in checkpoint.files} == shards.keys()


def test_a_checkpoint_of_the_base_model_alone(tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    model.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    assert_holds(opened(tmp_path), model)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_tensors_that_are_not_aligned_to_their_dtype(name: str, tmp_path: Path) -> None:
    tensors = saved(tmp_path, name)
    expected = tiny_model(name)
    # The format wants no alignment: a header of odd length shifts every tensor.
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert len(header) % 2
    assert load_file(path).keys() == tensors.keys()
    assert_holds(opened(tmp_path), expected)


# --- ties and strangers ------------------------------------------------------------------------


@pytest.mark.parametrize("stored_as", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_one_entry_serves_both_tied_names(stored_as: str, tmp_path: Path) -> None:
    tensors = saved(tmp_path, "llama", tie_word_embeddings=True)
    embedding = tensors.pop("model.embed_tokens.weight")
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    stored_names = names if stored_as == "both" else [stored_as]
    store(tmp_path, tensors | {name: embedding.clone() for name in stored_names})
    checkpoint = opened(tmp_path)
    first, second = (checkpoint.weights[name] for name in names)
    assert first is second
    assert_holds(checkpoint, tiny_model("llama", tie_word_embeddings=True))


def test_tied_in_the_config_but_stored_apart(tmp_path: Path) -> None:
    tensors = saved(tmp_path, "llama", tie_word_embeddings=True)
    store(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(SourceError, match="tie_word_embeddings to false"):
        opened(tmp_path)


def test_what_the_model_has_no_place_for_is_reported(tmp_path: Path) -> None:
    tensors = saved(tmp_path, "deepseek_v3")
    extra = {
        name.replace("layers.1.", "layers.2."): t.clone()
        for name, t in tensors.items()
        if ".layers.1." in name
    }
    extra["model.layers.2.eh_proj.weight"] = torch.zeros(64, 128)
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    store(tmp_path, tensors | extra)
    checkpoint = opened(tmp_path)
    assert sorted(checkpoint.unused) == sorted(extra)
    assert "rotary" in checkpoint.unused["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert "multi-token" in checkpoint.unused["model.layers.2.eh_proj.weight"]
    assert_holds(checkpoint, tiny_model("deepseek_v3"))


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.scales", "head.weight"]
)
def test_tensors_that_nobody_reads_are_refused(name: str, tmp_path: Path) -> None:
    """A layer more than the config says, a scale, a head: each may change the numbers."""
    store(tmp_path, saved(tmp_path, "llama") | {name: torch.zeros(3)})
    with pytest.raises(SourceError, match=rf"reads no {name}, for no reason .* unused='allow'"):
        opened(tmp_path)
    meta = meta_model(read_config(tmp_path))
    assert [*open_checkpoint(tmp_path, meta, allow_unused=True).unused] == [name]


def test_a_dtype_that_is_not_known(tmp_path: Path) -> None:
    """It counts only where the model reads the tensor."""
    tensors = saved(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    store(tmp_path, tensors | {"model.rotary_emb.inv_freq": torch.zeros(4)})
    data = path.read_bytes()

    def respelt(name: str) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header[name]["dtype"] = "F6_E2M3"
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    path.write_bytes(respelt("model.rotary_emb.inv_freq"))
    checkpoint = opened(tmp_path)
    assert [*checkpoint.unused] == ["model.rotary_emb.inv_freq"]
    assert_holds(checkpoint, tiny_model("llama"))
    path.write_bytes(respelt("model.norm.weight"))
    with pytest.raises(SourceError, match=r"model\.norm\.weight is stored as F6_E2M3: expected"):
        opened(tmp_path)


# --- laziness ----------------------------------------------------------------------------------


def test_opening_reads_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    reads: list[object] = []

    def counting(function):
        def call(*args, **kwargs):
            reads.append(function)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "frombuffer", counting(torch.frombuffer))
    monkeypatch.setattr(os, "preadv", counting(os.preadv))
    monkeypatch.setattr(safetensors_files.mmap, "mmap", counting(safetensors_files.mmap.mmap))
    checkpoint = opened(tmp_path)
    assert reads == []
    checkpoint.weights.load("model.norm.weight")
    assert len(reads) == 2  # the file is mapped, the tensor a view
    reads.clear()
    checkpoint.weights.load(STACKED)
    assert len(reads) == 16  # one read for each of 8 gates and 8 ups


def test_a_tensor_in_its_own_dtype_is_not_copied(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    weights = opened(tmp_path).weights
    first, second = (weights.load("model.norm.weight") for _ in range(2))
    assert first.data_ptr() == second.data_ptr()
    # The mapping is private: a careless write stays in this process.
    before = (tmp_path / "model.safetensors").read_bytes()
    first.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_pages_of_a_dropped_tensor_leave_memory(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1 << 24)}, tmp_path / "x.safetensors")  # 64 MiB
    stored = safetensors_files.File(tmp_path / "x.safetensors").tensors["x"]

    def resident_file_pages() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:")) >> 10

    before = resident_file_pages()
    tensor = stored.read()
    assert tensor.sum() == 1 << 24
    assert resident_file_pages() - before > 60
    del tensor
    assert resident_file_pages() - before < 4


def test_one_open_file_for_many_tensors(tmp_path: Path) -> None:
    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    before = descriptors()
    checkpoint = opened(tmp_path)
    tensors = [checkpoint.weights.load(name) for name in checkpoint.weights]
    assert descriptors() - before <= 2  # the file, and the mapping's own
    del checkpoint, tensors
    assert descriptors() == before


# --- in memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_memory_is_not_copied(name: str) -> None:
    model = tiny_model(name)
    weights = weights_of(model, meta_model(model.config, torch.float32))
    for tensor_name, tensor in named_tensors(model):
        assert weights.load(tensor_name).data_ptr() == tensor.data_ptr()


def test_a_model_in_memory_is_cast_on_load() -> None:
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16)
    weights = weights_of(model, meta_model(model.config, torch.float16))
    for name, tensor in named_tensors(model):
        dtype = weights[name].type.dtype
        assert dtype == ("f32" if "inv_freq" in name or "correction" in name else "f16")
        loaded = weights.load(name)
        assert torch.equal(loaded, tensor.to(loaded.dtype))
        assert dtype == dtype_name(loaded.dtype)


def test_a_model_without_weights_in_memory() -> None:
    meta = meta_model(tiny_config("llama"))
    with pytest.raises(SourceError, match=r"on the meta device: model\.embed_tokens\.weight"):
        weights_of(meta.model, meta)
    with pytest.raises(
        SourceError, match=r"the model expects f32\[128, 64\], .* holds f32\[256, 32\]"
    ):
        weights_of(tiny_model("llama", hidden_size=32, head_dim=16, vocab_size=256), meta)


# --- errors ------------------------------------------------------------------------------------


def test_missing_tensors_are_listed(tmp_path: Path) -> None:
    tensors = saved(tmp_path, "llama")
    del tensors["model.norm.weight"]
    store(tmp_path, tensors)
    with pytest.raises(SourceError, match=r"no tensor for model\.norm\.weight$"):
        opened(tmp_path)
    store(tmp_path, {name: t for name, t in tensors.items() if "layers.1." not in name})
    with pytest.raises(SourceError, match=r"no tensor for model\.layers\.1(.*, ){4}.* and 5 more$"):
        opened(tmp_path)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    tensors = saved(tmp_path, "qwen3_moe")
    del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    store(tmp_path, tensors)
    with pytest.raises(SourceError, match=rf"{STACKED}: no stored tensor for index 3 beside"):
        opened(tmp_path)
    del tensors["model.layers.0.mlp.experts.7.down_proj.weight"]
    tensors["model.layers.0.mlp.experts.3.up_proj.weight"] = torch.zeros(32, 64)
    store(tmp_path, tensors)
    with pytest.raises(SourceError, match=r"down_proj: the model expects f32\[8, 64, 32\].*f32\[7"):
        opened(tmp_path)


def test_shapes_must_agree(tmp_path: Path) -> None:
    tensors = saved(tmp_path, "qwen3_moe")
    name = "model.layers.0.self_attn.q_proj.weight"
    store(tmp_path, tensors | {name: torch.zeros(32, 64)})
    match = (
        rf"{name}: the model expects f32\[64, 64\], model.safetensors stores as .* f32\[32, 64\]"
    )
    with pytest.raises(SourceError, match=match):
        opened(tmp_path)
    expert = "model.layers.0.mlp.experts.3.up_proj.weight"
    store(tmp_path, tensors | {expert: torch.zeros(16, 64)})
    with pytest.raises(SourceError, match=rf"{STACKED}: cannot be built from .* 16 tensors"):
        opened(tmp_path)


def test_dtypes_that_no_cast_brings_over(tmp_path: Path) -> None:
    tensors = saved(tmp_path, "llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    for dtype, lacking in (
        (torch.int8, "no tensor .*weight_scale' is stored beside it; config.json has no quant"),
        (torch.float8_e4m3fn, r"no scales .*weight_scale_inv' are stored for f8e4m3\["),
        (torch.int32, r"i32\[.*neither a plain float tensor nor known as a quantized one"),
    ):
        store(tmp_path, tensors | {name: tensors[name].to(dtype)})
        with pytest.raises(SourceError, match=rf"{name}: .*{lacking}"):
            opened(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files(keep: int, tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError, match=r"model\.safetensors: not a complete safetensors file"):
        opened(tmp_path)


def test_a_file_cut_short_after_opening(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    checkpoint = opened(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(SourceError, match="cut short since it was opened"):
        checkpoint.weights.load(STACKED)


def test_missing_shard(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(SourceError, match=r"model-00002-of-\d+\.safetensors: no such file"):
        opened(tmp_path)


def test_a_tensor_stored_twice(tmp_path: Path) -> None:
    """The index decides; transformers' own answer is another where it names neither."""
    tensors = saved(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "b.safetensors")
    for name in ("a", "c"):
        stale = {"lm_head.weight": tensors["lm_head.weight"] + 1, "mtp.x": torch.zeros(1)}
        save_file(stale, tmp_path / f"{name}.safetensors")
    shards = {"mtp.x": "a.safetensors", "mtp.y": "c.safetensors"}
    shards |= dict.fromkeys(tensors, "b.safetensors")
    write_index(tmp_path, shards)
    assert torch.equal(opened(tmp_path).weights.load("lm_head.weight"), tensors["lm_head.weight"])
    write_index(tmp_path, {n: f for n, f in shards.items() if n != "lm_head.weight"})
    with pytest.raises(SourceError, match=r"'lm_head\.weight' is stored twice: in a\.s.* in b\.s"):
        opened(tmp_path)


def write_index(directory: Path, weight_map: object) -> None:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04never")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin, which are pickles.*safetensors"):
        opened(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(SourceError, match=r"expected model\.safetensors or .*, found config\.json"):
        opened(tmp_path)


@pytest.mark.parametrize("file", ["../out.safetensors", "/etc/x.safetensors", "..", "a\\b", ""])
def test_index_names_stay_in_the_directory(file: str, tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    write_index(tmp_path, {"lm_head.weight": file})
    with pytest.raises(SourceError, match="expected plain file names, found") as raised:
        opened(tmp_path)
    assert repr(file) in str(raised.value)


@pytest.mark.parametrize("weight_map", [None, [], {"x": 1}, {"x": "model.bin"}])
def test_bad_indices(weight_map: object, tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(SourceError, match="expected"):
        opened(tmp_path)


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    saved(outside, "llama")
    tiny_config("llama").save_pretrained(inside)
    (inside / "model.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(SourceError, match=r"links to .*outside.*, outside the checkpoint"):
        opened(inside)


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    blobs.mkdir()
    saved(snapshot, "llama")
    (snapshot / "model.safetensors").rename(blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert_holds(opened(snapshot), tiny_model("llama"))


@pytest.mark.parametrize("folder", [".", "text/model"])
def test_blobs_of_a_hub_cache_may_lie_elsewhere(folder: str, tmp_path: Path) -> None:
    """A folder in a snapshot, and blobs/ on another disk; no other links are followed."""
    cache, disk = tmp_path / "models--o--m", tmp_path / "disk"
    directory = cache / "snapshots" / "abc" / folder
    disk.mkdir()
    saved(directory, "llama")
    file = directory / "model.safetensors"
    file.rename(disk / "0123")
    (cache / "blobs").symlink_to(disk)
    file.symlink_to(os.path.relpath(cache / "blobs" / "0123", directory.resolve()))
    assert_holds(opened(directory), tiny_model("llama"))
    (tmp_path / "secret").write_bytes((disk / "0123").read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=r"links to .*secret, outside the checkpoint"):
        opened(directory)


def test_a_git_lfs_pointer_is_told(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 1\n"
    (tmp_path / "model.safetensors").write_text(pointer, encoding="ascii")
    with pytest.raises(SourceError, match="a Git LFS pointer of .* bytes.*`git lfs pull`$"):
        opened(tmp_path)
