"""The passes in their order, and what each stage of them must have done away with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..compiler.ir import Graph, Node
from ..compiler.ops.attention import attention
from ..compiler.ops.mla import mla_attention
from ..compiler.ops.moe import router
from ..compiler.ops.shape import permute, view
from ..compiler.pipeline import Pass, Stage
from .fusion.fuse_collective_norm import FuseCollectiveNorm
from .fusion.fuse_linear_residual import FuseLinearResidual
from .fusion.fuse_mla_projections import FuseMlaProjections
from .fusion.fuse_moe_gating import FuseMoeGating
from .fusion.fuse_norm_linear import FuseNormLinear
from .fusion.fuse_qkv_rope import FuseQkvRope
from .fusion.fuse_shared_experts import FuseSharedExperts
from .fusion.fuse_swiglu import FuseSwiglu
from .moves import is_projection
from .raising.canonicalize import Canonicalize, MergeEqual
from .raising.raise_ops import RaiseOps
from .serving.draft_next_tokens import DraftNextTokens
from .serving.feed_next_step import FeedNextStep
from .serving.gather_logits import GatherLogits
from .serving.insert_kv_cache import InsertKvCache
from .serving.sample_on_device import SampleOnDevice
from .target.fuse_elementwise import FuseElementwise
from .target.fuse_heads_attention import FuseHeadsAttention
from .target.fuse_kv_append import FuseKvAppend
from .target.lay_out_weights import LayOutWeights
from .transforms.absorb_mla import AbsorbMla
from .transforms.mxfp4_policy import MXFP4
from .transforms.quantize_mxfp4 import QuantizeMxfp4
from .transforms.shard_tensor_parallel import ShardTensorParallel

# What the model says, in the IR's own ops.
RAISING: tuple[Pass, ...] = (Canonicalize(), RaiseOps())
# What one kernel computes. Shared experts are found as the products that fuse-swiglu would join;
# what no other product could take, the norms' own pass does before the last two.
FUSIONS: tuple[Pass, ...] = (
    FuseSharedExperts(),
    FuseMlaProjections(),
    FuseQkvRope(),
    FuseSwiglu(),
    FuseMoeGating(),
    FuseCollectiveNorm(),
    FuseLinearResidual(),
    FuseNormLinear(),
)
# What a GPU wants of the final graph, whatever the passes before; the cpu interprets it without.
TARGET: tuple[Pass, ...] = (
    LayOutWeights(),
    FuseKvAppend(),
    FuseHeadsAttention(),
    FuseElementwise(),
)


def _moving(graph: Graph) -> Iterator[tuple[Node, str]]:
    for node in graph.nodes():
        if node.op in (view, permute) and node.args[0].op is node.op:
            yield node, f"{node.op.name} of {node.op.name} is one {node.op.name}"


def _uncached(graph: Graph) -> Iterator[tuple[Node, str]]:
    for node in graph.nodes():
        if node.op in (attention, mla_attention):
            yield node, "it attends to the tokens of one sequence, not to a cache"


def _ungated(graph: Graph) -> Iterator[tuple[Node, str]]:
    users = graph.users()
    for node in graph.nodes():
        logits = node.args[0] if node.op is router else None
        alone = logits and users[logits] == [node] and logits not in graph.roots
        constant = all(a.node.is_constant for a in node.args[1:])
        if logits and alone and constant and is_projection(logits):
            yield node, "the product of its logits has no other reader: both are moe_gating"


# What each stage must have done away with, whatever the model.
STAGES: tuple[Stage, ...] = (
    Stage("canonical form", Canonicalize.name, _moving),
    Stage("serving", InsertKvCache.name, _uncached),
    Stage("gating", FuseMoeGating.name, _ungated),
)


def causal_lm(
    *,
    max_sequences: int,
    max_tokens_per_sequence: int,
    pages: int | None = None,
    quantize: MXFP4 | None = None,
    shard: ShardTensorParallel | None = None,
    sample: bool = False,
    draft: int = 0,
) -> tuple[Pass, ...]:
    """From a traced causal language model to one that serves from a paged cache.

    With `sample` it also chooses the next tokens, so that no logits need to leave the device, and
    feeds them to the step behind it. `draft` is how many tokens a model that predicts further ones
    drafts behind each that it samples, which it then does.
    """
    sampling = (SampleOnDevice(),) if sample or draft else ()
    return (
        *RAISING,
        *(() if shard is None else (shard,)),
        AbsorbMla(),
        *(() if quantize is None else (QuantizeMxfp4(quantize),)),
        InsertKvCache(max_sequences, max_tokens_per_sequence, pages=pages),
        # Before the end of the network is gathered and fused: what drafts is like what is served.
        *((*sampling, DraftNextTokens(draft)) if draft else ()),
        GatherLogits(),
        *FUSIONS,
        *((MergeEqual(),) if draft else sampling),
        *((FeedNextStep(),) if sampling else ()),
    )


def of_rank(passes: Sequence[Pass], rank: int) -> tuple[Pass, ...]:
    """`passes` as rank `rank` of a tensor-parallel model runs them."""
    return tuple(replace(p, rank=rank) if isinstance(p, ShardTensorParallel) else p for p in passes)


def module() -> tuple[Pass, ...]:
    """For a module that is no language model: the same cleaning and fusions, no cache."""
    return (*RAISING, *FUSIONS)
