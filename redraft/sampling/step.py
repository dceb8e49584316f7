"""One step of rows with equal settings: what the model says becomes an action, and the action a new canvas."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from redraft.sampling.budget import Clock
from redraft.sampling.caching import Place
from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.policies import Action, Candidates, Draws, Kind, Window
from redraft.sampling.policies.action import setting
from redraft.sampling.policies.candidates import DRAW_NOISE, DRAW_TOKEN
from redraft.sampling.policies.frontier import prompt_end
from redraft.sampling.policies.unmask import best
from redraft.sampling.propose import Proposal, propose
from redraft.sampling.rows import Rows, count_blocks
from redraft.sampling.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step of the rows that were still running."""

    rows: Int[Tensor, "batch"]
    """Which rows these are: their ids in the batch, from 0."""
    age: Int[Tensor, "batch"]
    """Which step of each row it is, from 0."""
    canvas: Canvas
    """After the step."""
    is_done: Bool[Tensor, "batch"]
    """Rows that take no further step."""
    num_forwards: Int[Tensor, "batch"]
    """Forwards that each row took part in so far: steps whose input was not that of its forward before."""
    at: Int[Tensor, "batch width"] | None
    """The columns that the step worked on: those below; None for all."""
    kind: UInt8[Tensor, "batch width"]
    proposed: Int[Tensor, "batch width"]
    sureness: Float[Tensor, "batch width"]

    @property
    def x_0(self) -> Int[Tensor, "batch seq"]:
        """Proposals at the open positions; elsewhere the canvas."""
        return self._spread(self.proposed, self.canvas.tokens)

    @property
    def confidence(self) -> Float[Tensor, "batch seq"]:
        """Probability of the proposals; 0 where nothing was open."""
        return self._spread(self.sureness, torch.zeros_like(self.canvas.confidence, dtype=self.sureness.dtype))

    @property
    def is_committed(self) -> Bool[Tensor, "batch seq"]:
        """Noise that got a token in this step."""
        return self._was(Kind.SET)

    @property
    def is_edited(self) -> Bool[Tensor, "batch seq"]:
        """Drafts that got another token."""
        return self._was(Kind.EDIT)

    @property
    def is_reopened(self) -> Bool[Tensor, "batch seq"]:
        """Drafts that became noise again."""
        return self._was(Kind.REOPEN)

    def _was(self, kind: Kind) -> Bool[Tensor, "batch seq"]:
        return self._spread(self.kind == kind, torch.zeros_like(self.canvas.is_noise))

    def _spread(self, part: Tensor, elsewhere: Tensor) -> Tensor:
        return part if self.at is None else elsewhere.scatter(1, self.at, part)


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
    is_forward: Bool[Tensor, "batch"]
    """Rows whose input differs from that of their last forward."""


@dataclass(kw_only=True, eq=False)
class Group:
    """Rows that are decided together: those of one sampler."""

    sampler: Sampler
    rows: Rows
    prior: tuple[int, int]
    """The mask token and the size of the vocabulary, of which noise is made."""
    logits: Float[Tensor, "n vocab"] | None = None
    """Of the last forward, while they stand."""

    @classmethod
    def begin(
        cls, sampler: Sampler, canvas: Canvas, keys: Int[Tensor, "batch"], *, ids: Sequence[int], prior: tuple[int, int]
    ) -> "Group":
        """Set rows up before their first step."""
        status, budget = canvas.status, sampler.budget
        block_of = sampler.frontier.blocks(status)
        num_blocks = count_blocks(block_of, canvas.is_noise).clamp(min=1)
        steps = canvas.is_noise.sum(dim=1) if sampler.steps is None else torch.full_like(keys, sampler.steps)
        num_steps = (-(-steps // num_blocks)).clamp(min=1)
        if budget.forwards is not None and sampler.revise is not None and sampler.revise.is_clocked:
            num_steps = (budget.forwards // num_blocks).clamp(min=1)
        origin = prompt_end(status) if sampler.is_grid_from_prompt else torch.zeros_like(keys)
        lengths = torch.stack([(status != Status.PAD).sum(dim=1), origin], dim=1)
        rows = Rows(
            ids=keys.new_tensor(ids),
            keys=keys,
            canvas=canvas,
            block_of=block_of,
            num_steps=torch.full_like(keys, sampler.steps_per_block) if sampler.steps_per_block else num_steps,
            deadline=torch.full_like(keys, budget.deadline(), dtype=torch.float64),
            places=[Place(*numbers) for numbers in lengths.tolist()],
        )
        group = cls(sampler=sampler, rows=rows, prior=prior)
        if sampler.noise == "uniform":
            everywhere = torch.arange(status.shape[1], device=keys.device)[None]
            rows.canvas = canvas.reopen(canvas.is_noise, group._noise(rows.age - 1, everywhere))
        return group

    def ask(self, clock: Clock, *, is_every_step: bool) -> Question:
        """Open what comes next, and say where logits are wanted."""
        sampler, rows = self.sampler, self.rows
        revise = sampler.revise
        left = sampler.budget.forwards_left(rows.num_forwards, rows.deadline, clock)
        least = None
        if left is not None:
            is_clocked, num_noise = revise is not None and revise.is_clocked, rows.canvas.is_noise.sum(dim=1)
            least = torch.where(left == 1, num_noise, 0) if is_clocked else -(-num_noise // left)
            if is_clocked and sampler.budget.seconds is not None:
                blocks = count_blocks(rows.block_of, rows.canvas.is_noise | rows.canvas.is_draft).clamp(min=1)
                rows.num_steps = torch.minimum(rows.num_steps, rows.step + (left // blocks).clamp(min=1))
        rows.open_blocks(sampler.frontier.in_flight, least)
        window = rows.window()
        is_asked = window.is_open
        if revise is None or not revise.looks_at_drafts:
            is_asked = is_asked & rows.part.is_noise
        where = is_asked.flatten().nonzero()[:, 0]  # sync: how many positions are open is data
        width = is_asked.shape[1]
        row, column = where // width, where % width
        positions = column if rows.at is None else rows.at[row, column]
        return Question(
            window=window,
            where=where,
            draws=Draws(row_keys=rows.keys, age=rows.age, rows=row, positions=positions, columns=rows.columns),
            left=left,
            least=least,
            is_forward=rows.count_forwards(is_asked, is_every_step=is_every_step),
        )

    def knows(self, question: Question) -> bool:
        """Tell whether the logits asked for are those of the last forward."""
        is_same = self.logits is not None and len(self.logits) == len(question.where)
        return is_same and not question.is_forward.any()  # sync

    def decide(self, question: Question, *, is_told: bool) -> tuple[Step, Int[Tensor, "5 batch"]]:
        """Turn logits into a step.

        Also says of each row whether it is done, is stuck, met NaN, and has finished its block, and where its first
        undecided position is.
        """
        sampler, rows, logits = self.sampler, self.rows, self.logits
        assert logits is not None
        draws, before = question.draws, rows.part
        if sampler.guides:
            logits = logits.clone()  # they may work in place, and the next step may ask for the same logits
        whole = draws.rows * rows.canvas.tokens.shape[1] + draws.positions
        for guide in sampler.guides:
            logits = guide(logits, rows.canvas, whole)
        if sampler.anneal is not None:
            logits = logits / sampler.anneal(question.window)[draws.rows, None]
        if is_told:
            rows.told = logits.view(len(rows.places), -1, logits.shape[-1])
        candidates = Candidates(
            canvas=before,
            window=question.window,
            where=question.where,
            proposal=self._propose(logits, draws, whole),
            previous=rows.seen(rows.previous),
            draws=draws,
        )
        score = candidates.spread(sampler.score(candidates))
        is_set = sampler.unmask(score, candidates) & candidates.is_open_noise
        if question.least is not None:  # more, the surest first, where the policy committed too few
            count = torch.maximum(question.least, is_set.sum(dim=1))
            is_set = best(score.masked_fill(is_set, torch.inf), candidates, count)
        action = setting(is_set, candidates.x_0)
        if sampler.revise is None:
            after, kind = before.place(is_set, candidates.x_0, candidates.confidence), action.kind
        else:
            action = sampler.revise(action, candidates)
            if question.left is not None:
                action = action.closing(question.left == 1)
            after, kind = self._revised(action, candidates)
        if rows.at is None:
            rows.previous = action.tokens
        else:
            rows.previous.scatter_(1, rows.at, action.tokens)
        rows.since_filled = rows.since_filled + (~candidates.is_open_noise.any(dim=1)).long()
        age = rows.age
        is_stuck, is_finished, first = rows.take(after, question.window)
        is_done = sampler.stop(rows.canvas, after)
        step = Step(
            rows=rows.ids,
            age=age,
            canvas=rows.canvas,
            is_done=is_done,
            num_forwards=rows.num_forwards,
            at=rows.at,
            kind=kind,
            proposed=candidates.x_0,
            sureness=candidates.confidence,
        )
        is_nan = candidates.proposal.log_normaliser.isnan().any().expand_as(is_done)
        return step, torch.stack([is_done.long(), is_stuck * ~is_done, is_nan.long(), is_finished, first])

    def _propose(self, logits: Float[Tensor, "n vocab"], draws: Draws, where: Int[Tensor, "n"]) -> Proposal:
        sampler = self.sampler
        never = self.prior[0] if sampler.noise == "mask" else None
        u = draws.uniform(DRAW_TOKEN) if sampler.temperature else None
        temperature, top_k, top_p = sampler.temperature, sampler.top_k, sampler.top_p
        if sampler.constraint is None:
            return propose(logits, never=never, u=u, temperature=temperature, top_k=top_k, top_p=top_p)
        return sampler.constraint(
            propose(logits, never=never),
            self.rows.canvas,
            where,
            u=u,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            with_best=sampler.noise == "uniform",
        )

    def _revised(self, action: Action, candidates: Candidates) -> tuple[Canvas, UInt8[Tensor, "batch width"]]:
        """Do what fits: set and redraw open noise, edit and reopen drafts, and close what is finished."""
        canvas, kind, noise = candidates.canvas, action.kind, action.noise
        is_set = (kind == Kind.SET) & candidates.is_open_noise
        is_edit = (kind == Kind.EDIT) & canvas.is_draft
        is_reopened = (kind == Kind.REOPEN) & canvas.is_draft
        is_noised = is_reopened | (kind == Kind.RENOISE) & candidates.is_open_noise
        canvas = canvas.place(is_set | is_edit, action.tokens, candidates.confidence, status=Status.DRAFT)
        canvas = canvas.reopen(is_noised, self._noise(self.rows.age, self.rows.columns) if noise is None else noise)
        has_noise = (candidates.window.is_open & canvas.is_noise).any(dim=1)
        canvas = canvas.settle((action.may_close & ~has_noise)[:, None].expand_as(is_set))
        return canvas, kind.masked_fill(~(is_set | is_edit | is_reopened), 0)

    def _noise(self, age: Int[Tensor, "batch"], columns: Int[Tensor, "#batch width"]) -> Int[Tensor, "batch width"]:
        """Draw a noise token for every column."""
        if self.sampler.noise == "mask":
            return torch.full_like(columns, self.prior[0]).expand(len(age), -1)
        none = columns[:0, 0]
        draws = Draws(row_keys=self.rows.keys, age=age, rows=none, positions=none, columns=columns)
        return (draws.everywhere(DRAW_NOISE) * self.prior[1]).long()

    def no_progress(self, step: Step, place: int) -> ValueError:
        """Say which policy keeps a row from its end."""
        sampler, rows = self.sampler, self.rows
        is_noise, is_draft = rows.canvas.is_noise[place], rows.canvas.is_draft[place]
        is_open = (is_noise | is_draft) & (rows.block_of[place] <= rows.last_block[place])
        is_revised = sampler.revise is not None and bool(
            not is_noise.any() or step.is_committed[place].any() or rows.num_stalled[place]
        )
        policy: object
        if not (is_noise | is_draft).any():
            policy, what = sampler.stop, "everything is decided, and it is not done. A Stop must end such a row"
        elif not is_open.any():
            policy, what = sampler.frontier, "no block is open. A Frontier must have at least one block in flight"
        elif is_revised:
            policy, what = sampler.revise, "a block stays open after its last step. A Revise must let it close then"
        else:
            policy, what = (
                sampler.unmask,
                "noise is left after a block's last step. An Unmask must commit some in each step",
            )
        name = getattr(policy, "__qualname__", type(policy).__name__)
        return ValueError(f"{name} makes no progress in row {int(step.rows[place])}: {what}.")
