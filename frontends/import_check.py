"""The imported graph against the model itself: the gate of every import, and layer by layer.

The gate runs where it is cheap: embedding, head and the first layer of each structure, with their
real weights, in the dtype in which the model will compute. The others are left out on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ..compiler.interpret import interpret
from ..compiler.ir import Graph, Value
from ..compiler.ops.attention import attention
from ..compiler.ops.leaf import constant
from ..compiler.pipeline import run_pipeline
from ..compiler.rewrite import rebuild
from ..compiler.torch_types import torch_dtype
from ..passes.pipelines import RAISING
from .importers.meta_model import build_meta_model
from .importers.module_tensors import shared_copy
from .importers.online_rotations import rotate_activations
from .importers.streamed_model import dense_weight, skip_layers, stream_layers
from .importers.torch_export import ImportFailure, ImportMismatch
from .layers import graph_sections
from .quantization_check import check_quantization

if TYPE_CHECKING:
    from .importers.huggingface import HuggingFaceModel
    from .importers.meta_model import PreTrainedConfig, PreTrainedModel

# Error of a token's values relative to the largest value of all tokens, by dtype; narrow floats
# round differently with every order of arithmetic, over few layers by no more than this.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
# A tie of routers or a rounding may move a token; what was misunderstood moves more than these.
_FEW = 0.1
_TOKENS, _BEHIND_WINDOW, _MOST_TOKENS = 32, 24, 160
# Weights of more bytes than this are not read for a check; under the other, all layers are run.
LARGEST, _SMALL = 4 * 2**30, 64 * 2**20
_LOGITS = "the logits"


@dataclass(frozen=True)
class ImportCheck:
    """What was compared: `layers` by module path, over `tokens` tokens, and the largest error.

    Without `layers` nothing was, and `reason` says why; with them it says what was not.
    """

    tokens: int = 0
    layers: tuple[str, ...] = ()
    error: float = 0.0
    seconds: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        if not self.layers:
            return f"import not checked: {self.reason}"
        return (
            f"import checked against the model: {', '.join(self.layers)} and logits over "
            f"{self.tokens} tokens, largest difference {self.error:.1e} ({self.seconds:.1f} s)"
            f"{self.reason}"
        )


def check_import(imported: HuggingFaceModel, source: str | Path | PreTrainedModel) -> ImportCheck:
    """Compare the graph of `imported` with the model at `source`.

    Hidden states of a layer of each structure and logits, over a prompt that goes beyond the
    shortest window where that is near, with positions that the model makes itself. ImportMismatch
    where more than a tenth of the tokens differ by more than the tolerance of the dtype. In a
    narrow dtype a rounding may move a router's choice: there it is an error only if the model in
    f32 says so too, and tokens at which the model differs from that itself count for us, twice. A
    layer that predicts further tokens, or a model that drafts, is left out: it changes no token. Of
    a quantized checkpoint keys and tensors are counted before (`quantization_check`).
    """
    began = perf_counter()
    if not isinstance(source, torch.nn.Module):
        check_quantization(imported, Path(source))
    imported = replace(imported, graph=_model_alone(imported.graph))
    chosen = _chosen_layers(imported)
    if isinstance(chosen, str):
        return ImportCheck(reason=chosen)
    part, kept, skipped = chosen
    ids = _prompt(imported)
    inputs = {"tokens": ids.int(), "positions": torch.arange(len(ids), dtype=torch.int32)}
    with torch.no_grad():
        found = interpret(part, inputs, imported.weights).outputs
    ours = dict(zip((*kept, _LOGITS), found, strict=True))
    theirs = _run(_their_model(imported, source, kept, skipped, imported.dtype), ids, kept)
    if isinstance(theirs, str):
        return ImportCheck(reason=theirs)
    wrong = _first_wrong(ours, theirs, imported.dtype, {})
    if wrong and imported.dtype.itemsize < 4:
        exact = _run(_their_model(imported, source, kept, skipped, torch.float32), ids, kept)
        if isinstance(exact, str):
            return ImportCheck(reason=f"{wrong}; in f32 {exact}")
        limit = TOLERANCES[imported.dtype]
        moved = {p: int((token_errors(theirs[p], exact[p]) > limit).sum()) for p in exact}
        wrong = _first_wrong(ours, exact, imported.dtype, moved)
    if wrong:
        raise ImportMismatch(
            f"{imported.config.model_type}: the imported graph computes other numbers than the "
            f"model: {wrong}; please report it; check_import=False compiles it all the same"
        )
    error = max(float(token_errors(ours[path], theirs[path]).max()) for path in theirs)
    same = "; its online rotations are our own on both sides" if imported.rotated else ""
    return ImportCheck(len(ids), tuple(kept), error, perf_counter() - began, same)


def _model_alone(graph: Graph) -> Graph:
    """Logits from tokens and positions, without what predicts further tokens."""
    params = tuple(p for p in graph.params if p.attrs["name"] in ("tokens", "positions"))
    return Graph(graph.name, params, graph.outputs[:1], graph.symbols)


def _first_wrong(
    ours: Mapping[str, torch.Tensor],
    theirs: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    moved: Mapping[str, int],
) -> str:
    """What differs at more tokens than a few and twice those `moved` by rounding, or ""."""
    limit = TOLERANCES[dtype]
    for path, value in theirs.items():
        errors = token_errors(ours[path], value)
        wrong = int((~(errors <= limit)).sum())  # NaN is within no tolerance
        if wrong > _FEW * len(errors) + 2 * moved.get(path, 0):
            return (
                f"{path} differs by {float(errors.max()):.1e} of its largest value, at {wrong} of "
                f"{len(errors)} tokens (expected at most {limit:.0e})"
            )
    return ""


def compare_streamed(
    imported: HuggingFaceModel, directory: Path, prompts: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Run every layer of both sides, the weights of one in memory at a time.

    Gives the largest error of each layer's hidden state over the prompts, and that of the logits
    under "the logits", relative to the largest value of the model's. ImportFailure where a layer
    gives no hidden state, the model itself does not run, and for online rotations.
    """
    if imported.rotated:
        raise ImportFailure(
            f"{directory}: transformers does not compute its online rotations "
            f"({imported.rotated[0].module}), and is no reference for it"
        )
    graph = run_pipeline(imported.graph, RAISING)[-1].graph
    layers, ends = graph_sections(graph).layers, layer_ends(graph, imported.config)
    if len(ends) != len(layers):
        raise ImportFailure(f"{imported.config.model_type}: some layers give no hidden state")
    part = Graph(graph.name, graph.params, (*ends.values(), *graph.outputs), graph.symbols)
    worst: dict[str, float] = {}
    for prompt in prompts:
        ids = torch.tensor(prompt)
        theirs = _run(_their_model(imported, directory, list(ends), [], imported.dtype), ids, ends)
        if isinstance(theirs, str):
            raise ImportFailure(f"{imported.config.model_type}: {theirs}")
        inputs = {"tokens": ids.int(), "positions": torch.arange(len(ids), dtype=torch.int32)}
        with torch.no_grad():
            ours = interpret(part, inputs, imported.weights).outputs
        for path, found in zip((*ends, _LOGITS), ours, strict=True):
            error = float(token_errors(found, theirs[path]).max())
            worst[path] = max(worst.get(path, 0.0), error)
    return worst


def _run(
    model: PreTrainedModel, ids: torch.Tensor, layers: Iterable[str]
) -> dict[str, torch.Tensor] | str:
    """What each layer gives, and the logits, without a cache and with the model's positions.

    A text says why the model does not run.
    """
    found = record_layers(model, layers)
    try:
        with torch.no_grad():
            logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits
    except Exception as error:  # noqa: BLE001 the model's own code, on kernels of torch for the CPU
        told = " ".join(str(error).split())[:200]
        return f"the model itself does not run: {type(error).__name__}: {told}"
    return {**found, _LOGITS: logits}


def record_layers(model: torch.nn.Module, paths: Iterable[str]) -> dict[str, torch.Tensor]:
    """A dict that each run of `model` fills with the hidden state that each layer gives.

    A module at several of the `paths` gives one after the other, in their order.
    """
    found: dict[str, torch.Tensor] = {}

    def keep(turns: Iterator[str], _module: Any, _args: Any, output: Any) -> None:
        found[next(turns)] = output[0] if isinstance(output, tuple) else output

    places: dict[torch.nn.Module, list[str]] = {}
    for path in paths:
        places.setdefault(model.get_submodule(path), []).append(path)
    for module, own in places.items():
        module.register_forward_hook(partial(keep, cycle(own)))
    return found


def token_errors(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The largest difference at each token, relative to the largest finite value of all: [T].

    NaN and infinities that both have are no difference.
    """
    wanted = theirs.detach().cpu().double().reshape(-1, theirs.shape[-1])
    found = ours.double().reshape(wanted.shape)
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    difference = (found - wanted).abs().masked_fill(same, 0.0).amax(-1)
    largest = wanted.nan_to_num(0.0, 0.0, 0.0).abs().max()
    return difference / largest.clamp(min=torch.finfo(torch.float64).tiny)


def _chosen_layers(imported: HuggingFaceModel) -> tuple[Graph, list[str], list[str]] | str:
    """The graph of the layers that are run, with their ends and the logits as outputs; the paths of
    these layers, and of those left out. A text says why nothing can be chosen."""
    graph = imported.graph
    layers = graph_sections(graph).layers
    ends = layer_ends(graph, imported.config)
    if not layers or len(ends) != len(layers):
        return "its layers give no hidden state"
    kept = [layer for layer in layers if layer.same_as == layer.number]
    alone = all(layer.outputs == (ends[layer.path],) for layer in layers if layer not in kept)
    if not alone or _weight_bytes(graph) <= _SMALL:
        kept = list(layers)
    swap: dict[Value, Value] = {}
    last = ends[layers[0].path]
    for layer in layers:
        if layer in kept:
            last = ends[layer.path]
        else:
            swap[ends[layer.path]] = last
    outputs = (*(ends[layer.path] for layer in kept), *graph.outputs)
    part = rebuild(Graph(graph.name, graph.params, outputs, graph.symbols), swap)
    if (size := _weight_bytes(part)) > LARGEST:
        return f"its distinct layers have {size / 2**30:.1f} GiB of weights"
    paths = [layer.path for layer in kept]
    return part, paths, [layer.path for layer in layers if layer not in kept]


def layer_ends(graph: Graph, config: PreTrainedConfig) -> dict[str, Value]:
    """The hidden state that each layer gives, by module path: its last result of hidden size."""
    width = config.get_text_config().hidden_size
    ends: dict[str, Value] = {}
    for layer in graph_sections(graph).layers:
        fitting = [v for v in layer.outputs if v.type.shape[-1:] == (width,)]
        if fitting:
            ends[layer.path] = fitting[-1]
    return ends


def _weight_bytes(graph: Graph) -> int:
    return sum(int(n.types[0].nbytes) for n in graph.nodes() if n.op is constant)


def _prompt(imported: HuggingFaceModel) -> torch.Tensor:
    """Random ids, none of them with a meaning of its own, beyond a window that is not far."""
    config = imported.config.get_text_config()
    windows = [n.attrs.get("window", 0) for n in imported.graph.nodes() if n.op is attention]
    beyond = [w + _BEHIND_WINDOW for w in windows if 0 < w <= _MOST_TOKENS - _BEHIND_WINDOW]
    count = min(imported.max_tokens, max(beyond, default=_TOKENS))
    special: set[int] = set()
    for holder in (imported.config, config):
        for name, value in vars(holder).items():
            if name.endswith(("_token_id", "_token_index", "_ids")):
                values = value if isinstance(value, list) else [value]
                special |= {v for v in values if isinstance(v, int)}
    plain = [i for i in range(config.vocab_size) if i not in special]
    drawn = torch.randint(len(plain), (count,), generator=torch.Generator().manual_seed(0))
    return torch.tensor(plain)[drawn]


def _their_model(
    imported: HuggingFaceModel,
    source: str | Path | PreTrainedModel,
    kept: Sequence[str],
    skipped: Sequence[str],
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The model itself in `dtype`, without the layers that are left out."""
    if isinstance(source, torch.nn.Module):
        model = shared_copy(source)
        skip_layers(model, skipped)
        own = model.dtype
        for parameter in model.parameters():  # buffers keep theirs: rotary frequencies are f32
            if parameter.dtype == own != dtype:
                parameter.data = parameter.to(dtype)
        return model
    meta = build_meta_model(
        imported.config, dtype, attn_implementation="eager", experts_implementation="eager"
    )
    types = meta.types()
    rotate_activations(meta.model, imported.rotated)
    skip_layers(meta.model, skipped)

    def load(name: str) -> torch.Tensor:
        dense = dense_weight(imported.weights, imported.packed, name, dtype=imported.dtype)
        return dense.to(torch_dtype(types[name].dtype))

    return stream_layers(meta, kept, load)
