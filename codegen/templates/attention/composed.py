"""Ops of several ops: their launches, one after the other, by other references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...kernel_query import Call, Candidate, Ref
from ...kernel_source import map_leaves


def renamed(call: Call, refs: Mapping[Ref, Ref]) -> Call:
    """The call with other references in place of `refs`."""

    def new(leaf: Any) -> Any:
        return refs.get(leaf, leaf) if isinstance(leaf, Ref) else leaf

    args = {name: map_leaves(value, new) for name, value in call.args.items()}
    return replace(call, args=args, writes=tuple(new(ref) for ref in call.writes))


def joined(first: Candidate, then: Candidate) -> Candidate:
    """The launches of both."""
    return Candidate(
        (*first.calls, *then.calls),
        first.seconds + then.seconds,
        f"{first.reason}; {then.reason}",
        {**first.temps, **then.temps},
        {**first.counters, **then.counters},
    )
