"""Latent attention as models write it, in parts that tests exchange.

12 hidden values, ranks 8 and 7 of query and latent, 3 heads of 6 + 4 dims with values of 5.
"""

from __future__ import annotations

QUERY = """
    %ql = linear(%x, @w_dq)
    %qn = rms_norm(%ql, weight=@q_norm, eps=1e-06)
    %qp = linear(%qn, @w_uq)
    %qh = view(%qp, shape=[T, 3, 10])
    %q = rope(%qh, %c, %s, form='deinterleaved', start=6)
"""
LATENT = """
    %kv = linear(%x, @w_dkv)
    %low = slice(%kv, dim=1, start=0, stop=7)
    %c_kv = rms_norm(%low, weight=@kv_norm, eps=1e-05)
    %pe = slice(%kv, dim=1, start=7, stop=11)
    %k_pe = rope(%pe, %c, %s, form='deinterleaved')
"""
UP = """
    %up = linear(%c_kv, @w_ukv)
    %uh = view(%up, shape=[T, 3, 11])
    %k_nope = slice(%uh, dim=2, start=0, stop=6)
    %v = slice(%uh, dim=2, start=6, stop=11)
"""
KEYS = """
    %p1 = view(%k_pe, shape=[T, 1, 4])
    %p3 = expand(%p1, shape=[T, 3, 4])
    %k = cat(%k_nope, %p3, dim=2)
"""
ATTENTION = "%o = attention(%q, %k, %v, scale=0.3)"
OUTPUT = """
    %of = view(%o, shape=[T, 15])
    %y = linear(%of, @w_o)
"""


def mla_text(
    query: str = QUERY,
    latent: str = LATENT,
    up: str = UP,
    keys: str = KEYS,
    attention: str = ATTENTION,
    output: str = OUTPUT,
    results: str = "%y",
) -> str:
    return f"""
        graph @mla(%x: f32[T, 12], %positions: i32[T]) T=1..64 {{
          %c, %s = rope_tables(%positions, @inv, scale=1.0, dtype='f32')
          {query}{latent}{up}{keys}
          {attention}
          {output}
          return {results}
        }} where {{
          @inv: f32[2]
          @w_dq: f32[8, 12]
          @b_dq: f32[8]
          @q_norm: f32[8]
          @w_uq: f32[30, 8]
          @w_uq1: f32[10, 8]
          @w_uq_nope: f32[18, 8]
          @w_uq_pe: f32[12, 8]
          @w_q: f32[30, 12]
          @b_q: f32[30]
          @w_dkv: f32[11, 12]
          @b_dkv: f32[11]
          @w_dkv_wide: f32[16, 12]
          @w_dc: f32[7, 12]
          @w_kr: f32[4, 12]
          @kv_norm: f32[7]
          @w_ukv: f32[33, 7]
          @w_ukv1: f32[11, 7]
          @b_ukv: f32[33]
          @w_uk: f32[18, 7]
          @w_uv: f32[15, 7]
          @w_ukv2: f32[22, 7]
          @w_dkv_32: f32[36, 12]
          @kv_norm_32: f32[32]
          @w_ukv_32: f32[33, 32]
          @w_o: f32[12, 15]
          @b_o: f32[12]
          @w_o1: f32[12, 5]
          @sinks: f32[3]
        }}"""


MODELS: dict[str, dict[str, object]] = {
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v3 without a low rank of the query": {"q_lora_rank": None},
    "deepseek_v3 with biases": {"attention_bias": True},
    "deepseek_v3 with one group": {"n_group": 1, "topk_group": 1},  # Kimi K2
    "deepseek_v2 without a low rank of the query": {"q_lora_rank": None},
    "glm4_moe_lite": {},
    "minicpm3": {},
    "youtu": {},
}
