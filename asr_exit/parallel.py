"""Data-parallel training over torch.distributed, in one place. One process per core beats many threads in one process
where the machine is shared: nothing waits at a barrier inside an operator."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The processes of a run. Alone, every method is the identity."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls, backend: str = "gloo") -> Group:
        """Join the processes that torchrun started; alone without torchrun."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        dist.init_process_group(backend)
        return cls(dist.get_rank(), dist.get_world_size())

    def reduce_gradients(self, parameters: Sequence[Tensor], extras: Sequence[float]) -> list[float]:
        """Average the gradients of `parameters` over processes, in place, and sum `extras`; one exchange for all.

        Every process must hold gradients of the same parameters.
        """
        if self.size == 1:
            return list(extras)
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor(extras, device=grads[0].device)])
        dist.all_reduce(flat)
        parts = flat[: len(flat) - len(extras)].div_(self.size).split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
        return [float(x) for x in flat[len(flat) - len(extras) :]]

    @torch.no_grad()
    def exchange(self, shares: Sequence[Sequence[Tensor]]) -> None:
        """Give every process the values that process r holds of the tensors in `shares[r]`, in place."""
        if self.size == 1:
            return
        for rank, tensors in enumerate(shares):
            if tensors:
                flat = torch.cat([tensor.flatten() for tensor in tensors])
                dist.broadcast(flat, rank)
                parts = flat.split([tensor.numel() for tensor in tensors])
                torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    def gather(self, item: Any) -> list[Any]:
        """`item` of every process, in rank order."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()
