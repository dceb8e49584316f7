"""Masked (absorbing-state) diffusion: MDLM (arXiv 2406.07524), MD4 (2406.04329), LLaDA (2502.09992)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.processes.noised import Noised
from redraft.schedules import Linear, Schedule, weight


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusion:
    """Replace each token by the mask token with probability 1 - alpha(t), independently of all others.

    The negative evidence lower bound in continuous time is (Eq. 10, arXiv 2406.07524)

        NELBO(x_0) = E_t E_{x_t} [ -alpha'(t) / (1 - alpha(t)) * sum over masked i of -log p(x_0^i | x_t) ]

    and does not depend on the schedule (Section 3.5 there). LLaDA's loss (Eq. 3, arXiv 2502.09992) is the same with
    alpha = 1 - t, except that its softmax includes the mask token (`exclude_mask=False`).
    """

    noise: ClassVar = "mask"
    default_preset: ClassVar = "llada"
    varied_sampling: ClassVar[dict[str, Any]] = {"preset": "llada-random", "temperature": 0.9}

    mask_token_id: int
    schedule: Schedule = field(default_factory=Linear)
    exclude_mask: bool = True
    """Give the mask token probability 0 (MDLM's SUBS parametrisation); LLaDA leaves it in the softmax."""

    def __post_init__(self) -> None:
        if self.mask_token_id < 0:
            raise ValueError(f"mask_token_id must be a row of the vocabulary; got {self.mask_token_id}.")

    @classmethod
    def build(
        cls, *, mask_token_id: int, vocab_size: int, schedule: Schedule, exclude_mask: bool = True
    ) -> "MaskedDiffusion":
        """Build the process for a model; the size of its vocabulary does not matter."""
        return cls(mask_token_id=mask_token_id, schedule=schedule, exclude_mask=exclude_mask)

    def corrupt(
        self,
        x_0: Int[Tensor, "batch seq"],
        t: Float[Tensor, "batch"] | Float[Tensor, "batch seq"],
        *,
        u: Float[Tensor, "batch seq"],
        can_change: Bool[Tensor, "batch seq"] | None = None,
    ) -> Noised:
        """Mask each token with probability 1 - alpha(t); t per row or per position.

        A token is masked where `u` ~ U[0, 1) is below that probability, so the same `u` gives nested masks as t grows.
        Positions outside `can_change` (prompt, padding) keep their token and are no target.
        """
        if t.ndim == 1:
            t = t[:, None].expand(x_0.shape)
        is_target = u < 1 - self.schedule.alpha(t)
        if can_change is not None:
            is_target = is_target & can_change
        x_t = torch.where(is_target, self.mask_token_id, x_0)
        return Noised(x_0=x_0, x_t=x_t, t=t, is_target=is_target)

    def loss(self, logits: Float[Tensor, "n vocab"], noised: Noised) -> Float[Tensor, "n"]:
        """Weigh the cross-entropy of each target: nats; their sum over a row is a sample of the row's NELBO.

        `noised` holds the same n targets as `logits` (`noised.flatten()[noised.targets()]`).
        """
        nats = self.cross_entropy(logits, noised)
        return nats * self.weights(noised).to(nats.dtype)

    def weights(self, noised: Noised) -> Float[Tensor, "*shape"]:
        """Return the bound's weight of each position's time."""
        return weight(self.schedule, noised.t)

    def cross_entropy(self, logits: Float[Tensor, "n vocab"], noised: Noised) -> Float[Tensor, "n"]:
        """Return -log p(x_0 | x_t) of each target in nats, without the weight of its time."""
        return F.cross_entropy(self._without_mask(logits, -torch.inf), noised.x_0, reduction="none")

    def divergence(self, p: Float[Tensor, "n vocab"], q: Float[Tensor, "n vocab"]) -> Float[Tensor, "n"]:
        """Return KL(p || q) of two predictions, given as logits; nats."""
        log_p, log_q = (
            self._without_mask(logits, -1e9).log_softmax(dim=-1) for logits in (p, q)
        )  # -inf less -inf: NaN
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)

    def _without_mask(self, logits: Float[Tensor, "n vocab"], value: float) -> Float[Tensor, "n vocab"]:
        """Give the mask token this logit if its probability is 0; float32."""
        logits = logits.float()
        if not self.exclude_mask:
            return logits
        is_mask = torch.arange(logits.shape[-1], device=logits.device) == self.mask_token_id
        return logits.masked_fill(is_mask, value)

    def prior(self, u: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return pure noise: mask tokens everywhere, whatever `u` is."""
        return torch.full_like(u, self.mask_token_id, dtype=torch.int64)
