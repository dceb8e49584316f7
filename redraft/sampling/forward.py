"""The forward that rows of equal attention and cache share: what is fed, what is cached, when none is needed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from redraft.models.cache import Slots, SlotSpans, View
from redraft.models.denoiser import Denoiser
from redraft.models.query import Query, SelfConditioning
from redraft.sampling.caching import Planner
from redraft.sampling.guidance import guided, unconditional
from redraft.sampling.rows import Place, Rows
from redraft.sampling.sampler import Sampler
from redraft.sampling.step import Step, decide


@dataclass(frozen=True)
class Prefix:
    """Tokens whose keys and values are final in a slot."""

    tokens: Int[Tensor, "branches seq"]
    origin: int
    salt: str


class Forward:
    """Calls the model for groups of rows: with or without a cache, with or without guidance.

    Under guidance each row is fed in two branches, one after the other: as it is, and with what was given hidden.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        num_rows: int,
        num_positions: int,
        counts: Counter[str],
        *,
        num_scratch: int = 0,
    ) -> None:
        if denoiser.is_self_conditioned and sampler.cfg_scale:
            raise ValueError(f"this model has no unconditional branch; got cfg_scale={sampler.cfg_scale}. Use 0.")
        self.denoiser, self.layout = denoiser, sampler.layout_on(denoiser.settings)
        self.planner = Planner.of(sampler, denoiser)
        self.branches = 2 if sampler.cfg_scale else 1
        self.num_scratch = num_scratch
        """Slots of each row behind its positions, for keys and values that no later forward reads."""
        self.slots = Slots(num_rows * self.branches, num_positions + num_scratch)
        self.places: list[Place] = []
        """Rows that have a slot."""
        self.left: dict[int, Prefix] = {}
        """By slot, the prefix that a row which has left wrote there."""
        # Logits with an approximate cache depend on when it was filled, and those of a self-conditioned model on the
        # step before: there, the last logits cannot be used again, and every step is a forward.
        self.is_exact = sampler.cache == "exact"
        self.is_repeatable = sampler.cache in ("none", "exact") and not denoiser.is_self_conditioned
        self.counts = counts

    @torch.no_grad()
    def __call__(self, groups: Sequence[Rows]) -> None:
        """Give each group the logits (n, vocab) that it asks for; run the model if any row's input is new.

        Raises ValueError where several canvases of a model that takes one are open: a small budget opens several.
        """
        if self.is_repeatable:
            if all(group.has_answer() for group in groups):
                return
            if not any(len(group.window.where) for group in groups):
                return
        if self.denoiser.is_self_conditioned and any(group.block.ne(group.last_block).any() for group in groups):
            raise ValueError("this model denoises one canvas after the other; allow at least one forward for each.")
        self._close_gaps()
        places = [place for group in groups for place in group.places]
        if self.planner is not None:
            places.sort(key=lambda place: place.slot)
        query = self._query(groups, places)
        sizes = [place.length for place in places]
        if query.view is not None:
            spans = query.view.spans
            sizes = [end - start for start, end in zip(spans.starts, spans.ends, strict=True)][:: self.branches]
        logits = self.denoiser(query)
        self._count("forwards", places, sizes, query)
        if self.planner is not None:
            self.planner.note(places)
        asked = [len(group.window.where) * self.branches for group in groups]
        for group, answer in zip(groups, torch.split(logits, asked), strict=True):
            scale = group.sampler.cfg_scale
            group.answer(guided(*answer.chunk(2), scale=scale) if self.branches == 2 else answer)

    def decide(self, group: Rows) -> tuple[Step, Int[Tensor, "6 batch"]]:
        """Turn the logits of a group into its next step."""
        return decide(group)

    def _query(self, groups: Sequence[Rows], places: list[Place]) -> Query:
        """Lay the rows of all groups out in the order of `places`."""
        device, branches = groups[0].keys.device, self.branches
        indexes = rows_among(groups, places)
        is_whole = isinstance(indexes[0], slice)

        def joined(parts: list[Tensor]) -> Tensor:
            """Lay tensors (rows of a group, ...) out; narrower ones are padded with 0."""
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
        for group, index in zip(groups, indexes, strict=True):
            row = group.window.rows if isinstance(index, slice) else index[group.window.rows]
            column = group.window.positions - first[row]
            where += [(row * branches + branch) * input_ids.shape[2] + column for branch in range(branches)]
        committed = places_in_order = None
        if self.layout.has_order:
            places_in_order = joined([group.order() for group in groups]).repeat_interleave(branches, dim=0)
        elif self.layout.context == "causal":
            committed = [place.committed(self.layout) for place in places]
        previous = None
        if self.denoiser.is_self_conditioned:
            has_previous = joined([group.step[:, None] > 0 for group in groups])[:, 0]
            previous = SelfConditioning(joined([group.predicted for group in groups]), has_previous)
        return Query(
            input_ids=input_ids.flatten(0, 1),
            where=torch.cat(where),
            segment_ids=segment_ids,
            layout=self.layout,
            grid_origin=first.new_tensor([place.origin for place in places for _ in range(branches)]),
            committed=None if committed is None else first.new_tensor(committed).repeat_interleave(branches),
            order=places_in_order,
            view=view,
            previous=previous,
        )

    def _tokens(self, group: Rows) -> Int[Tensor, "rows branches seq"]:
        canvas = group.canvas
        if self.branches == 1:
            return canvas.tokens[:, None]
        return torch.stack([canvas.tokens, unconditional(canvas, group.prior[0])], dim=1)

    def _tokens_of(self, groups: Sequence[Rows]) -> dict[int, Int[Tensor, "branches seq"]]:
        """List the tokens of each row by the id of its place."""
        return {
            id(place): ids for group in groups for place, ids in zip(group.places, self._tokens(group), strict=True)
        }

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

    def admit(self, waiting: Sequence[Rows], others: Sequence[Rows], *, chunk: int | None) -> list[Rows]:
        """Give slots to rows that join, with the keys and values that other rows have of their prompts' beginnings.

        What is left of the prompts is fed with the first step if these rows are alone and in step, else in a forward of
        its own (`_feed_prompts`). Returns the groups that are ready; `others` are those that are not asked for.
        """
        planner = self.planner
        if planner is None:
            return list(waiting)
        tokens = self._tokens_of([*others, *waiting])
        places = [place for group in waiting for place in group.places]
        while True:
            self._seat(places, tokens)
            if not self.is_exact or self._are_in_step(planner, waiting, places, chunk):
                return list(waiting)
            unfed = [place for place in places if place.slot >= 0 and place.final < planner.finished(place)]
            if unfed:
                self._feed_prompts(planner, unfed, tokens, chunk)
            if chunk is not None or not unfed:
                break
        self._seat(places, tokens)
        return [group for group in waiting if all(map(planner.has_prompt, group.places))]

    def _are_in_step(
        self, planner: Planner, waiting: Sequence[Rows], places: Sequence[Place], chunk: int | None
    ) -> bool:
        """Tell whether rows that join have the slots to themselves and, if they are of several groups, equal spans."""
        is_alone = len(self.places) == len(places) == sum(place.slot >= 0 for place in places)
        spans = {(place.final, planner.finished(place), place.end, place.origin) for place in places}
        is_short = chunk is None or all(finished - final <= chunk for final, finished, _, _ in spans)
        return is_alone and (len(waiting) == 1 or (len(spans) == 1 and is_short))

    def _seat(self, places: Sequence[Place], tokens: dict[int, Tensor]) -> None:
        """Find a slot for rows that have none, and the longest prefix that any slot holds.

        A row waits where another one is being fed most of its prompt, so that it can copy that.
        """
        fresh = [place for place in places if place.slot < 0]
        if not fresh:
            return
        num_places = len(self.places) + len(fresh)
        self.slots.reserve(num_places * self.branches, max(place.length for place in fresh) + self.num_scratch)
        known = {key: ids.cpu() for key, ids in tokens.items()} if self.is_exact else {}  # sync: only where rows join
        for place in fresh:
            taken = {other.slot for other in self.places}
            free = [slot for slot in range(num_places) if slot not in taken]
            found = self._longest_prefix(place, known) if self.is_exact else (-1, 0, False)
            if found is None:
                continue
            best, num_shared, is_whole = found
            place.slot = best if num_shared and best in free else free[0]
            self.places.append(place)
            if place.slot != best or not is_whole:
                self._save(place.slot)
            if num_shared:
                self._copy(best, place.slot, num_shared)
                place.final = num_shared  # only after the copy
                place.num_copied += num_shared
            if is_whole:
                self.left.pop(best, None)  # the row that joins holds all of this prefix now

    def _longest_prefix(self, place: Place, known: dict[int, Tensor]) -> tuple[int, int, bool] | None:
        """Find the slot that holds most of a row's prompt, how many positions of it, and whether it holds no more.

        None if it pays to wait.
        """
        assert self.planner is not None
        finished, tokens = self.planner.finished, known[id(place)]
        sources, most = dict(self.left), 0
        for other in self.places:
            whole = Prefix(known[id(other)][:, : finished(other)], other.origin, other.salt)
            sources[other.slot] = Prefix(whole.tokens[:, : other.final], other.origin, other.salt)
            most = max(most, self._num_shared(place, tokens, whole))
        shared = {slot: self._num_shared(place, tokens, prefix) for slot, prefix in sources.items()}
        best = max(shared, key=lambda slot: shared[slot], default=-1)
        num_shared = shared.get(best, 0)
        if most > num_shared and 2 * most > finished(place):
            return None
        return best, num_shared, num_shared > 0 and num_shared == sources[best].tokens.shape[1]

    def _save(self, slot: int) -> None:
        """Free a slot: copy the prefix that a row left there to an unused slot, if there is any."""
        prefix = self.left.pop(slot, None)
        taken, capacity = {place.slot for place in self.places}, self.slots.num_rows // self.branches
        unused = [other for other in range(len(self.places), capacity) if other not in taken | self.left.keys()]
        if prefix is not None and unused:
            self._copy(slot, unused[0], prefix.tokens.shape[1])
            self.left[unused[0]] = prefix

    def _num_shared(self, place: Place, tokens: Int[Tensor, "branches seq"], prefix: Prefix) -> int:
        """Count the positions in which a row equals a prefix: of whole finished blocks, if blocks must be whole."""
        assert self.planner is not None
        is_alike = prefix.salt == place.salt and (prefix.origin == place.origin or self.layout.context == "causal")
        length = min(prefix.tokens.shape[1], self.planner.finished(place)) if is_alike else 0
        is_equal = (prefix.tokens[:, :length] == tokens[:, :length]).all(dim=0)
        return self.planner.whole(int(is_equal.long().cumprod(dim=0).sum()), place.origin)

    def _feed_prompts(
        self, planner: Planner, unfed: Sequence[Place], tokens: dict[int, Tensor], chunk: int | None
    ) -> None:
        """Write keys and values of finished blocks in one forward, and predict nothing.

        With a chunk, the oldest row is fed up to `chunk` tokens, and with it others that need about as many. While rows
        run, all that are fed get `chunk` tokens together; if more rows wait than run, so many times more: each row that
        runs holds up as many rows that wait.
        """
        num_running = len(self.places) - len(unfed)
        first = unfed[0] if chunk is not None else max(unfed, key=lambda place: planner.finished(place) - place.final)
        width = planner.next_end(first, chunk) - first.final
        fed = [place for place in unfed if 2 * (planner.next_end(place, width) - place.final) > width]
        if chunk is not None:
            fed = fed[: max(1, chunk * max(1, len(unfed) // max(1, num_running)) // width)]
        starts, ends = [place.final for place in fed], [planner.next_end(place, width) for place in fed]
        view = self._view(SlotSpans(starts=starts, ends=ends, key_ends=ends, reads_all=False), fed)
        positions = view.positions.view(len(fed), self.branches, -1)
        input_ids = torch.cat([tokens[id(place)].gather(1, at) for place, at in zip(fed, positions, strict=True)])
        origin = input_ids.new_tensor([place.origin for place in fed for _ in range(self.branches)])
        query = Query(input_ids=input_ids, where=origin[:0], layout=self.layout, grid_origin=origin, view=view)
        with torch.no_grad():
            self.denoiser(query)
        self._count("prefills", fed, [end - start for start, end in zip(starts, ends, strict=True)], query)
        for place, end in zip(fed, ends, strict=True):
            place.final = end

    def _count(self, kind: str, places: Sequence[Place], sizes: Sequence[int], query: Query) -> None:
        """Count a forward that fed each row so many positions."""
        for place, size in zip(places, sizes, strict=True):
            place.num_fed += size
        padding = query.input_ids.numel() // self.branches - sum(sizes)
        self.counts.update({kind: 1, "query_tokens": sum(sizes), "padding_tokens": padding})

    def leave(self, group: Rows, rows: Sequence[int], *, damaged: Sequence[int] = ()) -> None:
        """Remove rows; their keys and values stay until their slots are needed, if they are not damaged."""
        if self.planner is None:
            return
        tokens = self._tokens(group)
        for row in rows:
            place = group.places[row]
            self.places = [other for other in self.places if other is not place]
            if place.slot >= 0 and row in damaged:
                for branch in range(self.branches):  # what is masked is weighted by 0, and 0 times NaN is NaN
                    self.slots.clear(place.slot * self.branches + branch)
            elif place.slot >= 0 and self.is_exact:
                self.left[place.slot] = Prefix(tokens[row, :, : place.final].cpu(), place.origin, place.salt)

    def _close_gaps(self) -> None:
        """Move the last rows into slots that are free, so that the running rows are a contiguous part of the pool."""
        taken = {place.slot for place in self.places}
        gaps = [slot for slot in range(len(self.places)) if slot not in taken]
        for place in [place for place in self.places if place.slot >= len(self.places)]:
            slot = gaps.pop()
            self.left.pop(slot, None)
            self._copy(place.slot, slot, place.final if self.is_exact else place.length)
            place.slot = slot

    def _copy(self, source: int, to: int, num_positions: int) -> None:
        for branch in range(self.branches if source != to else 0):
            self.slots.copy(source * self.branches + branch, to * self.branches + branch, num_positions)


def rows_among(groups: Sequence[Rows], places: Sequence[Place]) -> list[slice | Tensor]:
    """Find the rows of each group among the places; a slice where one group has them all, in their order."""
    order = {id(place): row for row, place in enumerate(places)}
    numbers = [[order[id(place)] for place in group.places] for group in groups]
    if len(groups) == 1 and numbers[0] == list(range(len(places))):
        return [slice(None)]
    return [torch.tensor(rows, device=groups[0].keys.device) for rows in numbers]
