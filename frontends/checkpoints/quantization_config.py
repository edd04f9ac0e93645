"""The quantization scheme of a checkpoint, from config.json or ModelOpt's hf_quant_config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...compiler.microscaling import GROUPS
from ..importers.source_error import SourceError

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
    multiplying. `ignore` are patterns of modules whose weights stay dense.
    """

    method: str = ""
    groups: tuple[tuple[str, int], ...] = ()
    block: tuple[int, int] = (0, 0)
    divide: bool = False
    ignore: tuple[str, ...] = ()

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
        return re.match(pattern[3:], module) is not None
    path = module.split(".")
    around = [".".join(path[:i]) for i in range(1, len(path) + 1)]
    if "*" in pattern:
        return any(fnmatchcase(name, pattern) for name in around)
    return any(name == pattern or name.endswith(f".{pattern}") for name in around)


def quantization_scheme(config: Any, directory: Path | None = None) -> QuantizationScheme:
    """The scheme of a transformers config, or of ModelOpt's hf_quant_config.json in `directory`.

    SourceError names an unknown method or format.
    """
    found = _section(config)
    if found is None and directory is not None:
        found = _modelopt_file(directory / _MODELOPT)
    if found is None:
        return QuantizationScheme()
    method = str(found.get("quant_method", "none"))
    if method not in _METHODS:
        raise SourceError(
            f"quantization_config: expected a quant_method of {', '.join(_METHODS)}; found "
            f"{method!r}; use an unquantized (bf16, f16 or f32) version of the model"
        )
    expert_dtype = getattr(config, "expert_dtype", None)
    return _METHODS[method]({"expert_dtype": expert_dtype, **found})


def _section(config: Any) -> Mapping[str, Any] | None:
    for holder in (config, config.get_text_config()):
        section = getattr(holder, "quantization_config", None)
        if section is not None:
            return section if isinstance(section, dict) else section.to_dict()
    return None


def _modelopt_file(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        section = json.loads(path.read_text(encoding="utf-8"))["quantization"]
        return {**section, "quant_method": "modelopt", "ignore": section.get("exclude_modules")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: expected ModelOpt's quantization as JSON: {error}") from error


def _names(found: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = found.get(key) or ()
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise SourceError(f"quantization_config: expected {key} to be a list of names: {names!r}")
    return tuple(names)


def _unknown(what: str, found: Any, known: str) -> SourceError:
    return SourceError(f"quantization_config: {what} {found!r} is not supported; known: {known}")


# ---- one parser per quant_method


def _gpt_oss(found: Mapping[str, Any]) -> QuantizationScheme:
    return QuantizationScheme(
        "mxfp4", ((MXFP4, 32),), ignore=_names(found, "modules_to_not_convert")
    )


def _deepseek(found: Mapping[str, Any]) -> QuantizationScheme:
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
    formats = ((FP8, 0), (MXFP4, 32)) if experts == "fp4" else ((FP8, 0),)
    ignore = _names(found, "modules_to_not_convert")
    return QuantizationScheme("fp8", formats, block=(block[0], block[1]), ignore=ignore)


def _compressed_tensors(found: Mapping[str, Any]) -> QuantizationScheme:
    groups = found.get("config_groups") or {}
    formats = {_of_group(group, found.get("format")) for group in groups.values()}
    if not formats or len(dict(formats)) < len(formats):
        raise _unknown("compressed-tensors with formats", formats, "each format with one group")
    ignore = _names(found, "ignore")
    return QuantizationScheme(
        "compressed-tensors", tuple(sorted(formats)), divide=True, ignore=ignore
    )


def _of_group(group: Mapping[str, Any], default: Any) -> tuple[str, int]:
    name, weights = group.get("format") or default, group.get("weights") or {}
    size, kind = weights.get("group_size"), (weights.get("type"), weights.get("num_bits"))
    match name, kind:
        case "mxfp4-pack-quantized", ("float", 4) if size in GROUPS:
            return MXFP4, size
        case "nvfp4-pack-quantized", ("float", 4) if size == 16:
            return NVFP4, size
        case "pack-quantized", ("int", 4) if weights.get("symmetric") and isinstance(size, int):
            if size > 0 and weights.get("actorder") in (None, False):
                return INT4, size
        case _:
            pass
    known = "mxfp4-pack-quantized, nvfp4-pack-quantized, pack-quantized (int4, symmetric, in order)"
    raise _unknown(f"format {name!r} of {kind} in groups of", size, known)


def _quark(found: Mapping[str, Any]) -> QuantizationScheme:
    layers = found.get("layer_quant_config") or {}
    types = found.get("layer_type_quant_config") or {}
    specs = [found.get("global_quant_config"), *layers.values(), *types.values()]
    for spec in specs:
        weight = (spec or {}).get("weight")
        if weight is None and spec is not specs[0]:
            continue  # an override that keeps its layers dense
        fields = ("dtype", "qscheme", "group_size", "scale_format")
        given = tuple((weight or {}).get(field) for field in fields)
        if given != ("fp4", "per_group", 32, "e8m0"):
            known = "dtype fp4, qscheme per_group, group_size 32, scale_format e8m0"
            raise _unknown("quark's weight", dict(zip(fields, given, strict=True)), known)
    return QuantizationScheme("quark", ((MXFP4, 32),), ignore=_names(found, "exclude"))


def _modelopt(found: Mapping[str, Any]) -> QuantizationScheme:
    formats = {"mxfp4": (MXFP4, 32), "nvfp4": (NVFP4, 16)}
    algorithm = str(found.get("quant_algo", "")).lower()
    if algorithm not in formats:
        raise _unknown("modelopt's quant_algo", found.get("quant_algo"), ", ".join(formats).upper())
    return QuantizationScheme("modelopt", (formats[algorithm],), ignore=_names(found, "ignore"))


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], QuantizationScheme]] = {
    "mxfp4": _gpt_oss,
    "fp8": _deepseek,
    "compressed-tensors": _compressed_tensors,
    "quark": _quark,
    "modelopt": _modelopt,
}
