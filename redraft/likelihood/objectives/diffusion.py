"""Diffusion: MDLM, LLaDA (masked noise), UDLM, Duo (uniform noise), BD3LM (blocks); CART; complementary masks."""

from dataclasses import dataclass, replace

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

    All blocks go through one forward pass of [x_t ; x_0] (`Layout.is_two_copy`); the clean copy is context only. A
    block as long as the row is diffusion over the whole row; blocks of one token are an autoregressive model.
    """

    process: Process
    block_size: int | None = None
    smallest_block: int | None = None
    """Draw the size of each step's blocks among this, its doubles, and `block_size`: one model for all of them."""
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
        if self.cart is not None:
            problem = self._reweighed(problem, noised, rows, p=self.cart)
        return problem if size is None else _before_clean_copy(problem, noised, size)

    def evaluation(self) -> "Diffusion":
        """The plain bound over all noise levels, in blocks of the full size."""
        return Diffusion(process=self.process, block_size=self.block_size)

    def _size(self, key: NoiseKey) -> int | None:
        """Draw the block size of a step, the same for the whole global batch."""
        if self.block_size is None:
            return None
        sizes, size = [self.block_size], self.smallest_block or self.block_size
        while size < self.block_size:
            sizes, size = [*sizes, size], 2 * size
        return sizes[int(uniform(key.seed, key.step, 4) * len(sizes))]

    def _reweighed(self, problem: Problem, noised: Noised, rows: CleanRows, *, p: float) -> Problem:
        process, copies, where = self.process, len(noised.x_t) // len(rows.x_0), problem.query.where
        assert isinstance(process, MaskedDiffusion)
        segment_ids = rows.segment_ids.repeat(copies, 1)
        is_clean = ~noised.is_target & (segment_ids > 0)
        can_see = segment_ids[:, :, None] == segment_ids[:, None, :] if rows.isolate_segments else None
        weights = cart_weights(is_clean, p=p, can_see=can_see).flatten()[where] / copies
        targets = noised.flatten()[where]
        return replace(problem, nats=lambda logits, part: process.cross_entropy(logits, targets[part]) * weights[part])


def _block_numbers(rows: CleanRows, size: int) -> Int[Tensor, "batch seq"]:
    """Number the blocks of each row; where documents are isolated, each begins with a block of its own."""
    if rows.isolate_segments:
        positions = segment_positions(rows.segment_ids)
    else:
        positions = torch.arange(rows.x_0.shape[1], device=rows.x_0.device).expand_as(rows.x_0)
    return (positions % size == 0).long().cumsum(dim=1) - 1


def _before_clean_copy(problem: Problem, noised: Noised, size: int) -> Problem:
    """Ask the same of [x_t ; x_0], in which a noised block attends to itself and the clean blocks before it."""
    where, length, segment_ids = problem.query.where, noised.x_0.shape[1], problem.query.segment_ids
    query = replace(
        problem.query,
        input_ids=torch.cat([noised.x_t, noised.x_0], dim=1),  # (B, 2 L)
        where=where + where // length * length,
        segment_ids=None if segment_ids is None else segment_ids.repeat(1, 2),
        layout=Layout(block_size=size, is_two_copy=True),
    )
    return replace(problem, query=query)


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
