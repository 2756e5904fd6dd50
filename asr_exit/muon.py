"""Muon in the precision that the processor multiplies in: torch's own always orthogonalises in bf16, which a CPU
without bf16 products takes seconds for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from asr_exit.processor import computes_in_bf16

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic that lifts small singular values fastest
_STEPS, _EPS = 5, 1e-7


def orthogonalised(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, N) with its singular values moved near 1 (about 0.7 to 1.2), by five Newton-Schulz steps in `dtype`.

    https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype).T if tall else matrix.to(dtype)
    x = x / x.norm().clamp(min=_EPS)
    if dtype != torch.bfloat16 and x.shape[1] > 1.5 * x.shape[0]:
        return (_turn(x @ x.T) @ x).T if tall else _turn(x @ x.T) @ x
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _turn(gram: Tensor) -> Tensor:
    """What the five steps multiply a wide matrix by, from its Gram matrix: each step's factor is a polynomial of it.

    Nearly half of the operations, as the long side is read twice only; too coarse for bf16.
    """
    a, b, c = _NEWTON_SCHULZ
    turn: Tensor | None = None
    for step in range(_STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        turn = factor if turn is None else factor @ turn
        if step < _STEPS - 1:
            gram = factor @ gram @ factor
    assert turn is not None
    return turn


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with Nesterov momentum, steps of the size of AdamW's (arXiv 2502.16982), in fp32 on a
    processor without bf16."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; gradients must be dense (M, N)."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1.0 - momentum)
                dtype = torch.bfloat16 if computes_in_bf16(parameter.device.type) else torch.float32
                update = orthogonalised(parameter.grad.lerp(average, momentum), dtype)
                parameter.mul_(1.0 - rate * group["weight_decay"])
                size = 0.2 * max(parameter.shape) ** 0.5
                parameter.add_(update, alpha=-rate * size)
        return loss
