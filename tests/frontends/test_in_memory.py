"""A model in memory is compiled as it is: everything that was changed in it counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from types import MethodType, SimpleNamespace
from typing import Any

import ingot
import pytest
import torch
from imported import assert_close, eager, logits_of
from ingot.frontends import api
from ingot.frontends.import_check import check_import
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.frontends.importers.in_memory import unwrapped
from ingot.frontends.importers.source_error import SourceError, UnsupportedModel
from ingot.frontends.importers.torch_export import ImportFailure
from tiny_models import tiny_model
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

_TOKENS = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(1))


class LowRank(nn.Linear):
    """An adapter as a subclass of Linear: the base's weight, and a product of two more."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.a = nn.Parameter(torch.randn(4, base.in_features) / 4)
        self.b = nn.Parameter(torch.randn(base.out_features, 4) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


def llama() -> PreTrainedModel:
    """A model whose layers are of weight beside the embedding."""
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def _hook(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 1.7)


def _hook_with_a_tensor(model: PreTrainedModel) -> None:
    scale = torch.rand(64)
    model.model.norm.register_forward_hook(lambda module, args, out: out * scale)


def _adapter(model: PreTrainedModel) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = LowRank(attention.q_proj)


def _activation(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def _epsilon(model: PreTrainedModel) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def _scale(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.scaling *= 3


def _forward(model: PreTrainedModel) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = MethodType(lambda self, x: type(self).forward(self, x).tanh(), mlp)


def _untied(model: PreTrainedModel) -> None:
    model.config.tie_word_embeddings = True
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def _fewer_layers(model: PreTrainedModel) -> None:
    model.model.layers = model.model.layers[:1]
    assert model.config.num_hidden_layers == 2


def _layer_twice(model: PreTrainedModel) -> None:
    model.model.layers[1] = model.model.layers[0]


def _shared_parts(model: PreTrainedModel) -> None:
    first, second = model.model.layers
    second.mlp = first.mlp
    first.self_attn.k_proj = first.self_attn.v_proj
    second.input_layernorm = first.input_layernorm


class NoAttention(nn.Module):
    """In the place of attention."""

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return hidden_states * 0.3, None


def _no_attention(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn = NoAttention()


@pytest.mark.parametrize(
    "change",
    [
        _hook,
        _hook_with_a_tensor,
        _adapter,
        _activation,
        _epsilon,
        _scale,
        _forward,
        _untied,
        _fewer_layers,
        _layer_twice,
        _shared_parts,
        _no_attention,
    ],
)
def test_what_was_changed_counts(change: Callable[[PreTrainedModel], None]) -> None:
    model = llama()
    before = eager(model, _TOKENS)
    change(model)
    expected = eager(model, _TOKENS)
    assert change is _untied or (expected - before).abs().max() > 0.02 * before.abs().max()
    imported = import_hugging_face(model, dtype=None, max_tokens=64)
    assert_close(logits_of(imported, _TOKENS), expected)
    assert check_import(imported, model).layers


def _only_cumulates(self: Any, hidden_states: torch.Tensor, **_: Any) -> tuple[Any, None]:
    parts = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
    return self.o_proj(torch.cat([p.cumsum(1)[..., :32] for p in parts], -1)[..., :64]), None


def test_a_layer_that_mixes_tokens_without_attention_is_refused() -> None:
    model = llama()
    attention = model.model.layers[0].self_attn
    attention.forward = MethodType(_only_cumulates, attention)
    with pytest.raises(ImportFailure, match="one attention node for each of 2 layers, found 1"):
        import_hugging_face(model, dtype=None, max_tokens=64)


def _far_keys_are_cut(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
    """As scaled_dot_product_attention over the last 50 tokens: no short prompt shows it."""
    keys = torch.arange(k.shape[2])
    seen = (keys <= keys[:, None]) & (keys > keys[:, None] - 50)
    return sdpa_attention_forward(module, q, k, v, seen[None, None], **options)


@pytest.mark.parametrize("place", ["a name", "sdpa", "eager", "experts"])
def test_functions_of_the_user_s_are_refused(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace puts Ingot's in their place."""
    model = tiny_model("mixtral") if place == "experts" else llama()
    if place == "a name":
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", _far_keys_are_cut)
        model.set_attn_implementation("mine")
    elif place == "sdpa":
        wrapped = wraps(sdpa_attention_forward)(_far_keys_are_cut)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", wrapped)
        model.set_attn_implementation("sdpa")
    elif place == "eager":
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", _far_keys_are_cut)
        model.set_attn_implementation("eager")
    else:
        mapping = ALL_EXPERTS_FUNCTIONS._global_mapping
        monkeypatch.setitem(mapping, "grouped_mm", lambda *_: None)
        model.set_experts_implementation("grouped_mm")
    with pytest.raises(SourceError, match=rf"is the function {__name__}\.\S+: expected one"):
        import_hugging_face(model, dtype=None, max_tokens=64)


def test_training_mode_is_told() -> None:
    model = llama()
    assert not import_hugging_face(model, dtype=None, max_tokens=64).notes
    (note,) = import_hugging_face(model.train(), dtype=None, max_tokens=64).notes
    assert "in training mode" in note and model.training


def test_shared_modules_stay_shared_in_another_dtype() -> None:
    model = llama()
    _shared_parts(model)
    imported = import_hugging_face(model, dtype=torch.float64, max_tokens=64)
    assert imported.graph.outputs[0].type.dtype == "f32"
    exact = eager(copy.deepcopy(model).double(), _TOKENS).float()
    assert_close(logits_of(imported, _TOKENS), exact)


def test_code_that_holds_a_module_of_its_own_is_refused() -> None:
    """Its parameters would be constants of the trace, and the model's own would take no part."""
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x).tanh()  # pyright: ignore
    with pytest.raises(ImportFailure, match=r"take no part .*layers\.0\.mlp\.gate_proj\.weight"):
        import_hugging_face(model, dtype=None, max_tokens=64)


class FarLimit(nn.Module):
    """SiLU, as far as most numbers go."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x).clamp(max=100)


def test_an_activation_of_experts_that_differs_far_out_is_refused() -> None:
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.experts.act_fn = FarLimit()
    with pytest.raises(UnsupportedModel, match="its activation is none of"):
        import_hugging_face(model, dtype=None, max_tokens=64)


def test_experts_that_layers_share() -> None:
    model = tiny_model("mixtral")
    first, second = model.model.layers
    second.mlp.experts = first.mlp.experts
    imported = import_hugging_face(model, dtype=None, max_tokens=64)
    assert_close(logits_of(imported, _TOKENS), eager(model, _TOKENS))


def test_experts_activation_is_what_the_module_computes() -> None:
    model = tiny_model("mixtral")
    assert model.config.hidden_act == "silu"
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = nn.GELU(approximate="tanh")
    imported = import_hugging_face(model, dtype=None, max_tokens=64)
    assert_close(logits_of(imported, _TOKENS), eager(model, _TOKENS))


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("mixtral").train()
    modules = {name: dict(vars(module)) for name, module in model.named_modules()}
    config, tensors = model.config.to_dict(), {n: id(p) for n, p in model.named_parameters()}
    implementation = model.config._attn_implementation
    import_hugging_face(model, dtype=torch.bfloat16, max_tokens=64)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert {n: id(p) for n, p in model.named_parameters()} == tensors
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    for name, module in model.named_modules():
        assert vars(module).keys() == modules[name].keys() and module.training, name


def test_wrappers_are_taken_or_refused_in_one_line() -> None:
    model = tiny_model("llama")
    wrapped = torch.compile(model)
    assert unwrapped(wrapped) is model
    assert api.plan(wrapped, target="cpu", max_tokens_per_sequence=64).report.dtype == "f32"  # pyright: ignore

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner.model.embed_tokens(ids) * 2

    with pytest.raises(SourceError, match="Wrapper has a config but is no transformers model"):
        ingot.compile(Wrapper())  # pyright: ignore
    ids = torch.tensor([3, 4, 5])
    traced = ingot.compile(Wrapper(), example_inputs=(ids,))
    assert_close(torch.as_tensor(traced(ids)), model.model.embed_tokens(ids) * 2)
    with pytest.raises(TypeError, match="expected the path .* found NoneType"):
        ingot.compile(None)  # pyright: ignore


def test_adapters_of_peft_are_taken_and_learnt_prompts_refused() -> None:
    """PEFT wraps a model whose layers it changed in place; its protocol is played here."""
    model = tiny_model("llama")
    _adapter(model)
    wrapped = nn.Module()
    wrapped.peft_config = {"default": SimpleNamespace(is_prompt_learning=False)}  # pyright: ignore
    wrapped.get_base_model = lambda: model  # pyright: ignore
    assert unwrapped(wrapped) is model
    wrapped.peft_config = {"default": SimpleNamespace(is_prompt_learning=True)}  # pyright: ignore
    with pytest.raises(SourceError, match="learns prompts"):
        unwrapped(wrapped)
