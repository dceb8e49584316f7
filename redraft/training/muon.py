"""Muon for the matrices of the layers and AdamW for the rest, as one optimizer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer


def layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """List the trained matrices of the repeated layers: no embedding, no head, nothing with another number of axes."""
    found: dict[int, nn.Parameter] = {}
    for stack in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for module in stack.modules():
            if isinstance(module, nn.Embedding):
                continue
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if weight is not None and weight.ndim == 2 and weight.requires_grad:
                found[id(weight)] = weight
    return list(found.values())


class MuonAdamW(Optimizer):
    """Hand `matrices` of a fresh AdamW to Muon (Jordan et al. 2024), whose steps are scaled to AdamW's (2502.16982).

    So one learning rate and one weight decay serve both. As fused AdamW does, Muon leaves weights and moments as they
    are where `found_inf` is 1, without waiting for the device.
    """

    found_inf: Tensor | None = None

    def __init__(self, adamw: AdamW, matrices: list[nn.Parameter]) -> None:
        if not matrices:
            raise ValueError("train.optimizer muon found no matrix in the model's layers. Use adamw.")
        moved = {id(matrix) for matrix in matrices}
        for group in adamw.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in moved]
        decay = max(group["weight_decay"] for group in adamw.param_groups)
        self.adamw = adamw
        self.muon = Muon(matrices, lr=adamw.defaults["lr"], weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        super().__init__(matrices, {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Let schedulers and clipping see the groups themselves."""
        self.param_groups = [*self.adamw.param_groups, *self.muon.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step both. `closure` is not for this optimizer."""
        found_inf = self.found_inf
        self.adamw.found_inf = found_inf  # type: ignore[attr-defined]  # what the fused kernel reads
        self.adamw.step()
        matrices = [p for group in self.muon.param_groups for p in group["params"] if p.grad is not None]
        if found_inf is None:
            self.muon.step()
            return
        is_bad, before = found_inf > 0, [matrix.clone() for matrix in matrices]
        for matrix in matrices:  # a gradient equal to the momentum leaves the momentum as it is
            momentum = self.muon.state[matrix].get("momentum_buffer")
            kept = torch.zeros_like(matrix) if momentum is None else momentum
            matrix.grad = torch.where(is_bad, kept, matrix.grad)
        self.muon.step()
        for matrix, old in zip(matrices, before, strict=True):
            matrix.copy_(torch.where(is_bad, old, matrix))

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of both."""
        self.adamw.load_state_dict(state_dict["adamw"])
        self.muon.load_state_dict(state_dict["muon"])
        self._share_groups()
