"""Groups stored tensors into weights: codes, scales and shapes of a quantized weight become one.

Names, dtypes and ranks tell the storage format, which must agree with the quantization scheme of
config.json. MXFP4 stays packed, bit for bit; other formats are dequantized when they are read.
Floats stored without scales are dense, whatever the scheme says of their module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ...compiler.dtypes import FLOATS
from ...compiler.types import TensorType
from ..importers.source_error import SourceError
from .dequantize import BlockFp8, Dequantized, Int4, Nvfp4
from .quantization_config import FP8, INT4, MXFP4, NVFP4, QuantizationScheme
from .safetensors_files import File, Stored

_E8M0 = ("u8", "e8m0")
# gpt-oss's names for the codes of its experts.
_BLOCKS = ("gate_up_proj_blocks", "down_proj_blocks")
# Names of the scales of a quantized `X.weight`, as `X.<name>`. `X.scale` is one too if it is E8M0.
_COMPANIONS = ("weight_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale")


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight in MXFP4: codes u8 [..., N, K/2], scales u8 [..., N, K/g], E8M0 bytes.

    The model's own parameter is [..., K, N] if `transposed`.
    """

    codes: Stored
    scales: Stored
    transposed: bool = False

    @property
    def file(self) -> File:
        return self.codes.file

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])


Source = Stored | Dequantized | Packed


def sources_of(stored: Mapping[str, Stored], scheme: QuantizationScheme) -> dict[str, Source]:
    """Every weight by the name that its dense form has, and every other stored tensor.

    SourceError for a tensor that contradicts the scheme, lacks its scales, or has a wrong shape.
    """
    grouping = _Grouping(stored, scheme)
    for name in stored:
        grouping.add(name)
    return grouping.finish()


@dataclass
class _Grouping:
    stored: Mapping[str, Stored]
    scheme: QuantizationScheme
    sources: dict[str, Source] = field(default_factory=dict[str, Source])
    used: set[str] = field(default_factory=set[str])

    def add(self, name: str) -> None:
        """Add the quantized weight whose codes are stored as `name`, if they are codes."""
        tensor = self.stored[name]
        module, _, leaf = name.rpartition(".")
        if leaf in _BLOCKS and (tensor.dtype == "u8" or self._is_resaved(name)):
            self._gpt_oss(name, tensor)
        elif leaf == "weight_packed":
            self._packed(name, f"{module}.weight", tensor)
        elif leaf == "weight" and tensor.dtype in ("u8", "i8", "f4e2m1"):
            scale = self._scale(name, module, ("weight_scale", "scale"))
            self._fp4(name, name, tensor, scale, "weight_scale_2")
        elif tensor.dtype == "f8e4m3" and leaf not in _COMPANIONS:
            self._fp8(name, tensor)
        elif leaf == "weight" and tensor.dtype in FLOATS:
            self._check_dense(name, module)

    def finish(self) -> dict[str, Source]:
        """The weights and, under their own names, the tensors that belong to none."""
        for name, tensor in self.stored.items():
            module = name.rpartition(".")[0]
            if name in self.used:
                continue
            if self._is_companion(name) and self._lacks_weight(module):
                raise SourceError(f"{name}: no weight is stored for it beside it")
            if name in self.sources:
                raise SourceError(f"two stored tensors for {name}: quantized, and {tensor.type}")
            self.sources[name] = tensor
        return self.sources

    def _is_companion(self, name: str) -> bool:
        leaf = name.rpartition(".")[2]
        e8m0_scale = leaf == "scale" and name in self.stored and self.stored[name].dtype == "e8m0"
        return e8m0_scale or (leaf in _COMPANIONS and name in self.stored)

    def _lacks_weight(self, module: str) -> bool:
        own = (f"{module}.weight", f"{module}.weight_packed")
        return bool(self.scheme.method) and not any(name in self.stored for name in own)

    # ---- one function per storage format

    def _is_resaved(self, name: str) -> bool:
        """Whether transformers dequantized a gpt-oss and saved it: dense, under the packed name."""
        stem, tensor = name.removesuffix("_blocks"), self.stored[name]
        lonely = f"{stem}_scales" not in self.stored and stem not in self.stored
        if tensor.dtype in FLOATS and tensor.type.rank == 3 and lonely:
            return True
        if self.scheme.method == "mxfp4":
            raise SourceError(
                f"{name}: expected U8 blocks [E, N, K/32, 16] with scales, or the dense weight "
                f"[E, K, N] without, found {tensor.type}; {self.scheme.described}"
            )
        return False

    def _gpt_oss(self, name: str, blocks: Stored) -> None:
        stem = name.removesuffix("_blocks")
        if blocks.dtype != "u8":
            self._put(stem, blocks, name)
            return
        scales = self._companion(name, f"{stem}_scales")
        self._check_format(name, MXFP4)
        groups = blocks.shape[:-1]
        if (
            blocks.type.rank < 3
            or blocks.shape[-1] != 16
            or scales.type != TensorType("u8", groups)
        ):
            raise SourceError(
                f"{name}: expected blocks u8 [..., N, K/32, 16] and scales u8 [..., N, K/32], "
                f"found {blocks.type} and {scales.type}"
            )
        codes = replace(blocks, shape=(*groups[:-1], groups[-1] * 16))
        self._put(stem, Packed(codes, scales, transposed=True), name, f"{stem}_scales")

    def _packed(self, name: str, weight: str, tensor: Stored) -> None:
        module = weight.removesuffix(".weight")
        if tensor.dtype in FLOATS:
            raise SourceError(
                f"{name}: expected packed numbers under that name, found {tensor.type}; "
                f"{self.scheme.described}"
            )
        scale = self._scale(name, module, ("weight_scale",))
        if tensor.dtype == "i32":
            self._int4(name, weight, tensor, scale)
        else:
            self._fp4(name, weight, tensor, scale, "weight_global_scale")

    def _fp4(self, name: str, weight: str, tensor: Stored, scale: str, whole: str) -> None:
        """E2M1 codes: MXFP4 where the scales are E8M0, NVFP4 where they are E4M3."""
        scales = self.stored[scale]
        if scales.dtype not in (*_E8M0, "f8e4m3"):
            raise SourceError(
                f"{name}: expected scales of E8M0 (U8, F8_E8M0) or F8_E4M3 for {tensor.type}, "
                f"found {scale!r} {scales.type}"
            )
        format_ = NVFP4 if scales.dtype == "f8e4m3" else MXFP4
        codes = tensor.as_bytes()
        self._check_groups(name, 2 * codes.shape[-1] if codes.shape else 0, codes, scales, format_)
        if format_ == MXFP4:
            self._put(weight, Packed(codes, scales.as_bytes()), name, scale)
            return
        module = weight.removesuffix(".weight")
        of_all = f"{module}.{whole}"
        number = self._companion(name, of_all)
        if number.dtype != "f32" or number.type.numel != 1 or codes.type.rank != 2:
            raise SourceError(
                f"{name}: expected codes [N, K/2] and one f32 in {of_all!r}, found {codes.type} "
                f"and {number.type}"
            )
        shape = (codes.shape[0], 2 * codes.shape[1])
        divide = self.scheme.divide
        dense = Nvfp4(weight, tensor.file, shape, codes, scales, number, divide)
        self._put(weight, dense, name, scale, of_all)

    def _int4(self, name: str, weight: str, packed: Stored, scale: str) -> None:
        module = weight.removesuffix(".weight")
        shape_name, scales = f"{module}.weight_shape", self.stored[scale]
        shape = self._companion(name, shape_name)
        if f"{module}.weight_zero_point" in self.stored:
            raise SourceError(f"{name}: has zero points, which are not supported: symmetric only")
        fits = packed.type.rank == 2 and shape.shape == (2,) and shape.dtype in ("i32", "i64")
        if not fits or scales.dtype not in FLOATS:
            raise SourceError(
                f"{name}: expected packed i32 [N, K/8], float scales and {shape_name!r} of two "
                f"integers, found {packed.type}, {scales.type} and {shape.type}"
            )
        self._check_groups(name, 8 * packed.shape[1], packed, scales, INT4)
        dense = (packed.shape[0], 8 * packed.shape[1])
        source = Int4(weight, packed.file, dense, packed, scales, shape)
        self._put(weight, source, name, scale, shape_name)

    def _fp8(self, name: str, tensor: Stored) -> None:
        module = name.removesuffix(".weight")
        named = [f"{name}_scale_inv", *([f"{module}.scale"] if module != name else [])]
        scale = next((n for n in named if n in self.stored), None)
        if scale is None:
            if (other := f"{name}_scale") in self.stored:
                raise SourceError(
                    f"{name}: FP8 with {other!r} {self.stored[other].type} is not supported; "
                    "known are blocks with weight_scale_inv"
                )
            raise SourceError(f"{name}: no scales {named[0]!r} are stored for {tensor.type}")
        self._check_format(name, FP8)
        scales, (rows, columns) = self.stored[scale], self.scheme.block
        *lead, n, k = tensor.shape if tensor.type.rank >= 2 else (0, 0)
        grid = (*lead, -(-n // rows), -(-k // columns))
        if tensor.type.rank < 2 or scales.shape != grid or scales.dtype not in (*FLOATS, *_E8M0):
            raise SourceError(
                f"{name}: {tensor.type} in blocks of {rows} by {columns} has scales {[*grid]}, "
                f"found {scale!r} {scales.type}"
            )
        scales = scales.as_bytes() if scales.dtype == "e8m0" else scales
        source = BlockFp8(name, tensor.file, tensor.shape, tensor, scales, self.scheme.block)
        self._put(name, source, name, scale)

    def _check_dense(self, name: str, module: str) -> None:
        """SourceError for a dense weight that has scales, unless the scheme ignores its module."""
        if self.scheme.ignores(module):
            return
        beside = (f"{module}.{leaf}" for leaf in (*_COMPANIONS, "scale"))
        scale = next(filter(self._is_companion, beside), None)
        if scale is not None and self.scheme.method:
            raise SourceError(
                f"{name}: stored dense as {self.stored[name].type}, beside {scale!r}, and "
                f"{module} is not on the list of modules to ignore; {self.scheme.described}"
            )

    # ---- shared by the formats

    def _put(self, name: str, source: Source, *parts: str) -> None:
        if name in self.sources or (name in self.stored and name not in parts):
            raise SourceError(f"two stored tensors for {name}: {parts[0]!r} and another")
        self.sources[name] = source
        self.used.update(parts)

    def _companion(self, name: str, companion: str) -> Stored:
        if companion not in self.stored:
            raise SourceError(
                f"{name}: no tensor {companion!r} is stored beside it; {self.scheme.described}"
            )
        return self.stored[companion]

    def _scale(self, name: str, module: str, leaves: tuple[str, ...]) -> str:
        found = next((n for n in (f"{module}.{leaf}" for leaf in leaves) if n in self.stored), None)
        self._companion(name, found or f"{module}.{leaves[0]}")
        return found or ""

    def _check_format(self, name: str, format_: str) -> None:
        tensor = self.stored[name].type
        if self.scheme.group(format_) is None:
            raise SourceError(f"{name}: stored as {format_}, {tensor}; {self.scheme.described}")
        module = name.rpartition(".")[0]
        if self.scheme.ignores(module):
            raise SourceError(
                f"{name}: stored as {format_}, {tensor}, but config.json lists {module} among the "
                "modules to ignore"
            )

    def _check_groups(
        self, name: str, width: int, codes: Stored, scales: Stored, format_: str
    ) -> None:
        """SourceError unless rows of `width` elements have one scale per declared group."""
        self._check_format(name, format_)
        group = self.scheme.group(format_) or 1
        if width % group or scales.shape != (*codes.shape[:-1], width // group):
            raise SourceError(
                f"{name}: rows of {width} in groups of {group} have scales "
                f"{[*codes.shape[:-1], width // group]}, found {scales.type}"
            )
