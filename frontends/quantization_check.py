"""What a quantized checkpoint says, counted against what the imported graph makes of it.

The numeric gate cannot see a key or a tensor that the loader drops: both of its sides read weights
through that. A reference would be the library that wrote the checkpoint. None of them can be had
here: compressed-tensors, Quark and ModelOpt are no dependencies, and what transformers has of its
own for FP8 blocks and MXFP4 knows of weights alone, not of rotations or of scaled inputs. So for
every format this file holds, by tables of its own and independently of the loader, that

- each key of the quantization config that says something is one whose meaning is known,
- the graph turns as many activations as the config and the stored matrices want to be turned,
- each tensor beside a quantized weight is a part of it, or one that floats do without.

It does not see a known key whose value is misread (a group size is held to shapes by the loader),
nor a wrong arithmetic of scales, which tests hold to each library's files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compiler.ops.hadamard import hadamard
from .checkpoints.checkpoint import stored_tensors
from .checkpoints.patterns import matches_any
from .importers.side_files import read_json_object
from .importers.torch_export import ImportMismatch

if TYPE_CHECKING:
    from .importers.huggingface import HuggingFaceModel

# The keys of these hold names that a tool chose, not keys.
_NAMED = ("config_groups", "apply", "layer_quant_config", "layer_type_quant_config", "algo_config")
# How weights are stored, which of them are, and what is said of activations and of the past.
_STORED = """
    quant_method format targets weights weight type num_bits group_size strategy symmetric dynamic
    actorder observer observer_kwargs scale_dtype zp_dtype ignore quantization_status
    global_compression_ratio kv_cache_scheme run_compressed dequantize version producer
    sparsity_config sparsity_structure global_sparsity registry_requires_subclass input_activations
    output_activations weight_block_size fmt scale_fmt modules_to_not_convert modules_to_convert
    ignored_layers activation_scheme expert_dtype global_quant_config export kv_cache_group
    min_kv_scale pack_method weight_format weight_merge_groups kv_cache_quant_config
    kv_cache_post_rope quant_mode exclude input_tensors output_tensors target_device dtype qscheme
    scale_format ch_axis block_size enable_buffer_reuse is_dynamic max_input_numel observer_cls
    round_method scale_calculation_mode scale_type zero_point_type quant_algo kv_cache_quant_algo
    exclude_modules name quantization
"""
# Algorithms that changed weights before they were stored, and rotations, which are counted.
_ALGORITHMS = """
    alpha beta compute_scale_loss damp_percent desc_act static_groups inside_layer_modules
    model_decoder_layers scale_clamp_min scaling_layers r1 r2 r3 r4 random_r1 random_r2
    online_r1_rotation rotation_size backbone v_proj o_proj self_attn mlp trainable train_smooth
    smooth_positions online_config shared_parallel online_rotation_layers transform_config head_dim
    randomize requires_grad precision location inverse
"""
_KNOWN = frozenset((_STORED + _ALGORITHMS).split())
# Objects whose content is told to people or to the tool that made it.
_FREE = (
    "producer",
    "observer_kwargs",
    "input_activations",
    "output_activations",
    "scaling_layers",
    "input_tensors",
    "output_tensors",
    "kv_cache_scheme",
    "kv_cache_quant_config",
)
_PACKED = ("weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2")
_PARTS = (*_PACKED, "weight", "bias", "weight_global_scale", "weight_shape", "scale")
_FLOATS_DO_WITHOUT = (
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "activation_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "prob_scale",
)


def check_quantization(imported: HuggingFaceModel, directory: Path) -> None:
    """ImportMismatch where a quantized checkpoint says more than the graph of `imported` takes up.

    Headers of its files are read, and no tensor. Nothing is checked of one without quantization.
    """
    section = _section(directory)
    if not section:
        return
    where = f"{directory}: quantization_config"
    for path in _unknown(section, ""):
        raise ImportMismatch(
            f"{where}{path} is not known, and may change what the model computes; "
            "check_import=False compiles it all the same"
        )
    stored, unused = stored_tensors(directory)[0].keys(), imported.unused
    _check_beside({n for n in stored if not unused.get(n, "").endswith("allowed")}, where)
    names = stored - unused.keys()
    wanted = sum(_turned(section, names))
    found = sum(node.op is hadamard for node in imported.graph.nodes())
    if found < wanted:
        raise ImportMismatch(
            f"{where} wants {wanted} activations to be turned online, and the imported graph turns "
            f"{found}; please report it; check_import=False compiles it all the same"
        )


def _section(directory: Path) -> Mapping[str, Any]:
    config = read_json_object(directory / "config.json")
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping) and isinstance(holder.get("quantization_config"), Mapping):
            return holder["quantization_config"]
    beside = directory / "hf_quant_config.json"
    return read_json_object(beside) if beside.is_file() else {}


def _unknown(value: Any, path: str) -> Iterator[str]:
    """The paths of keys below `value` that nobody knows and that say something."""
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if inner in (None, False, "", [], {}):
            continue
        here = f"{path}.{key}"
        if key not in _KNOWN | {*_NAMED}:
            yield f"{here} {str(inner)[:60]!r}"
        elif key in _NAMED:
            for each in inner.values() if isinstance(inner, Mapping) else inner:
                yield from _unknown(each, here)
        elif key not in _FREE:
            yield from _unknown(inner, here)


def _quantized(names: Set[str]) -> set[str]:
    """The modules with a quantized weight."""
    return {n.rpartition(".")[0] for n in names if n.rpartition(".")[2] in _PACKED}


def _check_beside(names: Set[str], where: str) -> None:
    modules = _quantized(names)
    for name in sorted(names):
        module, _, leaf = name.rpartition(".")
        if module not in modules:
            module, _, leaf = name.removesuffix(".weight").rpartition(".")
        matrix = leaf == "input_rotation" or leaf.endswith(("_input", "_output"))  # are counted
        if module in modules and not matrix and leaf not in (*_PARTS, *_FLOATS_DO_WITHOUT):
            raise ImportMismatch(
                f"{where}: {name} lies beside a quantized weight, and nobody reads it; "
                "check_import=False compiles it all the same"
            )


def _turned(section: Mapping[str, Any], names: Set[str]) -> Iterator[int]:
    """How many activations each online rotation turns."""
    modules = _quantized(names)
    groups = (section.get("transform_config") or {}).get("config_groups") or {}
    for group in _listed(groups):
        for place in _listed(group.get("apply") or []):
            if place.get("location") in ("input", "output"):
                targets, ignore = place.get("targets") or [], place.get("ignore") or []
                yield sum(
                    matches_any(targets, name, {"Linear"})
                    and not matches_any(ignore, name, {"Linear"})
                    for name in modules
                )
    for algorithm in _listed(section.get("algo_config") or []):
        r1 = algorithm.get("online_r1_rotation") and algorithm.get("r1") is not False
        if algorithm.get("r4") or r1:
            yield max(1, sum(name.endswith(".input_rotation") for name in names))


def _listed(value: Any) -> list[Mapping[str, Any]]:
    given = value.values() if isinstance(value, Mapping) else value
    return [item for item in given if isinstance(item, Mapping)]
