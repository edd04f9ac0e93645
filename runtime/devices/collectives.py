"""A group of processes, one a rank, that exchange tensors over torch.distributed on the CPU."""

from __future__ import annotations

import hashlib
import secrets

import torch
import torch.distributed as dist


class GroupError(RuntimeError):
    """This process is in no group that fits, or its ranks disagree; says what mends it."""


class ProcessGroup:
    """The processes that were started together: rank `rank` of `ranks`.

    Every rank must make the same calls in the same order. What a rank waits for that never comes,
    it waits for until the timeout with which the group was made.
    """

    def __init__(self, ranks: int) -> None:
        """Take the default group of torch.distributed; GroupError unless it has `ranks` of them."""
        start = (
            f"start {ranks} processes with torchrun --nproc-per-node {ranks} script.py and let "
            'each call torch.distributed.init_process_group("gloo") before it compiles'
        )
        if not dist.is_available() or not dist.is_initialized():
            raise GroupError(f"tensor_parallel={ranks}: this process is in no group; {start}")
        if (found := dist.get_world_size()) != ranks:
            raise GroupError(
                f"tensor_parallel={ranks}: expected a group of {ranks}, found one of {found}; "
                f"{start}"
            )
        if "gloo" not in (backend := dist.get_backend_config()):
            raise GroupError(
                f"tensor_parallel={ranks}: expected a group over gloo, found {backend}; {start}"
            )
        self.ranks = ranks
        self.rank = dist.get_rank()

    def exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Give `x` to every rank; what each of them gave, in the order of ranks."""
        raw = x.contiguous().reshape(-1).view(torch.uint8)
        found = [torch.empty_like(raw) for _ in range(self.ranks)]
        dist.all_gather(found, raw)
        return [part.view(x.dtype).view(x.shape) for part in found]

    def agree(self, text: str) -> None:
        """GroupError unless every rank calls this with the same text."""
        digest = hashlib.sha256(text.encode()).digest()
        given = self.exchange(torch.tensor(list(digest), dtype=torch.uint8))
        if other := [i for i, d in enumerate(given) if not torch.equal(d, given[self.rank])]:
            raise GroupError(
                f"rank {self.rank} and ranks {other} compiled different programs: expected the "
                "same model and the same options on every rank"
            )

    def draw_seed(self) -> int:
        """A random number of 64 bits, the same on every rank."""
        mine = torch.tensor(list(secrets.token_bytes(8)), dtype=torch.uint8)
        return int.from_bytes(bytes(self.exchange(mine)[0].tolist()))


__all__ = ["GroupError", "ProcessGroup"]
