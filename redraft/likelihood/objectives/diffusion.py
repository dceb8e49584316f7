"""Diffusion: MDLM, LLaDA (masked noise), UDLM, Duo (uniform noise), BD3LM (blocks); CART; complementary masks."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.layouts import Layout, segment_positions
from redraft.likelihood.config import SMALLEST_T
from redraft.likelihood.problem import CleanRows, NoiseKey, Problem, denoising_problem, draw_noise
from redraft.processes.masked import MaskedDiffusion
from redraft.processes.noised import Noised, Process
from redraft.randomness import uniform


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The NELBO of `process` over whole rows, one time per row; or over blocks, one time per block.

    With a `block_size` it is block diffusion (BD3LM, arXiv 2503.09573): the sum over blocks of the NELBO of each block
    given the clean blocks before it,

        -log p(x_0) <= sum over blocks b of NELBO(x_0^b | x_0^(<b))

    All blocks go through one forward pass of [x_t ; x_0] (`Layout.is_two_copy`); the clean copy is context only, but in
    a causal `context` its last token before a block predicts the block's first one, as it does when sampling. A
    block as long as the row is diffusion over the whole row; blocks of one token are an autoregressive model.
    """

    process: Process
    block_size: int | None = None
    context: Literal["block", "causal"] = "block"
    within: Literal["full", "causal"] = "full"
    """How the clean copy attends, and a noised block after a causal one (`Layout`)."""
    smallest_block: int | None = None
    """Draw the size of each step's blocks among this, its doubles, and `block_size`: one model for all of them."""
    grow_steps: int | None = None
    """Go through these sizes instead, in equal parts, so that blocks have the full size from this step on (NBDiff,
    arXiv 2512.06776)."""
    ar_weight: float = 0.0
    """Add the autoregressive loss of the clean copy, -log p(x_0^i | x_0^(<i)) for all but first tokens, times this
    (I-DLM, arXiv 2604.11035; TiDAR, arXiv 2511.08923)."""
    is_distilled: bool = False
    """Minimise KL(p || q) in place of the cross-entropy with the text, where p is what the clean copy predicts, without
    gradient, and q what the noised block does: the model learns to draft its own text (arXiv 2507.11851)."""
    is_plain: bool = False
    """Weigh all targets by 1 instead of the bound's weight. Masked noise only."""
    t_min: float = SMALLEST_T
    t_max: float = 1.0
    is_complementary: bool = False
    """Take each row twice, under a mask and its complement: every token is a target exactly once. Masked noise only."""
    cart: float | None = None
    """Weigh the targets by `cart_weights` with this p instead of the bound's weight. Masked noise, no blocks."""

    def problem(self, rows: CleanRows, key: NoiseKey) -> Problem:
        """Corrupt the rows and ask for the noised tokens; with blocks, append the clean copy."""
        size = self._size(key)
        block = None if size is None else _block_numbers(rows, size)
        noised = draw_noise(self.process, rows, key, t_min=self.t_min, t_max=self.t_max, block=block)
        if self.is_complementary:
            noised = with_complement(self.process, noised, can_change=rows.is_target)
        problem = denoising_problem(self.process, noised, rows)
        num_noised = len(problem.row)
        if self.cart is not None or self.is_plain or self.ar_weight:
            problem = self._reweighed(problem, noised, rows)
        if size is None or block is None:
            return problem
        layout = Layout(block_size=size, context=self.context, within=self.within, is_two_copy=True)
        problem = _before_clean_copy(problem, noised, layout, num_noised=num_noised)
        return _distilled(self.process, problem, block) if self.is_distilled else problem

    def evaluation(self) -> "Diffusion":
        """The plain bound over all noise levels, in blocks of the full size."""
        return Diffusion(process=self.process, block_size=self.block_size, context=self.context, within=self.within)

    def _size(self, key: NoiseKey) -> int | None:
        """Draw the block size of a step, the same for the whole global batch."""
        if self.block_size is None:
            return None
        sizes, size = [self.block_size], self.smallest_block or self.block_size
        while size < self.block_size:
            sizes, size = [*sizes, size], 2 * size
        if self.grow_steps is not None:
            return sorted(sizes)[min(key.step * (len(sizes) - 1) // self.grow_steps, len(sizes) - 1)]
        return sizes[int(uniform(key.seed, key.step, 4) * len(sizes))]

    def _reweighed(self, problem: Problem, noised: Noised, rows: CleanRows) -> Problem:
        """Choose the weights of the targets, and ask for all tokens of the clean copy as well if it has a weight."""
        process, copies, where = self.process, len(noised.x_t) // len(rows.x_0), problem.query.where
        assert isinstance(process, MaskedDiffusion)
        weights = torch.ones_like(noised.t) if self.is_plain else process.weights(noised)
        if self.cart is not None:
            segment_ids = rows.segment_ids.repeat(copies, 1)
            is_clean = ~noised.is_target & (segment_ids > 0)
            can_see = segment_ids[:, :, None] == segment_ids[:, None, :] if rows.isolate_segments else None
            weights = cart_weights(is_clean, p=self.cart, can_see=can_see)
        weights = weights.flatten()[where]
        if self.ar_weight:
            clean = _has_left_neighbour(rows).repeat(copies, 1).flatten().nonzero()[:, 0]  # sync: how many is data
            where = torch.cat([where, clean])
            weights = torch.cat([weights, weights.new_full((len(clean),), self.ar_weight)])
        targets, weights = noised.flatten()[where], weights.float() / copies
        return Problem(
            query=replace(problem.query, where=where),
            row=where // noised.x_t.shape[1] % len(rows.x_0),
            nats=lambda logits, part: process.cross_entropy(logits, targets[part]) * weights[part],
        )


def _has_left_neighbour(rows: CleanRows) -> Bool[Tensor, "batch seq"]:
    """Tell which targets have a token before them, in their document where documents are isolated."""
    is_next = torch.zeros_like(rows.is_target)
    is_next[:, 1:] = True
    if rows.isolate_segments:
        is_next[:, 1:] = rows.segment_ids[:, 1:] == rows.segment_ids[:, :-1]
    return rows.is_target & is_next


def _block_numbers(rows: CleanRows, size: int) -> Int[Tensor, "batch seq"]:
    """Number the blocks of each row; where documents are isolated, each begins with a block of its own."""
    if rows.isolate_segments:
        positions = segment_positions(rows.segment_ids)
    else:
        positions = torch.arange(rows.x_0.shape[1], device=rows.x_0.device).expand_as(rows.x_0)
    return (positions % size == 0).long().cumsum(dim=1) - 1


def _before_clean_copy(problem: Problem, noised: Noised, layout: Layout, *, num_noised: int) -> Problem:
    """Ask the same of [x_t ; x_0], in which a noised block attends to itself and the clean blocks before it.

    The answers after the first `num_noised` are asked of the clean copy.
    """
    where, length, segment_ids = problem.query.where, noised.x_0.shape[1], problem.query.segment_ids
    where = where + where // length * length
    where[num_noised:] += length
    query = replace(
        problem.query,
        input_ids=torch.cat([noised.x_t, noised.x_0], dim=1),  # (B, 2 L)
        where=where,
        segment_ids=None if segment_ids is None else segment_ids.repeat(1, 2),
        layout=layout,
    )
    return replace(problem, query=query)


def _distilled(process: Process, problem: Problem, block: Int[Tensor, "batch seq"]) -> Problem:
    """Ask for each noised token in the clean copy too, right after it, and compare the two predictions.

    The first token of a block is predicted by the clean copy alone, so there is nothing to learn.
    """
    assert isinstance(process, MaskedDiffusion)
    is_first = torch.ones_like(block, dtype=torch.bool)
    is_first[:, 1:] = block[:, 1:] != block[:, :-1]
    length, where = block.shape[1], problem.query.where
    kept = (~is_first[where // (2 * length), where % length]).nonzero()[:, 0]  # sync: how many is data
    where = where[kept]

    def nats(logits: Float[Tensor, "n vocab"], part: slice) -> Float[Tensor, "n"]:
        divergence = process.divergence(logits[1::2].detach(), logits[::2])
        return torch.stack([divergence, torch.zeros_like(divergence)], dim=1).flatten()

    return Problem(
        query=replace(problem.query, where=torch.stack([where, where + length], dim=1).flatten()),
        row=problem.row[kept].repeat_interleave(2),
        nats=nats,
    )


def cart_weights(
    is_clean: Bool[Tensor, "batch seq"], *, p: float, can_see: Bool[Tensor, "batch seq seq"] | None = None
) -> Float[Tensor, "batch seq"]:
    """Weigh each position by the clean tokens near it: half the sum over clean i of p (1 - p)^(|n - i| - 1).

    A token among clean ones has weight 1, one without clean tokens near it nearly 0 (CART, arXiv 2508.15487). The
    weighted loss is not a bound.
    """
    index = torch.arange(is_clean.shape[1], device=is_clean.device)
    distance = (index[:, None] - index[None, :]).abs()
    kernel = 0.5 * p * (1 - p) ** (distance - 1).clamp(min=0).float() * (distance > 0)
    if can_see is None:
        return is_clean.float() @ kernel
    return (kernel * (can_see & is_clean[:, None, :])).sum(dim=-1)


def with_complement(process: Process, noised: Noised, *, can_change: Bool[Tensor, "batch seq"]) -> Noised:
    """Append to the rows the same rows under the complement of each mask: (2 * batch, seq).

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
