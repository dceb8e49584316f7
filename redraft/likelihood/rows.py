"""Noised continuations through the model: rows of like length share forward passes, the head runs at masks alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.likelihood.requests import LikelihoodConfig
from redraft.models.denoiser import Denoiser
from redraft.models.query import Query
from redraft.sampling.guidance import guided

LOGITS_PER_BATCH = 2**26


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one estimate is about: the last tokens of a row, under masks; all before them is given."""

    tokens: Int[Tensor, "seq"]
    is_masked: Bool[Tensor, "samples l"]
    context_len: int
    """What guidance hides; the earlier blocks of the continuation stay."""

    @property
    def start(self) -> int:
        """Where the part begins."""
        return len(self.tokens) - self.is_masked.shape[1]

    @property
    def target(self) -> Int[Tensor, "l"]:
        """The tokens that may be masked."""
        return self.tokens[self.start :]

    def blind(self, mask_token_id: int) -> Int[Tensor, "seq"]:
        """Return what guidance sees: the context masked."""
        return torch.where(torch.arange(len(self.tokens)) < self.context_len, mask_token_id, self.tokens)


def score_rows(denoiser: Denoiser, parts: Sequence[Part], config: LikelihoodConfig) -> list[Tensor]:
    """Evaluate log p of masked tokens, nats, and whether each is the likeliest; (samples, l, 2), 0 at the others."""
    order = [(len(part.tokens), i, row) for i, part in enumerate(parts) for row in range(len(part.is_masked))]
    found = [torch.zeros(*part.is_masked.shape, 2, dtype=torch.float64) for part in parts]
    most, vocab_size = config.tokens_per_forward(denoiser), denoiser.model.config.vocab_size
    for batch in _batches(parts, [(i, row) for _, i, row in sorted(order)], most_tokens=most, vocab_size=vocab_size):
        scores = _score_batch(denoiser, [(parts[i], parts[i].is_masked[row]) for i, row in batch], config).cpu()
        for (i, row), score in zip(batch, scores, strict=True):
            found[i][row] = score[parts[i].start : len(parts[i].tokens)]
    return found


def _batches(
    parts: Sequence[Part], rows: list[tuple[int, int]], *, most_tokens: int, vocab_size: int
) -> Iterator[list[tuple[int, int]]]:
    """Group rows, ordered by length, so that neither tokens nor logits outgrow a forward pass."""
    batch: list[tuple[int, int]] = []
    num_masked = 0
    counts = [part.is_masked.sum(dim=1).tolist() for part in parts]
    for i, row in rows:
        too_long = (len(batch) + 1) * len(parts[i].tokens) > most_tokens
        if batch and (too_long or (num_masked + counts[i][row]) * vocab_size > LOGITS_PER_BATCH):
            yield batch
            batch, num_masked = [], 0
        batch.append((i, row))
        num_masked += counts[i][row]
    if batch:
        yield batch


@torch.no_grad()
def _score_batch(
    denoiser: Denoiser, rows: list[tuple[Part, Tensor]], config: LikelihoodConfig
) -> Float[Tensor, "batch seq 2"]:
    """Run one batch. An autoregressive model sees the tokens before each."""
    device, mask_token_id = denoiser.device, denoiser.settings.mask_token_id
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad([part.tokens for part, _ in rows], batch_first=True).to(device)
    is_masked = pad([F.pad(mask, (part.start, 0)) for part, mask in rows], batch_first=True).to(device)
    lengths = torch.tensor([len(part.tokens) for part, _ in rows], device=device)
    positions = torch.arange(tokens.shape[1], device=device)
    is_ragged = len(rows[0][0].tokens) < len(rows[-1][0].tokens)
    segment_ids = (positions < lengths[:, None]).long() if is_ragged else None
    where = is_masked.flatten().nonzero()[:, 0]  # sync: how many are masked is data
    is_hidden = is_masked & (positions == 0) if denoiser.settings.is_autoregressive else is_masked
    x_t = torch.where(is_hidden, mask_token_id, tokens)
    logits = denoiser(Query(input_ids=x_t, where=where, segment_ids=segment_ids)).float()
    if config.cfg_scale:
        context_len = torch.tensor([part.context_len for part, _ in rows], device=device)
        blind = torch.where(positions < context_len[:, None], mask_token_id, x_t)
        unconditional = denoiser(Query(input_ids=blind, where=where, segment_ids=segment_ids)).float()
        logits = guided(logits, unconditional, scale=config.cfg_scale)
    found = token_scores(logits, tokens.flatten()[where], mask_token_id if config.exclude_mask else None)
    return found.new_zeros(tokens.numel(), 2).index_copy(0, where, found).view(*tokens.shape, 2)


def token_scores(
    logits: Float[Tensor, "n vocab"], targets: Int[Tensor, "n"], excluded: int | None
) -> Float[Tensor, "n 2"]:
    """Evaluate log p of tokens, and whether each is the likeliest; the excluded token's logits are overwritten."""
    if excluded is not None:
        logits[:, excluded] = -torch.inf
    nats = -F.cross_entropy(logits, targets, reduction="none").double()
    return torch.stack([nats, (logits.argmax(-1) == targets).double()], dim=1)
