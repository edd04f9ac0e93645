"""EAGLE-3 heads, from a directory in the published layout to tokens.

The reference is plain torch: the head is computed anew over the whole history for every token that
is drafted, from the hidden states that transformers gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ingot
import pytest
import torch
import torch.nn.functional as F
from drafting_programs import (
    LENGTH,
    NEW,
    PROMPTS,
    SWEPT,
    VOCAB,
    Recorded,
    drafting_program,
    opened,
)
from eagle_checkpoints import write_eagle
from ingot.codegen.lower import Lowered
from ingot.frontends.importers.huggingface import HuggingFaceModel, import_hugging_face
from ingot.frontends.importers.source_error import SourceError
from ingot.frontends.loading import LoadedModel
from ingot.runtime.serving.device_drafts import DeviceDrafter
from mtp_checkpoints import without_stop
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Case:
    """A model and a head for it: what `write_eagle` is given, and the hidden states of the head.

    By default those are, of L layers, 2, L // 2 and L - 3.
    """

    model: str
    head: dict[str, Any]
    features: tuple[int, int, int] = (2, 3, 3)
    layers: int = 6


IDS = "eagle_aux_hidden_state_layer_ids"
CASES = {
    "llama, all tokens, nothing of its own": Case("llama", {"head": False}, (2, 2, 1), layers=4),
    "llama, fewer tokens": Case("llama", {"draft_vocab_size": 5}, (2, 1, 0), layers=3),
    "qwen3, own embedding, another width, layers by what they take": Case(
        "qwen3",
        {
            "draft_vocab_size": 6,
            "embedding": True,
            "hidden_size": 48,
            "head_dim": 16,
            "target_hidden_size": 64,
            "norm_before_residual": True,
            IDS: [0, 4, 5],
        },
        (0, 4, 5),
    ),
    "gpt_oss, layers by what they give": Case(
        "gpt_oss",
        {
            "draft_vocab_size": 6,
            "eagle_config": {IDS: [0, 2, 4], "use_aux_hidden_state": True},
        },
        (1, 3, 5),
    ),
    "deepseek_v3": Case("deepseek_v3", {"draft_vocab_size": 6}),
}
FAST = "llama, fewer tokens"


def cases() -> list[Any]:
    return [pytest.param(name, marks=SWEPT * (name != FAST)) for name in CASES]


@dataclass(frozen=True)
class Made:
    """A case on disk: directories of the model and of the head, and both in memory."""

    case: Case
    model: Path
    head: Path
    target: PreTrainedModel
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @cache
    def make(name: str) -> Made:
        case, folder = CASES[name], tmp_path_factory.mktemp("eagle3")
        layers: dict[str, Any] = {"num_hidden_layers": case.layers}
        if case.model == "gpt_oss":
            layers["layer_types"] = ["sliding_attention", "full_attention"] * (case.layers // 2)
        target = tiny_model(case.model, seed=1, vocab_size=VOCAB, **layers)
        target.save_pretrained(folder / "model")
        without_stop(folder / "model")
        config, tensors = write_eagle(folder / "head", target, **case.head)
        return Made(case, folder / "model", folder / "head", target, config, tensors)

    return make


@cache
def imported(model: Path, head: Path | None) -> HuggingFaceModel:
    predict = ingot.Eagle3(head) if head else None
    return import_hugging_face(model, dtype=None, max_tokens=LENGTH, predict=predict)


@cache
def built(model: Path, head: Path | None, tokens: int, group: int = 0) -> tuple[Lowered, set[str]]:
    """With `group` the weights are in MXFP4; see drafting_program."""
    return drafting_program(imported(model, head), tokens, group)


def program(model: Path, head: Path | None, tokens: int, group: int = 0) -> Lowered:
    return built(model, head, tokens, group)[0]


# ---- the reference


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE of x [T, heads, D] at positions 0, 1, …"""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def layer(made: Made, hidden: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """The states [T, H] of features or states [T, H] and the tokens [T] that follow."""
    held, config = made.tensors, made.config
    eps, part = config["rms_norm_eps"], "midlayer."
    table: Any = held.get("embed_tokens.weight", made.target.get_input_embeddings().weight)
    token = normed(table[following], held[f"{part}input_layernorm.weight"], eps)
    feature = normed(hidden, held[f"{part}hidden_norm.weight"], eps)
    residual = feature if config.get("norm_before_residual") else hidden
    pairs = torch.cat([token, feature], -1)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (pairs @ held[f"{part}self_attn.{n}_proj.weight"].T for n in "qkv")
    q, k, v = (x.unflatten(-1, (n, -1)) for x, n in ((q, heads), (k, groups), (v, groups)))
    q, k = (rotated(x, config["rope_theta"]) for x in (q, k))
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    unseen = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    attended = torch.einsum("hts,shd->thd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)
    hidden = residual + attended.flatten(1) @ held[f"{part}self_attn.o_proj.weight"].T
    inner = normed(hidden, held[f"{part}post_attention_layernorm.weight"], eps)
    gate, up, down = (held[f"{part}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
    return hidden + (F.silu(inner @ gate.T) * (inner @ up.T)) @ down.T


@torch.no_grad()
def drafted(made: Made, history: list[int], count: int) -> list[int]:
    """`count` tokens behind `history`, of which the last has not gone through the model."""
    states = made.target(torch.tensor([history[:-1]]), output_hidden_states=True).hidden_states
    hidden = torch.cat([states[i][0] for i in made.case.features], -1)
    hidden = hidden @ made.tensors["fc.weight"].T
    following, found = list(history[1:]), list[int]()
    head: Any = made.tensors.get("lm_head.weight", made.target.get_output_embeddings().weight)
    for _ in range(count):
        state = layer(made, hidden, torch.tensor(following))[-1:]
        logits = normed(state, made.tensors["norm.weight"], made.config["rms_norm_eps"]) @ head.T
        token = int(logits.argmax())
        found.append(token + int(made.tensors["d2t"][token]) if "d2t" in made.tensors else token)
        hidden = torch.cat([hidden, state])
        following.append(found[-1])
    return found


def test_the_reference_takes_what_layers_take(made: Callable[[str], Made]) -> None:
    """transformers' hidden state i is what layer i is given."""
    target: Any = made(FAST).target
    given: list[torch.Tensor] = []
    hooks = [
        part.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        for part in target.model.layers
    ]
    with torch.no_grad():
        states = target(torch.tensor([PROMPTS[0]]), output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    assert len(given) == made(FAST).case.layers and all(map(torch.equal, given, states))


# ---- what is drafted, and what comes of it


@pytest.mark.parametrize("tokens", [*(pytest.param(k, marks=SWEPT) for k in (1, 2, 3)), 4])
@pytest.mark.parametrize("name", cases())
def test_every_draft_is_the_reference_s(
    name: str, tokens: int, made: Callable[[str], Made]
) -> None:
    """Of every step, over its own states for further tokens; each that comes saves a step."""
    it = made(name)
    drafter = Recorded(tokens)
    with opened(program(it.model, it.head, tokens), drafter) as session:
        found = session.generate(PROMPTS, max_new_tokens=NEW)
    assert len(drafter.drafted) > 20
    right = 0
    for sequence, length, draft in drafter.drafted:
        assert draft == drafted(it, sequence.history[:length], len(draft))
        came = [a == b for a, b in zip(draft, sequence.history[length:], strict=False)]
        right += [*came, False].index(False)
    assert {len(draft) for _, _, draft in drafter.drafted} >= {1, tokens}
    with opened(program(it.model, None, 0)) as session:
        expected = session.generate(PROMPTS, max_new_tokens=NEW)
    assert [s.tokens for s in found] == [s.tokens for s in expected]
    assert sum(s.stats.steps for s in found) == NEW * len(PROMPTS) - right
    assert right > 0 or name != FAST


@pytest.mark.parametrize("name", cases())
def test_quantized_like_a_layer_of_the_model(name: str, made: Callable[[str], Made]) -> None:
    """Its weights are packed, and the tokens are those of the quantized model without it."""
    it = made(name)
    lowered, packed = built(it.model, it.head, 2, 16)
    own = {n.removeprefix("eagle3.") for n in packed if n.startswith("eagle3.")}
    products = {n for n in it.tensors if n.endswith("_proj.weight")}
    assert own >= {*products, "fc.weight"} and len(products) == 7
    with opened(program(it.model, None, 0, 16)) as session:
        expected = [s.tokens for s in session.generate(PROMPTS, max_new_tokens=NEW)]
    with opened(lowered, DeviceDrafter(2)) as session:
        found = [s.tokens for s in session.generate(PROMPTS, max_new_tokens=NEW)]
    assert found == expected


def test_what_it_lacks_is_the_model_s(made: Callable[[str], Made]) -> None:
    """The model's embedding is there once, and its tensors are there once for all passes."""
    it = made(FAST)

    def weights(lowered: Lowered) -> dict[str, int]:
        buffers = lowered.program.buffers.values()
        return {b.name: b.nbytes for b in buffers if b.kind == "weight"}

    made_with = [(None, 0), (it.head, 1), (it.head, 3)]
    plain, one, three = (weights(program(it.model, head, k)) for head, k in made_with)
    assert sum(one.values()) == sum(three.values())
    own = sum(t.nbytes for n, t in it.tensors.items() if n not in ("d2t", "t2d"))
    frequencies = 4 * it.config["hidden_size"] // it.config["num_attention_heads"] // 2
    table = 4 * it.config["draft_vocab_size"]
    assert sum(one.values()) - sum(plain.values()) == own + frequencies + table
    assert sum("embed_tokens" in name for name in three) == 1


def test_through_the_doors(made: Callable[[str], Made], tmp_path: Path) -> None:
    """Compiled, as an ingot without the directory of its head, without it, and by another way to
    draft: the same tokens."""
    it = made(FAST)
    sizes: Any = {"max_sequences": 2, "max_tokens_per_sequence": LENGTH, "target": "cpu"}

    def tokens(model: ingot.Model | LoadedModel) -> list[Any]:
        found = model.session.generate(PROMPTS, max_new_tokens=NEW)
        return [s.tokens for s in found]

    expected = tokens(ingot.compile(it.model, **sizes))
    model = ingot.compile(it.model, speculate=ingot.Eagle3(it.head, k=2), **sizes)
    assert tokens(model) == expected
    report = model.report.speculation
    assert report is not None and report.kind == "eagle3:2" and report.verified > 0
    gone = tmp_path / "a:head"  # paths may have colons
    gone.symlink_to(it.head, target_is_directory=True)
    ingot.compile_to(it.model, tmp_path / "made", speculate=f"eagle3:2:{gone}", **sizes)
    gone.unlink()
    for speculate in (None, "eagle3:1:elsewhere", "ngram:2", "none"):
        assert tokens(ingot.load(tmp_path / "made", speculate=speculate)) == expected
    with pytest.raises(ValueError, match="eagle3:3:.* drafts 3 tokens .* drafts 2"):
        ingot.load(tmp_path / "made", speculate=ingot.Eagle3(gone, 3))
    with pytest.raises(ValueError, match="mtp:1: the steps of this ingot draft by eagle3:2:"):
        ingot.load(tmp_path / "made", speculate="mtp")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_model_in_memory(dtype: str, made: Callable[[str], Made]) -> None:
    it, head = made(FAST), ingot.Eagle3(made(FAST).head, k=3)
    sizes: Any = {"max_tokens_per_sequence": LENGTH, "target": "cpu", "dtype": dtype}
    models = [ingot.compile(source, speculate=head, **sizes) for source in (it.model, it.target)]
    assert str(models[0].graph()) == str(models[1].graph())
    # By their sessions: the directory says of no token that it ends a text.
    first, second = (model.session.generate(PROMPTS, max_new_tokens=NEW) for model in models)
    assert [s.tokens for s in first] == [s.tokens for s in second]


def test_inspected_without_weights(made: Callable[[str], Made], tmp_path: Path) -> None:
    """config.json alone of both: what a step is, and no weights."""
    it = made(FAST)
    for name, source in (("model", it.model), ("head", it.head)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((source / "config.json").read_text())
    head = ingot.Eagle3(tmp_path / "head", k=2)
    options: Any = {"target": "cpu", "max_tokens_per_sequence": LENGTH}
    planned = ingot.frontends.api.plan(tmp_path / "model", speculate=head, **options)
    whole = ingot.frontends.api.plan(it.model, speculate=ingot.Eagle3(it.head, k=2), **options)
    assert str(planned.graph()) == str(whole.graph())
    with pytest.raises(SourceError, match="expected model.safetensors"):
        ingot.compile(it.model, speculate=head, **options)


# ---- refusals

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "speculators": ({"speculators_model_type": "eagle3"}, "the layout of the library speculators"),
    "another head": (
        {"architectures": ["Eagle3DeepseekV2ForCausalLM"]},
        "architectures: expected an EAGLE-3 head, .*Eagle3DeepseekV2",
    ),
    "a model": (
        {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": None},
        "expected an EAGLE-3 head, which has a draft_vocab_size",
    ),
    "two layers": ({"num_hidden_layers": 2}, "num_hidden_layers: expected 1, found 2"),
    "another type": ({"model_type": "qwen3"}, "model_type: expected 'llama', found 'qwen3'"),
    "a tied head": ({"tie_word_embeddings": True}, "tie_word_embeddings: expected False"),
    "a norm before fc": ({"norm_before_fc": True}, "norm_before_fc True is not known"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .*known"),
    "no features": (
        {"eagle_config": {"use_aux_hidden_state": False}},
        r"eagle_config\.use_aux_hidden_state: expected True, found False",
    ),
    "drafts at once": ({"eagle_config": {"parallel": 4}}, r"eagle_config\.parallel 4 is not known"),
    "no object": ({"eagle_config": 3}, "eagle_config: expected an object, found 3"),
    "another vocabulary": ({"vocab_size": 9}, "of another model: vocab_size 9, where llama has 8"),
    "another width": (
        {"target_hidden_size": 96},
        "of another model: target_hidden_size 96, where llama has 64",
    ),
    "too many tokens": ({"draft_vocab_size": 9}, "1 to the 8 tokens of the model, found 9"),
    "a layer too far": ({IDS: [0, 1, 3]}, r"ids: expected three layers .* 0 to 2, found \[0, 1"),
    "the last layer": ({"eagle_config": {IDS: [0, 1, 2]}}, r"0 to 1, found \[0, 1, 2\]"),
    "two hidden states": ({IDS: [1, 2]}, r"expected three layers .* found \[1, 2\]"),
    "dynamic rope": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type 'dynamic'",
    ),
    "no llama config": ({"hidden_size": 62}, "no llama config: .*62"),
}


def refused(made: Made, folder: Path, match: str) -> None:
    """In one line, which names the place."""
    with pytest.raises(SourceError, match=match) as raised:
        ingot.compile(made.model, speculate=ingot.Eagle3(folder), target="cpu")
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_refuses_a_config(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    it, (change, match) = made(FAST), CONFIGS[name]
    config = {k: v for k, v in {**it.config, **change}.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(it.tensors, tmp_path / "model.safetensors")
    refused(it, tmp_path, match)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (without("midlayer.hidden_norm.weight"), "no tensor for midlayer.hidden_norm"),
    "no map": (without("d2t"), "no tensor for d2t: which says what the 5 draft tokens are"),
    "no head": (without("lm_head.weight"), "no tensor for lm_head.weight: the model's is no 5 x"),
    "unknown": (
        lambda t: t.update({"mask_hidden": torch.zeros(1, 64)}),
        "mask_hidden: not known of EAGLE-3 heads",
    ),
    "another shape": (
        lambda t: t.update({"fc.weight": torch.zeros(64, 64)}),
        r"fc.weight: the model expects f32\[64, 192\], .*safetensors stores .*f32\[64, 64\]",
    ),
    "packed": (
        lambda t: t.update({"norm.weight": torch.zeros(64, dtype=torch.uint8)}),
        "neither a plain float tensor",
    ),
    "a short map": (
        lambda t: t.update({"d2t": torch.zeros(4, dtype=torch.int64)}),
        r"d2t: the model expects i64\[5\]",
    ),
    "a map beyond": (
        lambda t: t.update({"d2t": torch.tensor([0, 0, 0, 0, 4])}),
        r"d2t gives the token 8 \(1 of 5 are not among the 8",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_refuses_tensors(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    it, (change, match) = made(FAST), TENSORS[name]
    tensors = dict(it.tensors)
    change(tensors)
    (tmp_path / "config.json").write_text(json.dumps(it.config), encoding="utf-8")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=match) as raised:
        ingot.compile(it.model, speculate=ingot.Eagle3(tmp_path), target="cpu")
    assert "\n" not in str(raised.value)


def test_refuses_what_is_no_directory_of_safetensors(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    it = made(FAST)
    refused(it, tmp_path / "nowhere", "no such directory of an EAGLE-3 head")
    refused(it, tmp_path, "config.json: not readable: No such file")
    (tmp_path / "config.json").write_text(json.dumps(it.config), encoding="utf-8")
    refused(it, tmp_path, "expected model.safetensors")
    torch.save(it.tensors, tmp_path / "pytorch_model.bin")
    refused(it, tmp_path, "pytorch_model.bin, which are pickles and are never loaded")
    whole = (it.head / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    refused(it, tmp_path, "not a complete safetensors file")
    assert load_file(it.head / "model.safetensors").keys() == it.tensors.keys()
