"""What is taken as prompts, ids and stops, and what is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ingot
import numpy as np
import pytest
import torch
from ingot.frontends.options import CompileOptions, GenerateOptions
from ingot.frontends.text.prompts import prompts_of, token_ids_of
from tiny_models import tiny_model
from tiny_tokenizers import byte_level, save

pytestmark = pytest.mark.usefixtures("shared_traces")


def shown(value: Any) -> str:
    """`value` as a test's name: without addresses, so that every worker has the same."""
    return re.sub(r" at 0x\w+", "", repr(value))


ONE: list[Any] = [
    [5, 6],
    (5, 6),
    range(5, 7),
    iter([5, 6]),
    np.array([5, 6]),
    torch.tensor([5, 6]),
    torch.tensor([5, 6], dtype=torch.int32),
    [np.int64(5), torch.tensor(6)],
    {"input_ids": [5, 6]},
    {"input_ids": torch.tensor([5, 6]), "attention_mask": torch.tensor([1, 1])},
    {"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]},
]
SEVERAL: list[Any] = [
    [[5, 6], [7]],
    [(5, 6), np.array([7])],
    iter([[5, 6], [7]]),
    [{"input_ids": [5, 6]}, torch.tensor([7])],
    {"input_ids": [[5, 6], [7]]},
    {
        "input_ids": torch.tensor([[5, 6], [0, 7]]),
        "attention_mask": torch.tensor([[1, 1], [0, 1]]),
    },
]


@pytest.mark.parametrize("given", ONE, ids=shown)
def test_one_prompt(given: Any) -> None:
    assert prompts_of(given) == ([[5, 6]], True)


@pytest.mark.parametrize("given", SEVERAL, ids=shown)
def test_several_prompts(given: Any) -> None:
    assert prompts_of(given) == ([[5, 6], [7]], False)


def test_texts() -> None:
    assert prompts_of("ab") == (["ab"], True)
    assert prompts_of(["ab", [5]]) == (["ab", [5]], False)
    assert prompts_of([]) == ([], False)
    assert prompts_of(torch.tensor([[5, 6]])) == ([[5, 6]], False)


def test_what_tokenizers_of_transformers_return(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), pad_token="</s>", padding_side="left"
    )
    for options in ({}, {"return_tensors": "pt"}, {"return_tensors": "np"}):
        ids = tokenizer("the é")["input_ids"]
        found, _ = prompts_of(tokenizer("the é", **options))
        assert found == [ids]
        rows = tokenizer(["the é", "a b c d e f g"], padding=True, **options)
        assert prompts_of(rows) == ([ids, tokenizer("a b c d e f g")["input_ids"]], False)


WRONG: list[tuple[Any, str]] = [
    (None, "found a NoneType"),
    (5, "found a int"),
    (True, "found a bool"),
    (1.5, "found a float"),
    (b"ab", "found a bytes"),
    ({5, 6}, "found a set"),
    (frozenset([5]), "found a frozenset"),
    ({"prompt": [5]}, "found a dict"),
    ([True, False], "found True"),
    ([5, 1.5], "found 1.5"),
    ([5, None], "found None"),
    ([5, "a"], "found 'a'"),
    (["a", 5], "found a int"),
    ([[5], {6}], "found a set"),
    ([b"ab"], "found a bytes"),
    (torch.tensor([1.5]), "found 1.5"),
    (torch.tensor([True]), "found True"),
    (np.array(["a"]), ""),
    (torch.zeros(1, 1, 1, dtype=torch.long), r"found \[0\]"),
    ([{"role": "user", "content": "a"}], "chat_template"),
    ([{"input_ids": [[5], [6]]}], "found rows"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=shown)
def test_other_kinds_are_refused_by_name(given: Any, message: str) -> None:
    if isinstance(given, np.ndarray):
        assert prompts_of(given) == (["a"], False)  # an array of texts
        return
    with pytest.raises(TypeError, match=f"^prompts: expected.*{message}"):
        prompts_of(given)
    with pytest.raises(TypeError, match="^token_ids: expected"):
        token_ids_of("ab", "token_ids")


STOPS: list[tuple[Any, type[Exception], str]] = [
    ({"a"}, TypeError, "found a set"),
    ({"a": 1}, TypeError, "found a dict"),
    (True, TypeError, "found True"),
    ([False], TypeError, "found False"),
    (b"a", TypeError, "found a bytes"),
    ([b"a"], TypeError, "found b'a'"),
    (1.0, TypeError, "found a float"),
    ([1.0], TypeError, "found 1.0"),
    ([None], TypeError, "found None"),
    ([-1], ValueError, "found -1"),
    ([""], ValueError, "found ''"),
]


@pytest.mark.parametrize(("stop", "error", "message"), STOPS, ids=shown)
def test_stops_of_other_kinds(stop: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^stop: expected.*{message}"):
        GenerateOptions(stop=stop)


def test_stops() -> None:
    assert GenerateOptions(stop=None) == GenerateOptions()
    assert GenerateOptions(stop=np.int64(7)).stop_tokens == [7]
    assert GenerateOptions(stop=("a", 7)).stop == ("a", 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 5}, "^passes: expected a list of passes, found a int"),
        ({"passes": "abc"}, "^passes: expected a list of passes, found a str"),
        ({"passes": ["abc"]}, "^passes: expected passes, found 'abc'"),
        ({"target": 5}, "^target: expected a name, found 5"),
        ({"target": None}, "^target: expected a name, found None"),
    ],
)
def test_options_of_other_kinds(options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        CompileOptions(**options)


KINDS: list[Any] = [[], {}, set[int](), b"x", 1.5, object(), (1,), "x", True, None]


def _error(type_: Any, name: str, value: Any) -> str:
    """The error for a value, or the option's name where there is none."""
    try:
        type_(**{name: value})
    except (TypeError, ValueError, NotImplementedError) as error:
        return str(error)
    return name


@pytest.mark.parametrize("type_", [CompileOptions, GenerateOptions])
@pytest.mark.parametrize("value", KINDS, ids=shown)
def test_any_kind_of_value_is_taken_or_refused_by_the_name(type_: Any, value: Any) -> None:
    for name in type_.__dataclass_fields__:
        assert name in _error(type_, name, value)


# ---- a model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=320, max_position_embeddings=48).save_pretrained(path)
    return save(path, byte_level())


def test_a_lowered_limit_is_said(directory: Path, tmp_path: Path) -> None:
    model = ingot.compile(directory, max_sequences=1, max_tokens_per_sequence=100)
    note = "max_tokens_per_sequence: 100 is lowered to 48, the max_position_embeddings"
    assert note in model.report.notes and note in str(model.report)
    said = "at most 48, to which the model lowers max_tokens_per_sequence = 100 tokens, found 60"
    model.export(tmp_path / "m.ingot")
    for one in (model, ingot.load(tmp_path / "m.ingot")):
        with pytest.raises(ValueError, match=f"^prompts: expected {said}"):
            one.generate([5] * 60)
        with pytest.raises(ValueError, match=f"^token_ids: expected {said}"):
            one.logits([5] * 60)
        with pytest.raises(ValueError, match="^logprobs: expected 0 to 320, found 321"):
            one.generate([5], logprobs=321)
        with pytest.raises(TypeError, match="^stream: "):
            one.generate([5], stream=1)  # type: ignore[call-overload]
    options = {"max_tokens_per_sequence": 40, "check_import": False}
    plain = ingot.compile(directory, max_sequences=1, **options)
    assert not plain.report.notes
    with pytest.raises(ValueError, match="at most max_tokens_per_sequence = 40 tokens, found 60"):
        plain.generate([5] * 60)
