"""Where each row of a running generation stands."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from redraft.sampling.caching import Bounds
from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.policies import Window
from redraft.sampling.policies.revise import MOST_POST_STEPS

NEVER = torch.iinfo(torch.int64).max


@dataclass
class Rows:
    """What the loop knows about each running row."""

    index: Int[Tensor, "batch"]
    keys: Int[Tensor, "batch"]
    canvas: Canvas
    block_of: Int[Tensor, "batch seq"]
    origin: Int[Tensor, "batch"]
    block: Int[Tensor, "batch"]
    """First unfinished block."""
    last_block: Int[Tensor, "batch"]
    """Last block that is open."""
    step: Int[Tensor, "batch"]
    num_steps: Int[Tensor, "batch"]
    since_filled: Int[Tensor, "batch"]
    previous: Int[Tensor, "batch seq"]
    fed: Int[Tensor, "batch seq"]
    """Input of the row's last forward: its tokens, of which those not asked for are negative (-1 - token)."""
    num_forwards: Int[Tensor, "batch"]
    """Forwards that the row took part in."""
    least_left: Int[Tensor, "batch"]
    """Fewest decisions that were left since the last step of the block's clock."""
    num_stalled: Int[Tensor, "batch"]
    """Steps since then in which that did not fall."""

    def keep(self, kept: Int[Tensor, "kept"]) -> None:
        """Drop the other rows, and the columns that only they needed."""
        self.canvas = self.canvas.rows(kept)
        length = self.canvas.tokens.shape[1]
        for field in fields(self):
            values = getattr(self, field.name)
            if isinstance(values, Tensor):
                setattr(self, field.name, values[kept] if values.ndim == 1 else values[kept, :length])

    def count_forwards(self, is_asked: Bool[Tensor, "batch seq"], *, is_every_step: bool) -> None:
        """Count a forward for each row whose input differs from that of its last one, whatever the batch runs."""
        tokens = self.canvas.tokens
        fed = torch.where(is_asked, tokens, -1 - tokens)
        is_forward = is_asked.any(dim=1) & (fed != self.fed).any(dim=1) | is_every_step
        self.fed = torch.where(is_forward[:, None], fed, self.fed)
        self.num_forwards = self.num_forwards + is_forward.long()

    def find_stuck(self, before: Canvas, window: Window) -> Bool[Tensor, "batch"]:
        """Find the rows that may never end: those whose step changed nothing although their block's clock is at its
        end or nothing is undecided, and those that have come no nearer to their end for very many steps since."""
        canvas = self.canvas
        is_same = ((canvas.tokens == before.tokens) & (canvas.status == before.status)).all(dim=1)
        is_undecided = canvas.is_noise | canvas.is_draft
        left = is_undecided.sum(dim=1) + canvas.is_noise.sum(dim=1)
        is_stalled = window.is_last & (left >= self.least_left)
        self.num_stalled = torch.where(is_stalled, self.num_stalled + 1, 0)
        self.least_left = torch.where(is_stalled, self.least_left, left)
        return is_same & (window.is_last | ~is_undecided.any(dim=1)) | (self.num_stalled > MOST_POST_STEPS)


def open_window(rows: Rows, in_flight: int, least: Int[Tensor, "batch"] | None) -> Window:
    """Open each row's first unfinished blocks, enough of them to commit `least` tokens, and set the clocks."""
    canvas = rows.canvas
    is_unfinished = canvas.is_noise | canvas.is_draft
    block = torch.where(is_unfinished, rows.block_of, NEVER).amin(dim=1)
    is_new = block != rows.block
    rows.last_block = block + (in_flight - 1)
    if least is not None:
        reaches = canvas.is_noise & (canvas.is_noise.long().cumsum(dim=1) >= least[:, None])
        needed = torch.where(reaches, rows.block_of, NEVER).amin(dim=1)
        rows.last_block = torch.where(needed == NEVER, rows.last_block, torch.maximum(rows.last_block, needed))
    is_open = is_unfinished & (rows.block_of <= rows.last_block[:, None])
    rows.block = block
    rows.step = torch.where(is_new, 0, rows.step)
    rows.since_filled = torch.where(is_new, 0, rows.since_filled)
    is_mine = (rows.block_of == block[:, None]) & (canvas.status != Status.PAD)
    return Window(
        is_open=is_open,
        step=rows.step,
        num_steps=rows.num_steps,
        block_size=is_mine.sum(dim=1),
        steps_since_filled=rows.since_filled,
    )


def bounds_of(rows: Rows) -> list[Bounds]:
    """Bring to the host where each row stands."""
    canvas = rows.canvas
    is_real = canvas.status != Status.PAD
    is_open = is_real & (rows.block_of >= rows.block[:, None]) & (rows.block_of <= rows.last_block[:, None])
    positions = torch.arange(canvas.tokens.shape[1], device=canvas.tokens.device)
    unfinished = torch.where(canvas.is_noise | canvas.is_draft, positions, NEVER).amin(dim=1)
    start = torch.where(is_open, positions, NEVER).amin(dim=1)
    end = torch.where(is_open, positions + 1, 0).amax(dim=1)
    numbers = torch.stack([unfinished, start, end, is_real.sum(dim=1), rows.origin], dim=1)
    return [Bounds(*row) for row in numbers.tolist()]  # sync
