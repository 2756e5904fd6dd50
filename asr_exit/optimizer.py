"""The optimisers of a run behind one face: AdamW; or Muon for the matrices in the layers and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from asr_exit.encoder import Encoder
from asr_exit.muon import Muon
from asr_exit.parallel import Group

OPTIMIZERS = ("adamw", "muon")


class Optimizers:
    """What `torch.optim.Optimizer` offers a training loop, over one or two of them with one learning rate.

    Muon (https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a matrix; its updates are scaled to
    the size of AdamW's (arXiv 2502.16982), so that learning rate and weight decay mean the same for both. That takes a
    quarter of an update on a CPU, so every process does its share of the matrices and tells the others.
    """

    def __init__(
        self,
        model: Encoder,
        name: str,
        weight_decay: float,
        group: Group | None = None,
        aside: Iterable[nn.Parameter] = (),
    ) -> None:
        """`name`: one of `OPTIMIZERS`. Vectors (norms, biases) never decay, nor what is trained `aside`."""
        self.group = group or Group()
        inside = [layer for segment in model.segments for layer in segment.layers] if name == "muon" else []
        self.matrices = [m.weight for layer in inside for m in layer.modules() if isinstance(m, nn.Linear)]
        taken = set(map(id, self.matrices))
        rest = [p for p in model.parameters() if id(p) not in taken]
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ]
        if others := list(aside):
            groups.append({"params": others, "weight_decay": 0.0})
        self.all: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)]
        by_size = sorted(self.matrices, key=torch.Tensor.numel)
        self._shares = [by_size[rank :: self.group.size] for rank in range(self.group.size)]
        mine = self._shares[self.group.rank]
        if mine:
            self.all.append(Muon(mine, lr=1e-3, weight_decay=weight_decay))

    @property
    def learning_rate(self) -> float:
        """Of every parameter."""
        return float(self.all[0].param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def zero_grad(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget the gradients of `parameters`, also of those that another process updates."""
        for parameter in parameters:
            parameter.grad = None

    def step(self) -> None:
        """One update; all processes do it together."""
        for optimizer in self.all:
            optimizer.step()
        if self.matrices:
            self.group.exchange(self._shares)

    def state_dict(self) -> dict[str, Any]:
        """The same for any number of processes; all of them must ask together."""
        states = self.all[-1].state
        mine = {index: states[p]["momentum_buffer"] for index, p in self._numbered() if p in states}
        momentum = {index: buffer for part in self.group.gather(mine) for index, buffer in part.items()}
        return {"adamw": self.all[0].state_dict(), "momentum": momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.all[0].load_state_dict(state["adamw"])
        for index, parameter in self._numbered():
            if index in state["momentum"]:
                self.all[-1].state[parameter]["momentum_buffer"] = state["momentum"][index].clone()

    def _numbered(self) -> list[tuple[int, torch.Tensor]]:
        """The matrices of this process's share, with their place in the model."""
        mine = set(map(id, self._shares[self.group.rank]))
        return [(index, p) for index, p in enumerate(self.matrices) if id(p) in mine]
