"""Diffusion over the whole row: MDLM, LLaDA (masked noise), UDLM, Duo (uniform noise); CART; complementary masks."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from redraft.likelihood.problem import SMALLEST_T, CleanRows, NoiseKey, Problem, draw_noise, whole_canvas
from redraft.processes.masked import MaskedDiffusion
from redraft.processes.noised import Noised, Process


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The NELBO of `process`, one time per row; both options are for masked noise."""

    process: Process
    t_min: float = SMALLEST_T
    t_max: float = 1.0
    is_complementary: bool = False
    """Take each row twice, under a mask and its complement: every token is a target exactly once."""
    cart_p: float | None = None
    """Weigh the targets by `cart_weights` instead of the bound's weight."""

    def problem(self, rows: CleanRows, key: NoiseKey) -> Problem:
        """Corrupt the rows and ask for what is noised."""
        noised = draw_noise(self.process, rows.x_0, key, can_change=rows.is_target, t_min=self.t_min, t_max=self.t_max)
        if self.is_complementary:
            noised = with_complement(self.process, noised, can_change=rows.is_target)
        problem = whole_canvas(self.process, noised, rows)
        return problem if self.cart_p is None else self._reweighed(problem, noised, rows, p=self.cart_p)

    def evaluation(self) -> "Diffusion":
        """The plain bound over all noise levels."""
        return Diffusion(process=self.process)

    def _reweighed(self, problem: Problem, noised: Noised, rows: CleanRows, *, p: float) -> Problem:
        process, copies, where = self.process, len(noised.x_t) // len(rows.x_0), problem.query.where
        assert isinstance(process, MaskedDiffusion)
        segment_ids = rows.segment_ids.repeat(copies, 1)
        is_clean = ~noised.is_target & (segment_ids > 0)
        can_see = segment_ids[:, :, None] == segment_ids[:, None, :] if rows.isolate_segments else None
        weights = cart_weights(is_clean, p=p, can_see=can_see).flatten()[where] / copies
        targets = noised.flatten()[where]
        return replace(problem, nats=lambda logits, part: process.cross_entropy(logits, targets[part]) * weights[part])


def cart_weights(
    is_clean: Bool[Tensor, "batch seq"], *, p: float, can_see: Bool[Tensor, "batch seq seq"] | None = None
) -> Float[Tensor, "batch seq"]:
    """Weigh each position by the clean tokens near it: half the sum over clean i of p (1 - p)^(|n - i| - 1).

    Tokens with much context count in full, those with none not at all (CART, arXiv 2508.15487). Not a bound.
    """
    index = torch.arange(is_clean.shape[1], device=is_clean.device)
    distance = (index[:, None] - index[None, :]).abs()
    kernel = 0.5 * p * (1 - p) ** (distance - 1).clamp(min=0).float() * (distance > 0)
    if can_see is None:
        return is_clean.float() @ kernel
    return (kernel * (can_see & is_clean[:, None, :])).sum(dim=-1)


def with_complement(process: Process, noised: Noised, *, can_change: Bool[Tensor, "batch seq"]) -> Noised:
    """Put under each row the one whose mask is the complement of its own: (2 * batch, seq).

    With the linear schedule the complement of noise at t is noise at 1 - t, so the mean of both is unbiased. Each token
    is a target once per pair (coupled sampling, arXiv 2506.20639; complementary masks, arXiv 2509.26328).
    """
    assert isinstance(process, MaskedDiffusion)
    is_target = can_change & ~noised.is_target
    return Noised(
        x_0=noised.x_0.repeat(2, 1),
        x_t=torch.cat([noised.x_t, torch.where(is_target, process.mask_token_id, noised.x_0)]),
        t=torch.cat([noised.t, 1 - noised.t]),
        is_target=torch.cat([noised.is_target, is_target]),
    )
