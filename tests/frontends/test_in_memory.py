"""A model in memory is compiled as it is: everything that was changed in it counts."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType, SimpleNamespace

import ingot
import pytest
import torch
from imported import assert_close, eager, logits_of
from ingot.frontends import api
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.frontends.importers.in_memory import unwrapped
from ingot.frontends.importers.source_error import SourceError
from ingot.frontends.importers.torch_export import ImportFailure
from tiny_models import tiny_model
from torch import nn
from transformers import PreTrainedModel

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


@pytest.mark.parametrize(
    "change",
    [_hook, _hook_with_a_tensor, _adapter, _activation, _epsilon, _scale, _forward, _untied],
)
def test_what_was_changed_counts(change: Callable[[PreTrainedModel], None]) -> None:
    model = llama()
    before = eager(model, _TOKENS)
    change(model)
    expected = eager(model, _TOKENS)
    assert change is _untied or (expected - before).abs().max() > 0.02 * before.abs().max()
    assert_close(
        logits_of(import_hugging_face(model, dtype=None, max_tokens=64), _TOKENS), expected
    )


def test_code_that_holds_a_module_of_its_own_is_refused() -> None:
    """Its parameters would be constants of the trace, and the model's own would take no part."""
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x).tanh()  # pyright: ignore
    with pytest.raises(ImportFailure, match=r"take no part .*layers\.0\.mlp\.gate_proj\.weight"):
        import_hugging_face(model, dtype=None, max_tokens=64)


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
