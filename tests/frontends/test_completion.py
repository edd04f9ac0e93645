"""Stop strings: text across tokens, special tokens, and both together."""

from __future__ import annotations

from collections.abc import Iterable

import ingot
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.frontends.text.completion import StopStringChecker
from ingot.frontends.text.text_model import TextModel
from ingot.frontends.text.tokenizer import Tokenizer
from tiny_models import tiny_model
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

pytestmark = pytest.mark.usefixtures("shared_traces")

SPECIALS = ["<|im_end|>", "<s>"]
WORDS = ["ab", "a", "b", "<", "|im", "_end|>", "é", "\n"]


def words(texts: Iterable[str], specials: Iterable[str] = ()) -> Tokenizer:
    """A tokenizer whose token i is texts[i]; decoding concatenates."""
    vocab = {text: i for i, text in enumerate(texts)}
    backend = Backend(models.WordLevel(vocab, unk_token=next(iter(vocab))))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(s, special=True) for s in specials])
    return Tokenizer(backend, None, None)


TOKENIZER = words([*WORDS, *SPECIALS], SPECIALS)


def run(texts: list[str], stops: list[str]) -> tuple[str, bool, list[str]]:
    """The text, whether it was stopped, and the pieces that were given."""
    checker = StopStringChecker(TOKENIZER, stops)
    pieces: list[str] = []
    for text in texts:
        token = TOKENIZER.backend.token_to_id(text)
        assert token is not None
        pieces.append(checker.push(token))
        if checker.stopped:
            break
    else:
        pieces.append(checker.finish())
    return checker.text, checker.stopped, pieces


CASES: list[tuple[list[str], list[str], str, bool]] = [
    (["a", "<|im_end|>", "b"], ["<|im_end|>"], "a", True),
    (["a", "<", "|im", "_end|>", "b"], ["<|im_end|>"], "a", True),  # spelled as text
    (["a", "b", "\n", "<|im_end|>", "a"], ["b\n<|im_end|>"], "a", True),
    (["a", "<s>", "b"], ["ab"], "ab", False),  # a special token stands between
    (["a", "<s>", "b", "ab"], ["<s>b"], "a", True),
    (["b", "a", "b", "a"], ["bab"], "", True),
    (["a", "é", "\n"], ["é\n"], "a", True),
    (["a", "<|im_end|>"], ["<|im_end|>b", "<s>"], "a", False),
    (["ab", "a"], ["ba", "a<s>"], "a", True),
]


@pytest.mark.parametrize(("texts", "stops", "text", "stopped"), CASES)
def test_stop_strings(texts: list[str], stops: list[str], text: str, stopped: bool) -> None:
    found, ended, pieces = run(texts, stops)
    assert (found, ended) == (text, stopped)
    assert "".join(pieces) == text


@given(
    texts=st.lists(st.sampled_from(WORDS + SPECIALS), max_size=12),
    stops=st.lists(st.text(st.sampled_from("ab<|im_end>s\n"), min_size=1, max_size=6), max_size=3),
)
def test_text_ends_at_the_first_stop_string(texts: list[str], stops: list[str]) -> None:
    found, stopped, pieces = run(texts, stops)
    assert "".join(pieces) == found
    # The oracle looks at all text after each token, special tokens written out.
    seen = ""
    for text in texts:
        seen += text
        if ends := [at for stop in stops if (at := seen.find(stop)) >= 0]:
            shown = "".join(TOKENIZER.decode([t]) for t in _tokens_before(texts, min(ends)))
            assert stopped and found.startswith(shown[: len(found)])
            return
    assert not stopped
    assert found == "".join(text for text in texts if text not in SPECIALS)


def _tokens_before(texts: list[str], end: int) -> list[int]:
    """The tokens that lie wholly before character `end`."""
    found: list[int] = []
    for text in texts:
        if (end := end - len(text)) < 0:
            break
        found.append(TOKENIZER.backend.token_to_id(text) or 0)
    return found


# ---- a model


@pytest.fixture(scope="module")
def model() -> ingot.Model:
    return ingot.compile(tiny_model("llama"), max_sequences=2, max_tokens_per_sequence=64)


def with_tokenizer(model: ingot.Model, specials: Iterable[int], size: int = 128) -> TextModel:
    """`model` with the text `w7 ` for token 7, and special tokens."""
    texts = [f"w{i} " for i in range(size)]
    tokenizer = words(texts, [texts[i] for i in specials])
    return TextModel(model.session, tokenizer, ())


def test_a_special_token_stops_as_its_id(model: ingot.Model) -> None:
    free = with_tokenizer(model, ()).generate([5, 6], max_new_tokens=20).tokens
    end = next(t for t in free if t != free[0])
    at = free.index(end)
    special = with_tokenizer(model, [end])
    assert f"w{end} " not in special.generate([5, 6], max_new_tokens=20).text.split(" ")
    found = special.generate([5, 6], max_new_tokens=20, stop=f"w{end} ")
    assert found.finish_reason == "stop" and found.tokens == free[:at]
    assert found.text == "".join(f"w{t} " for t in free[:at])
    # As text and special token together, its tokens stay in `tokens`, as for every stop string.
    found = special.generate([5, 6], max_new_tokens=20, stop=f" w{end} ")
    assert found.finish_reason == "stop" and found.tokens == free[: at + 1]
    assert found.text == "".join(f"w{t} " for t in free[:at]).removesuffix(" ")


def test_ids_of_a_padded_vocabulary(model: ingot.Model) -> None:
    """Ids that only the model has are served, and have no text."""
    free = model.generate([5, 6], max_new_tokens=20)
    size = int(np.median(free.tokens))
    small = with_tokenizer(model, (), size)
    found = small.generate([5, 127], max_new_tokens=3)
    assert found.tokens == model.generate([5, 127], max_new_tokens=3).tokens
    found = small.generate([5, 6], max_new_tokens=20)
    assert found.tokens == free.tokens
    assert found.text == "".join(f"w{t} " for t in free.tokens if t < size)
    pieces = [e.text for e in small.generate([5, 6], max_new_tokens=20, stream=True)]
    assert "".join(pieces) == found.text
    with pytest.raises(ValueError, match="from 0 to 127, found 128"):
        small.generate([128])
