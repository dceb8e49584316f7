"""Muon for the matrices of the layers and AdamW for the rest, as one optimizer."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

ITERATION = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5 that bring singular values near 1 in five iterations (Jordan et al. 2024)."""


def layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """List the trained matrices of the repeated layers: no embedding, no head, only 2-D weights."""
    matrices: dict[int, nn.Parameter] = {}  # by id: a stack in a stack is walked through twice
    for stack in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for module in stack.modules():
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if (
                weight is not None
                and weight.ndim == 2
                and weight.requires_grad
                and not isinstance(module, nn.Embedding)
            ):
                matrices[id(weight)] = weight
    return list(matrices.values())


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (n, rows, columns) near 1 by five iterations of Newton-Schulz.

    In bfloat16, as published, but in float32 on a CPU: many have no bfloat16 arithmetic (80 times slower on one).
    """
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = ITERATION
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """Muon with Nesterov momentum (Jordan et al. 2024), its steps scaled to the size of AdamW's (2502.16982, eq. 4).

    As fused AdamW does, it leaves weights and momentum as they are where `found_inf` is 1, without waiting for the
    device. Matrices of one shape are iterated together. torch.optim.Muon iterates in bfloat16
    on every device, one matrix at a time.
    """

    found_inf: Tensor | None = None

    def __init__(self, matrices: list[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step. `closure` is not for this optimizer."""
        for group in self.param_groups:
            same_shape: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    same_shape[matrix.shape, matrix.device, matrix.dtype].append(matrix)
            for matrices in same_shape.values():
                self._step_together(matrices, **{name: group[name] for name in ("lr", "weight_decay", "momentum")})

    def _step_together(self, matrices: list[nn.Parameter], *, lr: float, weight_decay: float, momentum: float) -> None:
        gradients = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
        buffers = torch.stack([self._momentum(matrix) for matrix in matrices])
        moved = buffers.lerp(gradients, 1 - momentum)
        updates = orthogonal(gradients.lerp(moved, momentum)) * (0.2 * max(gradients.shape[1:]) ** 0.5)
        for matrix, buffer, update in zip(matrices, moved, updates, strict=True):
            stepped = matrix * (1 - lr * weight_decay) - lr * update
            self._unless_skipped(matrix, stepped)
            self._unless_skipped(self._momentum(matrix), buffer)

    def _momentum(self, matrix: nn.Parameter) -> Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]

    def _unless_skipped(self, old: Tensor, new: Tensor) -> None:
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))


class MuonAdamW(Optimizer):
    """Hand `matrices` of a fresh AdamW to Muon, so that one learning rate and one weight decay serve both."""

    found_inf: Tensor | None = None

    def __init__(self, adamw: AdamW, matrices: list[nn.Parameter]) -> None:
        if not matrices:
            raise ValueError("train.optimizer muon found no matrix in the model's layers. Use adamw.")
        moved = {id(matrix) for matrix in matrices}
        for group in adamw.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in moved]
        decay = max(group["weight_decay"] for group in adamw.param_groups)
        self.adamw = adamw
        self.muon = Muon(matrices, lr=adamw.defaults["lr"], weight_decay=decay)
        super().__init__(matrices, {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Share the parameter groups of both, so that schedulers and gradient clipping work on them."""
        self.param_groups = [*self.adamw.param_groups, *self.muon.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step both. `closure` is not for this optimizer."""
        for optimizer in (self.adamw, self.muon):
            optimizer.found_inf = self.found_inf  # type: ignore[union-attr]  # what AdamW's fused kernel reads
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of both."""
        self.adamw.load_state_dict(state_dict["adamw"])
        self.muon.load_state_dict(state_dict["muon"])
        self._share_groups()
