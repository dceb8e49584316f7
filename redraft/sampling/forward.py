"""The forward that rows of equal attention and cache share: what is fed, what is cached, what need not be run again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from redraft.models.cache import Slots, SlotSpans, View
from redraft.models.denoiser import Denoiser
from redraft.models.query import Query, SelfConditioning
from redraft.sampling.caching import ApproximatePlanner, ExactPlanner, Place
from redraft.sampling.guidance import guided, unconditional
from redraft.sampling.rows import Question, Rows
from redraft.sampling.sampler import Sampler


@dataclass(frozen=True)
class Prefix:
    """Tokens whose keys and values are final in a slot."""

    tokens: Int[Tensor, "branches seq"]
    origin: int


class Forward:
    """Calls the model for groups of rows: with or without a cache, with or without guidance.

    Under guidance each row is fed in two branches, one after the other: as it is, and with what was given hidden.
    """

    def __init__(self, denoiser: Denoiser, sampler: Sampler, num_rows: int, num_positions: int) -> None:
        if denoiser.is_self_conditioned and sampler.cfg_scale:
            raise ValueError(f"this model has no unconditional branch; got cfg_scale={sampler.cfg_scale}. Use 0.")
        self.denoiser, self.layout = denoiser, sampler.layout
        self.planner = sampler.planner(denoiser)
        self.branches = 2 if sampler.cfg_scale else 1
        self.slots = Slots(num_rows * self.branches, num_positions)
        self.places: list[Place] = []
        """Rows that have a slot."""
        self.left: dict[int, Prefix] = {}
        """By slot, what a row that had it has left there."""
        # What an approximate cache gives depends on when it was filled, and what a self-conditioned model gives on the
        # step before: there, every step is a forward.
        self.is_repeatable = not isinstance(self.planner, ApproximatePlanner) and not denoiser.is_self_conditioned
        self.num_fed = 0
        """Forwards that fed prompts alone."""

    @torch.no_grad()
    def __call__(self, groups: Sequence[Rows], questions: Sequence[Question]) -> bool:
        """Give each group the logits (n, vocab) that it asks for; run the model if any row's input is new, and say so.

        Raises ValueError where several canvases of a model that takes one are open: a budget can ask for that.
        """
        if self.is_repeatable:
            if all(group.knows(question) for group, question in zip(groups, questions, strict=True)):
                return False
            if not any(len(question.where) for question in questions):
                for group, question in zip(groups, questions, strict=True):
                    group.logits = group.canvas.confidence.new_zeros((0, group.prior[1]))
                    group.answered = question.draws
                return False
        if self.denoiser.is_self_conditioned and any(group.block.ne(group.last_block).any() for group in groups):
            raise ValueError("this model denoises one canvas after the other; give a forward for each, at least.")
        self._close_gaps()
        places = [place for group in groups for place in group.places]
        if self.planner is not None:
            places.sort(key=lambda place: place.slot)
        logits = self.denoiser(self._query(groups, questions, places))
        if self.planner is not None:
            self.planner.note(places)
        sizes = [len(question.where) * self.branches for question in questions]
        for group, question, found in zip(groups, questions, torch.split(logits, sizes), strict=True):
            group.logits = guided(*found.chunk(2), scale=group.sampler.cfg_scale) if self.branches == 2 else found
            group.answered = question.draws
            group.count_forward(question)
        return True

    def _query(self, groups: Sequence[Rows], questions: Sequence[Question], places: list[Place]) -> Query:
        """Lay the rows of all groups out in the order of `places`."""
        device, branches = groups[0].keys.device, self.branches
        order = {id(place): row for row, place in enumerate(places)}
        numbers = [[order[id(place)] for place in group.places] for group in groups]
        is_whole = len(groups) == 1 and numbers[0] == list(range(len(places)))
        indexes = [slice(None) if is_whole else torch.tensor(rows, device=device) for rows in numbers]

        def joined(parts: list[Tensor]) -> Tensor:
            """Lay tensors (rows of a group, ...) out; what is narrower is filled up with 0."""
            if is_whole:
                return parts[0]
            width = max(part.shape[-1] for part in parts)
            whole = parts[0].new_zeros(len(places), *parts[0].shape[1:-1], width)
            for part, index in zip(parts, indexes, strict=True):
                whole[index, ..., : part.shape[-1]] = part
            return whole

        tokens, segment_ids, view = [self._tokens(group) for group in groups], None, None
        first = torch.zeros(len(places), dtype=torch.int64, device=device)
        if self.planner is not None:
            view = self._view(self.planner.plan(places), places)
            first = torch.tensor(view.spans.starts[::branches], device=device)
            fed = [view.positions.view(len(places), branches, -1)[index] for index in indexes]
            tokens = [each.gather(2, at) for each, at in zip(tokens, fed, strict=True)]
        elif len(places) > 1:
            rows = joined([group.segment_ids for group in groups])
            segment_ids = rows[:, None].expand(-1, branches, -1).flatten(0, 1)
        input_ids, where = joined(tokens), []
        for question, index in zip(questions, indexes, strict=True):
            row = question.draws.rows if isinstance(index, slice) else index[question.draws.rows]
            column = question.draws.positions - first[row]
            where += [(row * branches + branch) * input_ids.shape[2] + column for branch in range(branches)]
        previous = None
        if self.denoiser.is_self_conditioned:
            is_told = joined([group.step[:, None] > 0 for group in groups])[:, 0]
            previous = SelfConditioning(joined([group.told for group in groups]), is_told)
        return Query(
            input_ids=input_ids.flatten(0, 1),
            where=torch.cat(where),
            segment_ids=segment_ids,
            layout=self.layout,
            grid_origin=first.new_tensor([place.origin for place in places for _ in range(branches)]),
            view=view,
            previous=previous,
        )

    def _tokens(self, group: Rows) -> Int[Tensor, "rows branches seq"]:
        canvas = group.canvas
        if self.branches == 1:
            return canvas.tokens[:, None]
        return torch.stack([canvas.tokens, unconditional(canvas, group.prior[0])], dim=1)

    def _view(self, spans: SlotSpans, places: Sequence[Place]) -> View:
        slots = [place.slot * self.branches + branch for place in places for branch in range(self.branches)]
        is_run = slots == list(range(slots[0], slots[0] + len(slots)))
        return self.slots.view(
            spans.repeated(self.branches),
            self.denoiser.device,
            first=slots[0],
            rows=None if is_run else slots,
            is_static=self.denoiser.is_compiled,
        )

    def admit(self, group: Rows, running: Sequence[Rows], *, chunk: int | None) -> bool:
        """Give rows that join their slots, with the keys and values that others have of what their prompts begin with.

        What is left of the prompts is fed with their first step, or alone where other rows run or wait for it, up to
        `chunk` tokens in a call. Returns whether the rows are ready.
        """
        if self.planner is None:
            return True
        places, tokens = group.places, self._tokens(group).cpu()  # sync: only where rows join
        everyone = list(range(len(places)))
        if isinstance(self.planner, ExactPlanner):
            kinds = [(tokens[row].numpy().tobytes(), places[row].unfinished, places[row].origin) for row in everyone]
            distinct = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
            self._seat(group, distinct, tokens, running)
            is_alone = len(distinct) == len(self.places) == len(places)
            if not is_alone and not self._feed_prompts(group, distinct, chunk):
                return False
        self._seat(group, everyone, tokens, [*running, group])
        return True

    def _seat(self, group: Rows, rows: Sequence[int], tokens: Tensor, running: Sequence[Rows]) -> None:
        """Find a slot for rows that have none, and the longest prefix that any slot holds."""
        places = [group.places[row] for row in rows if group.places[row].slot < 0]
        if not places:
            return
        running_prefixes: dict[int, Prefix] = {}
        for other in running if isinstance(self.planner, ExactPlanner) else ():
            theirs = self._tokens(other).cpu()
            known = [(place, own) for place, own in zip(other.places, theirs, strict=True) if place.slot >= 0]
            running_prefixes |= {place.slot: Prefix(own[:, : place.final], place.origin) for place, own in known}
        num_places = len(self.places) + len(places)
        self.slots.reserve(num_places * self.branches, max(place.length for place in places))
        taken = {place.slot for place in self.places}
        free = [slot for slot in range(num_places) if slot not in taken]
        for place in places:
            own, sources = tokens[group.places.index(place)], self.left | running_prefixes
            shared = {slot: self._shared(place, own, prefix) for slot, prefix in sources.items()}
            best = max(shared, key=lambda slot: shared[slot], default=-1)
            found = shared.get(best, 0)
            is_whole = found > 0 and found == sources[best].tokens.shape[1]
            place.slot = best if found and best in free else free[0]
            self.places.append(place)
            free.remove(place.slot)
            if place.slot != best or not is_whole:
                self._save(place.slot)
            if found:
                self._copy(best, place.slot, found)
                place.final = found  # not before it is there
            if is_whole:
                self.left.pop(best, None)  # the row that joins has what it has

    def _save(self, slot: int) -> None:
        """Make room in a slot: copy what a row has left there to one that nobody needs, if there is any."""
        prefix = self.left.pop(slot, None)
        taken, capacity = {place.slot for place in self.places}, self.slots.num_rows // self.branches
        unused = [other for other in range(len(self.places), capacity) if other not in taken | self.left.keys()]
        if prefix is not None and unused:
            self._copy(slot, unused[0], prefix.tokens.shape[1])
            self.left[unused[0]] = prefix

    def _shared(self, place: Place, tokens: Int[Tensor, "branches seq"], prefix: Prefix) -> int:
        """Count the positions of whole finished blocks in which a row is as a prefix."""
        assert isinstance(self.planner, ExactPlanner)
        length = min(prefix.tokens.shape[1], place.unfinished) if prefix.origin == place.origin else 0
        is_equal = (prefix.tokens[:, :length] == tokens[:, :length]).all(dim=0)
        return max(0, self.planner.floor(int(is_equal.long().cumprod(dim=0).sum()), place.origin))

    def _feed_prompts(self, group: Rows, rows: Sequence[int], chunk: int | None) -> bool:
        """Write keys and values of finished blocks, and predict nothing; with a chunk, those of one row."""
        assert isinstance(self.planner, ExactPlanner)
        planner, places = self.planner, group.places
        waiting = [row for row in rows if places[row].final < planner.finished(places[row])]
        rows = waiting if chunk is None else waiting[:1]
        if not rows:
            return True
        fed = [places[row] for row in rows]
        ends = [planner.finished(place) for place in fed]
        if chunk is not None:
            ends = [min(ends[0], max(planner.floor(fed[0].final + chunk, fed[0].origin), planner.after(fed[0])))]
        starts = [place.final for place in fed]
        view = self._view(SlotSpans(starts=starts, ends=ends, key_ends=ends, reads_all=False), fed)
        tokens = self._tokens(group)[list(rows)].flatten(0, 1).gather(1, view.positions)
        origin = tokens.new_tensor([place.origin for place in fed for _ in range(self.branches)])
        with torch.no_grad():
            self.denoiser(Query(input_ids=tokens, where=origin[:0], layout=self.layout, grid_origin=origin, view=view))
        self.num_fed += 1
        for place, end in zip(fed, ends, strict=True):
            place.final = end
        return all(place.final == planner.finished(place) for place in places if place.slot >= 0)

    def leave(self, group: Rows, rows: Sequence[int]) -> None:
        """Let rows go; their keys and values stay until their slots are needed."""
        if self.planner is None:
            return
        tokens = self._tokens(group)
        for row in rows:
            place = group.places[row]
            self.places = [other for other in self.places if other is not place]
            if place.slot >= 0 and isinstance(self.planner, ExactPlanner):
                self.left[place.slot] = Prefix(tokens[row, :, : place.final].cpu(), place.origin)

    def _close_gaps(self) -> None:
        """Move the last rows to where others left, so that the rows that run are one piece of the slots."""
        taken = {place.slot for place in self.places}
        gaps = [slot for slot in range(len(self.places)) if slot not in taken]
        for place in [place for place in self.places if place.slot >= len(self.places)]:
            slot = gaps.pop()
            self.left.pop(slot, None)
            self._copy(place.slot, slot, place.final if isinstance(self.planner, ExactPlanner) else place.length)
            place.slot = slot

    def _copy(self, source: int, to: int, num_positions: int) -> None:
        for branch in range(self.branches if source != to else 0):
            self.slots.copy(source * self.branches + branch, to * self.branches + branch, num_positions)
