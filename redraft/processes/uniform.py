"""Uniform-state diffusion: UDLM (arXiv 2412.10193), Duo (2506.10892), after D3PM (2107.03006)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.processes.noised import Noised
from redraft.schedules import Linear, Schedule

SMALLEST = 1e-9  # lower bound of alpha and 1 - alpha, where the loss would be 0 * inf


@dataclass(frozen=True, kw_only=True)
class UniformDiffusion:
    """Replace each token with probability 1 - alpha(t) by one drawn uniformly from the N tokens of the vocabulary.

    Noise looks like text, so every position is a target and may change at any time. The bound in continuous time
    (arXiv 2412.10193; the same in Duo), with y = N alpha x_0 + (1 - alpha), y' the same with the prediction p in x_0's
    place, and i = x_t, is

        NELBO(x_0) = E_t E_{x_t} [ -alpha'(t) / (N alpha(t)) * sum over positions of
                                   N / y'_i - N / y_i + sum_j y_j / y_i * log(y_j y'_i / (y_i y'_j)) ]

    Its minimum is the p(x_0^l | all of x_t but position l) of each position l. At the minimum the bound equals
    -log p(x_0), and "plug_in" is the true posterior; "mixture" needs p(x_0^l | x_t) (arXiv 2605.22765; tested).

    A stock model has no input for the time: it reads the noise level off x_t.
    """

    noise: ClassVar = "uniform"
    default_preset: ClassVar = "duo"
    varied_sampling: ClassVar[dict[str, Any]] = {}  # the default preset draws varied text

    vocab_size: int
    """N: noise is drawn from the ids 0 to N - 1, and all clean tokens lie there."""
    schedule: Schedule = field(default_factory=Linear)

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2; got {self.vocab_size}. Uniform noise needs a choice.")

    @classmethod
    def build(
        cls, *, mask_token_id: int, vocab_size: int, schedule: Schedule, exclude_mask: bool = True
    ) -> "UniformDiffusion":
        """Build the process for a model; a mask token does not matter."""
        return cls(vocab_size=vocab_size, schedule=schedule)

    def corrupt(
        self,
        x_0: Int[Tensor, "batch seq"],
        t: Float[Tensor, "batch"] | Float[Tensor, "batch seq"],
        *,
        u: Float[Tensor, "batch seq"],
        can_change: Bool[Tensor, "batch seq"] | None = None,
    ) -> Noised:
        """Renoise each token with probability 1 - alpha(t); t per row or per position.

        `u` ~ U[0, 1) decides both whether and to which token. Positions outside `can_change` (prompt, padding) keep
        their token and are no target; all others are targets.
        """
        if t.ndim == 1:
            t = t[:, None].expand(x_0.shape)
        if can_change is None:
            can_change = torch.ones_like(x_0, dtype=torch.bool)
        share = 1 - self.schedule.alpha(t)
        x_t = torch.where(can_change & (u < share), self._token(u, share), x_0)
        return Noised(x_0=x_0, x_t=x_t, t=t, is_target=can_change)

    def loss(self, logits: Float[Tensor, "n vocab"], noised: Noised) -> Float[Tensor, "n"]:
        """Weigh the gap between true and predicted reverse rates: nats; their sum over a row samples its NELBO.

        `noised` holds the same n targets as `logits`. With c = N alpha / (1 - alpha) all y are divided by 1 - alpha, so
        that y_j = 1 + c [j = x_0] and y'_j = 1 + c p_j; only the sum of log y' runs over the vocabulary, in float32.
        """
        t, n = noised.t.to(torch.float64), self.vocab_size
        alpha = self.schedule.alpha(t)
        c = n * alpha.clamp(min=SMALLEST) / (1 - alpha).clamp(min=SMALLEST)
        p = logits[:, :n].float().softmax(dim=-1)
        p_x_0, p_x_t = (p.gather(1, ids[:, None])[:, 0].to(torch.float64) for ids in (noised.x_0, noised.x_t))
        sum_log = torch.log1p(c[:, None].float() * p).sum(dim=-1).to(torch.float64)
        y = 1 + c * (noised.x_t == noised.x_0)  # at x_t
        predicted = 1 + c * p_x_t
        cross = (1 + c) * c.log1p() - c * (c * p_x_0).log1p() - sum_log + (n + c) * (predicted.log() - y.log())
        rate = -self.schedule.derivative(t) / (n * alpha.clamp(min=SMALLEST))
        return (rate * ((n + c) * (1 / predicted - 1 / y) + cross / y)).float()

    def prior(self, u: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return pure noise: uniform tokens, from `u` ~ U[0, 1)."""
        return self._token(u, torch.ones_like(u))

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
        """Draw x_s for s < t from the posterior, given an x_0 drawn from the prediction p.

        The posterior q(x_s | x_t, x_0) takes a prediction in one of two ways. "plug_in" puts p in x_0's place (UDLM,
        Duo): pass `x_t_prob`, the predicted probability that x_t itself is clean. "mixture" averages over x_0 (D3PM):
        leave `x_t_prob` out. They agree where the prediction is certain.

        The draw is one of three: keep x_t, take x_0, or renoise. `u` ~ U[0, 1) chooses, and picks the token of the
        last, so no tensor is as large as the vocabulary.
        """
        n = self.vocab_size
        alpha_t = self.schedule.alpha(t.to(torch.float64))
        alpha_s = self.schedule.alpha(s.to(torch.float64)).clamp(min=SMALLEST)
        p_x_t = (x_t == x_0).to(torch.float64) if x_t_prob is None else x_t_prob.to(torch.float64)
        keep = alpha_t * p_x_t + alpha_t / alpha_s * (1 - alpha_s) / n
        clean = (alpha_s - alpha_t) / n
        renoise = (1 - alpha_t / alpha_s) * (1 - alpha_s) / n
        left = u * (keep + clean + renoise) - keep
        x_s = torch.where((left < clean) | (renoise == 0), x_0, self._token(left - clean, renoise))
        return torch.where(left < 0, x_t, x_s)

    def _token(self, u: Float[Tensor, "*shape"], top: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Map u ~ U[0, top) to the vocabulary; beyond [0, top) to any token."""
        share = u / top.clamp(min=torch.finfo(top.dtype).tiny)
        return (share.clamp(0, 1) * self.vocab_size).long().clamp(max=self.vocab_size - 1)
