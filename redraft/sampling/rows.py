"""The running rows of one sampler, and the whole state of each."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from redraft.layouts import Layout
from redraft.randomness import mix, uniform
from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.policies.candidates import DRAW_NOISE, Window
from redraft.sampling.policies.frontier import prompt_end
from redraft.sampling.policies.revise import MAX_POST_STEPS
from redraft.sampling.sampler import Sampler

NEVER = torch.iinfo(torch.int64).max
DERIVED = (
    "at",
    "columns",
    "marks",
    "blocks",
    "segment_ids",
    "logits",
    "left",
    "num_required",
    "asked_now",
    "is_forward",
)
"""Tensors that are computed anew in each step, or when rows join or leave."""


@dataclass(eq=False)
class Place:
    """A row's progress, in positions, and what is cached of it: integers that the host needs without a sync."""

    length: int
    """Positions of the row."""
    origin: int = 0
    """Where block 0 of the layout's grid begins."""
    unfinished: int = 0
    """First position that is not decided."""
    start: int = 0
    """First position of the open blocks."""
    end: int = 0
    """One past the last position of the open blocks."""
    is_finished: bool = True
    """Whether the open blocks are finished, so that others are to be opened."""
    reach: int = 0
    """One past all that is open or a draft, and past the first undecided position behind the open blocks."""
    slot: int = -1
    """Row of the slots; -1 while it has none."""
    final: int = 0
    """Positions whose keys and values are final."""
    opened: tuple[int, int] = (-1, -1)
    """Open blocks as of the last forward."""
    salt: str = ""
    """Only rows of equal salts share keys and values."""
    num_accepted: int = 0
    """Drafts that the last step accepted, if the row speculates."""
    num_fed: int = 0
    """Positions fed so far, over all forwards."""
    num_copied: int = 0
    """Positions whose keys and values were copied from another row."""

    def committed(self, layout: Layout) -> int:
        """Count the positions before the block that holds the first undecided one."""
        if layout.has_order:  # its blocks begin anywhere
            return max(0, self.unfinished - (layout.within == "with-last"))
        return max(0, layout.floor(self.unfinished, self.origin))


class Rows:
    """The state of the rows. The first dimension of each tensor is the row. A tensor that a `Step` shows is replaced,
    never changed in place.

    Steps work on the columns `at` of each row (None: all columns); they hold all open positions.
    """

    def __init__(
        self,
        sampler: Sampler,
        canvas: Canvas,
        keys: Int[Tensor, "batch"],
        *,
        ids: list[int],
        prior: tuple[int, int],
        layout: Layout,
    ) -> None:
        status, zero, never = canvas.status, torch.zeros_like(keys), torch.full_like(keys, NEVER)
        self.sampler, self.canvas, self.keys, self.ids = sampler, canvas, keys, keys.new_tensor(ids)
        self.layout = layout
        self.prior = prior
        """The mask token and the size of the vocabulary, of which noise is made."""
        self.block_of = sampler.frontier.blocks(status)
        self.num_steps = self._steps_per_block()
        """Steps for each block."""
        origin = prompt_end(status) if sampler.is_grid_from_prompt else zero
        numbers = torch.stack([(status != Status.PAD).sum(dim=1), origin], dim=1).tolist()
        self.places = [Place(length=length, origin=start) for length, start in numbers]
        self.age = zero
        """Steps that the row has taken, whether or not the model ran: its random numbers are keyed by it."""
        if sampler.noise == "uniform":
            everywhere = torch.arange(status.shape[1], device=keys.device)[None]
            self.canvas = canvas.reopen(canvas.is_noise, self.noise(self.age - 1, everywhere))
        self.block, self.last_block = never.clone(), never.clone()
        """First unfinished block, and the last one that is open."""
        self.block_size, self.step, self.since_filled = zero.clone(), zero.clone(), zero.clone()
        self.opens_block = zero > 0
        """Whether nothing was decided in that block when it opened, and it begins one of the layout."""
        self.num_forwards = zero
        """Forwards that the row took part in."""
        self.asked, self.fed = zero, self.canvas.tokens.clone()
        """A hash of the positions that the last forward was asked for (in a causal context, and of how many are
        committed), and the tokens that it was fed."""
        self.logits: Tensor | None = None
        """Logits of the last forward while they are valid: for the rows and positions of the window `answered`. Of rows
        that speculate, what enters the head."""
        self.answered: Window
        self.left: Tensor | None = None
        """Forwards that each row has left; None without a limit."""
        self.num_required: Tensor | None = None
        """Tokens that this step must commit at least, so that the forwards that are left suffice."""
        self.asked_now, self.is_forward = zero, zero > 0
        """A hash of the positions that this step asks for; and the rows whose input differs from that of their last
        forward. A row counts only these forwards, whatever the batch runs."""
        self.num_left = self._count_decisions()
        """Decisions that are left: two for noise, one for a draft. The number falls with every step towards the end
        (noise -> draft -> committed), so a policy that does not lower it makes no progress."""
        self.fewest_left, self.num_stalled = never, zero
        """Smallest `num_left` since the last step of the block, and steps since then in which it did not fall."""
        self.previous = torch.full_like(self.canvas.tokens, -1)
        """What the step before proposed."""
        self.predicted = torch.zeros(len(keys), 0, 0, device=keys.device)
        """What a self-conditioned model predicted in the step before, (batch, length of a canvas, vocab)."""
        self.at: Tensor | None = None

    def _steps_per_block(self) -> Int[Tensor, "batch"]:
        sampler, is_noise = self.sampler, self.canvas.is_noise
        if sampler.steps_per_block:
            return torch.full_like(self.keys, sampler.steps_per_block)
        ordered = torch.where(is_noise, self.block_of, NEVER).sort(dim=1).values
        is_new = torch.ones_like(is_noise)
        is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        num_blocks = (is_new & (ordered != NEVER)).sum(dim=1).clamp(min=1)
        if sampler.forwards is not None and sampler.needs_all_steps:
            return (sampler.forwards // num_blocks).clamp(min=1)
        steps = is_noise.sum(dim=1) if sampler.steps is None else torch.full_like(self.keys, sampler.steps)
        return (-(-steps // num_blocks)).clamp(min=1)

    def in_columns(self, values: Tensor) -> Tensor:
        """Take the columns that a step works on."""
        return values if self.at is None else values.gather(1, self.at)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the other rows, and the columns that only they needed."""
        self.places = [self.places[row] for row in rows]
        index, length = torch.tensor(rows, device=self.keys.device), max(place.length for place in self.places)
        selected = {n: v.index_select(0, index) for n, v in self._tensors().items()}
        self._set({n: v[:, :length] if v.ndim == 2 else v for n, v in selected.items()})

    def split(self) -> list["Rows"]:
        """Make rows of their own of each."""
        singles = [copy(self) for _ in self.places]
        for row, single in enumerate(singles):
            single.keep([row])
        return singles

    def join(self, other: "Rows") -> None:
        """Take in further rows."""
        self.places = self.places + other.places
        length = max(place.length for place in self.places)

        def wide(name: str, values: Tensor) -> Tensor:
            fill = int(Status.PAD) if name == "status" else 0
            return F.pad(values, (0, length - values.shape[1]), value=fill) if values.ndim == 2 else values

        theirs = other._tensors()
        self._set({n: torch.cat([wide(n, v), wide(n, theirs[n])]) for n, v in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = vars(self.canvas) | vars(self)
        return {n: v for n, v in values.items() if isinstance(v, Tensor) and n not in DERIVED}

    def _set(self, tensors: dict[str, Tensor]) -> None:
        self.canvas = Canvas(**{name: tensors.pop(name) for name in vars(self.canvas)})
        vars(self).update(tensors)
        self.logits = None
        self.choose_columns()

    def ask(self, *, is_every_step: bool) -> None:
        """Open the next blocks, and find the positions whose logits are wanted."""
        sampler, revise = self.sampler, self.sampler.revise
        if sampler.forwards is not None:
            num_noise, left = self.canvas.is_noise.sum(dim=1), (sampler.forwards - self.num_forwards).clamp(min=1)
            required = torch.where(left == 1, num_noise, 0) if sampler.needs_all_steps else -(-num_noise // left)
            self.left, self.num_required = left, required
        self.open_blocks(self.num_required)
        is_open = (self.part.is_noise | self.part.is_draft) & (self.blocks <= self.last_block[:, None])
        is_asked = is_open if revise is not None and revise.looks_at_drafts else is_open & self.part.is_noise
        where = is_asked.flatten().nonzero()[:, 0]  # sync: how many positions are open is data
        row, column = where // is_asked.shape[1], where % is_asked.shape[1]
        self.asked_now = torch.where(is_asked, self.marks, 0).sum(dim=1)
        if self.layout.context == "causal":  # what is committed attends otherwise, even if no token changed
            committed = self.keys.new_tensor([place.committed(self.layout) for place in self.places])
            self.asked_now = mix(self.asked_now + committed)
        # Tokens outside of the columns need no comparison: they were decided, so the positions asked for changed too.
        is_new = (self.asked_now != self.asked) | (self.part.tokens != self.in_columns(self.fed)).any(dim=1)
        self.is_forward = is_asked.any(dim=1) & is_new | is_every_step
        self.window = Window(  # what is open in this step
            is_open=is_open,
            where=where,
            rows=row,
            positions=column if self.at is None else self.at[row, column],
            columns=self.columns,
            row_keys=self.keys,
            age=self.age,
            step=self.step,
            num_steps=self.num_steps,
            block_size=self.block_size,
            steps_since_filled=self.since_filled,
            opens_block=self.opens_block,
        )

    def order(self) -> Int[Tensor, "batch seq"]:
        """Place each position in the order in which a layout with an order is causal."""
        length, device = self.canvas.tokens.shape[1], self.keys.device
        positions = torch.arange(length, device=device)[None]
        committed = torch.tensor([[place.committed(self.layout)] for place in self.places], device=device)
        end = torch.tensor([[place.end] for place in self.places], device=device)
        if self.layout.within == "with-last":  # a window: the last committed token and the noise that it predicts
            return torch.where((positions >= committed) & (positions < end - 1), committed, positions)
        return positions + length * (self.canvas.is_noise | (positions >= end)).long()

    def has_answer(self) -> bool:
        """Tell whether the logits asked for are those of the last forward."""
        if self.logits is None or self.is_forward.any():  # sync
            return False
        then, now = self.answered, self.window
        return torch.equal(then.rows, now.rows) and torch.equal(then.positions, now.positions)

    def logits_asked_for(self) -> Float[Tensor, "n vocab"]:
        """Return the answer to this step's question; where nothing is asked, the last answer stays for a later step."""
        if self.logits is None or not len(self.window.where):
            return self.canvas.confidence.new_zeros((0, self.prior[1]))
        return self.logits

    def open_blocks(self, num_required: Int[Tensor, "batch"] | None = None) -> None:
        """Open the next blocks where the open ones are finished, as many as `num_required` commits need."""
        which = [row for row, place in enumerate(self.places) if place.is_finished or num_required is not None]
        if not which:
            return
        pick = slice(None) if len(which) == len(self.places) else torch.tensor(which, device=self.keys.device)
        status, block_of, before = self.canvas.status[pick], self.block_of[pick], self.block[pick]
        is_noise, is_draft, is_real = (status == Status.NOISE), (status == Status.DRAFT), (status != Status.PAD)
        is_undecided = is_noise | is_draft
        block = torch.where(is_undecided, block_of, NEVER).amin(dim=1)
        last = block + (self.sampler.frontier.in_flight - 1)
        if num_required is not None:
            is_enough = is_noise & (is_noise.long().cumsum(dim=1) >= num_required[pick, None])
            needed = torch.where(is_enough, block_of, NEVER).amin(dim=1)
            last = torch.where(needed == NEVER, last, torch.maximum(last, needed))
        is_same = block == before
        self.block[pick], self.last_block[pick] = block, last
        self.block_size[pick] = (is_real & (block_of == block[:, None])).sum(dim=1)
        for clock in (self.step, self.since_filled):
            clock[pick] = torch.where(is_same, clock[pick], 0)
        positions, is_later = torch.arange(status.shape[1], device=status.device), block_of > last[:, None]
        is_open = is_real & ~is_later & (block_of >= block[:, None])
        ends = [torch.where(mask, positions + 1, 0).amax(dim=1) for mask in (is_open, is_open | is_draft)]
        masks = (is_undecided, is_open, is_undecided & is_later)
        firsts = [torch.where(mask, positions, NEVER).amin(dim=1) for mask in masks]
        numbers = torch.stack([*ends, *firsts], dim=1).tolist()  # sync: when a block opens
        opens_block = []
        for row, (end, last_end, unfinished, start, later) in zip(which, numbers, strict=True):
            place = self.places[row]
            place.is_finished = False
            place.unfinished, place.start, place.end = unfinished, start, end
            place.reach = max(last_end, 0 if later == NEVER else later + 1)
            begin = self.layout.floor(start, place.origin) if self.layout.block_size else start
            opens_block.append(unfinished == start == begin)
        self.opens_block[pick] = torch.tensor(opens_block, device=self.keys.device)
        self.choose_columns()

    def choose_columns(self) -> None:
        """Choose the columns that steps work on: only those around the open positions if that halves them, else all."""
        length, device = self.canvas.tokens.shape[1], self.keys.device
        width = max(1, *(place.reach - min(place.unfinished, place.reach) for place in self.places))
        self.at = None
        if 2 * width < length:
            starts = [min(place.unfinished, length - width) for place in self.places]
            self.at = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
            self.previous = self.previous.clone()  # a step may show it
            self.fed = self.canvas.tokens.scatter(1, self.at, self.in_columns(self.fed))
        # What holds while these blocks are open:
        self.columns: Tensor = torch.arange(length, device=device)[None] if self.at is None else self.at
        self.marks = mix(self.columns)
        self.blocks = self.in_columns(self.block_of)
        self.segment_ids = (self.canvas.status != Status.PAD).long()
        self.part = self.canvas if self.at is None else self.canvas.columns(self.at)

    def answer(self, logits: Float[Tensor, "n vocab"]) -> None:
        """Store the logits asked for, and count a forward for the rows whose input was new."""
        self.logits, self.answered = logits, self.window
        self.asked = torch.where(self.is_forward, self.asked_now, self.asked)
        self.num_forwards = self.num_forwards + self.is_forward.long()
        fed = torch.where(self.is_forward[:, None], self.part.tokens, self.in_columns(self.fed))
        self.fed = fed if self.at is None else self.fed.scatter_(1, self.at, fed)

    def take(self, canvas: Canvas, part: Canvas, proposed: Int[Tensor, "batch width"]) -> Tensor:
        """Store a step's canvas, its `part` in the columns, and the tokens proposed there.

        Returns for each row, (3, batch): is it stuck, has its first unfinished block changed, its first undecided
        position. A row is stuck if the step changed nothing although it was the block's last one or nothing is
        undecided, or if more than MAX_POST_STEPS steps after the last one brought it no nearer to its end.
        """
        window, before, self.part, self.canvas = self.window, self.part, part, canvas
        self.previous = proposed if self.at is None else self.previous.scatter_(1, self.at, proposed)
        was_filled = ~(window.is_open & before.is_noise).any(dim=1)
        self.since_filled = self.since_filled + was_filled.long()
        is_same = ((part.tokens == before.tokens) & (part.status == before.status)).all(dim=1)
        self.num_left = self._count_decisions()
        is_stalled = window.is_last & (self.num_left >= self.fewest_left)
        self.num_stalled = torch.where(is_stalled, self.num_stalled + 1, 0)
        self.fewest_left = torch.where(is_stalled, self.fewest_left, self.num_left)
        self.step, self.age = self.step + 1, self.age + 1
        is_stuck = is_same & (window.is_last | (self.num_left == 0)) | (self.num_stalled > MAX_POST_STEPS)
        is_undecided = part.is_noise | part.is_draft
        block, first = (torch.where(is_undecided, v, NEVER).amin(dim=1) for v in (self.blocks, self.columns))
        return torch.stack([is_stuck.long(), (block != self.block).long(), first])

    def advance(self, canvas: Canvas, part: Canvas, num_decided: Int[Tensor, "batch"]) -> Int[Tensor, "batch"]:
        """Store the canvas of a step that decided several tokens in a row, as so many steps of one would have.

        Returns each row's first undecided position.
        """
        self.canvas, self.part, self.age, self.step = canvas, part, self.age + num_decided, self.step + 1
        self.num_left = self._count_decisions()
        return torch.where(part.is_noise | part.is_draft, self.columns, NEVER).amin(dim=1)

    def noise(self, age: Int[Tensor, "batch"], columns: Int[Tensor, "#batch width"]) -> Int[Tensor, "batch width"]:
        """Draw a noise token for every column."""
        if self.sampler.noise == "mask":
            return torch.full_like(columns, self.prior[0]).expand(len(age), -1)
        return (uniform(self.keys[:, None], age[:, None], columns, DRAW_NOISE) * self.prior[1]).long()

    def _count_decisions(self) -> Int[Tensor, "batch"]:
        is_noise = self.canvas.is_noise
        return is_noise.sum(dim=1) + (is_noise | self.canvas.is_draft).sum(dim=1)
