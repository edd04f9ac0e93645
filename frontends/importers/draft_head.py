"""What drafts within a model, from its hidden states: the shape that all such heads have.

For every token a head takes a feature of the model's hidden states there and the token that
follows, and gives a state, from which it predicts the token after that. For further tokens its
state takes the place of the feature, one position on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...compiler.ir import Value
from ...compiler.ops.draft import likeliest
from ...compiler.types import TensorType
from .meta_model import MetaModel, PreTrainedModel
from .module_tensors import named_tensors


@dataclass(frozen=True, eq=False)
class DraftHead(MetaModel):
    """A head on the meta device, which may share tensors with the model `trunk`.

    Beside the model's its own tensors have names that begin with `prefix`; none others are in
    `types`.
    """

    trunk: PreTrainedModel

    prefix: ClassVar[str]

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, torch.nn.Module]:
        """The modules that hold its own tensors, by their names in it."""

    @abstractmethod
    def features(self, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """[1, T, H] of the model's hidden states: before each layer, and behind the last norm."""

    @abstractmethod
    def step(
        self, hidden: torch.Tensor, following: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """The state [1, T, H] from a feature or a state [1, T, H], the tokens that follow and the
        positions of the hidden states, both i64[1, T]."""

    @abstractmethod
    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """[1, T, V] of a state."""

    def drafted(self, logits: Value) -> Value:
        """i32[T]: the ids of the likeliest tokens by logits [T, V]."""
        return likeliest(logits)

    def types(self) -> dict[str, TensorType]:
        """See MetaModel; of the head's own tensors."""
        shared = {id(tensor) for _, tensor in named_tensors(self.trunk)}
        own = {name for name, tensor in named_tensors(self.model) if id(tensor) not in shared}
        return {name: type_ for name, type_ in super().types().items() if name in own}

    def prefixed(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """What is `named` by its own tensors, by the names that they have beside the model's."""
        return {f"{self.prefix}{name}": value for name, value in named.items()}


class Predicting(torch.nn.Module):
    """What is traced of a model and its head: no cache, positions from `offset` on.

    The head's positions are those of the hidden states that it takes.
    """

    def __init__(self, head: DraftHead, offset: int) -> None:
        super().__init__()
        self.model, self.offset = head.trunk, offset
        own = torch.nn.Module()
        for name, part in head.parts.items():
            own.add_module(name, part)
        self.add_module(head.prefix.removesuffix("."), own)
        # No module of this one: what it shares with the model goes by the model's names.
        self.__dict__["_head"] = head

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, following: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Logits of the model, features, logits of the head and its state, each [1, T, ·]."""
        position_ids = position_ids + self.offset if self.offset else position_ids
        output: Any = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            output_hidden_states=True,
        )
        head: DraftHead = self.__dict__["_head"]
        hidden = head.features(output.hidden_states)
        state = head.step(hidden, following, position_ids)
        return output.logits, hidden, head.logits(state), state
