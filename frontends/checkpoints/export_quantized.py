"""Export a Hugging Face directory with MXFP4 weights, readable by transformers and others.

The policy of the compiler (passes/transforms/mxfp4_policy.py) selects the weights on the model's
graph. Stored tensors are encoded and written one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...compiler.dtypes import FLOATS
from ...compiler.ir import Value, walk
from ...compiler.microscaling import encode
from ...compiler.ops.leaf import constant
from ...compiler.ops.shape import permute
from ...compiler.pipeline import run_pipeline
from ...compiler.torch_types import torch_dtype
from ...compiler.types import TensorType
from ...passes.pipelines import RAISING
from ...passes.transforms.mxfp4_policy import MXFP4, find_sites
from ...runtime.artifact.atomic_write import AtomicWrite
from ...runtime.artifact.safetensors_file import Item
from ..importers.huggingface import import_hugging_face
from ..importers.meta_model import MetaModel, build_meta_model, read_config
from ..importers.side_files import read_json_object
from ..importers.source_error import SourceError
from .checkpoint import stored_tensors
from .conversions import Destination, destinations
from .dequantize import Dequantized
from .quantization_config import quantization_scheme
from .quantized import Packed, Source, sources_of
from .safetensors_files import Stored, torch_item, write_checkpoint

COMPRESSED_TENSORS, GPT_OSS = "compressed-tensors", "gpt-oss"
# gpt-oss's format holds these parameters, [E, K, N], and no others.
_GPT_OSS_WEIGHTS = ("experts.gate_up_proj", "experts.down_proj")
_SHARD_BYTES = 5 << 30
# Files that are rewritten, and files that are never copied.
_OWN = ("config.json", "model.safetensors.index.json", "hf_quant_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx")


@dataclass(frozen=True)
class Exported:
    """What was written: quantized tensors, kept ones with the reason, sizes in bytes."""

    directory: Path
    format: str
    quantized: tuple[str, ...]
    kept: Mapping[str, str]
    bytes_before: int
    bytes_after: int


def quantize_directory(
    source: str | Path,
    target: str | Path,
    options: MXFP4,
    *,
    shard_bytes: int = _SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write the model in `source` to `target`, its weights in MXFP4 as `options` say.

    The format is gpt-oss's own for a gpt-oss, compressed-tensors for others: transformers reads the
    experts of gpt-oss in its own format alone, and no others. `progress` gets the bytes written and
    the total. The directory takes its name at the end; a failure leaves nothing. FileExistsError
    for a target that exists; ValueError for options that a format lacks; SourceError for a model
    that cannot be read, is in MXFP4 already, or holds NaN.
    """
    source, target = Path(source), Path(target)
    writing = AtomicWrite(target)
    config = read_config(source)
    # This one is not traced: it says the modules and parameter names.
    meta = build_meta_model(config, attn_implementation="eager", experts_implementation="eager")
    format_ = GPT_OSS if config.model_type == "gpt_oss" else COMPRESSED_TENSORS
    if options.group != 32:
        raise ValueError(f"group: {format_} has groups of 32, found {options.group}")
    stored, files = stored_tensors(source)
    if foreign := next((name for file in files for name in file.foreign), None):
        raise SourceError(f"{source}: {foreign} is stored in a dtype that cannot be copied")
    scheme = quantization_scheme(config, source)
    if scheme.rotations:
        raise SourceError(
            f"{source}: its activations are rotated online ({scheme.rotations[0].name}), which the "
            "written config would not say"
        )
    sources = sources_of(stored, scheme)
    if packed := next((n for n, s in sources.items() if isinstance(s, Packed)), None):
        raise SourceError(f"{source}: {packed} is in MXFP4 already")
    plan = _Plan(sources, meta, _decisions(source, options), options, format_)
    items = [plan.item(*pair) for pair in destinations(sources, meta)]
    total, done = sum(item.nbytes for item in items), 0

    def written(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    with writing:
        writing.content.mkdir()
        write_checkpoint(writing.content, items, shard_bytes, written)
        _write_config(source, writing.content, plan.quantization_config())
        _copy_others(source, writing.content)
        writing.publish()
    before = sum(tensor.nbytes for tensor in stored.values())
    return Exported(target, format_, tuple(plan.quantized), plan.kept, before, total)


def _decisions(source: Path, options: MXFP4) -> dict[str, str]:
    """By the model's names: "" for a weight to quantize, else the reason not to."""
    # What the model does not read is copied as it is.
    imported = import_hugging_face(source, dtype=None, max_tokens=2, allow_unused=True)
    graph = run_pipeline(imported.graph, RAISING)[-1].graph
    found: dict[str, str] = {}
    for site in find_sites(graph, options):
        reason = "" if site.action == "quantize" else site.reason
        if not reason and _is_transposed(site.weight):
            reason = "the reduced dim is not its last"
        for node in walk((site.weight,)):
            if node.op is constant:
                name = node.attrs["name"]
                found[name] = found.get(name) or reason
    return found


def _is_transposed(weight: Value) -> bool:
    """Whether a 2-D weight is transposed before its product."""
    moved = [n.attrs["dims"] for n in walk((weight,)) if n.op is permute]
    return any(dims[-1] != len(dims) - 1 for dims in moved) and weight.type.rank == 2


@dataclass
class _Plan:
    """Selects, per stored tensor, whether it is quantized, kept or dequantized; records which."""

    sources: Mapping[str, Source]
    meta: MetaModel
    decisions: Mapping[str, str]
    options: MXFP4
    format: str
    quantized: list[str] = field(default_factory=list[str])
    kept: dict[str, str] = field(default_factory=dict[str, str])
    done: set[str] = field(default_factory=set[str])  # `quantized` by the model's names

    def item(self, name: str, target: Destination | None) -> Item:
        source = self.sources[name]
        assert not isinstance(source, Packed)
        reason = self._reason(source.type, target)
        if not reason and target is not None:
            self.quantized.append(name)
            self.done.add(target.name)
            if self.format == GPT_OSS:
                return _gpt_oss(name, source, self.options)
            return _compressed_tensors(name, source, self.options)
        if target is not None and (target.name in self.decisions or self._is_linear(target)):
            self.kept[name] = reason
        if not isinstance(source, Dequantized):
            return torch_item({name: source.type}, lambda: [source.read()])
        # Its old format is not declared by the new config: stored dense.
        type_ = self.meta.types()[target.name] if target else source.type.with_dtype("bf16")
        type_ = source.type.with_dtype(type_.dtype)
        return torch_item({name: type_}, lambda: [source.read_as(torch_dtype(type_.dtype))])

    def _reason(self, type_: TensorType, target: Destination | None) -> str:
        """The reason why a stored tensor is not quantized, "" if it is."""
        if target is None:
            return "the model has no such parameter"
        if target.name not in self.decisions:
            return "no matrix product or embedding reads it"
        if reason := self.decisions[target.name]:
            return reason
        *_, width = type_.shape
        if self.format == GPT_OSS:
            if not target.name.endswith(_GPT_OSS_WEIGHTS) or type_.rank != 3:
                return f"{GPT_OSS}'s format holds experts only"
            width = type_.shape[1]
        elif type_.rank != 2 or not self._is_linear(target):
            return f"{COMPRESSED_TENSORS} holds linear layers and experts only"
        if type_.dtype not in FLOATS:
            return f"it is stored as {type_.dtype}"
        if not isinstance(width, int) or width % self.options.group:
            return f"groups of {self.options.group} do not divide K = {width}"
        return ""

    def _is_linear(self, target: Destination) -> bool:
        """Whether it is the weight of a linear layer, or of one of an expert."""
        if target.converter is not None:
            return ".experts." in target.name and target.pattern.endswith(".weight")
        return target.name in self._linears()

    def _linears(self) -> set[str]:
        modules = self.meta.model.named_modules()
        return {f"{n}.weight" for n, m in modules if isinstance(m, torch.nn.Linear)}

    def quantization_config(self) -> dict[str, Any]:
        if self.format == GPT_OSS:
            kept = {n.removesuffix(".weight") for n in self.kept if n.endswith(".weight")}
            return {"quant_method": "mxfp4", "modules_to_not_convert": sorted(kept)}
        ignore = sorted(n.removesuffix(".weight") for n in self._linears() - self.done)
        weights = {
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": self.options.group,
            "symmetric": True,
            "dynamic": False,
            "scale_dtype": "torch.uint8",
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "mxfp4-pack-quantized",
        }
        return {
            "quant_method": COMPRESSED_TENSORS,
            "format": "mxfp4-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ignore,
        }


def _compressed_tensors(name: str, source: Stored | Dequantized, options: MXFP4) -> Item:
    """X.weight [N, K] as X.weight_packed [N, K/2] and X.weight_scale [N, K/32]."""
    rows, width = source.shape
    types = {
        f"{name}_packed": TensorType("u8", (rows, width // 2)),
        f"{name}_scale": TensorType("u8", (rows, width // options.group)),
    }
    return torch_item(types, lambda: _encoded(name, _dense(source), options))


def _gpt_oss(name: str, source: Stored | Dequantized, options: MXFP4) -> Item:
    """P [E, K, N] as P_blocks [E, N, K/32, 16] and P_scales [E, N, K/32]."""
    experts, width, rows = source.shape
    groups = (experts, rows, width // 32)
    types = {
        f"{name}_blocks": TensorType("u8", (*groups, 16)),
        f"{name}_scales": TensorType("u8", groups),
    }

    def load() -> Sequence[torch.Tensor]:
        dense = _dense(source)
        codes, scales = torch.empty(experts, rows, width // 2, dtype=torch.uint8), []
        for i, expert in enumerate(dense):
            codes[i], of_one = _encoded(name, expert.transpose(0, 1), options)
            scales.append(of_one)
        return codes.view(*groups, 16), torch.stack(scales)

    return torch_item(types, load)


def _dense(source: Stored | Dequantized) -> torch.Tensor:
    """The weight as stored, or dequantized to f32."""
    return source.read() if isinstance(source, Stored) else source.read_as(torch.float32)


def _encoded(name: str, dense: torch.Tensor, options: MXFP4) -> Sequence[torch.Tensor]:
    try:
        return encode(dense, options.group, options.scale)
    except ValueError as error:
        raise SourceError(f"{name}: {error}") from error


def _write_config(source: Path, target: Path, quantization: Mapping[str, Any]) -> None:
    config = read_json_object(source / "config.json")
    for section in [config, *(v for v in config.values() if isinstance(v, dict))]:
        section.pop("quantization_config", None)
    config["quantization_config"] = quantization
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")


def _copy_others(source: Path, target: Path) -> None:
    """Copy the tokenizer and other files beside the weights; no folders."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in _OWN and path.suffix not in _WEIGHTS:
            shutil.copyfile(path, target / path.name)
