"""What is asked, how it is estimated, and what comes back."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Int
from torch import Tensor

from redraft.models.denoiser import Denoiser


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """How likelihoods are estimated."""

    samples: int = 128
    """Monte-Carlo samples per continuation (of a block-causal model: per block); an even number."""
    confidence: float | None = None
    """Stop sampling a multiple-choice question once its best choice is known with this probability, e.g. 0.99."""
    cfg_scale: float = 0.0
    """Guidance as in LLaDA: un + (scale + 1)(cond - un), where un sees a masked context; doubles the work."""
    exclude_mask: bool = True
    """Give the mask token probability 0; the published code of LLaDA leaves it in the softmax."""
    masks: Literal["weighted", "stratified", "antithetic", "independent"] = "weighted"
    """How many tokens a sample masks: weighted draws few more often; the others are there to be compared with."""
    control: bool = True
    """Take off what other samples foretell of each token; off is the published estimator."""
    share_context: bool = True
    """Run the clean blocks of a block-causal model once for all samples and choices of a question; off to compare."""
    batch_tokens: int | None = None
    """Tokens in one forward pass; by default 16384 on an accelerator, 2048 on a CPU, whose caches are small."""
    seed: int = 0
    """Seed of the masks."""

    def __post_init__(self) -> None:
        if self.samples < 4 or self.samples % 2:
            raise ValueError(f"samples must be an even number of at least 4; got {self.samples}.")
        if self.confidence is not None and not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence is a probability in [0.5, 1); got {self.confidence}. Use 0.99.")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1; got {self.batch_tokens}.")

    def num_units(self, samples: int) -> int:
        """Count the independent values that so many samples make."""
        return samples // 2 if self.masks == "antithetic" else samples

    def tokens_per_forward(self, denoiser: Denoiser) -> int:
        """Bound the tokens of one forward pass."""
        return self.batch_tokens or (2048 if denoiser.device.type == "cpu" else 16384)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One continuation to be scored after its context; either may hold any token, the mask token too."""

    context: Int[Tensor, "c"]
    continuation: Int[Tensor, "l"]
    key: int = 0
    """Requests of equal key share their noise; the choices of one question should."""

    def __post_init__(self) -> None:
        if not len(self.continuation):
            raise ValueError("a continuation must hold at least one token; got none.")


@dataclass(frozen=True, kw_only=True)
class LogLikelihood:
    """A lower bound of log p(continuation | context) in nats, and the standard error of its estimate."""

    nats: float
    standard_error: float
    """Of the Monte Carlo alone; 0 where all masks were summed, and for autoregressive models."""
    num_tokens: int
    forwards: int
    """Rows that went through the model, two per sample under guidance; of a block-causal model a row is a block."""
    is_greedy: bool | None = None
    """Whether each token is the likeliest after those before it; None but for autoregressive models."""


def rolling_requests(tokens: Int[Tensor, "n"], *, window: int, context: int = 0, key: int = 0) -> list[Request]:
    """Cut a text into disjoint continuations, each after at most `context` tokens, that fit into `window` together."""
    if not 0 <= context < window:
        raise ValueError(f"context must leave room in the window of {window} tokens; got {context}.")
    stride = window - context
    starts = [0, *range(window, len(tokens), stride)]
    ends = [*starts[1:], len(tokens)]
    return [
        Request(context=tokens[max(0, start - context) : start], continuation=tokens[start:end], key=key + i)
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
