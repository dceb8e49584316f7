"""Block-causal models: the clean blocks of a question are run once, and every noised block reads their keys and values.

What the choices of a question have in common, whole blocks of context, is computed once: the clean blocks form a tree,
and a block attends to its ancestors and itself. Noised copies of blocks lie one behind the other in one row, each at
the positions of its block; a copy attends to the clean blocks before it and to itself. To an autoregressive model a
token is a block, and a choice is a copy of many blocks, with nothing noised.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.likelihood.requests import LikelihoodConfig
from redraft.likelihood.rows import Part, token_scores
from redraft.models.cache import Slots, SlotSpans
from redraft.models.denoiser import Denoiser
from redraft.models.query import Query
from redraft.sampling.guidance import guided

ROOT = 0  # before all blocks
MOST_COPIED_TOKENS = 512  # in one forward: each is compared with all others before the mask says no


def can_share(denoiser: Denoiser) -> bool:
    """Tell whether a model has blocks whose keys and values can be kept."""
    return denoiser.settings.block_size is not None and not denoiser.is_self_conditioned and denoiser.can_append


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The clean blocks of a few texts, each of which but the root follows another."""

    size: int
    children: dict[tuple[int, tuple[int, ...]], int]
    """(block before, tokens) -> number of a block."""
    tokens: Int[Tensor, "clean"]
    positions: Int[Tensor, "clean"]
    is_seen: Bool[Tensor, "blocks clean"]
    """Which tokens each block sees: its ancestors' and its own; the root none."""

    @classmethod
    def of(cls, texts: Sequence[Tensor], size: int) -> "Tree":
        """Take whole blocks as long as there is something to score behind them."""
        children: dict[tuple[int, tuple[int, ...]], int] = {}
        for text in texts:
            node = ROOT
            for block in _blocks(text, len(text) - 1, size):
                node = children.setdefault((node, block), len(children) + 1)
        is_above = torch.zeros(len(children) + 1, len(children) + 1, dtype=torch.bool)
        for (parent, _), node in children.items():
            is_above[node] = is_above[parent]
            is_above[node, node] = True
        depths = is_above.sum(dim=1)[1:] - 1
        return cls(
            size=size,
            children=children,
            tokens=torch.tensor([token for _, block in children for token in block], dtype=torch.int64),
            positions=(depths[:, None] * size + torch.arange(size)).flatten(),
            is_seen=is_above[:, 1:].repeat_interleave(size, dim=1),
        )

    def before(self, text: Int[Tensor, "seq"], start: int) -> int:
        """Find the block that ends where the block of `start` begins."""
        node = ROOT
        for block in _blocks(text, start, self.size):
            node = self.children[node, block]
        return node


def _blocks(text: Int[Tensor, "seq"], end: int, size: int) -> list[tuple[int, ...]]:
    """List the whole blocks before a position."""
    tokens = text.tolist()
    return [tuple(tokens[i : i + size]) for i in range(0, end // size * size, size)]


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Noised copies of blocks, flattened; under a logit shift each begins with the clean token before its block."""

    tokens: Int[Tensor, "n"]
    positions: Int[Tensor, "n"]
    copy: Int[Tensor, "n"]
    parent: Int[Tensor, "n"]
    """The clean block before."""
    is_lead: Bool[Tensor, "n"]
    """Clean token before the block: it predicts the block's first one, and nobody sees it."""


class SharedBlocks:
    """A tree's keys and values, computed at the first use and kept."""

    def __init__(self, denoiser: Denoiser, tree: Tree) -> None:
        self.denoiser, self.tree = denoiser, tree
        self.slots = Slots(1, len(tree.tokens) + MOST_COPIED_TOKENS)

    def logits_at(self, where: Int[Tensor, "m"], copies: Copies) -> Float[Tensor, "m vocab"]:
        """Return the logits that come out at these of the copies' tokens."""
        tree, nowhere = self.tree, where[:0]
        num_clean = len(tree.tokens)
        if num_clean and not self.slots.layers:
            block = torch.arange(1, len(tree.is_seen)).repeat_interleave(tree.size)
            self._feed(nowhere, tree.tokens, tree.positions, tree.is_seen[block], after=0)
        self.slots.reserve(1, num_clean + len(copies.tokens))
        block = copies.positions // tree.size
        is_own = (copies.copy[:, None] == copies.copy) & (block[:, None] >= block) & ~copies.is_lead
        mask = torch.cat([tree.is_seen[copies.parent], is_own], dim=1)
        return self._feed(where, copies.tokens, copies.positions, mask, after=num_clean)

    def _feed(
        self,
        where: Int[Tensor, "m"],
        tokens: Int[Tensor, "n"],
        positions: Int[Tensor, "n"],
        mask: Bool[Tensor, "n keys"],
        *,
        after: int,
    ) -> Float[Tensor, "m vocab"]:
        device, end = self.denoiser.device, after + len(tokens)
        spans = SlotSpans(starts=[after], ends=[end], key_ends=[end], reads_all=False)
        query = Query(
            input_ids=tokens[None].to(device),
            where=where.to(device),
            positions=positions[None].to(device),
            shift=False,  # `where` is shifted already
            view=self.slots.view(spans, device),
            sees=mask[None].to(device),
            slot_positions=torch.cat([self.tree.positions[:after], positions])[None].to(device),
        )
        return self.denoiser(query)


def score_blocks(parts: Sequence[Part], texts: Sequence[SharedBlocks], config: LikelihoodConfig) -> list[Tensor]:
    """Score the noised blocks of one question as `rows.score_rows` does.

    `texts` are the clean blocks, and with guidance those of the texts without their contexts.
    """
    found = [torch.zeros(*part.is_masked.shape, 2, dtype=torch.float64) for part in parts]
    denoiser = texts[0].denoiser
    mask_token_id = denoiser.settings.mask_token_id
    for batch in _batches(parts, texts[0].tree.size, most=min(MOST_COPIED_TOKENS, config.tokens_per_forward(denoiser))):
        logits = _logits(texts[0], parts, batch, hides_context=False)
        if config.cfg_scale:
            blind = _logits(texts[1], parts, batch, hides_context=True)
            logits = guided(logits, blind, scale=config.cfg_scale)
        is_masked = [parts[i].is_masked[row] for i, row in batch]
        targets = torch.cat([parts[i].target[mask] for (i, _), mask in zip(batch, is_masked, strict=True)])
        scores = token_scores(logits, targets.to(logits.device), mask_token_id if config.exclude_mask else None).cpu()
        pieces = scores.split([int(mask.sum()) for mask in is_masked])
        for (i, row), mask, piece in zip(batch, is_masked, pieces, strict=True):
            found[i][row, mask] = piece
    return found


def _batches(parts: Sequence[Part], size: int, *, most: int) -> Iterator[list[tuple[int, int]]]:
    """Group copies, each (part, sample), up to as many tokens."""
    batch: list[tuple[int, int]] = []
    num_tokens = 0
    for i, part in enumerate(parts):
        width = 1 + len(part.tokens) - part.start // size * size
        for row in range(len(part.is_masked)):
            if batch and num_tokens + width > most:
                yield batch
                batch, num_tokens = [], 0
            batch.append((i, row))
            num_tokens += width
    if batch:
        yield batch


@torch.no_grad()
def _logits(
    shared: SharedBlocks, parts: Sequence[Part], batch: list[tuple[int, int]], *, hides_context: bool
) -> Float[Tensor, "n vocab"]:
    """Predict the masked tokens of copies, one copy after the other."""
    settings, size = shared.denoiser.settings, shared.tree.size
    text_of = {i: parts[i].blind(settings.mask_token_id) if hides_context else parts[i].tokens for i, _ in batch}
    parent_of = {i: shared.tree.before(text, parts[i].start) for i, text in text_of.items()}
    columns: list[tuple[Tensor, ...]] = []
    where, end = [], 0
    for number, (i, row) in enumerate(batch):
        part, text = parts[i], text_of[i]
        begin = part.start // size * size
        lead = int(settings.shift_logits and begin > 0)
        positions = torch.arange(begin - lead, len(text))
        is_masked = F.pad(part.is_masked[row], (part.start - begin + lead, 0))
        is_hidden = is_masked & (positions == 0) if settings.is_autoregressive else is_masked
        tokens = torch.where(is_hidden, settings.mask_token_id, text[begin - lead :])
        number_of, parent = torch.full_like(tokens, number), torch.full_like(tokens, parent_of[i])
        columns.append((tokens, positions, number_of, parent, positions < begin))
        masked = is_masked.nonzero()[:, 0]
        where.append(end + (masked - int(settings.shift_logits)).clamp(min=0))
        end += len(tokens)
    tokens, positions, copy, parent, is_lead = map(torch.cat, zip(*columns, strict=True))
    copies = Copies(tokens=tokens, positions=positions, copy=copy, parent=parent, is_lead=is_lead)
    return shared.logits_at(torch.cat(where), copies).float()
