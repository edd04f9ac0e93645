"""The quantization scheme of a checkpoint, from config.json or ModelOpt's hf_quant_config.json.

Every key is read, or known not to change what the model computes, or refused. Activations stay in
floats, as does the KV cache: what a config says of their quantization (input_activations,
activation_scheme, kv_cache_scheme) is left out, which is more exact than what it describes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...compiler.microscaling import GROUPS
from ..importers.side_files import read_json_object
from ..importers.source_error import SourceError
from .config_section import Section
from .patterns import matches_regex
from .rotations import Rotation, stored_rotation, transform_rotations

_MODELOPT = "hf_quant_config.json"  # of ModelOpt, beside config.json or instead of its section

MXFP4 = "MXFP4"
FP8 = "FP8 blocks"
NVFP4 = "NVFP4"
INT4 = "INT4 groups"


@dataclass(frozen=True)
class QuantizationScheme:
    """The quantization scheme that config.json declares.

    `method` is its quant_method, "" for an unquantized model. `groups` are pairs of a storage
    format and its group size, the elements that share one scale (0: not declared). `block` is the
    rows and columns of an FP8 block. `divide`: NVFP4's per-tensor scale divides instead of
    multiplying. `ignore` are patterns of modules whose weights stay dense. `rotations` are those of
    activations, which are not merged into weights.
    """

    method: str = ""
    groups: tuple[tuple[str, int], ...] = ()
    block: tuple[int, int] = (0, 0)
    divide: bool = False
    ignore: tuple[str, ...] = ()
    rotations: tuple[Rotation, ...] = ()

    @property
    def described(self) -> str:
        if not self.method:
            return "config.json has no quantization_config"
        return f"config.json says {' and '.join(f for f, _ in self.groups)} ({self.method})"

    def group(self, format_: str) -> int | None:
        """The group size of `format_`; None for a format that the scheme does not declare."""
        return dict(self.groups).get(format_)

    def ignores(self, module: str) -> bool:
        """Whether `ignore` names `module` or a module that contains it."""
        return any(_matches(pattern, module) for pattern in self.ignore)


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return matches_regex(pattern, module)
    path = module.split(".")
    around = [".".join(path[:i]) for i in range(1, len(path) + 1)]
    if "*" in pattern:
        return any(fnmatchcase(name, pattern) for name in around)
    return any(name == pattern or name.endswith(f".{pattern}") for name in around)


def quantization_scheme(config: Any, directory: Path | None = None) -> QuantizationScheme:
    """The scheme of a transformers config, or of ModelOpt's hf_quant_config.json in `directory`.

    SourceError names an unknown method or format, and keys that are not known.
    """
    found = _section(config)
    if found is None and directory is not None:
        found = _modelopt_file(directory / _MODELOPT)
    if found is None:
        return QuantizationScheme()
    method = str(found.get("quant_method") or "none")
    if method not in _METHODS:
        raise SourceError(
            f"quantization_config: expected a quant_method of {', '.join(_METHODS)}; found "
            f"{method!r}; use an unquantized (bf16, f16 or f32) version of the model"
        )
    expert_dtype = getattr(config, "expert_dtype", None)
    section = Section({"expert_dtype": expert_dtype, **found}, "quantization_config")
    section.known("quant_method", "expert_dtype", "dequantize", "version", "producer")
    scheme = _METHODS[method](section)
    section.refuse_unread()
    return scheme


def _section(config: Any) -> Mapping[str, Any] | None:
    for holder in (config, config.get_text_config()):
        section = getattr(holder, "quantization_config", None)
        if section is not None:
            data = section.to_dict() if hasattr(section, "to_dict") else section
            if not isinstance(data, dict):
                raise SourceError(
                    f"quantization_config: expected an object, found {str(data)[:60]!r}"
                )
            return data
    return None


def _modelopt_file(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    whole = read_json_object(path)
    given = whole.get("quantization")
    if not isinstance(given, dict):
        raise SourceError(f"{path}: expected ModelOpt's quantization, found {str(given)[:60]!r}")
    section = {**given, "quant_method": "modelopt"}
    around = Section(whole, path.name)
    around.known("quantization", "producer")
    around.refuse_unread()
    return section


def _unknown(what: str, found: Any, known: str) -> SourceError:
    return SourceError(
        f"quantization_config: {what} {repr(found)[:200]} is not supported; known: {known}"
    )


# ---- one parser per quant_method


def _gpt_oss(found: Section) -> QuantizationScheme:
    ignore = found.names("modules_to_not_convert")
    return QuantizationScheme("mxfp4", ((MXFP4, 32),), ignore=ignore)


def _deepseek(found: Section) -> QuantizationScheme:
    """FP8 blocks; `expert_dtype` "fp4" adds experts in MXFP4 (DeepSeek-V4)."""
    block = found.get("weight_block_size")
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(isinstance(b, int) and b > 0 for b in block)
    ):
        raise _unknown("fp8 with weight_block_size", block, "two positive integers")
    if (experts := found.get("expert_dtype")) not in (None, "fp8", "fp4"):
        raise _unknown("expert_dtype", experts, "fp8, fp4")
    # Stored tensors tell which modules are converted, and how scales are stored.
    found.known("fmt", "scale_fmt", "modules_to_convert", "activation_scheme")
    formats = ((FP8, 0), (MXFP4, 32)) if experts == "fp4" else ((FP8, 0),)
    ignore = found.names("modules_to_not_convert", "ignored_layers")
    return QuantizationScheme("fp8", formats, block=(block[0], block[1]), ignore=ignore)


def _compressed_tensors(found: Section) -> QuantizationScheme:
    default = found.get("format")
    formats = {_of_group(group, default) for group in found.objects("config_groups").values()}
    if not formats or len(dict(formats)) < len(formats):
        raise _unknown("compressed-tensors with formats", formats, "each format with one group")
    sparsity = found.object("sparsity_config")
    if (layout := sparsity.get("format")) not in (None, "dense"):
        raise _unknown("sparsity_config with format", layout, "dense")
    sparsity.known(
        "sparsity_structure", "global_sparsity", "registry_requires_subclass", "targets", "ignore"
    )
    found.known(
        "quantization_status", "global_compression_ratio", "kv_cache_scheme", "run_compressed"
    )
    return QuantizationScheme(
        "compressed-tensors",
        tuple(sorted(formats)),
        divide=True,
        ignore=found.names("ignore"),
        rotations=transform_rotations(found.object("transform_config")),
    )


def _of_group(group: Section, default: Any) -> tuple[str, int]:
    group.known("targets", "input_activations", "output_activations")
    name, weights = group.get("format") or default, group.object("weights")
    size, kind = weights.get("group_size"), (weights.get("type"), weights.get("num_bits"))
    symmetric, order = weights.get("symmetric"), weights.get("actorder")
    weights.known("strategy", "dynamic", "scale_dtype", "zp_dtype", "observer", "observer_kwargs")
    match name, kind:
        case "mxfp4-pack-quantized", ("float", 4) if size in GROUPS and symmetric is not False:
            return MXFP4, size
        case "nvfp4-pack-quantized", ("float", 4) if size == 16 and symmetric is not False:
            return NVFP4, size
        case "pack-quantized", ("int", 4) if symmetric and isinstance(size, int):
            if size > 0 and order in (None, False):
                return INT4, size
        case _:
            pass
    known = "mxfp4-pack-quantized, nvfp4-pack-quantized, pack-quantized (int4, symmetric, in order)"
    raise _unknown(f"format {name!r} of {kind} in groups of", size, known)


# ---- Quark


# Algorithms that change weights alone, or merge what they scale into the weights before.
_OFFLINE = ("smooth", "awq", "autosmoothquant", "gptq", "gptaq", "qronos")
_ROTATING = ("rotation", "quarot")


def _quark(found: Section) -> QuantizationScheme:
    whole = found.object("global_quant_config")
    overrides = (*found.objects("layer_quant_config").values(),)
    overrides += (*found.objects("layer_type_quant_config").values(),)
    for layers in (whole, *overrides):
        _quark_layers(layers, dense=layers is not whole)
    written = found.object("export")
    written.known(
        "kv_cache_group", "min_kv_scale", "pack_method", "weight_format", "weight_merge_groups"
    )
    found.known("kv_cache_quant_config", "kv_cache_post_rope", "quant_mode")
    rotations = [
        rotation
        for algorithm in found.objects("algo_config").values()
        for rotation in _quark_rotations(algorithm)
    ]
    exclude = found.names("exclude")
    return QuantizationScheme("quark", ((MXFP4, 32),), ignore=exclude, rotations=tuple(rotations))


def _quark_layers(layers: Section, dense: bool) -> None:
    """Check what is said of some layers: weights in MXFP4, or kept dense where they may be."""
    layers.known("input_tensors", "output_tensors", "target_device")
    if layers.get("weight") is None and dense:
        return
    weight = layers.object("weight")
    fields = ("dtype", "qscheme", "group_size", "scale_format")
    given = tuple(weight.get(field) for field in fields)
    axis = weight.get("ch_axis")
    if given != ("fp4", "per_group", 32, "e8m0") or axis not in (None, -1, 1):
        known = "dtype fp4, qscheme per_group, group_size 32, scale_format e8m0, ch_axis -1"
        raise _unknown("quark's weight", dict(zip(fields, given, strict=True)), known)
    weight.known(
        "block_size",
        "enable_buffer_reuse",
        "is_dynamic",
        "max_input_numel",
        "observer_cls",
        "round_method",
        "scale_calculation_mode",
        "scale_type",
        "symmetric",
        "zero_point_type",
    )
    if weight.get("is_scale_quant"):
        raise _unknown("quark's weight with is_scale_quant", True, "scales in e8m0 alone")


def _quark_rotations(algorithm: Section) -> list[Rotation]:
    """What an algorithm does to activations when the model runs.

    R1 and R2 are merged into weights, unless R1 is kept online. R3 turns queries and keys alike,
    behind their rotary embedding, and q·H·(k·H)ᵀ == q·kᵀ. R4 turns the inputs of down projections.
    """
    name = algorithm.get("name")
    if name not in (*_OFFLINE, *_ROTATING):
        raise _unknown("quark's algorithm", name, ", ".join((*_OFFLINE, *_ROTATING)))
    if name in _OFFLINE:
        if algorithm.get("static_groups") is False:
            raise _unknown("quark's static_groups", False, "True: groups in the order of columns")
        algorithm.known(
            "alpha",
            "beta",
            "block_size",
            "compute_scale_loss",
            "damp_percent",
            "desc_act",
            "inside_layer_modules",
            "model_decoder_layers",
            "scale_clamp_min",
            "scaling_layers",
        )
        return []
    r1, r4 = algorithm.get("r1"), algorithm.get("r4")
    online = ["r1"] if r1 is not False and algorithm.get("online_r1_rotation") else []
    online += ["r4"] if r4 else []
    algorithm.known("r2", "r3", "random_r1", "random_r2", "rotation_size", "scaling_layers")
    algorithm.known("backbone", "model_decoder_layers", "v_proj", "o_proj", "self_attn", "mlp")
    algorithm.known("trainable", "train_smooth", "smooth_positions")
    kept = algorithm.object("online_config")
    kept.known("shared_parallel")
    layers = kept.names("online_rotation_layers")
    return [stored_rotation(" and ".join(online), layers)] if online else []


# ---- ModelOpt


def _modelopt(found: Section) -> QuantizationScheme:
    formats = {"mxfp4": (MXFP4, 32), "nvfp4": (NVFP4, 16)}
    algorithm = str(found.get("quant_algo") or "").lower()
    if algorithm not in formats:
        raise _unknown("modelopt's quant_algo", found.get("quant_algo"), ", ".join(formats).upper())
    for key in ("pre_quant_scale", "has_zero_point"):
        if found.get(key):
            raise _unknown(f"modelopt's {key}", True, "False")
    groups = found.objects("config_groups").values()
    for group in groups:
        group.known("targets", "input_activations", "output_activations")
    weights = [group.object("weights") for group in groups]
    sizes = [found.get("group_size"), *(group.get("group_size") for group in weights)]
    if any(size not in (None, formats[algorithm][1]) for size in sizes):
        raise _unknown("modelopt's groups of", sizes, str(formats[algorithm][1]))
    for group in weights:
        if (kind := (group.get("type"), group.get("num_bits"))) != ("float", 4):
            raise _unknown("modelopt's weights of", kind, "float in 4 bits")
        group.known("dynamic")
    found.known("kv_cache_scheme", "kv_cache_quant_algo")
    ignore = found.names("ignore", "exclude_modules")
    return QuantizationScheme("modelopt", (formats[algorithm],), ignore=ignore)


_METHODS: Mapping[str, Callable[[Section], QuantizationScheme]] = {
    "mxfp4": _gpt_oss,
    "fp8": _deepseek,
    "compressed-tensors": _compressed_tensors,
    "quark": _quark,
    "modelopt": _modelopt,
}
