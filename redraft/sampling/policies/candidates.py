"""What a policy may look at: the canvas, which of it is open, and what the model proposes there."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.randomness import uniform
from redraft.sampling.canvas import Canvas
from redraft.sampling.propose import Proposal

DRAW_TOKEN, DRAW_ORDER, DRAW_UNMASK, DRAW_REVISE, DRAW_NOISE = range(5)
"""What a random number is for: the same position draws different numbers for different purposes."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The open positions of each row, its progress in its current block, and its random numbers.

    Policies see equally many columns of each row: from its first undecided position on, with all open positions, and
    up to the next undecided one. There are n open positions in a batch.
    """

    is_open: Bool[Tensor, "batch seq"]
    """Noise that may be committed now, and drafts that may be revised."""
    where: Int[Tensor, "n"]
    """The open positions that the model is asked for, as indices into batch * seq of these columns."""
    rows: Int[Tensor, "n"]
    """Their rows."""
    positions: Int[Tensor, "n"]
    """Their positions in their rows."""
    columns: Int[Tensor, "#batch seq"]
    """Positions of all columns."""
    row_keys: Int[Tensor, "batch"]
    age: Int[Tensor, "batch"]
    """Steps in which each row was decided before this one."""
    step: Int[Tensor, "batch"]
    """Steps the row has taken in this block."""
    num_steps: Int[Tensor, "batch"]
    """Steps the row is to take in this block."""
    block_size: Int[Tensor, "batch"]
    """Positions of the block, given ones included."""
    steps_since_filled: Int[Tensor, "batch"]
    """Steps the row has taken since its block held no noise."""
    opens_block: Bool[Tensor, "batch"]
    """Whether nothing was decided in the block when it opened, and it begins a block of the layout."""

    @property
    def is_last(self) -> Bool[Tensor, "batch"]:
        """Whether this is the block's last step, or a later one."""
        return self.step >= self.num_steps - 1

    @property
    def times(self) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        """Times t -> s of this step, on an even grid from 1 to 0; float64."""
        left = (self.num_steps - self.step).clamp(min=1).to(torch.float64)
        return left / self.num_steps, (left - 1) / self.num_steps

    def uniform(self, purpose: int) -> Float[Tensor, "n"]:
        """Draw from U[0, 1) for each open position: a function of (row, its age, position, purpose) alone."""
        return uniform(self.row_keys[self.rows], self.age[self.rows], self.positions, purpose)

    def uniform_everywhere(self, purpose: int) -> Float[Tensor, "batch seq"]:
        """Draw from U[0, 1) for every column."""
        return uniform(self.row_keys[:, None], self.age[:, None], self.columns, purpose)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """One step's proposals at the n open positions of a batch."""

    canvas: Canvas
    """The columns of the window before the step."""
    window: Window
    proposal: Proposal
    previous: Int[Tensor, "batch seq"]
    """What the step before proposed, or placed instead; -1 where it proposed nothing."""

    @cached_property
    def is_open_noise(self) -> Bool[Tensor, "batch seq"]:
        """Open positions that hold no token yet."""
        return self.window.is_open & self.canvas.is_noise

    @cached_property
    def is_open_draft(self) -> Bool[Tensor, "batch seq"]:
        """Open positions that hold a token which may change."""
        return self.window.is_open & self.canvas.is_draft

    @cached_property
    def x_0(self) -> Int[Tensor, "batch seq"]:
        """Proposals at the open positions; elsewhere the canvas."""
        return self.over_canvas(self.proposal.x_0)

    @cached_property
    def likeliest(self) -> Int[Tensor, "batch seq"]:
        """The model's first choice at the open positions; elsewhere the canvas."""
        return self.over_canvas(self.proposal.likeliest())

    @cached_property
    def confidence(self) -> Float[Tensor, "batch seq"]:
        """Probability of the proposals; 0 where nothing is open."""
        return self.spread(self.proposal.confidence)

    @property
    def placed(self) -> Int[Tensor, "n"]:
        """The tokens at the open positions before the step."""
        return self.canvas.tokens.flatten()[self.window.where]

    def spread(self, values: Float[Tensor, "n"]) -> Float[Tensor, "batch seq"]:
        """Lay values of the open positions out over the columns; 0 elsewhere."""
        shape = self.canvas.tokens.shape
        return values.new_zeros(shape.numel()).scatter(0, self.window.where, values).view(shape)

    def over_canvas(self, tokens: Int[Tensor, "n"]) -> Int[Tensor, "batch seq"]:
        """Lay tokens of the open positions out over the columns; elsewhere the canvas."""
        return self.canvas.tokens.flatten().scatter(0, self.window.where, tokens).view_as(self.canvas.tokens)
