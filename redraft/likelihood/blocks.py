"""Block-causal models: the clean blocks of a question are run once, and every noised block reads their keys and values.

The choices of a question share blocks of context. The clean blocks form a tree, in which equal blocks after equal
blocks are one node; a block attends to its ancestors and itself. Noised copies of blocks are concatenated in one row,
each at the positions of its block; a copy attends to the clean blocks before it and to itself. For a causal
model a token is a block, and a choice is a copy of many blocks in which nothing is noised.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.likelihood.spans import MaskedSpan, Sample, at_least_float32, tokens_per_forward
from redraft.models.cache import Slots, SlotSpans
from redraft.models.denoiser import Denoiser
from redraft.models.query import Query

ROOT = 0  # the node before all blocks
MAX_COPIED_TOKENS = 512  # in one forward: the mask grows with its square


def can_share(denoiser: Denoiser) -> bool:
    """Whether keys and values of a model's clean blocks can be reused by the blocks after them."""
    return denoiser.settings.block_size is not None and not denoiser.is_self_conditioned and denoiser.can_append


class SharedBlocks:
    """The clean blocks before the spans of a question; their keys and values are computed at the first use."""

    def __init__(self, denoiser: Denoiser, spans: Sequence[MaskedSpan], *, hides_context: bool) -> None:
        size = 1 if denoiser.settings.is_causal else denoiser.settings.block_size
        assert size is not None
        self.denoiser, self.size, self.hides_context = denoiser, size, hides_context
        children: dict[tuple[int, tuple[int, ...]], int] = {}  # (block before, tokens) -> number of a block
        self.parents: dict[MaskedSpan, int] = {}
        """The number of the block before a span's first one."""
        for span in spans:
            text, node = span.inputs(0, denoiser.settings, hides_context=hides_context).tolist(), ROOT
            for start in range(0, self._begin(span), size):
                node = children.setdefault((node, tuple(text[start : start + size])), len(children) + 1)
            self.parents[span] = node
        is_above = torch.zeros(len(children) + 1, len(children) + 1, dtype=torch.bool)
        for (parent, _), node in children.items():
            is_above[node] = is_above[parent]
            is_above[node, node] = True
        depths = is_above.sum(dim=1)[1:] - 1
        self.tokens = torch.tensor([token for _, block in children for token in block], dtype=torch.int64)
        self.positions = (depths[:, None] * size + torch.arange(size)).flatten()
        self.is_seen = is_above[:, 1:].repeat_interleave(size, dim=1)
        """(blocks, clean tokens): which tokens each block sees: its ancestors' and its own; the root sees none."""
        self.max_tokens = min(MAX_COPIED_TOKENS, tokens_per_forward(denoiser))
        self.slots = Slots(1, len(self.tokens) + MAX_COPIED_TOKENS)

    def width(self, span: MaskedSpan) -> int:
        """Count the tokens of a copy: those from the beginning of its first block, and one before it."""
        return 1 + len(span.tokens) - self._begin(span)

    def _begin(self, span: MaskedSpan) -> int:
        return span.start // self.size * self.size

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> Float[Tensor, "n vocab"]:
        """Predict the masked tokens of samples, one copy after the other.

        Under a logit shift a token is predicted by the one before it. A copy then begins with a lead: the clean token
        before its block, which predicts the block's first token. The block's own tokens attend to the same token in
        the tree, so no token may attend to a lead: it would be counted twice.
        """
        settings, num_clean = self.denoiser.settings, len(self.tokens)
        shift = int(settings.shift_logits or settings.is_causal)
        columns: list[tuple[Tensor, ...]] = []
        where, end = [], 0
        for number, (span, sample) in enumerate(samples):
            begin = self._begin(span)
            lead = shift * (begin > 0)
            tokens = span.inputs(sample, settings, hides_context=self.hides_context)[begin - lead :]
            positions = torch.arange(begin - lead, len(span.tokens))
            parent = torch.full_like(tokens, self.parents[span])
            columns.append((tokens, positions, torch.full_like(tokens, number), parent, positions < begin))
            # The first token of a text has no left neighbour, not even under a shift: clamp lets it predict itself.
            masked = span.is_scored(sample)[begin - lead :].nonzero()[:, 0]
            where.append(end + (masked - shift).clamp(min=0))
            end += len(tokens)
        tokens, positions, copy, parent, is_lead = map(torch.cat, zip(*columns, strict=True))
        if num_clean and not self.slots.layers:  # the first use
            block = torch.arange(1, len(self.is_seen)).repeat_interleave(self.size)
            self._feed(where[0][:0], self.tokens, self.positions, self.is_seen[block], after=0)
        self.slots.reserve(1, num_clean + len(tokens))
        block = positions // self.size
        is_same_copy = (copy[:, None] == copy) & (block[:, None] >= block) & ~is_lead
        mask = torch.cat([self.is_seen[parent], is_same_copy], dim=1)
        return at_least_float32(self._feed(torch.cat(where), tokens, positions, mask, after=num_clean))

    def _feed(
        self,
        where: Int[Tensor, "m"],
        tokens: Int[Tensor, "n"],
        positions: Int[Tensor, "n"],
        mask: Bool[Tensor, "n keys"],
        *,
        after: int,
    ) -> Float[Tensor, "m vocab"]:
        """Run tokens, whose keys and values go into the slots `after` the clean ones; logits at `where`."""
        device, end = self.denoiser.device, after + len(tokens)
        spans = SlotSpans(starts=[after], ends=[end], key_ends=[end], reads_all=False)
        query = Query(
            input_ids=tokens[None].to(device),
            where=where.to(device),
            positions=positions[None].to(device),
            shift=False,  # `where` is shifted already
            view=self.slots.view(spans, device),
            sees=mask[None].to(device),
            slot_positions=torch.cat([self.positions[:after], positions])[None].to(device),
        )
        return self.denoiser(query)
