"""The optimisers of a run behind one face: AdamW; or Muon for the matrices in the layers and AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from asr_exit.encoder import Encoder

OPTIMIZERS = ("adamw", "muon")


class Optimizers:
    """What `torch.optim.Optimizer` offers a training loop, over one or two of them with one learning rate.

    Muon (https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a matrix; its updates are scaled to
    the size of AdamW's (arXiv 2502.16982), so that learning rate and weight decay mean the same for both.
    """

    def __init__(self, model: Encoder, name: str, weight_decay: float) -> None:
        """`name`: one of `OPTIMIZERS`. Vectors (norms, biases) never decay."""
        inside = [layer for segment in model.segments for layer in segment.layers] if name == "muon" else []
        matrices = [m.weight for layer in inside for m in layer.modules() if isinstance(m, nn.Linear)]
        taken = set(map(id, matrices))
        rest = [p for p in model.parameters() if id(p) not in taken]
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.all: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.all.append(muon)

    @property
    def learning_rate(self) -> float:
        """Of every parameter."""
        return float(self.all[0].param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One update."""
        for optimizer in self.all:
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """One per optimiser."""
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Inverse of `state_dict`."""
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)
