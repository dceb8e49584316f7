"""The running rows of one sampler: all that a generation knows about each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from redraft.randomness import mix
from redraft.sampling.budget import Clock
from redraft.sampling.caching import Place
from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.policies import Draws, Window
from redraft.sampling.policies.candidates import DRAW_NOISE
from redraft.sampling.policies.frontier import prompt_end
from redraft.sampling.policies.revise import MOST_POST_STEPS
from redraft.sampling.sampler import Sampler

NEVER = torch.iinfo(torch.int64).max
PASSING = ("at", "columns", "marks", "blocks", "segment_ids", "left_in_part", "logits")
"""What is worked out anew when rows join or leave."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a group asks of the model in a step."""

    window: Window
    where: Int[Tensor, "n"]
    """Positions asked for, in the flattened columns that the policies see."""
    draws: Draws
    """Their rows and positions, and random numbers."""
    left: Int[Tensor, "batch"] | None
    """Forwards that each row has left; None without a budget."""
    least: Int[Tensor, "batch"] | None
    """What the step must commit at least for the budget to suffice."""
    asked: Int[Tensor, "batch"]
    """The positions asked for, as one number."""
    is_forward: Bool[Tensor, "batch"]
    """Rows whose input differs from that of their last forward, whatever the batch runs."""


@dataclass(kw_only=True, eq=False)
class Rows:
    """Where each row stands. Tensors have a row for each; what a `Step` shows is replaced, never written into.

    Steps work on the columns `at` of each row (None: all of them), in which everything lies that is open.
    """

    sampler: Sampler
    ids: Int[Tensor, "batch"]
    keys: Int[Tensor, "batch"]
    canvas: Canvas
    block_of: Int[Tensor, "batch seq"]
    num_steps: Int[Tensor, "batch"]
    """Of the clock of each block."""
    deadline: Float[Tensor, "batch"]
    """In seconds of `time.perf_counter`; infinite for none."""
    places: list[Place]
    prior: tuple[int, int]
    """The mask token and the size of the vocabulary, of which noise is made."""
    logits: Float[Tensor, "n vocab"] | None = None
    """Of the last forward, while they stand: for the rows and positions of `answered`."""
    answered: Draws = field(init=False)
    at: Int[Tensor, "batch width"] | None = None

    @classmethod
    def begin(
        cls, sampler: Sampler, canvas: Canvas, keys: Int[Tensor, "batch"], *, ids: Sequence[int], prior: tuple[int, int]
    ) -> "Rows":
        """Set rows up before their first step."""
        status, budget = canvas.status, sampler.budget
        block_of = sampler.frontier.blocks(status)
        num_blocks = count_blocks(block_of, canvas.is_noise).clamp(min=1)
        steps = canvas.is_noise.sum(dim=1) if sampler.steps is None else torch.full_like(keys, sampler.steps)
        num_steps = (-(-steps // num_blocks)).clamp(min=1)
        if budget.forwards is not None and sampler.revise is not None and sampler.revise.is_clocked:
            num_steps = (budget.forwards // num_blocks).clamp(min=1)
        origin = prompt_end(status) if sampler.is_grid_from_prompt else torch.zeros_like(keys)
        numbers = torch.stack([(status != Status.PAD).sum(dim=1), origin], dim=1).tolist()
        rows = cls(
            sampler=sampler,
            ids=keys.new_tensor(ids),
            keys=keys,
            canvas=canvas,
            block_of=block_of,
            num_steps=torch.full_like(keys, sampler.steps_per_block) if sampler.steps_per_block else num_steps,
            deadline=torch.full_like(keys, budget.deadline(), dtype=torch.float64),
            places=[Place(length=length, origin=start) for length, start in numbers],
            prior=prior,
        )
        if sampler.noise == "uniform":
            everywhere = torch.arange(status.shape[1], device=keys.device)[None]
            rows.canvas = canvas.reopen(canvas.is_noise, rows.noise(rows.age - 1, everywhere))
        return rows

    def __post_init__(self) -> None:
        none, never = torch.zeros_like(self.keys), torch.full_like(self.keys, NEVER)
        self.age = none
        """Steps in which the row was decided, whether or not the model ran: its random numbers are keyed by it."""
        self.block, self.last_block = never.clone(), never.clone()
        """First unfinished block, and the last one that is open."""
        self.block_size, self.step, self.since_filled = none.clone(), none.clone(), none.clone()
        self.num_forwards = none
        """Forwards that the row took part in."""
        self.asked, self.fed = none, self.canvas.tokens.clone()
        """Which positions the last forward was asked for, as one number, and its tokens in the columns."""
        self.num_left = _decisions(self.canvas.status)
        """Decisions that are left: two for noise, one for a draft."""
        self.least_left, self.num_stalled = never, none
        """Fewest since the last step of the block's clock, and steps since then in which they did not fall."""
        self.previous = torch.full_like(self.canvas.tokens, -1)
        """What the step before proposed."""
        self.told = torch.zeros(len(self.keys), 0, 0, device=self.keys.device)
        """What a self-conditioned model predicted in the step before, (batch, length of a canvas, vocab)."""

    def seen(self, values: Tensor) -> Tensor:
        """Take the columns that a step works on."""
        return values if self.at is None else values.gather(1, self.at)

    def keep(self, kept: Sequence[int]) -> None:
        """Drop the other rows, and the columns that only they needed."""
        self.places = [self.places[row] for row in kept]
        index, length = torch.tensor(kept, device=self.keys.device), max(place.length for place in self.places)
        kept_of = {n: v.index_select(0, index) for n, v in self._tensors().items()}
        self._set({n: v[:, :length] if v.ndim == 2 else v for n, v in kept_of.items()})

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
        return {n: v for n, v in values.items() if isinstance(v, Tensor) and n not in PASSING}

    def _set(self, tensors: dict[str, Tensor]) -> None:
        self.canvas = Canvas(**{name: tensors.pop(name) for name in vars(self.canvas)})
        vars(self).update(tensors)
        self.logits = None
        self.aim()

    def ask(self, clock: Clock, *, is_every_step: bool) -> Question:
        """Open what comes next, and say where logits are wanted."""
        sampler, revise = self.sampler, self.sampler.revise
        left = sampler.budget.forwards_left(self.num_forwards, self.deadline, clock)
        least = None
        if left is not None:
            is_clocked, num_noise = revise is not None and revise.is_clocked, self.canvas.is_noise.sum(dim=1)
            least = torch.where(left == 1, num_noise, 0) if is_clocked else -(-num_noise // left)
            if is_clocked and sampler.budget.seconds is not None:
                blocks = count_blocks(self.block_of, self.canvas.is_noise | self.canvas.is_draft).clamp(min=1)
                self.num_steps = torch.minimum(self.num_steps, self.step + (left // blocks).clamp(min=1))
        self.open_blocks(least)
        is_open = (self.part.is_noise | self.part.is_draft) & (self.blocks <= self.last_block[:, None])
        is_asked = is_open
        if revise is None or not revise.looks_at_drafts:
            is_asked = is_asked & self.part.is_noise
        where = is_asked.flatten().nonzero()[:, 0]  # sync: how many positions are open is data
        width = is_asked.shape[1]
        asked = torch.where(is_asked, self.marks, 0).sum(dim=1)
        # A change that left the columns was one of what is asked for, too.
        is_new = (asked != self.asked) | (self.part.tokens != self.seen(self.fed)).any(dim=1)
        row, column = where // width, where % width
        positions = column if self.at is None else self.at[row, column]
        return Question(
            window=Window(
                is_open=is_open,
                step=self.step,
                num_steps=self.num_steps,
                block_size=self.block_size,
                steps_since_filled=self.since_filled,
            ),
            where=where,
            draws=Draws(row_keys=self.keys, age=self.age, rows=row, positions=positions, columns=self.columns),
            left=left,
            least=least,
            asked=asked,
            is_forward=is_asked.any(dim=1) & is_new | is_every_step,
        )

    def knows(self, question: Question) -> bool:
        """Tell whether the logits asked for are those of the last forward."""
        if self.logits is None or question.is_forward.any():  # sync
            return False
        now = question.draws
        return torch.equal(self.answered.rows, now.rows) and torch.equal(self.answered.positions, now.positions)

    def open_blocks(self, least: Int[Tensor, "batch"] | None = None) -> None:
        """Open the next blocks where others are finished, enough of them to commit `least` tokens, and set clocks."""
        which = [row for row, place in enumerate(self.places) if place.is_finished or least is not None]
        if not which:
            return
        pick = slice(None) if len(which) == len(self.places) else torch.tensor(which, device=self.keys.device)
        status, block_of, before = self.canvas.status[pick], self.block_of[pick], self.block[pick]
        is_noise, is_draft, is_real = (status == Status.NOISE), (status == Status.DRAFT), (status != Status.PAD)
        is_undecided = is_noise | is_draft
        block = torch.where(is_undecided, block_of, NEVER).amin(dim=1)
        last = block + (self.sampler.frontier.in_flight - 1)
        if least is not None:
            reaches = is_noise & (is_noise.long().cumsum(dim=1) >= least[pick, None])
            needed = torch.where(reaches, block_of, NEVER).amin(dim=1)
            last = torch.where(needed == NEVER, last, torch.maximum(last, needed))
        is_new, is_within = block != before, is_real & (block_of <= last[:, None])
        for values, new in (
            (self.block, block),
            (self.last_block, last),
            (self.block_size, (is_real & (block_of == block[:, None])).sum(dim=1)),
            (self.step, torch.where(is_new, 0, self.step[pick])),
            (self.since_filled, torch.where(is_new, 0, self.since_filled[pick])),
        ):
            values[pick] = new
        positions = torch.arange(status.shape[1], device=status.device)
        is_open, is_later = is_within & (block_of >= block[:, None]), is_undecided & (block_of > last[:, None])
        ends = [torch.where(mask, positions + 1, 0).amax(dim=1) for mask in (is_open, is_open | is_draft)]
        firsts = [torch.where(mask, positions, NEVER).amin(dim=1) for mask in (is_undecided, is_open, is_later)]
        numbers = torch.stack([*ends, *firsts], dim=1).tolist()  # sync: when a block opens
        for row, (end, last_end, unfinished, start, later) in zip(which, numbers, strict=True):
            place = self.places[row]
            place.is_finished = False
            place.unfinished, place.start, place.end = unfinished, start, end
            place.reach = max(last_end, 0 if later == NEVER else later + 1)
        self.aim()

    def aim(self) -> None:
        """Choose the columns that steps work on."""
        length, device = self.canvas.tokens.shape[1], self.keys.device
        width = max(1, *(place.reach - min(place.unfinished, place.reach) for place in self.places))
        self.at = None
        if 2 * width < length:
            starts = [min(place.unfinished, length - width) for place in self.places]
            self.at = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
            self.previous = self.previous.clone()  # a step may show it
            self.fed = self.canvas.tokens.scatter(1, self.at, self.seen(self.fed))
        # What holds while these blocks are open:
        self.columns: Tensor = torch.arange(length, device=device)[None] if self.at is None else self.at
        self.marks = mix(self.columns)
        self.blocks = self.seen(self.block_of)
        self.segment_ids = (self.canvas.status != Status.PAD).long()
        self.part = self.canvas if self.at is None else self.canvas.columns(self.at)
        self.left_in_part = _decisions(self.part.status)

    def count_forward(self, question: Question) -> None:
        """Note that a question was answered."""
        is_forward = question.is_forward
        self.asked = torch.where(is_forward, question.asked, self.asked)
        self.num_forwards = self.num_forwards + is_forward.long()
        fed = torch.where(is_forward[:, None], self.part.tokens, self.seen(self.fed))
        self.fed = fed if self.at is None else self.fed.scatter_(1, self.at, fed)

    def take(self, canvas: Canvas, part: Canvas, proposed: Int[Tensor, "batch width"], window: Window) -> Tensor:
        """Take a step's canvas, its part in the columns, and what was proposed there.

        Says of each row whether it may never end, whether its first unfinished block is another now, and where its
        first undecided position is, (3, batch). A row may never end if the step changed nothing although its block's
        clock is at its end or nothing is undecided, or if it has come no nearer to its end for very many steps since.
        """
        before, self.part, self.canvas = self.part, part, canvas
        self.previous = proposed if self.at is None else self.previous.scatter_(1, self.at, proposed)
        was_filled = ~(window.is_open & before.is_noise).any(dim=1)
        self.since_filled = self.since_filled + was_filled.long()
        is_same = ((part.tokens == before.tokens) & (part.status == before.status)).all(dim=1)
        left = _decisions(part.status)
        self.num_left, self.left_in_part = self.num_left + (left - self.left_in_part), left
        is_stalled = window.is_last & (self.num_left >= self.least_left)
        self.num_stalled = torch.where(is_stalled, self.num_stalled + 1, 0)
        self.least_left = torch.where(is_stalled, self.least_left, self.num_left)
        self.step, self.age = self.step + 1, self.age + 1
        is_stuck = is_same & (window.is_last | (self.num_left == 0)) | (self.num_stalled > MOST_POST_STEPS)
        is_undecided = part.is_noise | part.is_draft
        block = torch.where(is_undecided, self.blocks, NEVER).amin(dim=1)
        first = torch.where(is_undecided, self.columns, NEVER).amin(dim=1)
        return torch.stack([is_stuck.long(), (block != self.block).long(), first])

    def noise(self, age: Int[Tensor, "batch"], columns: Int[Tensor, "#batch width"]) -> Int[Tensor, "batch width"]:
        """Draw a noise token for every column."""
        if self.sampler.noise == "mask":
            return torch.full_like(columns, self.prior[0]).expand(len(age), -1)
        none = columns[:0, 0]
        draws = Draws(row_keys=self.keys, age=age, rows=none, positions=none, columns=columns)
        return (draws.everywhere(DRAW_NOISE) * self.prior[1]).long()


def count_blocks(block_of: Int[Tensor, "batch seq"], is_noise: Bool[Tensor, "batch seq"]) -> Int[Tensor, "batch"]:
    """Count the blocks of each row that hold noise."""
    ordered = torch.where(is_noise, block_of, NEVER).sort(dim=1).values
    is_new = torch.ones_like(is_noise)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (is_new & (ordered != NEVER)).sum(dim=1)


def _decisions(status: UInt8[Tensor, "batch width"]) -> Int[Tensor, "batch"]:
    """Count what is left to decide: two for noise, one for a draft."""
    is_noise = status == Status.NOISE
    return is_noise.sum(dim=1) + (is_noise | (status == Status.DRAFT)).sum(dim=1)
