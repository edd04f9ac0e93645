"""Mixture of experts: the router's choice and the chosen experts.

`gating` chooses experts by `gating_kernels`, for which `choose` holds the choice; `experts` is
computed by `experts_kernels`, or where few tokens' weights lie in fragments by `expert_stream`,
which streams products by head, too.
"""
