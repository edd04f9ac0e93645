"""insert-kv-cache: what it makes, what it refuses, and that serving equals the uncached graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import PassContext
from ingot.passes.serving.insert_kv_cache import CannotCache, InsertKvCache
from ingot.passes.transforms.absorb_mla import AbsorbMla
from mla_graphs import LATENT, OUTPUT, QUERY, mla_text
from pass_checks import applied, graph_of, ops, random_weights

SLOTS, PAGE, LENGTH = 3, 4, 24  # three slots of six pages
PASS = InsertKvCache(max_sequences=SLOTS, max_tokens_per_sequence=LENGTH, page_size=PAGE)

KINDS = {
    "plain": "%q, %k, %v, scale=0.5",
    "grouped": "%q, %k1, %v1, scale=0.5",
    "window": "%q, %k, %v, scale=0.5, window=5",
    "a window of one": "%q, %k, %v, scale=0.5, window=1",
    "sinks": "%q, %k, %v, sinks=@sinks, scale=0.5",
    "softcap": "%q, %k, %v, scale=0.5, softcap=1.5",
    "window, sinks and softcap": "%q, %k, %v, sinks=@sinks, scale=0.3, window=7, softcap=2.0",
}


def model_text(attention: str, second: str = "%q2, %k2, %v2, scale=0.5", extra: str = "") -> str:
    """Two layers with rope over hidden values [T, 8], two heads of 4."""
    return f"""
        graph @model(%tokens: i32[T], %positions: i32[T]) T=1..64 {{
          %x = embedding(%tokens, @embed)
          %c, %s = rope_tables(%positions, @inv, scale=1.0, dtype='f32')
          {extra}
          %l = linear(%x, @wq)
          %l3 = view(%l, shape=[T, 2, 4])
          %q = rope(%l3, %c, %s, form='half')
          %m = linear(%x, @wk)
          %m3 = view(%m, shape=[T, 2, 4])
          %k = rope(%m3, %c, %s, form='half')
          %n = linear(%x, @wv)
          %v = view(%n, shape=[T, 2, 4])
          %k1 = slice(%k, dim=1, start=0, stop=1)
          %v1 = slice(%v, dim=1, start=1, stop=2)
          %o = attention({attention})
          %of = view(%o, shape=[T, 8])
          %y = add(%x, %of)
          %q2 = view(%y, shape=[T, 2, 4])
          %k2 = rope(%q2, %c, %s, form='interleaved')
          %v2 = tanh(%q2)
          %o2 = attention({second})
          %of2 = view(%o2, shape=[T, 8])
          %z = add(%y, %of2)
          %logits = linear(%z, @embed)
          return %logits
        }} where {{
          @embed: f32[16, 8]
          @wq: f32[8, 8]
          @wk: f32[8, 8]
          @wv: f32[8, 8]
          @inv: f32[2]
          @sinks: f32[2]
        }}"""


def cached(graph: Graph, step: InsertKvCache = PASS) -> Graph:
    after, log = applied(step, graph)
    found = ops(graph)
    assert log.matches["cache"] == found["attention"] + found["mla_attention"]
    return after


class Server:
    """Runs a cached graph step by step through the interpreter, as a session would."""

    def __init__(self, before: Graph, seed: int = 0) -> None:
        self.before, self.after = before, cached(before)
        self.weights = random_weights(before)
        generator = torch.Generator().manual_seed(seed)
        pages = SLOTS * LENGTH // PAGE
        table = torch.randperm(pages, generator=generator).view(SLOTS, -1)
        self.table = table.int()  # pages lie anywhere
        self.state = {  # and hold whatever was there before
            name: torch.full([int(d) for d in self.after.param(name).type.shape], torch.nan)
            for name in self.after.updates
        }
        self.history: dict[int, list[int]] = {slot: [] for slot in range(SLOTS)}

    def step(self, tokens: Sequence[tuple[int, int]], rows: Sequence[int]) -> torch.Tensor:
        """Tokens as (slot, id), slot -1 for padding; logits of `rows`."""
        positions: list[int] = []
        for slot, token in tokens:
            positions.append(len(self.history[slot]) if slot >= 0 else 0)
            if slot >= 0:
                self.history[slot].append(token)
        inputs = {
            "tokens": torch.tensor([t for _, t in tokens]).int(),
            "slots": torch.tensor([s for s, _ in tokens]).int(),
            "positions": torch.tensor(positions).int(),
            "page_table": self.table,
            "logit_rows": torch.tensor(rows).int(),
        }
        results = interpret(self.after, {**inputs, **self.state}, self.weights)
        self.state = results.updates
        return results.outputs[0]

    def expected(self, slot: int) -> torch.Tensor:
        """The last logits of a slot by the graph without a cache."""
        ids = torch.tensor(self.history[slot]).int()
        inputs = {"tokens": ids, "positions": torch.arange(len(ids)).int()}
        return interpret(self.before, inputs, self.weights).outputs[0][-1]


def assert_serves(before: Graph, steps: Sequence[Sequence[tuple[int, int]]]) -> None:
    """After every step the last token of each slot has the uncached graph's logits."""
    server = Server(before)
    for tokens in steps:
        last = {slot: row for row, (slot, _) in enumerate(tokens) if slot >= 0}
        found = server.step(tokens, list(last.values()) or [0])
        for logits, slot in zip(found, last, strict=False):
            expected = server.expected(slot)
            scale = max(float(expected.abs().max()), 1.0)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode(kind: str) -> None:
    prefill = [(1, t % 16) for t in range(11)]
    decode = [[(1, t)] for t in (3, 5, 7, 2, 9, 1)]
    assert_serves(graph_of(model_text(KINDS[kind])), [prefill, *decode])


@st.composite
def schedules(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Steps of chunks of several slots, in any order, with padding between."""
    left = dict.fromkeys(range(SLOTS), LENGTH)
    steps: list[list[tuple[int, int]]] = []
    for _ in range(draw(st.integers(1, 6))):
        step: list[tuple[int, int]] = []
        for slot in draw(st.permutations([*range(SLOTS), -1])):
            count = draw(st.integers(0, 6))
            count = count if slot < 0 else min(count, left[slot])
            if slot >= 0:
                left[slot] -= count
            step += [(slot, draw(st.integers(0, 15))) for _ in range(count)]
        if step:
            steps.append(step)
    return steps or [[(0, 1)]]


MIXED = graph_of(model_text(KINDS["window, sinks and softcap"]))


@settings(max_examples=12)
@given(schedules())
def test_any_mix_of_slots_chunks_and_padding(steps: list[list[tuple[int, int]]]) -> None:
    assert_serves(MIXED, steps)


def test_chunked_prefill_longer_than_the_window() -> None:
    steps = [[(2, t % 16) for t in range(start, start + 6)] for start in range(0, 24, 6)]
    assert_serves(graph_of(model_text(KINDS["window"])), steps)


def test_padding_is_stored_nowhere() -> None:
    server = Server(graph_of(model_text(KINDS["plain"])))
    server.step([(-1, 3), (-1, 4)], [0])
    assert all(cache.isnan().all() for cache in server.state.values())
    server.step([(0, 1), (-1, 3)], [0])
    for cache in server.state.values():
        assert (~cache.isnan()).flatten(2).any(-1).sum() == 1


def test_rows_are_those_asked_for() -> None:
    server = Server(graph_of(model_text(KINDS["plain"])))
    tokens = [(0, 4), (1, 5), (0, 6), (1, 7)]
    ordered = server.step(tokens, [0, 1, 2, 3])
    again = Server(server.before).step(tokens, [3, 1, 1])
    assert torch.equal(again, ordered[[3, 1, 1]])


def test_text(golden: Callable[[str], None]) -> None:
    text = model_text(KINDS["window, sinks and softcap"], "%q2, %k2, %v2, scale=0.5, causal=True")
    after = cached(graph_of(text))
    for node in after.nodes():
        assert "causal" not in node.attrs
    golden(str(after))


@pytest.mark.parametrize(
    ("tokens", "pages", "shape"), [(1, None, 3), (8, None, 6), (9, None, 9), (9, 4, 4)]
)
def test_pages(tokens: int, pages: int | None, shape: int) -> None:
    step = InsertKvCache(SLOTS, tokens, page_size=4, pages=pages)
    after = cached(graph_of(model_text(KINDS["grouped"])), step)
    assert after.param("k_cache.0").type.shape == (shape, 4, 1, 4)
    assert after.param("v_cache.1").type.shape == (shape, 4, 2, 4)
    assert after.param("page_table").type.shape == (SLOTS, -(-tokens // 4))
    assert list(after.updates) == ["k_cache.0", "v_cache.0", "k_cache.1", "v_cache.1"]


# ---- latent attention


def mla_model(absorb: AbsorbMla | None, latent: str = LATENT, second: str = "") -> Graph:
    """One layer of latent attention over 12 hidden values, then what `second` says of %y."""
    last = "%y1" if second else "%y"
    text = mla_text(
        query="%x = embedding(%tokens, @embed)" + QUERY,
        latent=latent,
        output=OUTPUT + second + f"%logits = linear({last}, @embed)",
        results="%logits",
    )
    text = text.replace("%x: f32[T, 12]", "%tokens: i32[T]").replace(
        "@inv:", "@embed: f32[16, 12]\n@inv:"
    )
    return absorb(graph_of(text), PassContext()) if absorb else graph_of(text)


ABSORBED = {
    "run time": mla_model(AbsorbMla(premultiply=False)),
    "pre-multiplied": mla_model(AbsorbMla(premultiply=True)),
    "joined latent": mla_model(AbsorbMla(), LATENT.replace(", @kv_norm", "")),
}


@pytest.mark.parametrize("kind", ABSORBED)
def test_serves_latent_attention(kind: str) -> None:
    assert ops(ABSORBED[kind])["mla_attention"] == 1
    prefill = [(1, t % 16) for t in range(11)]
    steps = [prefill, *([(1, t)] for t in (3, 5, 7, 2)), [(0, 4), (-1, 0), (1, 9), (0, 2)]]
    assert_serves(ABSORBED[kind], steps)


@settings(max_examples=8)
@given(schedules())
def test_any_mix_over_latents(steps: list[list[tuple[int, int]]]) -> None:
    assert_serves(ABSORBED["run time"], steps)


def test_a_token_of_latent_cache_is_c_kv_and_k_pe() -> None:
    after = cached(ABSORBED["run time"])
    assert list(after.updates) == ["latent_cache.0"]
    cache = after.param("latent_cache.0").type
    assert cache.shape == (SLOTS * LENGTH // PAGE, PAGE, 7 + 4)
    assert cache.nbytes == SLOTS * LENGTH * (7 + 4) * 4
    full = cached(mla_model(None))
    state = sum(full.param(name).type.nbytes for name in full.updates)
    assert state == SLOTS * LENGTH * 3 * (10 + 5) * 4  # what keys and values would take


def test_caches_are_numbered_by_layer_whatever_they_hold() -> None:
    second = """
        %q2 = view(%y, shape=[T, 3, 4])
        %o2 = attention(%q2, %q2, %q2, scale=0.5)
        %y1 = view(%o2, shape=[T, 12])
    """
    graph = mla_model(AbsorbMla(), second=second)
    after = cached(graph)
    assert list(after.updates) == ["latent_cache.0", "k_cache.1", "v_cache.1"]
    assert_serves(graph, [[(0, 1), (0, 2), (1, 3)], [(1, 4), (0, 5)]])


def test_latent_text(golden: Callable[[str], None]) -> None:
    golden(str(cached(ABSORBED["run time"])))


def test_refuses_latent_attention_over_other_rows() -> None:
    text = """
        graph @g(%positions: i32[T]) T=1..8 {
          %o = mla_attention(@q, @p, @c, scale=0.5)
          return %o
        } where {
          @q: f32[7, 2, 4]
          @p: f32[7, 2, 2]
          @c: f32[7, 6]
        }"""
    with pytest.raises(CannotCache, match="mla_attention at number 0: it is over .7. rows"):
        PASS(graph_of(text), PassContext())


# ---- what cannot be served

ROWS = "@memory: f32[7, 2, 4]\n@wk"
REFUSED = {
    "it is not causal": model_text("%q, %k, %v, scale=0.5, causal=False"),
    "not the T tokens of the graph": model_text("%q, @memory, @memory, scale=0.5")
    .replace("@wk", ROWS, 2)
    .replace("%m = linear(%x, @memory: f32[7, 2, 4]\n", "%m = linear(%x, "),
}
# Lines after the tables that make %x from something that is not token-wise.
MIXING = {
    "arange": (
        "%a = arange(start=0, stop=T, step=1, dtype='i64')\n%e = embedding(%a, @embed)",
        "its rows depend on one another or on their number",
    ),
    "cumsum": (
        "%e = aten.cumsum.default(%x, dim=0)",
        "its rows depend on one another or on their number",
    ),
    "cumsum, the batch kept": (
        (
            "%h = view(%x, shape=[1, T, 8])\n%f = aten.cumsum.default(%h, dim=1)\n"
            "%e = view(%f, shape=[T, 8])"
        ),
        "its rows depend on one another or on their number",
    ),
    "roll": ("%e = aten.roll.default(%x, shifts=[1], dims=[0])", "its rows depend on one another"),
    "convolution over the tokens": (
        "%xt = permute(%x, dims=[1, 0])\n%e1 = neg(%xt)\n%e = permute(%e1, dims=[1, 0])",
        "has tokens elsewhere than as its first dim",
    ),
    "mean over the tokens": (
        "%m0 = mean(%x, dim=0, keepdim=False)\n%e = expand(%m0, shape=[T, 8])",
        "its result is over all tokens",
    ),
    "softmax over the tokens": ("%e = softmax(%x, dim=0)", "it works along the tokens"),
    "a shift by one": (
        (
            "%h = slice(%x, dim=0, start=0, stop=T - 1)\n"
            "%f = full(value=0.0, shape=[1, 8], dtype='f32')\n%e = cat(%f, %h, dim=0)"
        ),
        "has tokens elsewhere than as its first dim",
    ),
    "the last token": (
        "%f = slice(%x, dim=0, start=T - 1, stop=T)\n%e = expand(%f, shape=[T, 8])",
        "its result is over all tokens",
    ),
    "a lookup in other tokens": (
        "%e = take(%x, %positions)",
        "it looks tokens up in other tokens",
    ),
    "tokens folded into pairs": (
        "%h = view(%x, shape=[2*T, 4])\n%e = view(%h, shape=[T, 8])",
        "has tokens elsewhere than as its first dim",
    ),
}
TOKEN_WISE = {
    "an unknown op on each row, the batch kept": (
        "%h = view(%x, shape=[1, T, 8])\n%f = aten.cumsum.default(%h, dim=2)\n"
        "%g = softmax(%f, dim=2)\n%e = view(%g, shape=[T, 8])"
    ),
    "a product for each head": (
        "%h = view(%x, shape=[T, 2, 4])\n%w3 = view(@wq, shape=[2, 8, 4])\n"
        "%h3 = head_linear(%h, %w3)\n%h1 = slice(%h3, dim=1, start=1, stop=2)\n"
        "%e = view(%h1, shape=[T, 8])"
    ),
    "an unknown op on each row": "%e = aten.cumsum.default(%x, dim=1)",
    "an unknown op on each element": "%e = aten.softplus.default(%x)",
    "a lookup by an unknown op": "%p = cast(%positions, dtype='i64')\n"
    "%e = aten.index.Tensor(@embed, %p, indices=[True])",
    "filled": "%e = full(value=2.0, shape=[T, 8], dtype='f32')",
    "weights for all": "%e = expand(@inv8, shape=[T, 8])",
    "fused products": (
        "%f = linear(%x, @wq, residual=%x)\n"
        "%g, %h = linear(%x, @both, norm=@inv8, delta=%f, gate='silu', eps=0.01)\n"
        "%i, %e = add_rms_norm(%g, %h, @inv8, eps=0.01)"
    ),
}


def with_line(line: str) -> Graph:
    text = model_text(KINDS["plain"], extra=f"{line}\n%x1 = add(%x, %e)")
    text = text.replace("@inv: f32[2]", "@inv: f32[2]\n@inv8: f32[8]\n@both: f32[16, 8]")
    return graph_of(text.replace("%y = add(%x, %of)", "%y = add(%x1, %of)"))


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_attention(reason: str) -> None:
    with pytest.raises(CannotCache, match=reason):
        PASS(graph_of(REFUSED[reason]), PassContext())


@pytest.mark.parametrize("name", MIXING)
def test_refuses_what_mixes_tokens(name: str) -> None:
    line, reason = MIXING[name]
    with pytest.raises(CannotCache, match=reason):
        PASS(with_line(line), PassContext())


@pytest.mark.parametrize("name", TOKEN_WISE)
def test_serves_what_is_token_wise(name: str) -> None:
    steps = [[(1, 3), (0, 5), (1, 4)], [(0, 2), (-1, 0), (1, 1)]]
    assert_serves(with_line(TOKEN_WISE[name]), steps)


def test_refuses_a_graph_without_positions() -> None:
    text = "graph @g(%tokens: i32[T]) T=1..8 {\n%0 = embedding(%tokens, @w)\nreturn %0"
    text += "\n} where {\n@w: f32[8, 4]\n}"
    with pytest.raises(KeyError, match="no parameter 'positions'"):
        PASS(graph_of(text), PassContext())
