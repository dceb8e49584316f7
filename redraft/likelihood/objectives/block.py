"""Block diffusion: BD3LM (arXiv 2503.09573)."""

from dataclasses import dataclass, replace

import torch

from redraft.layouts import Layout, segment_positions
from redraft.likelihood.objectives.diffusion import with_complement
from redraft.likelihood.problem import SMALLEST_T, CleanRows, NoiseKey, Problem, draw_noise, whole_canvas
from redraft.processes.noised import Process
from redraft.randomness import uniform


@dataclass(frozen=True, kw_only=True)
class BlockDiffusion:
    """The sum over blocks of the NELBO of each block given the clean blocks before it, one time per block.

        -log p(x_0) <= sum over blocks b of NELBO(x_0^b | x_0^(<b))

    All blocks go through one forward pass of [x_t ; x_0] (`Layout.is_two_copy`); the clean copy is context only. A
    block as long as the row is `Diffusion`; blocks of one token are an autoregressive model.
    """

    process: Process
    block_size: int
    t_min: float = SMALLEST_T
    t_max: float = 1.0
    smallest_block: int | None = None
    """Draw the size of each step's blocks among this, its doubles, and `block_size`: one model for all of them."""
    is_complementary: bool = False
    """Take each row twice, under a mask and its complement: every token is a target exactly once."""

    def problem(self, rows: CleanRows, key: NoiseKey) -> Problem:
        """Corrupt each block at its own time, put the clean copy behind, and ask for what is noised."""
        if rows.isolate_segments:
            positions = segment_positions(rows.segment_ids)
        else:
            positions = torch.arange(rows.x_0.shape[1], device=rows.x_0.device).expand_as(rows.x_0)
        size = self._size(key)
        block = (positions % size == 0).long().cumsum(dim=1) - 1
        noised = draw_noise(
            self.process, rows.x_0, key, can_change=rows.is_target, t_min=self.t_min, t_max=self.t_max, block=block
        )
        if self.is_complementary:
            noised = with_complement(self.process, noised, can_change=rows.is_target)
        problem = whole_canvas(self.process, noised, rows)
        where, length, segment_ids = problem.query.where, rows.x_0.shape[1], problem.query.segment_ids
        query = replace(
            problem.query,
            input_ids=torch.cat([noised.x_t, noised.x_0], dim=1),  # (B, 2 L)
            where=where + where // length * length,
            segment_ids=None if segment_ids is None else segment_ids.repeat(1, 2),
            layout=Layout(block_size=size, is_two_copy=True),
        )
        return replace(problem, query=query)

    def _size(self, key: NoiseKey) -> int:
        """Draw the block size of a step, the same for the whole global batch."""
        sizes, size = [self.block_size], self.smallest_block or self.block_size
        while size < self.block_size:
            sizes, size = [*sizes, size], 2 * size
        return sizes[int(uniform(key.seed, key.step, 4) * len(sizes))]

    def evaluation(self) -> "BlockDiffusion":
        """The plain bound over all noise levels, in whole blocks."""
        return BlockDiffusion(process=self.process, block_size=self.block_size)
