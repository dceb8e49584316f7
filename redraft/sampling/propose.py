"""Proposals: a clean token for each open position, and how likely the model finds it.

The logits of the open positions are the largest tensor of a step, so they are read in pieces that stay in the
processor's cache, and never copied whole. That is faster than torch.compile's fusion (benchmarks/results/sampling.md).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from redraft.randomness import uniform

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
    """As the model gave them, in its dtype."""
    log_normaliser: Float[Tensor, "n"]
    best: Int[Tensor, "n"] | None = None
    """The most probable tokens that satisfy a constraint together, if there is one and a policy may need them."""

    def likeliest(self) -> Int[Tensor, "n"]:
        """Return the model's first choice at each position."""
        return self.logits.argmax(dim=-1) if self.best is None else self.best

    def probability_of(self, tokens: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Return the probability of one token at each position."""
        return (_at(self.logits, tokens) - self.log_normaliser).exp()

    def entropy(self) -> Float[Tensor, "n"]:
        """Return the entropy in nats."""
        entropy = torch.empty_like(self.log_normaliser)
        for rows in _pieces(self.logits):
            log_p = self.logits[rows].float() - self.log_normaliser[rows, None]
            entropy[rows] = -(log_p.exp() * log_p).nan_to_num_(0.0).sum(dim=-1)
        return entropy


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
    scan = _scan(logits, never, temperature)
    if temperature == 0:
        x_0 = scan.best()
    elif u is None:
        raise ValueError(f"a temperature of {temperature} needs random numbers u; got None.")
    elif top_k is not None and top_k < logits.shape[-1]:
        x_0 = _draw_of_best(scan, u, top_k=top_k, top_p=top_p)
    elif top_p is not None and top_p < 1:
        x_0 = _draw_nucleus(scan, u, top_p=top_p)
    else:
        x_0 = scan.draw(u)
    confidence = (_at(logits, x_0) - scan.log_normaliser).exp()
    return Proposal(x_0=x_0, confidence=confidence, logits=logits, log_normaliser=scan.log_normaliser)


@dataclass(frozen=True, kw_only=True)
class _Scan:
    """Results of one pass over the logits. The token `never` is left out, except in the normaliser."""

    logits: Float[Tensor, "n vocab"]
    never: int | None
    temperature: float
    chunk_max: Float[Tensor, "n chunks"]
    """Largest logit of each chunk of the vocabulary."""
    chunk_mass: Float[Tensor, "n chunks"]
    """Mass of each chunk at the temperature, the likeliest token having 1."""
    log_normaliser: Float[Tensor, "n"]
    """Of the plain softmax."""
    floor: Float[Tensor, "n"] | None = None
    """Tokens with logits no larger than this are left out of a draw."""

    @property
    def width(self) -> int:
        """Tokens in a chunk."""
        return min(VOCAB_CHUNK, self.logits.shape[-1])

    def weights(self, values: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """Turn logits into mass at the temperature; float64."""
        return ((values - self.chunk_max.amax(dim=-1, keepdim=True)) / self.temperature).exp().to(torch.float64)

    def chunk(self, chunk: Int[Tensor, "n"]) -> Float[Tensor, "n m"]:
        """Read one chunk of each row again."""
        vocab_size = self.logits.shape[-1]
        ids = chunk[:, None] * self.width + torch.arange(self.width, device=chunk.device)
        values = self.logits.gather(-1, ids.clamp(max=vocab_size - 1)).float()
        is_out = ids >= vocab_size
        if self.never is not None:
            is_out |= ids == self.never
        if self.floor is not None:
            is_out |= values <= self.floor[:, None]
        return values.masked_fill_(is_out, -torch.inf)

    def best(self) -> Int[Tensor, "n"]:
        """Find the largest logit; of equals the first."""
        chunk = self.chunk_max.argmax(dim=-1)
        return chunk * self.width + self.chunk(chunk).argmax(dim=-1)

    def draw(self, u: Float[Tensor, "n"]) -> Int[Tensor, "n"]:
        """Invert the cumulative distribution in two levels, chunk and token, so that float32 sums stay exact enough."""
        chunk_ends = self.chunk_mass.to(torch.float64).cumsum(dim=-1)  # (n, chunks)
        target = u.to(torch.float64)[:, None] * chunk_ends[:, -1:]
        chunk = _first_beyond(chunk_ends, target)
        before = chunk_ends.gather(-1, chunk[:, None]) - self.chunk_mass.gather(-1, chunk[:, None])
        token_ends = self.weights(self.chunk(chunk)).cumsum(dim=-1)
        return chunk * self.width + _first_beyond(token_ends, target - before)


def _scan(logits: Float[Tensor, "n vocab"], never: int | None, temperature: float) -> _Scan:
    """Read the logits once, some rows at a time.

    Of each chunk of the vocabulary only the largest logit and the mass are kept: a draw chooses a chunk by its mass,
    and reads that chunk alone again. The float32 buffers are reused for every piece, so they stay in the cache.
    """
    n, vocab_size = logits.shape
    width = min(VOCAB_CHUNK, vocab_size)
    num_chunks = -(-vocab_size // width)
    chunk_max = logits.new_empty((n, num_chunks), dtype=torch.float32)
    chunk_mass = torch.empty_like(chunk_max)
    total = logits.new_empty(n, dtype=torch.float32)
    z = weights = chunk_max.new_empty(0)
    for rows in _pieces(logits):
        size = rows.stop - rows.start
        if size != len(z):
            z = chunk_max.new_full((size, num_chunks, width), -torch.inf)  # what is past the vocabulary stays
            weights = torch.empty_like(z)
        flat = z.view(size, -1)
        flat[:, :vocab_size] = logits[rows]
        if never is not None:
            flat[:, never] = -torch.inf
        chunk_max[rows] = z.amax(dim=-1)
        z -= chunk_max[rows].amax(dim=-1)[:, None, None]
        mass = torch.exp(z, out=weights).sum(dim=-1)
        total[rows] = mass.sum(dim=-1)
        if temperature not in (0, 1):
            mass = torch.exp(z.div_(temperature), out=weights).sum(dim=-1)
        chunk_mass[rows] = mass
    log_normaliser = chunk_max.amax(dim=-1) + total.log()
    if never is not None:
        log_normaliser = torch.logaddexp(log_normaliser, logits[:, never].float())
    return _Scan(
        logits=logits,
        never=never,
        temperature=temperature,
        chunk_max=chunk_max,
        chunk_mass=chunk_mass,
        log_normaliser=log_normaliser,
    )


def _pieces(logits: Float[Tensor, "n vocab"]) -> list[slice]:
    """Cut the rows into pieces: on a CPU such that a float32 copy of one stays in its cache."""
    n, vocab_size = logits.shape
    size = max(1, (2**18 if logits.device.type == "cpu" else 2**27) // vocab_size)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _draw_of_best(scan: _Scan, u: Float[Tensor, "n"], *, top_k: int, top_p: float | None) -> Int[Tensor, "n"]:
    """Draw among the k likeliest tokens, of these among the first that hold p of their mass."""
    size = min(top_k, scan.logits.shape[-1])
    likely = scan.logits.topk(min(size + 1, scan.logits.shape[-1]), dim=-1)  # one more: `never` may be among them
    is_out = torch.zeros_like(likely.indices, dtype=torch.bool) if scan.never is None else likely.indices == scan.never
    is_out[:, size:] |= ~is_out.any(dim=-1, keepdim=True)
    weights = scan.weights(likely.values.float().masked_fill_(is_out, -torch.inf))
    before = weights.cumsum(dim=-1) - weights
    weights = weights.masked_fill(before >= (top_p or torch.inf) * weights.sum(dim=-1, keepdim=True), 0.0)
    ends = weights.cumsum(dim=-1)
    return likely.indices.gather(-1, _first_beyond(ends, u.to(torch.float64)[:, None] * ends[:, -1:])[:, None])[:, 0]


def _draw_nucleus(scan: _Scan, u: Float[Tensor, "n"], *, top_p: float) -> Int[Tensor, "n"]:
    """Draw among the likeliest tokens that together hold p of the mass, without sorting the vocabulary.

    Rejection sampling: draw from the whole distribution. The token lies in the nucleus if the tokens with larger logits
    hold less than p of the mass. If it does not, no token with a smaller logit does either, so the next draw is from
    those above it alone (`floor`). Every token of the nucleus stays above the floor, so accepted draws have exactly the
    distribution of the nucleus. A draw is accepted with probability p or more: 1 / p passes are expected at most.
    """
    total = scan.chunk_mass.sum(dim=-1, dtype=torch.float64)
    x_0, left = scan.draw(u), torch.arange(len(u), device=u.device)
    while True:
        value = _at(scan.logits, x_0[left])
        above = _mass_above(scan, value)
        out = (above.sum(dim=-1, dtype=torch.float64) >= top_p * total[left]).nonzero()[:, 0]  # sync
        if not len(out):
            return x_0
        left, u = left[out], uniform(u.to(torch.float64)[out].view(torch.int64))  # derive the next u by hashing this
        scan = replace(
            scan,
            logits=scan.logits[out],
            chunk_max=scan.chunk_max[out],
            chunk_mass=above[out],
            log_normaliser=scan.log_normaliser[out],
            floor=value[out],
        )
        x_0[left] = scan.draw(u)


def _mass_above(scan: _Scan, value: Float[Tensor, "n"]) -> Float[Tensor, "n chunks"]:
    """Sum the mass of the tokens with larger logits, by chunk."""
    mass = torch.empty_like(scan.chunk_mass)
    for rows in _pieces(scan.logits):
        z = scan.logits[rows].float()
        is_out = z <= value[rows, None]
        if scan.never is not None:
            is_out[:, scan.never] = True
        z = (z - scan.chunk_max[rows].amax(dim=-1, keepdim=True)).div_(scan.temperature)
        z = z.exp_().masked_fill_(is_out, 0.0)
        mass[rows] = F.pad(z, (0, -z.shape[1] % VOCAB_CHUNK)).view(len(z), -1, VOCAB_CHUNK).sum(dim=-1)
    return mass


def _at(logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    return logits.gather(-1, tokens[:, None])[:, 0].float()


def _first_beyond(ends: Float[Tensor, "n m"], target: Float[Tensor, "n 1"]) -> Int[Tensor, "n"]:
    """Find the first interval that ends beyond the target and has some mass."""
    first = torch.searchsorted(ends, target, right=True)[:, 0]
    # Rounding may put the target on the very end: then the last interval with mass is meant.
    last = (ends < ends[:, -1:]).sum(dim=-1)
    return torch.minimum(first, last)
