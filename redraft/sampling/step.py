"""One step of rows with equal settings: logits become an action, and the action a new canvas."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.policies.candidates import DRAW_TOKEN, Candidates, Window
from redraft.sampling.policies.revise import Action, Kind
from redraft.sampling.policies.unmask import best
from redraft.sampling.propose import Proposal, propose
from redraft.sampling.rows import Rows


@dataclass(frozen=True, kw_only=True)
class Likeliest:
    """The likeliest tokens at the positions where a step placed one, and their log-probabilities in nats."""

    rows: Int[Tensor, "n"]
    """Rows of the step, from 0."""
    positions: Int[Tensor, "n"]
    tokens: Int[Tensor, "n k"]
    log_p: Float[Tensor, "n k"]


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
    """Forwards that each row took part in so far; a step with the same input as the row's last forward needs none."""
    at: Int[Tensor, "batch width"] | None
    """The columns that the step worked on: those below; None for all."""
    kind: UInt8[Tensor, "batch width"]
    proposed: Int[Tensor, "batch width"]
    proposed_confidence: Float[Tensor, "batch width"]
    likeliest: Likeliest | None = None
    """With a sampler's `num_listed`."""
    num_accepted: Int[Tensor, "batch"] | None = None
    """Drafts of each row that its own next tokens agreed with, if it speculates."""

    @property
    def x_0(self) -> Int[Tensor, "batch seq"]:
        """Proposals at the open positions; elsewhere the canvas."""
        return self._spread(self.proposed, self.canvas.tokens)

    @property
    def confidence(self) -> Float[Tensor, "batch seq"]:
        """Probability of the proposals; 0 where nothing was open."""
        return self._spread(
            self.proposed_confidence, torch.zeros_like(self.canvas.confidence, dtype=self.proposed_confidence.dtype)
        )

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


def decide(rows: Rows) -> tuple[Step, Int[Tensor, "6 batch"]]:
    """Turn logits into a step; where a policy raises, the rows are as they were.

    The tensor holds for each row: is it done, is it stuck, are logits NaN, is its block finished, its first undecided
    position, and how many drafts were accepted. One tensor, so that the caller waits for the device once.
    """
    sampler, window, logits, before = rows.sampler, rows.window, rows.logits_asked_for(), rows.part
    if sampler.guides:
        logits = logits.clone()  # they may work in place, and the next step may ask for the same logits
    where = window.rows * rows.canvas.tokens.shape[1] + window.positions
    for guide in sampler.guides:
        logits = guide(logits, rows.canvas, where)
    if sampler.anneal is not None:
        logits = logits / sampler.anneal(window)[window.rows, None]
    u = window.uniform(DRAW_TOKEN) if sampler.temperature else None
    proposal = propose_tokens(rows, logits, u=u, canvas=rows.canvas, where=where)
    candidates = Candidates(canvas=before, window=window, proposal=proposal, previous=rows.in_columns(rows.previous))
    score = candidates.spread(sampler.score(candidates))
    is_set = sampler.unmask(score, candidates) & candidates.is_open_noise
    if rows.num_required is not None:  # where the policy committed too few, commit more: the highest scores first
        count = torch.maximum(rows.num_required, is_set.sum(dim=1))
        is_set = best(score.masked_fill(is_set, torch.inf), candidates, count)
    is_last_forward = torch.zeros_like(is_set[:, 0]) if rows.left is None else rows.left == 1
    action = Action(kind=is_set.to(torch.uint8), tokens=candidates.x_0, closes_block=is_last_forward)
    if sampler.revise is None:
        after, kind = before.place(is_set, candidates.x_0, candidates.confidence), action.kind
    else:
        after, kind, action = _revised(rows, action, candidates)
    canvas = after if rows.at is None else rows.canvas.with_columns(rows.at, after)
    is_done = sampler.stop(canvas, after)
    step = Step(
        rows=rows.ids,
        age=rows.age,
        canvas=canvas,
        is_done=is_done,
        num_forwards=rows.num_forwards,
        at=rows.at,
        kind=kind,
        proposed=candidates.x_0,
        proposed_confidence=candidates.confidence,
        likeliest=_likeliest(window, proposal, kind, sampler.num_listed) if sampler.num_listed else None,
    )
    if rows.predicted.numel():
        rows.predicted = logits.view_as(rows.predicted).to(rows.predicted.dtype)
    is_stuck, is_finished, first = rows.take(canvas, after, action.tokens)
    is_nan = torch.zeros_like(is_stuck).index_add_(0, window.rows, proposal.log_normaliser.isnan().long())
    return step, torch.stack([is_done.long(), is_stuck * ~is_done, is_nan, is_finished, first, torch.zeros_like(first)])


def _likeliest(window: Window, proposal: Proposal, kind: UInt8[Tensor, "batch width"], num_listed: int) -> Likeliest:
    placed = kind.flatten()[window.where]
    index = ((placed == Kind.SET) | (placed == Kind.EDIT)).nonzero()[:, 0]  # sync: only for those who ask
    return likeliest_of(proposal, index, rows=window.rows, positions=window.positions, num_listed=num_listed)


def likeliest_of(
    proposal: Proposal,
    index: Int[Tensor, "m"],
    *,
    rows: Int[Tensor, "n"],
    positions: Int[Tensor, "n"],
    num_listed: int,
) -> Likeliest:
    """List the likeliest tokens of some of the n proposals, which stand at these rows and positions."""
    log_p = proposal.logits[index].float() - proposal.log_normaliser[index, None]
    top = log_p.topk(min(num_listed, log_p.shape[1]), dim=-1)
    return Likeliest(rows=rows[index], positions=positions[index], tokens=top.indices, log_p=top.values)


def propose_tokens(
    rows: Rows,
    logits: Float[Tensor, "n vocab"],
    *,
    u: Float[Tensor, "n"] | None,
    canvas: Canvas | None = None,
    where: Int[Tensor, "n"] | None = None,
) -> Proposal:
    """Propose tokens with the rows' sampler, at `where` of a canvas that their constraint sees (None: without it)."""
    sampler = rows.sampler
    never = rows.prior[0] if sampler.noise == "mask" else None
    draw: dict[str, Any] = {"temperature": sampler.temperature, "top_k": sampler.top_k, "top_p": sampler.top_p}
    draw["u"] = u if sampler.temperature else None
    if sampler.constraint is None or canvas is None or where is None:
        return propose(logits, never=never, **draw)
    plain = propose(logits, never=never)
    return sampler.constraint(plain, canvas, where, with_best=sampler.noise == "uniform", **draw)


def _revised(rows: Rows, action: Action, candidates: Candidates) -> tuple[Canvas, UInt8[Tensor, "batch width"], Action]:
    """Apply an action where it fits: set and redraw open noise, edit and reopen drafts, close finished blocks.

    In the last forward of a budget a block closes, so none of its positions becomes or stays noise.
    """
    assert rows.sampler.revise is not None
    is_last_forward, action = action.closes_block, rows.sampler.revise(action, candidates)
    canvas, kind = candidates.canvas, action.kind
    is_set = (kind == Kind.SET) & candidates.is_open_noise
    is_edit = (kind == Kind.EDIT) & canvas.is_draft
    is_reopened = (kind == Kind.REOPEN) & canvas.is_draft & ~is_last_forward[:, None]
    is_renoised = (kind == Kind.RENOISE) & candidates.is_open_noise & ~is_last_forward[:, None]
    canvas = canvas.place(is_set | is_edit, action.tokens, candidates.confidence, status=Status.DRAFT)
    noise = rows.noise(rows.age, rows.columns) if action.noise is None else action.noise
    canvas = canvas.reopen(is_reopened | is_renoised, noise)
    has_noise = (candidates.window.is_open & canvas.is_noise).any(dim=1)
    closes = (action.closes_block | is_last_forward) & ~has_noise
    canvas = canvas.settle(closes[:, None].expand_as(is_set))
    return canvas, kind.masked_fill(~(is_set | is_edit | is_reopened), 0), action


def no_progress(rows: Rows, step: Step, place: int) -> ValueError:
    """Make the error that says which policy keeps a row from its end."""
    sampler = rows.sampler
    is_noise, is_draft = rows.canvas.is_noise[place], rows.canvas.is_draft[place]
    is_open = (is_noise | is_draft) & (rows.block_of[place] <= rows.last_block[place])
    has_committed = not is_noise.any() or step.is_committed[place].any() or rows.num_stalled[place]
    policy: object = sampler.unmask
    what = "noise is left after a block's last step. An Unmask must commit some in each step"
    if not (is_noise | is_draft).any():
        policy, what = sampler.stop, "everything is decided, and it is not done. A Stop must end such a row"
    elif not is_open.any():
        policy, what = sampler.frontier, "no block is open. A Frontier must have at least one block in flight"
    elif sampler.revise is not None and bool(has_committed):
        policy, what = sampler.revise, "a block stays open after its last step. A Revise must let it close then"
    name = getattr(policy, "__qualname__", type(policy).__name__)
    return ValueError(f"{name} makes no progress in row {int(step.rows[place])}: {what}.")
