"""Speculation: a causal model checks drafts of its next tokens, and drafts those after them, in the same forward.

A round of a row whose first undecided position is u, with k drafts, feeds

    the token at u - 1, the drafts at u .. u + k - 1          causal: their logits predict u .. u + k
    masks from u + a on, for each number a of `groups`        seen by themselves alone: they predict drafts after u + a

What is predicted at u is the autoregressive model's own choice; where a draft equals it, so is what is predicted after
the draft. The longest prefix of such drafts is accepted, and one token more is decided. If a drafts were accepted, the
masks from u + a on saw the text as it is now, and what they predict are the drafts of the next round.

The text is that of preset `ar`, token for token: each token is drawn from the same logits with the same random number.
Sources: Leviathan et al., arXiv 2211.17192 (verification); arXiv 2507.11851 and TiDAR, arXiv 2511.08923 (masks for
every acceptance in one forward); I-DLM, arXiv 2604.11035 (masks after all drafts).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from redraft.models.cache import SlotSpans
from redraft.models.denoiser import Denoiser
from redraft.models.head import output_embeddings
from redraft.models.query import Query
from redraft.models.settings import DiffusionSettings
from redraft.randomness import uniform
from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.forward import Forward, rows_among
from redraft.sampling.policies.candidates import DRAW_TOKEN
from redraft.sampling.policies.revise import Kind
from redraft.sampling.propose import Proposal
from redraft.sampling.rows import Place, Rows
from redraft.sampling.sampler import Sampler, Speculation
from redraft.sampling.step import Likeliest, Step, likeliest_of, propose_tokens

Head = Callable[[Float[Tensor, "batch n dim"]], Float[Tensor, "batch n vocab"]]
"""What makes logits of hidden states; or what leaves logits as they are."""


class SpeculatingForward(Forward):
    """Rounds of groups of rows: one forward a round."""

    def __init__(self, denoiser: Denoiser, sampler: Sampler, *sizes: Any) -> None:
        assert sampler.speculation is not None
        self.round = Round.of(sampler.speculation, denoiser.settings)
        super().__init__(denoiser, sampler, *sizes, num_scratch=self.round.num_fed)
        self.is_repeatable = False  # each round feeds other tokens
        self.head: Head | None = output_embeddings(denoiser.model) if denoiser.has_plain_head else None

    @torch.no_grad()
    def __call__(self, groups: Sequence[Rows]) -> None:
        """Give each group what its round asked for, `Speculation.num_asked` of each row.

        That is what enters the head, where it can be called later: drafts are read from one group of masks alone.
        """
        places = [place for group in groups for place in group.places]
        for place in places:
            if place.opened[0] >= 0:  # of the round before: what was accepted had been fed as text
                place.final, place.opened = place.opened[0] + place.num_accepted, (-1, -1)
                place.num_accepted = 0  # until this round is decided, if it is
        self._close_gaps()
        places.sort(key=lambda place: place.slot)
        self._catch_up(groups, places)
        indexes = rows_among(groups, places)
        query = self._query_of(groups, places, indexes)
        asked = self.denoiser(query) if self.head is None else self.denoiser.hidden(query)
        asked = asked.view(len(places), self.round.speculation.num_asked, -1)
        self._count("forwards", places, [self.round.num_fed] * len(places), query)
        for place in places:
            place.opened = (place.unfinished, place.unfinished + self.round.num_drafts)
        for group, index in zip(groups, indexes, strict=True):
            group.answer(asked[index].flatten(0, 1))

    @torch.no_grad()
    def decide(self, group: Rows) -> tuple[Step, Int[Tensor, "6 batch"]]:
        """Decide the run of tokens that the drafts allow, and draft the next ones."""
        return decide_run(group, self.round, self.head or (lambda logits: logits))

    def _are_in_step(self, *args: Any) -> bool:
        return False  # prompts are fed before the first round: then all rounds have one shape

    def _catch_up(self, groups: Sequence[Rows], places: Sequence[Place]) -> None:
        """Feed what lies before the token that begins a round: text that was given behind a hole."""
        assert self.planner is not None
        while behind := [place for place in places if place.final < place.unfinished - 1]:
            self._feed_prompts(self.planner, behind, self._tokens_of(groups), None)

    def _query_of(self, groups: Sequence[Rows], places: Sequence[Place], indexes: Sequence[slice | Tensor]) -> Query:
        """Lay out what a round feeds, in the order of `places`."""
        each, device = self.round, groups[0].keys.device
        starts = [max(place.unfinished - 1, 0) for place in places]
        ends = [start + each.num_fed for start in starts]
        view = self._view(SlotSpans(starts=starts, ends=ends, key_ends=ends, reads_all=False), places)
        start, undecided, length = (
            torch.tensor(numbers, device=device)[:, None]
            for numbers in (starts, [place.unfinished for place in places], [place.length for place in places])
        )
        text = start + torch.arange(each.num_drafts + 1, device=device)
        input_ids = torch.full((len(places), each.num_fed), groups[0].prior[0], device=device)
        has_drafts = torch.zeros(len(places), dtype=torch.bool, device=device)
        for group, index in zip(groups, indexes, strict=True):
            last = group.canvas.tokens.shape[1] - 1
            input_ids[index, : text.shape[1]] = group.canvas.tokens.gather(1, text[index].clamp(max=last))
            has_drafts[index] = group.canvas.is_draft.any(dim=1)
        masks = undecided[:, :, None] + each.accepted(has_drafts)[:, :, None]
        masks = (masks + torch.arange(each.num_masks, device=device)).flatten(1)
        positions = torch.minimum(torch.cat([text, masks], dim=1), length - 1)
        slots = torch.arange(view.num_keys, device=device) - start  # those of the round count from 0
        is_fed, number = (slots >= 0) & (slots < each.num_fed), slots.clamp(min=0, max=each.num_fed - 1)
        rule = each.rule(has_drafts).gather(2, number[:, None].expand(-1, each.num_fed, -1))
        return Query(
            input_ids=input_ids,
            where=each.where(len(places), device),
            positions=positions,
            layout=self.layout,
            shift=False,
            is_open=(torch.arange(each.num_fed, device=device) > each.num_drafts).expand(len(places), -1),
            view=view,
            sees=(slots < 0)[:, None] | is_fed[:, None] & rule,
            slot_positions=torch.where(is_fed, positions.gather(1, number), slots + start),
        )


@dataclass(frozen=True, kw_only=True)
class Round:
    """The tokens of a round: the last decided one, k drafts, and groups of masks."""

    speculation: Speculation
    shift: bool
    """Whether a mask predicts the position behind it, not its own."""
    is_causal: bool
    """Whether masks of a group see only those before them."""

    @classmethod
    def of(cls, speculation: Speculation, settings: DiffusionSettings) -> "Round":
        """Lay out the rounds of a model."""
        return cls(
            speculation=speculation,
            shift=settings.shift_logits,
            is_causal=settings.layout.within == "causal",
        )

    @property
    def num_drafts(self) -> int:
        """Drafts that a round checks, and that it makes."""
        return self.speculation.num_drafts

    @property
    def num_groups(self) -> int:
        """Groups of masks."""
        return self.speculation.num_groups

    @property
    def num_masks(self) -> int:
        """Masks of a group: from the place of the token that is decided with the drafts before, to the last draft's.

        Nothing sees the last one where masks are causal, and it predicts no draft under a shift.
        """
        return self.num_drafts + (not (self.shift and self.is_causal))

    @property
    def num_fed(self) -> int:
        """Tokens that a row feeds in a round."""
        return 1 + self.num_drafts + self.num_groups * self.num_masks

    def accepted(self, has_drafts: Bool[Tensor, "batch"]) -> Int[Tensor, "batch groups"]:
        """Say after how many accepted drafts each group of masks stands."""
        if self.speculation.source == "ahead":
            return (self.num_drafts * has_drafts.long())[:, None]
        return torch.arange(self.num_groups, device=has_drafts.device).expand(len(has_drafts), -1)

    def rule(self, has_drafts: Bool[Tensor, "batch"]) -> Bool[Tensor, "batch fed fed"]:
        """Tell which tokens of a round see which: of each row (query, key)."""
        num_text, fed = self.num_drafts + 1, torch.arange(self.num_fed, device=has_drafts.device)
        is_text, group = fed < num_text, (fed - num_text).div(max(self.num_masks, 1), rounding_mode="floor")
        reach = fed.expand(len(has_drafts), -1)  # the last token of the text that each one sees
        if self.num_groups:
            reach = torch.where(is_text, fed, self.accepted(has_drafts)[:, group.clamp(min=0)])
        sees_masks = (group[:, None] == group) & ~is_text & ~is_text[:, None]
        if self.is_causal:
            sees_masks &= fed[:, None] >= fed
        return is_text & (fed <= reach[:, :, None]) | sees_masks

    def where(self, num_rows: int, device: torch.device) -> Int[Tensor, "asked"]:
        """List the tokens whose logits are wanted."""
        fed = torch.arange(self.num_fed, device=device)
        if self.num_groups:
            number = (fed - self.num_drafts - 1) % self.num_masks
            fed = fed[(fed <= self.num_drafts) | (number < self.num_drafts if self.shift else number > 0)]
        return (torch.arange(num_rows, device=device)[:, None] * self.num_fed + fed).flatten()


@dataclass(frozen=True, kw_only=True)
class Run:
    """As many positions of each row, one after the other."""

    positions: Int[Tensor, "batch n"]
    tokens: Int[Tensor, "batch n"]
    is_open: Bool[Tensor, "batch n"]
    """Noise and drafts; False behind the end of a row."""
    is_draft: Bool[Tensor, "batch n"]

    @classmethod
    def of(cls, canvas: Canvas, first: Int[Tensor, "batch"], size: int) -> "Run":
        """Take the positions first, first + 1, ... of each row."""
        positions = first[:, None] + torch.arange(size, device=first.device)
        within = positions.clamp(max=canvas.tokens.shape[1] - 1)
        status = canvas.status.gather(1, within).masked_fill(positions > within, int(Status.PAD))
        is_draft = status == Status.DRAFT
        return cls(
            positions=within,
            tokens=canvas.tokens.gather(1, within),
            is_open=(status == Status.NOISE) | is_draft,
            is_draft=is_draft,
        )

    def place(
        self, canvas: Canvas, which: Bool[Tensor, "batch n"], tokens: Tensor, confidence: Tensor, *, status: Status
    ) -> Canvas:
        """Put tokens down at some of the positions."""
        at = torch.where(which, self.positions, canvas.tokens.shape[1])  # the others go to a column that is cut off

        def spread(values: Tensor, elsewhere: Tensor) -> Tensor:
            wide = torch.cat([elsewhere, elsewhere[:, :1]], dim=1)
            return wide.scatter(1, at, values.to(wide.dtype))[:, :-1]

        return Canvas(
            tokens=spread(tokens, canvas.tokens),
            status=spread(torch.full_like(tokens, int(status)), canvas.status),
            confidence=spread(confidence, canvas.confidence),
        )


def decide_run(rows: Rows, fed: Round, head: Head) -> tuple[Step, Int[Tensor, "6 batch"]]:
    """Decide the accepted drafts and the token after them, and place the next drafts; `head` gives logits.

    The facts are those of `step.decide`; the last is the number of accepted drafts.
    """
    assert rows.logits is not None
    k, before, sampler = fed.num_drafts, rows.canvas, rows.sampler
    asked = rows.logits.view(len(before.tokens), fed.speculation.num_asked, -1)
    first = rows.keys.new_tensor([place.unfinished for place in rows.places])
    run = Run.of(before, first, k + 1)
    blank = before.reopen(before.is_draft, torch.full_like(before.tokens, rows.prior[0]))  # as preset `ar` sees it
    proposal = _propose_run(rows, blank, run, head(asked[:, : k + 1]))
    x_0, confidence = (values.view(run.tokens.shape) for values in (proposal.x_0, proposal.confidence))
    agrees = run.is_draft & (x_0 == run.tokens) & (first > 0)[:, None]
    num_accepted = agrees[:, :k].long().cumprod(dim=1).sum(dim=1)
    is_set = run.is_open & (torch.arange(k + 1, device=first.device) <= num_accepted[:, None])
    after = run.place(blank, is_set, x_0, confidence, status=Status.COMMITTED)
    drafts = Run.of(after, first + num_accepted + 1, k)
    tokens, sure, is_drafted = _draft(rows, fed, after, drafts, asked[:, k + 1 :], head, num_accepted)
    canvas = drafts.place(after, is_drafted & drafts.is_open, tokens, sure, status=Status.DRAFT)
    tail = canvas if rows.at is None else canvas.columns(rows.at)
    kind = _kinds(rows.part, tail)
    step = Step(
        rows=rows.ids,
        age=rows.age,
        canvas=canvas,
        is_done=sampler.stop(canvas, tail),
        num_forwards=rows.num_forwards,
        at=rows.at,
        kind=kind,
        proposed=tail.tokens,
        proposed_confidence=torch.where(kind > 0, tail.confidence, 0.0),
        likeliest=_likeliest(run, is_set, proposal, sampler.num_listed) if sampler.num_listed else None,
        num_accepted=num_accepted,
    )
    undecided = rows.advance(canvas, tail, is_set.sum(dim=1))
    is_nan = (proposal.log_normaliser.view(run.tokens.shape).isnan() & is_set).any(dim=1)
    none = torch.zeros_like(first)
    return step, torch.stack([step.is_done.long(), none, is_nan.long(), none + 1, undecided, num_accepted])


def _propose_run(rows: Rows, blank: Canvas, run: Run, logits: Float[Tensor, "batch n vocab"]) -> Proposal:
    """Propose a token at each position of a run as preset `ar` does: the n-th with the random number of its n-th step.

    Guides and constraints may look at all tokens before: then one position is proposed after the other.
    """
    sampler, size = rows.sampler, run.tokens.shape
    offsets = torch.arange(size[1], device=run.tokens.device)
    u = uniform(rows.keys[:, None], rows.age[:, None] + offsets, run.positions, DRAW_TOKEN)
    if not sampler.guides and sampler.constraint is None:
        return propose_tokens(rows, logits.flatten(0, 1), u=u.flatten())
    logits, canvas, is_alive = logits.clone(), blank, torch.ones_like(run.is_open[:, 0])
    x_0, confidence = run.tokens.clone(), torch.zeros(size, device=u.device)
    normaliser = torch.zeros_like(confidence)
    for n in range(size[1]):
        index = (is_alive & run.is_open[:, n]).nonzero()[:, 0]  # sync: only under guides and constraints
        if not len(index):
            break
        where, one = index * canvas.tokens.shape[1] + run.positions[index, n], logits[index, n]
        for guide in sampler.guides:
            one = guide(one, canvas, where)
        proposal = propose_tokens(rows, one, u=u[index, n], canvas=canvas, where=where)
        logits[index, n], x_0[index, n] = one, proposal.x_0
        confidence[index, n], normaliser[index, n] = proposal.confidence, proposal.log_normaliser
        is_now = torch.zeros_like(run.is_open)
        is_now[index, n] = True
        canvas = run.place(canvas, is_now, x_0, confidence, status=Status.COMMITTED)
        is_alive = is_alive & run.is_draft[:, n] & (x_0[:, n] == run.tokens[:, n])
    return Proposal(
        x_0=x_0.flatten(),
        confidence=confidence.flatten(),
        logits=logits.flatten(0, 1),
        log_normaliser=normaliser.flatten(),
    )


def _draft(
    rows: Rows,
    fed: Round,
    after: Canvas,
    run: Run,
    asked: Float[Tensor, "batch drafts dim"],
    head: Head,
    num_accepted: Int[Tensor, "batch"],
) -> tuple[Int[Tensor, "batch k"], Float[Tensor, "batch k"], Bool[Tensor, "batch k"]]:
    """Draft the tokens after a run: (tokens, their probabilities, which there are).

    A draft is drawn with the random number that checks it: the nearer the two distributions, the likelier they agree.
    """
    k, size = fed.num_drafts, run.tokens.shape
    if not fed.num_groups:
        tokens, is_known = look_up(after, run.positions[:, 0], k)
        return tokens, torch.zeros(size, device=tokens.device), is_known
    stands = fed.accepted(rows.canvas.is_draft.any(dim=1)) == num_accepted[:, None]  # (B, groups)
    numbers = torch.arange(k, device=num_accepted.device)
    index = stands.long().argmax(dim=1)[:, None] * k + numbers
    chosen = head(asked.gather(1, index[:, :, None].expand(-1, -1, asked.shape[2])))
    u = uniform(rows.keys[:, None], (rows.age + num_accepted + 1)[:, None] + numbers, run.positions, DRAW_TOKEN)
    proposal = propose_tokens(rows, chosen.flatten(0, 1), u=u.flatten())
    has_drafts = stands.any(dim=1, keepdim=True).expand(size)
    return proposal.x_0.view(size), proposal.confidence.view(size), has_drafts


def look_up(
    canvas: Canvas, end: Int[Tensor, "batch"], num_drafts: int
) -> tuple[Int[Tensor, "batch k"], Bool[Tensor, "batch k"]]:
    """Draft what followed the last tokens of a text where they stood in it before (prompt lookup decoding).

    The place where most of the last three tokens match is taken; of several, the last one.
    """
    tokens, (_, length) = canvas.tokens, canvas.tokens.shape
    columns = torch.arange(length, device=end.device)
    num_equal, is_equal = torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)
    for back in range(1, min(3, length) + 1):  # do the `back` tokens before a column equal the last ones of the text?
        last = tokens.gather(1, (end - back).clamp(min=0)[:, None])
        left = torch.cat([torch.full_like(tokens[:, :back], -1), tokens[:, :-back]], dim=1)
        is_equal = is_equal & (left == last) & (end >= back)[:, None]
        num_equal += is_equal
    is_match = (columns < end[:, None]) & (num_equal > 0)
    score = torch.where(is_match, num_equal * length + columns, -1)
    positions = score.argmax(dim=1)[:, None] + torch.arange(num_drafts, device=end.device)
    is_known = (positions < end[:, None]) & is_match.any(dim=1, keepdim=True)
    return tokens.gather(1, positions.clamp(max=length - 1)), is_known


def _kinds(before: Canvas, after: Canvas) -> UInt8[Tensor, "batch seq"]:
    """Tell what happened to each position."""
    kind = torch.zeros_like(before.status)
    kind[before.is_noise & ~after.is_noise] = int(Kind.SET)
    kind[before.is_draft & ~after.is_noise & (before.tokens != after.tokens)] = int(Kind.EDIT)
    kind[before.is_draft & after.is_noise] = int(Kind.REOPEN)
    return kind


def _likeliest(run: Run, is_set: Bool[Tensor, "batch n"], proposal: Proposal, num_listed: int) -> Likeliest:
    index = is_set.flatten().nonzero()[:, 0]  # sync: only for those who ask
    rows = torch.arange(len(is_set), device=is_set.device)[:, None].expand_as(is_set).flatten()
    return likeliest_of(proposal, index, rows=rows, positions=run.positions.flatten(), num_listed=num_listed)
