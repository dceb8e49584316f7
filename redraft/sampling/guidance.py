"""Guidance: what changes the logits on their way from the model to the draw."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redraft.sampling.canvas import Canvas, Status
from redraft.settings import Count, Settings

Guide = Callable[[Float[Tensor, "n vocab"], Canvas, Int[Tensor, "n"]], Float[Tensor, "n vocab"]]
"""(logits at the n open positions, canvas, these positions as indices into batch * seq) -> the logits, changed.

It may work in place."""


def unconditional(canvas: Canvas, mask_token_id: int) -> Int[Tensor, "batch seq"]:
    """Mask all given positions: the canvas of the unconditional branch (Section 2.4 of arXiv 2502.09992)."""
    return torch.where(canvas.status == Status.GIVEN, mask_token_id, canvas.tokens)


def guided(
    conditional: Float[Tensor, "n vocab"], without: Float[Tensor, "n vocab"], *, scale: float
) -> Float[Tensor, "n vocab"]:
    """Push the logits away from the unconditional ones: un + (scale + 1) (cond - un), as LLaDA does."""
    return without + (scale + 1) * (conditional - without)


_ORDERLESS = (
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "RepetitionPenaltyLogitsProcessor",
    "SuppressTokensLogitsProcessor",
)
"""Processors of transformers, besides its warpers, that do not depend on a token's position in the text."""


@dataclass(frozen=True, kw_only=True)
class Processors:
    """LogitsProcessors of transformers. Each open position is a row of scores; its `input_ids` are the whole canvas.

    Raises ValueError for processors of transformers that need the text to grow from left to right.
    """

    processors: tuple[Any, ...]
    never: int | None = None
    """Token that is never drawn (the mask): its logit is -inf before the processors run."""

    def __post_init__(self) -> None:
        for processor in self.processors:
            name, home = type(processor).__name__, type(processor).__module__
            is_orderless = name in _ORDERLESS or name.endswith("LogitsWarper")
            if name in ("NoBadWordsLogitsProcessor", "SequenceBiasLogitsProcessor"):
                is_orderless = all(len(ids) == 1 for ids in processor.sequence_bias)
            if home == "transformers.generation.logits_process" and not is_orderless:
                raise ValueError(
                    f"{name} counts the tokens before the next one, and a diffusion model writes in any order. "
                    f"Leave it out, or use a warper, {', '.join(_ORDERLESS)}, a constraint, or a processor of your own."
                )

    def __call__(
        self, logits: Float[Tensor, "n vocab"], canvas: Canvas, where: Int[Tensor, "n"]
    ) -> Float[Tensor, "n vocab"]:
        rows = canvas.tokens[where // canvas.tokens.shape[1]]  # (n, L)
        if self.never is not None:
            logits[:, self.never] = -torch.inf
        for processor in self.processors:
            logits = processor(rows, logits)
        return logits


@dataclass(frozen=True, kw_only=True)
class Reward(Settings):
    """Prefer clean estimates with a high reward: log p(token) + strength * reward(estimate with that token there).

    Discrete classifier-based guidance (D-CBG, Section 3.2 of arXiv 2412.10193) over the `top_k` likeliest tokens of
    each position; the other tokens are left out.
    """

    reward: Callable[[Int[Tensor, "m seq"]], Float[Tensor, "m"]]
    """Scores whole rows whose noise is replaced by the model's likeliest tokens; padding holds the mask token."""
    strength: float = 1.0
    top_k: Count = 8

    def __call__(
        self, logits: Float[Tensor, "n vocab"], canvas: Canvas, where: Int[Tensor, "n"]
    ) -> Float[Tensor, "n vocab"]:
        likely = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1)
        seq_len = canvas.tokens.shape[1]
        clean = canvas.tokens.flatten().scatter(0, where, likely.indices[:, 0]).view_as(canvas.tokens)
        trials = clean[where // seq_len][:, None].repeat(1, likely.indices.shape[1], 1)  # (n, k, L)
        at = (where % seq_len)[:, None, None].expand(-1, trials.shape[1], 1)
        trials = trials.scatter(2, at, likely.indices[:, :, None])
        rewards = self.reward(trials.flatten(0, 1)).to(logits.dtype).view_as(likely.values)
        return torch.full_like(logits, -torch.inf).scatter(1, likely.indices, likely.values + self.strength * rewards)
