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
"""What a random number is for: the same position draws apart for each."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """What is open in each row, and how far the row is through its current block."""

    is_open: Bool[Tensor, "batch seq"]
    """Noise that may be committed now, and drafts that may be revised."""
    step: Int[Tensor, "batch"]
    """Steps the row has taken in this block."""
    num_steps: Int[Tensor, "batch"]
    """Steps the row is to take in this block."""
    block_size: Int[Tensor, "batch"]
    """Positions of the block, given ones included."""
    steps_since_filled: Int[Tensor, "batch"]
    """Steps the row has taken since its block held no noise."""

    @property
    def is_last(self) -> Bool[Tensor, "batch"]:
        """Whether the row's clock ends with this step."""
        return self.step >= self.num_steps - 1

    @property
    def times(self) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        """Times t -> s of this step, on an even grid from 1 to 0; float64."""
        left = (self.num_steps - self.step).clamp(min=1).to(torch.float64)
        return left / self.num_steps, (left - 1) / self.num_steps


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Random numbers of the current step, a function of (row, its age, position, purpose) alone."""

    row_keys: Int[Tensor, "batch"]
    age: Int[Tensor, "batch"]
    """Steps in which each row was decided before this one."""
    rows: Int[Tensor, "n"]
    """Of the open positions."""
    positions: Int[Tensor, "n"]
    """Of the open positions, in their rows."""
    columns: Int[Tensor, "#batch seq"]
    """Of all that the policies see."""

    def uniform(self, purpose: int) -> Float[Tensor, "n"]:
        """Draw from U[0, 1) for each open position."""
        return uniform(self.row_keys[self.rows], self.age[self.rows], self.positions, purpose)

    def everywhere(self, purpose: int) -> Float[Tensor, "batch seq"]:
        """Draw from U[0, 1) for everything that the policies see."""
        return uniform(self.row_keys[:, None], self.age[:, None], self.columns, purpose)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """One step's proposals at the n open positions of a batch.

    The policies see of each row the columns around what is open, all of equal width: from the first undecided position
    on, past all that is open, and up to the next undecided one.
    """

    canvas: Canvas
    """These columns before the step."""
    window: Window
    where: Int[Tensor, "n"]
    """The open positions, as indices into batch * seq of these columns."""
    proposal: Proposal
    previous: Int[Tensor, "batch seq"]
    """What the step before proposed, or placed instead; -1 where it proposed nothing."""
    draws: Draws

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
        return self.canvas.tokens.flatten().scatter(0, self.where, self.proposal.x_0).view_as(self.canvas.tokens)

    @cached_property
    def likeliest(self) -> Int[Tensor, "batch seq"]:
        """The model's first choice at the open positions; elsewhere the canvas."""
        best = self.proposal.likeliest()
        return self.canvas.tokens.flatten().scatter(0, self.where, best).view_as(self.canvas.tokens)

    @cached_property
    def confidence(self) -> Float[Tensor, "batch seq"]:
        """Probability of the proposals; 0 where nothing is open."""
        return self.spread(self.proposal.confidence)

    def spread(self, values: Float[Tensor, "n"]) -> Float[Tensor, "batch seq"]:
        """Lay values of the open positions out over the canvas; 0 elsewhere."""
        shape = self.canvas.tokens.shape
        return values.new_zeros(shape.numel()).scatter(0, self.where, values).view(shape)
