"""Proposals: a clean token for each open position, and how likely the model finds it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

VOCAB_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Tokens x_0 at n open positions, and the distributions that they came from.

    All probabilities are those of the unmodified float32 softmax, whatever temperature or cut the draw had.
    """

    x_0: Int[Tensor, "n"]
    confidence: Float[Tensor, "n"]
    """Probability of x_0."""
    logits: Float[Tensor, "n vocab"]
    log_normaliser: Float[Tensor, "n"]

    def probability_of(self, tokens: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Return the probability of one token at each position."""
        return (self.logits.gather(-1, tokens[:, None])[:, 0] - self.log_normaliser).exp()

    def margin(self) -> Float[Tensor, "n"]:
        """Return the probability of the likeliest token less that of the second."""
        top = (self.logits.topk(2, dim=-1).values - self.log_normaliser[:, None]).exp()
        return top[:, 0] - top[:, 1]

    def entropy(self) -> Float[Tensor, "n"]:
        """Return the entropy in nats."""
        log_p = self.logits - self.log_normaliser[:, None]
        return -(log_p.exp() * log_p).nan_to_num(0.0).sum(dim=-1)


def propose(
    logits: Float[Tensor, "n vocab"],
    *,
    never: int | None,
    u: Float[Tensor, "n"] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Proposal:
    """Draw x_0 from softmax(logits / temperature) cut to the top k tokens and the top p of mass; the argmax at 0.

    `u` ~ U[0, 1) is the one random number a position needs: it is looked up in the cumulative distribution, which is
    cheaper than Gumbel noise over the vocabulary. The token `never` (the mask) is never proposed. The confidence is
    the probability of x_0 in the plain float32 softmax, as in LLaDA's sampler (arXiv 2502.09992).
    """
    logits = logits.float()
    log_normaliser = logits.logsumexp(dim=-1)
    with _without(never, logits):
        if temperature == 0:
            x_0 = logits.argmax(dim=-1)
        else:
            if u is None:
                raise ValueError(f"a temperature of {temperature} needs random numbers u; got None.")
            x_0 = _draw(_cut(logits / temperature, top_k=top_k, top_p=top_p), u)
    confidence = (logits.gather(-1, x_0[:, None])[:, 0] - log_normaliser).exp()
    return Proposal(x_0=x_0, confidence=confidence, logits=logits, log_normaliser=log_normaliser)


@contextmanager
def _without(token_id: int | None, logits: Float[Tensor, "n vocab"]) -> Iterator[None]:
    """Take a token out of the logits for a while, in place: a copy would cost as much as the choice itself."""
    if token_id is None:
        yield
        return
    kept = logits[:, token_id].clone()
    logits[:, token_id] = -torch.inf
    yield
    logits[:, token_id] = kept


def _cut(logits: Float[Tensor, "n vocab"], *, top_k: int | None, top_p: float | None) -> Float[Tensor, "n vocab"]:
    """Remove all but the k best tokens, and then all that lie beyond the first p of the mass."""
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        mass_before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(mass_before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, index, ordered)
    return logits


def _draw(logits: Float[Tensor, "n vocab"], u: Float[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Invert the cumulative distribution in two levels, chunk and token, so that float32 sums stay exact enough."""
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % VOCAB_CHUNK))
    weights = weights.reshape(len(weights), weights.shape[-1] // VOCAB_CHUNK, VOCAB_CHUNK)
    chunk_ends = weights.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)  # (n, chunks)
    target = u.to(torch.float64)[:, None] * chunk_ends[:, -1:]
    chunk = _first_beyond(chunk_ends, target)
    row = torch.arange(len(chunk), device=chunk.device)
    before = torch.where(chunk > 0, chunk_ends[row, (chunk - 1).clamp(min=0)], 0.0)
    token_ends = weights[row, chunk].to(torch.float64).cumsum(dim=-1)
    return chunk * VOCAB_CHUNK + _first_beyond(token_ends, target - before[:, None])


def _first_beyond(ends: Float[Tensor, "n m"], target: Float[Tensor, "n 1"]) -> Int[Tensor, "n"]:
    """Find the first interval that ends beyond the target and has some mass."""
    found = torch.searchsorted(ends, target, right=True)[:, 0]
    # Rounding may put the target on the very end: then the last interval with mass is meant.
    last = (ends < ends[:, -1:]).sum(dim=-1)
    return torch.minimum(found, last)
