"""Imports a Hugging Face directory or model: a graph in token-major form and lazy weights.

The model is built on the meta device and traced without a cache, at batch 1 with a dynamic number
of tokens, with Ingot's own attention and experts functions: each is one node, and every other
operator is token-wise.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram, export

from ...compiler.ir import Graph, Value
from ...compiler.ops.attention import attention
from ...compiler.ops.leaf import constant, param
from ...compiler.ops.moe import experts
from ...compiler.ops.mxfp4 import mxfp4
from ...compiler.ops.pointwise import cast
from ...compiler.ops.shape import permute, view
from ...compiler.pipeline import run_pipeline
from ...compiler.rewrite import rebuild
from ...compiler.types import TensorType, symbol
from ...compiler.weights import Weights
from ...passes.pipelines import RAISING
from ...passes.serving.insert_kv_cache import CannotCache, InsertKvCache
from ..checkpoints.checkpoint import open_checkpoint, stored_dtype, weights_of
from ..checkpoints.rotations import Rotated
from ..checkpoints.safetensors_files import holds_weights
from ..speculate import MTP, Eagle3
from .attention_masks import described_masks
from .default_positions import default_position_offset
from .draft_head import DraftHead, Predicting
from .eagle_head import eagle_head
from .in_memory import meta_copy, traceable_model
from .meta_model import (
    ADAPTER,
    MERGE,
    MetaModel,
    PreTrainedConfig,
    PreTrainedModel,
    build_meta_model,
    length_limits,
    read_config,
)
from .online_rotations import rotate_activations
from .prediction_layer import prediction_layer
from .refusals import (
    ENCODER_DECODER,
    NOT_THE_INTERFACE,
    cross_attention_layers,
    language_modules,
    language_parameters,
    reason_of,
    refuse_unsupported_layers,
)
from .source_error import SourceError, UnsupportedModel
from .torch_export import Imported, ImportFailure, import_program
from .traced_ops import register
from .tracing import one_at_a_time
from .weightless import without_weights

# Tokens in the traced sample; any number but 0 and 1, which torch.export treats as special.
_SAMPLE_TOKENS = 20
_T = symbol("T")


@dataclass(frozen=True)
class HuggingFaceModel:
    """A causal language model: logits [T, vocab] from `tokens` and `positions`, both i32[T].

    Logits are in the model's dtype, f32 for f64. T is at most `max_tokens`. `unused` has tensors of
    the checkpoint that the graph does not read (an MTP layer, say), and why; `packed` names the
    weights in MXFP4 and `rotated` the activations that are turned (see Checkpoint). `notes` say in
    which way the model is not what was asked for.

    One that also predicts the token behind the next has, beside `tokens` and `positions`, the
    parameter `following` i32[T], for each token the one that follows it, and the outputs logits,
    hidden [T, H], drafted i32[T], the likeliest token behind that, and its state [T, H]: see
    prediction_layer.
    """

    graph: Graph
    weights: Weights
    config: PreTrainedConfig
    dtype: torch.dtype
    max_tokens: int
    unused: Mapping[str, str]
    packed: Mapping[str, tuple[int, ...]]
    rotated: Sequence[Rotated]
    notes: tuple[str, ...] = ()


class _Logits(torch.nn.Module):
    """The forward pass that is traced: no cache, positions given, which count from `offset`."""

    def __init__(self, model: PreTrainedModel, offset: int) -> None:
        super().__init__()
        self.model, self.offset = model, offset

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        position_ids = position_ids + self.offset if self.offset else position_ids
        output = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return output.logits


def trace(
    model: PreTrainedModel,
    max_tokens: int,
    offset: int = 0,
    head: DraftHead | None = None,
) -> ExportedProgram:
    """The functional program of a model: ids and positions [1, T] -> logits [1, T, V].

    With `head` it is what Predicting says. `offset` is added to the positions. ImportFailure and
    UnsupportedModel say why it has none.
    """
    ids = torch.zeros(1, _SAMPLE_TOKENS, dtype=torch.long, device=model.device)
    traced = _Logits(model, offset) if head is None else Predicting(head, offset)
    inputs = [ids.clone() for _ in range(2 if head is None else 3)]
    tokens = Dim("T", min=1, max=max(max_tokens, _SAMPLE_TOKENS))
    try:
        with torch.no_grad(), described_masks(max_tokens), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)  # torch's own
            program = export(
                traced, tuple(inputs), dynamic_shapes=tuple({1: tokens} for _ in inputs)
            )
            return program.run_decompositions({})
    except UnsupportedModel:
        raise
    except Exception as error:  # the model's own code runs here, and may fail in any way
        raise ImportFailure(reason_of(error, model)) from error


def _token_input(name: str, traced: TensorType) -> tuple[Value, Value]:
    """The i32[T] parameter `name`, and the i64[1, T] value that the program expects."""
    declared = param(name=name, type=TensorType("i32", (_T,)))
    return declared, view(cast(declared, dtype=traced.dtype), shape=traced.shape)


def _import_traced(
    meta: MetaModel,
    name: str,
    max_tokens: int,
    offset: int,
    head: DraftHead | None = None,
) -> Imported:
    imported = import_program(
        trace(meta.model, max_tokens, offset, head),
        name,
        symbols={"T": range(1, max_tokens + 1)},
        inputs={
            "input_ids": lambda t: _token_input("tokens", t),
            "position_ids": lambda t: _token_input("positions", t),
            "following": lambda t: _token_input("following", t),
        },
        strip="model.",
    )
    graph = imported.graph
    outputs = [view(output, shape=output.type.shape[1:]) for output in graph.outputs]
    if head is not None:
        outputs[2] = head.drafted(outputs[2])
    if outputs[0].type.dtype == "f64":
        outputs[0] = cast(outputs[0], dtype="f32")  # the widest in which logits are served
    graph = Graph(graph.name, graph.params, tuple(outputs), graph.symbols)
    referenced = frozenset(n.attrs["name"] for n in graph.nodes() if n.op is constant)
    return Imported(graph, imported.constants, referenced)


def _with_packed(graph: Graph, packed: Mapping[str, tuple[int, ...]], weights: Weights) -> Graph:
    """`graph` with the weights that are stored in MXFP4 in that form.

    `packed` gives for each the order of mxfp4's dims in which they are the model's own.
    """
    swap: dict[Value, Value] = {}
    for node in graph.nodes():
        if node.op is not constant or node.attrs["name"] not in packed:
            continue
        name = node.attrs["name"]
        parts = [f"{name}.codes", f"{name}.scales"]
        codes, scales = (constant(name=part, type=weights[part].type) for part in parts)
        value = mxfp4(codes, scales, dtype=node.types[0].dtype)
        order = packed[name]
        in_order = order == tuple(range(len(order)))
        swap[Value(node)] = value if in_order else permute(value, dims=order)
    return rebuild(graph, swap)


def _count_expert_modules(modules: Iterable[torch.nn.Module]) -> int:
    """Modules that hold their experts' weights as one 3-D stack."""
    stacks = (getattr(m, "down_proj", None) for m in modules)
    return sum(isinstance(s, torch.nn.Parameter) and s.ndim == 3 for s in stacks)


def _is_cacheable(graph: Graph) -> bool:
    """Whether no node but attention mixes tokens."""
    try:
        run_pipeline(graph, (*RAISING, InsertKvCache()))
    except CannotCache:
        return False
    return True


def _check(
    meta: MetaModel, imported: Imported, in_memory: bool, head: DraftHead | None
) -> dict[str, str]:
    """The parameters of other parts than the language model, and why text does not need them.

    ImportFailure where the trace has not all attention, experts and parameters of that. Of a model
    in memory some layers may be gone or without attention, if nothing else mixes tokens.
    """
    model, kind = meta.model, meta.model.config.model_type
    found = [n.op for n in imported.graph.nodes()]
    layers = model.config.get_text_config().num_hidden_layers
    layers -= len(cross_attention_layers(model))
    layers += head is not None
    seen = found.count(attention)
    if seen != layers and not (in_memory and 0 < seen < layers and _is_cacheable(imported.graph)):
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModel(ENCODER_DECODER.format(kind))
        raise ImportFailure(
            f"{kind}: expected one attention node for each of {layers} layers, found {seen}; "
            f"{NOT_THE_INTERFACE}"
        )
    stacks = _count_expert_modules(m for _, m in language_modules(model))
    stacks += 0 if head is None else _count_expert_modules(head.model.modules())
    if (seen := found.count(experts)) < stacks:  # layers may share one module
        raise ImportFailure(
            f"{kind}: expected one experts node for each of {stacks} MoE layers, found {seen}; the "
            "model does not call its experts through transformers' experts interface"
        )
    parameters = [n for n, _ in model.named_parameters()]
    used = {meta.tied.get(n, n) for n in imported.referenced}
    unused = [n for n in parameters if meta.tied.get(n, n) not in used]
    language = language_parameters(model)
    absent = [n for n in unused if n in language]
    if head is not None:
        own = head.prefixed(dict.fromkeys(head.stored_names()))
        absent += [n for n in own if n not in imported.referenced]
    if absent:
        raise ImportFailure(
            f"{kind}: {len(absent)} parameters take no part in the traced program: "
            f"{', '.join(absent[:5])}"
        )
    return dict.fromkeys(unused, "a part for images or sound, of a model that is given text alone")


def _adapter_note(directory: Path, allowed: bool) -> tuple[str, ...]:
    """What there is to say of an adapter beside the model; SourceError unless it is `allowed`."""
    if not (directory / ADAPTER).is_file():
        return ()
    if not allowed:
        raise SourceError(
            f"{directory}: {ADAPTER} is of an adapter, {MERGE}, or leave it out by unused='allow' "
            "(--unused allow)"
        )
    return (f"{ADAPTER}: the adapter beside the model is left out; allowed",)


@one_at_a_time()
def import_hugging_face(
    source: str | Path | PreTrainedModel,
    *,
    dtype: torch.dtype | None,
    max_tokens: int,
    weightless: bool = False,
    allow_unused: bool = False,
    predict: MTP | Eagle3 | None = None,
) -> HuggingFaceModel:
    """Trace and import a causal language model; no weight is read.

    `source` is a directory with config.json and safetensors, or a model in memory (it is not
    changed, and its tensors are not copied where `dtype` is their own). `dtype` None keeps the
    checkpoint's: that of config.json, or else of most stored values. `max_tokens`, or less where
    the model was made for less, bounds T. With `weightless` a directory may hold no weights: then
    they only have types. `allow_unused` leaves out stored tensors that the model does not read,
    whatever they are, and an adapter beside the model. With `predict` the model also predicts the
    token behind the next, by the first layer that its checkpoint has for it or by an EAGLE-3 head.
    SourceError (see meta_model) or ImportFailure for an unsupported model.
    """
    register()
    in_memory = isinstance(source, PreTrainedModel)
    config = source.config if in_memory else read_config(source)
    limit, reason = min(
        ((n, r) for r, n in length_limits(config).items()), default=(max_tokens, "")
    )
    notes: tuple[str, ...] = ()
    head: DraftHead | None = None
    if limit < max_tokens:
        notes = (f"max_tokens_per_sequence: {max_tokens} is lowered to {limit}, the {reason}",)
        max_tokens = limit
    if in_memory:
        if isinstance(predict, MTP):
            raise SourceError(
                f"{type(source).__name__}: a model in memory has no layer of multi-token "
                "prediction, which transformers leaves in the checkpoint; give its directory"
            )
        if source.training:
            notes += ("the model is in training mode: compiled as in eval mode, without dropout",)
        meta = traceable_model(source, dtype)
        held = weights_of(source, meta)
        weights = Weights({**held, **Weights.of(meta.buffers, "computed from the config")})
        packed, unused, rotated = {}, {}, ()
        if isinstance(predict, Eagle3):  # which is traced with it, on the meta device
            meta = replace(meta, model=meta_copy(meta.model))
    else:
        notes += _adapter_note(Path(source), allow_unused)
        absent = weightless and not holds_weights(Path(source))
        named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        if dtype is None and named is None and not absent:
            dtype = stored_dtype(source)
        meta = build_meta_model(config, dtype or named)
        layer = prediction_layer(meta, meta.model.dtype) if isinstance(predict, MTP) else None
        head = layer
        opened = without_weights if absent else open_checkpoint
        checkpoint = opened(source, meta, layer=layer, allow_unused=allow_unused)
        weights, packed, unused = checkpoint.weights, checkpoint.packed, checkpoint.unused
        rotated = checkpoint.rotated
        if head is not None and rotated:
            raise SourceError(
                f"{source}: its online rotations ({rotated[0].module}) are not applied to a layer "
                "of multi-token prediction; compile it without speculate=MTP(...)"
            )
        rotate_activations(meta.model, rotated)
    if isinstance(predict, Eagle3):
        head = eagle_head(predict.directory, meta, weightless=weightless)
        weights = weights.merged(head.weights())
    refuse_unsupported_layers(meta.model)
    try:
        if in_memory:
            offset = default_position_offset(meta_copy(meta.model), dict(source.named_buffers()))
        else:
            offset = default_position_offset(meta.model, meta.buffers)
    except UnsupportedModel:
        _import_traced(meta, config.model_type, max_tokens, 0)  # what fails here names the line
        raise
    imported = _import_traced(meta, config.model_type, max_tokens, offset, head)
    unused = {**unused, **_check(meta, imported, in_memory, head)}
    weights = weights.merged(imported.constants)
    graph = _with_packed(imported.graph, packed, weights)
    return HuggingFaceModel(
        graph, weights, config, meta.model.dtype, max_tokens, unused, packed, rotated, notes
    )
