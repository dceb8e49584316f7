"""Masked (absorbing-state) diffusion: MDLM (arXiv 2406.07524), MD4 (2406.04329), LLaDA (2502.09992)."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.processes.noised import Noised, PosteriorKind
from redraft.schedules import Linear, Schedule, weight


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusion:
    """Replace each token by the mask token with probability 1 - alpha(t), independently of all others.

    The negative evidence lower bound in continuous time is (Eq. 10, arXiv 2406.07524)

        NELBO(x_0) = E_t E_{x_t} [ -alpha'(t) / (1 - alpha(t)) * sum over masked i of -log p(x_0^i | x_t) ]

    and does not depend on the schedule (its invariance: Section 3.5 there). LLaDA's loss (Eq. 3, arXiv 2502.09992) is
    the same with alpha = 1 - t, but for one thing: its softmax includes the mask token (`exclude_mask=False`).
    """

    mask_token_id: int
    schedule: Schedule = field(default_factory=Linear)
    exclude_mask: bool = True
    """Give the mask token probability 0 (MDLM's SUBS parametrisation); LLaDA leaves it in the softmax."""

    def __post_init__(self) -> None:
        if self.mask_token_id < 0:
            raise ValueError(f"mask_token_id must be a row of the vocabulary; got {self.mask_token_id}.")

    def corrupt(
        self,
        x_0: Int[Tensor, "batch seq"],
        t: Float[Tensor, "batch"] | Float[Tensor, "batch seq"],
        *,
        u: Float[Tensor, "batch seq"] | None = None,
        generator: torch.Generator | None = None,
        can_change: Bool[Tensor, "batch seq"] | None = None,
    ) -> Noised:
        """Mask each token with probability 1 - alpha(t); t per row or per position.

        `u` ~ U[0, 1) decides (drawn from `generator` where absent): the same `u` gives nested masks as t grows.
        Positions outside `can_change` (prompt, padding) stay as they are and are no target.
        """
        if t.ndim == 1:
            t = t[:, None].expand(x_0.shape)
        if u is None:
            u = torch.rand(x_0.shape, generator=generator, device=x_0.device, dtype=torch.float64)
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
        return nats * weight(self.schedule, noised.t).to(nats.dtype)

    def cross_entropy(self, logits: Float[Tensor, "n vocab"], noised: Noised) -> Float[Tensor, "n"]:
        """Return -log p(x_0 | x_t) of each target in nats, without the weight of its time."""
        logits = logits.float()
        if self.exclude_mask:
            is_mask = torch.arange(logits.shape[-1], device=logits.device) == self.mask_token_id
            logits = logits.masked_fill(is_mask, -torch.inf)
        return F.cross_entropy(logits, noised.x_0, reduction="none")

    def prior(
        self,
        shape: tuple[int, ...],
        *,
        u: Float[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Int[Tensor, "..."]:
        """Fill a canvas with noise: every position is the mask token, so no random number is needed."""
        return torch.full(shape, self.mask_token_id, dtype=torch.int64, device=device)

    def posterior(
        self,
        x_t: Int[Tensor, "n"],
        x_0_probs: Float[Tensor, "n vocab"],
        t: Float[Tensor, "n"],
        s: Float[Tensor, "n"],
        *,
        kind: PosteriorKind = "plug_in",
    ) -> Float[Tensor, "n vocab"]:
        """Compute P(x_s | x_t, prediction) for s < t (arXiv 2406.07524); both kinds are the same here.

        A mask becomes x_0 with probability (alpha_s - alpha_t) / (1 - alpha_t); any other token stays.
        """
        one_hot = F.one_hot(torch.stack([x_t, torch.full_like(x_t, self.mask_token_id)]), x_0_probs.shape[-1])
        is_x_t, is_mask = one_hot.to(x_0_probs.dtype)
        share = self._unmasked_share(t, s)[:, None].to(x_0_probs.dtype)
        return torch.where((x_t == self.mask_token_id)[:, None], share * x_0_probs + (1 - share) * is_mask, is_x_t)

    def posterior_draw(
        self,
        x_0: Int[Tensor, "n"],
        x_t: Int[Tensor, "n"],
        t: Float[Tensor, "n"],
        s: Float[Tensor, "n"],
        *,
        u: Float[Tensor, "n"],
        x_t_prob: Float[Tensor, "n"] | None = None,
    ) -> Int[Tensor, "n"]:
        """Draw x_s from `posterior`, given an x_0 drawn from the prediction; `u` ~ U[0, 1) decides to unmask or not."""
        return torch.where((x_t == self.mask_token_id) & (u < self._unmasked_share(t, s)), x_0, x_t)

    def _unmasked_share(self, t: Float[Tensor, "n"], s: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        alpha_t, alpha_s = self.schedule.alpha(t), self.schedule.alpha(s)
        return (alpha_s - alpha_t) / (1 - alpha_t)
