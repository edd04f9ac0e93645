"""A compiled model beside transformers on the same directory: tokens, logits, every layer.

Ours are decoded greedily through the session (prefill in chunks, then the paged cache, all prompts
together). Theirs are one forward pass, without a cache, over each prompt and our tokens: as long as
both agree, its largest logits are the tokens that transformers would have chosen.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from ..compiler.interpret import interpret
from ..compiler.ir import Graph, Value
from ..compiler.ops.leaf import constant
from ..compiler.torch_types import torch_dtype
from ..compiler.weights import Weights
from .checkpoint import open_checkpoint
from .huggingface import import_hugging_face
from .inspect_view import layout
from .meta_model import build_meta_model, read_config
from .model import Model
from .tokenizer import Tokenizer

# Largest |difference| relative to the largest |logit|. Narrower dtypes round differently with every
# order of arithmetic, and a router may then choose another expert: there the tokens decide alone.
F32_TOLERANCE = 1e-4

_STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError('pop from an empty stack')
        return """
_TEXTS = (
    "a",
    "def __init__(self, ",
    "The quick brown fox jumps over the lazy dog, and then",
    "import os\n\n\ndef read_lines(path):\n    with open(path) as file:\n        return [",
    _STACK,
)
_RANDOM_LENGTHS = (1, 7, 40, 70)


@dataclass(frozen=True)
class PromptCheck:
    """One prompt. `agreed` counts the equal tokens out of `steps`.

    Where both part, `ours` and `theirs` are the two tokens, and `near` says whether each is among
    the other's top n. `logits_error` is the largest difference over all positions, relative to the
    largest of their logits.
    """

    length: int
    steps: int
    agreed: int
    ours: int | None
    theirs: int | None
    near: bool
    logits_error: float


@dataclass(frozen=True)
class LayerCheck:
    """What leaves one layer: the largest difference relative to the largest of theirs."""

    path: str
    error: float


@dataclass(frozen=True)
class Check:
    """The comparison; `ok` when tokens, or their top n, agree and the logits are close."""

    model_type: str
    dtype: str
    top: int
    tolerance: float | None
    prompts: tuple[PromptCheck, ...]
    layers: tuple[LayerCheck, ...]

    @property
    def logits_error(self) -> float:
        return worst(p.logits_error for p in self.prompts)

    @property
    def failures(self) -> tuple[str, ...]:
        """What is wrong, a line each."""
        if not self.prompts:
            return ("there was nothing to compare: no prompts",)
        found = [
            f"prompt {i}: token {p.agreed} is {p.ours}, in transformers {p.theirs}, "
            f"and one is not among the other's top {self.top}"
            for i, p in enumerate(self.prompts)
            if not p.near
        ]
        error = self.logits_error
        # NaN is not within any tolerance
        if self.tolerance is not None and not error <= self.tolerance:
            found.append(f"logits differ by {error:.1e} of the largest, over {self.tolerance:.0e}")
        found += [
            f"{layer.path} differs by {layer.error:.1e}, over {self.tolerance:.0e}"
            for layer in self.layers
            if self.tolerance is not None and not layer.error <= self.tolerance
        ]
        return tuple(found)

    @property
    def ok(self) -> bool:
        return not self.failures


def worst(errors: Iterable[float]) -> float:
    """The largest error; NaN if any is."""
    values = list(errors)
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


def built_in_prompts(tokenizer: Tokenizer | None, vocab_size: int, longest: int) -> list[list[int]]:
    """Prompts of different lengths, up to `longest`; random ids where there is no tokenizer."""
    if tokenizer is None:
        drawn = torch.Generator().manual_seed(0)
        rows = [torch.randint(vocab_size, (n,), generator=drawn) for n in _RANDOM_LENGTHS]
        prompts: list[list[int]] = [row.tolist() for row in rows]
    else:
        prompts = [tokenizer.encode(text) for text in _TEXTS]
    return [prompt[:longest] for prompt in prompts if prompt]


def check_model(
    directory: Path,
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    steps: int,
    top: int,
    tolerance: float | None,
) -> Check:
    """Compare `model`, compiled from `directory`, with transformers on the CPU in its dtype."""
    sequences = model.session.requests(prompts, max_new_tokens=steps, top_logprobs=top)
    for event in model.session.events(sequences):
        if event.finish_reason == "error":
            raise RuntimeError(f"generation failed: {event.message}")
    dtype = torch_dtype(model.report.dtype)
    theirs = _transformers_model(directory, dtype)
    weights = _weights(directory, model.graph("raise-ops"), dtype)
    ends = _layer_ends(model.graph("raise-ops"), theirs)
    checked: list[PromptCheck] = []
    errors: dict[str, list[float]] = {path: [] for path in ends}
    for sequence in sequences:
        prompt, tokens = sequence.prompt, sequence.tokens
        ids = [*prompt, *tokens[:-1]]
        with _outputs_of(theirs, ends) as hidden, torch.inference_mode():
            expected = theirs(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        found = torch.from_numpy(model.logits(ids))
        ours_top = [[token for token, _ in step] for step in sequence.top_logprobs]
        check = compare_tokens(tokens, ours_top, expected[len(prompt) - 1 :], top)
        error = relative_error(found, expected)
        checked.append(replace(check, length=len(prompt), logits_error=error))
        for path, value in _interpreted(model.graph("raise-ops"), ends, ids, weights).items():
            errors[path].append(relative_error(value, hidden[path]))
    layers = tuple(LayerCheck(path, worst(values)) for path, values in errors.items())
    kind = model.report.model_type
    return Check(kind, model.report.dtype, top, tolerance, tuple(checked), layers)


def compare_tokens(
    tokens: Sequence[int], ours_top: Sequence[Sequence[int]], expected: torch.Tensor, top: int
) -> PromptCheck:
    """Our tokens beside `expected` f32[steps, vocab], the logits that theirs come from.

    The top-n rule is applied at the first token that differs; nothing after it is comparable.
    """
    chosen = expected.argmax(dim=-1).tolist()
    pairs = zip(tokens, chosen, strict=True)
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if at is None:
        return PromptCheck(0, len(tokens), len(tokens), None, None, True, 0.0)
    theirs_top = expected[at].topk(min(top, expected.shape[-1])).indices.tolist()
    near = tokens[at] in theirs_top and chosen[at] in ours_top[at]
    return PromptCheck(0, len(tokens), at, tokens[at], chosen[at], near, 0.0)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |found - expected| / max |expected|, in f32."""
    wanted = expected.float().reshape(found.shape)
    largest = float(wanted.abs().max())
    difference = float((found.float() - wanted).abs().max())
    return difference / largest if largest else difference


def _weights(directory: Path, graph: Graph, dtype: torch.dtype) -> Weights:
    """The weights of `graph`; the model is traced once more only if tracing itself made some."""
    stored = open_checkpoint(directory, build_meta_model(read_config(directory), dtype)).weights
    if all(n.attrs["name"] in stored for n in graph.nodes() if n.op is constant):
        return stored
    return import_hugging_face(directory, dtype=dtype, max_tokens=2).weights


def _transformers_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        )
    return model.eval()


@contextmanager
def _quiet() -> Generator[None]:
    """Without transformers' bars and its report of tensors (an MTP layer) that it leaves out."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _layer_ends(graph: Graph, theirs: PreTrainedModel) -> dict[str, Value]:
    """By module path, the value that leaves each layer: the last of hidden size that it gives."""
    width = theirs.config.get_text_config().hidden_size
    tokens = graph.param("tokens").type.shape
    ends: dict[str, Value] = {}
    for layer in layout(graph).layers:
        fitting = [v for v in layer.leaving if v.type.shape == (*tokens, width)]
        if fitting:
            ends[layer.path] = fitting[-1]
    return ends


@contextmanager
def _outputs_of(model: PreTrainedModel, paths: Iterable[str]) -> Generator[dict[str, torch.Tensor]]:
    """What the modules at `paths` give during a forward pass."""
    outputs: dict[str, torch.Tensor] = {}

    def hook_for(path: str) -> Any:
        def keep(_module: Any, _args: Any, output: Any) -> None:
            outputs[path] = output[0] if isinstance(output, tuple) else output

        return keep

    hooks = [model.get_submodule(p).register_forward_hook(hook_for(p)) for p in paths]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _interpreted(
    graph: Graph, ends: dict[str, Value], ids: Sequence[int], weights: Weights
) -> dict[str, torch.Tensor]:
    part = Graph(graph.name, graph.params, tuple(ends.values()), graph.symbols)
    inputs = {
        "tokens": torch.tensor(ids, dtype=torch.int32),
        "positions": torch.arange(len(ids), dtype=torch.int32),
    }
    with torch.inference_mode():
        outputs = interpret(part, inputs, weights).outputs
    return dict(zip(ends, outputs, strict=True))
