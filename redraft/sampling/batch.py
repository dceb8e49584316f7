"""A batch of rows that are denoised together: they join and leave at any forward, and none changes another."""

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor

from redraft.models.denoiser import Denoiser
from redraft.models.finite import explain_nan, is_out_of_memory
from redraft.sampling.canvas import Canvas
from redraft.sampling.forward import Forward
from redraft.sampling.rows import Place, Rows
from redraft.sampling.sampler import Sampler
from redraft.sampling.speculate import SpeculatingForward
from redraft.sampling.step import Step, no_progress


class Batch:
    """Running rows of one denoiser, for one thread: what `generate`, chat and a server drive.

    Rows of samplers with the same attention and cache share a forward; those of one sampler (the same object) are
    decided together. A row gets the same tokens as if it ran alone (bitwise in float64), whichever rows join or leave.
    Keys and values of rows that left stay until their slot is needed. With an exact cache, a row that joins copies
    those of the longest prefix that it shares with any other row.

    Only rows with the same `salt` share prefixes: otherwise the time that a prompt takes would tell who else sent it.

    Memory is reserved for `max_rows` and `max_positions`; more is allowed and costs a copy. Unused slots hold prefixes
    of rows that left. Prompts of rows that join are fed together in a forward of their own, up to `chunk` tokens in a
    tick while others run (None: all), or more if more rows wait than run; these rows take no steps meanwhile.
    """

    def __init__(
        self, denoiser: Denoiser, *, max_rows: int = 0, max_positions: int = 0, chunk: int | None = None
    ) -> None:
        self.denoiser, self.chunk = denoiser, chunk
        self.size = (max_rows, max_positions)
        self._groups: list[Rows] = []
        self._waiting: list[Rows] = []
        self._forwards: dict[object, Forward] = {}
        self._steps: list[Step] = []
        self._num_joined = 0
        self.counts: Counter[str] = Counter()
        """Forwards, those that fed prompts alone (prefills), the positions fed (query_tokens) and the padding among
        them (padding_tokens); of rows that speculate, places for drafts and those accepted (accepted_drafts)."""

    def __len__(self) -> int:
        return sum(len(group.places) for group in self._groups + self._waiting)

    @property
    def bytes_per_position(self) -> int:
        """Memory of the keys and values of one position of a row, as far as forwards have shown it."""
        return sum(forward.slots.bytes_per_position for forward in self._forwards.values())

    def join(self, canvas: Canvas, sampler: Sampler, *, row_keys: Int[Tensor, "batch"], salt: str = "") -> list[int]:
        """Take in rows, and return their ids. `row_keys` seed them: equal keys and prompts give equal tokens.

        Raises ValueError for a cache that does not fit the model's attention, and for a constraint that a row cannot
        satisfy; then no row has joined.
        """
        if len(row_keys) != len(canvas.tokens):
            raise ValueError(f"row_keys must be one for each row; got {len(row_keys)} for {len(canvas.tokens)} rows.")
        if sampler.constraint is not None:
            sampler.constraint.check(canvas)
        self._forward_of(sampler)
        ids = list(range(self._num_joined, self._num_joined + len(row_keys)))
        self._num_joined += len(ids)
        prior = self.denoiser.settings.mask_token_id, self.denoiser.model.config.get_text_config().vocab_size
        layout = sampler.layout_on(self.denoiser.settings)
        group = Rows(sampler, canvas, row_keys, ids=ids, prior=prior, layout=layout)
        for place in group.places:
            place.salt = salt
        if self.denoiser.is_self_conditioned:
            length = layout.block_size or 0
            group.predicted = group.predicted.new_zeros(len(ids), length, prior[1], dtype=self.denoiser.model.dtype)
        self._waiting.append(group)
        self._drop(group, group.num_left.eq(0).tolist())  # sync: a row with nothing to decide is done
        return ids

    def leave(self, ids: Sequence[int]) -> None:
        """Remove rows, done or not; ids of rows that have left already are ignored."""
        for group in [*self._groups, *self._waiting]:
            self._drop(group, [id in ids for id in group.ids.tolist()])

    def place(self, id: int) -> Place:
        """Return the progress of a row; the batch keeps it up to date until the row leaves."""
        groups = (*self._groups, *self._waiting)
        return next(
            place for rows in groups for place, own in zip(rows.places, rows.ids.tolist(), strict=True) if own == id
        )

    def suspend(self, ids: Sequence[int]) -> list[Rows]:
        """Remove rows, and return them with all their state: after `resume` they go on as if nothing had happened."""
        groups = [group for group in (*self._groups, *self._waiting) if set(ids) & set(group.ids.tolist())]
        rows = [row for group in groups for row in group.split() if int(row.ids[0]) in ids]
        self.leave(ids)
        for row in rows:
            place = row.places[0]
            place.slot, place.final, place.opened = -1, 0, (-1, -1)
        return rows

    def resume(self, rows: Rows) -> None:
        """Take in a row that was suspended; its keys and values are computed anew."""
        self._waiting.append(rows)

    def tick(self, failed: dict[int, Exception] | None = None) -> list[Step]:
        """Make one step of every row that is ready: a forward for each kind of attention and cache, if one is needed.

        Returns a step for each sampler; rows that are done have left. If it raises, nothing is lost: the next tick
        returns the steps that were made, and makes the others. Raises ValueError for logits that are NaN, for a policy
        that makes no progress (from a block's last step on, each step must change something), and for a budget with
        fewer forwards than canvases, if the model denoises one canvas at a time.

        With `failed`, only want of memory is raised. Rows that raise anything else leave, and `failed` gets the error
        of each by its id: where rows that share a forward or a sampler raise, each is tried by itself once.
        """
        self._admit(failed)
        for forward in self._forwards.values():
            if groups := self._sharing(forward, self._groups):
                try:
                    self._step(forward, groups, failed)
                except Exception as error:
                    if failed is None or is_out_of_memory(error):
                        raise
                    self._step_alone(forward, groups, failed)
        steps, self._steps = self._steps, []
        return steps

    def _step(self, forward: Forward, groups: list[Rows], failed: dict[int, Exception] | None) -> None:
        """Make a step of all groups; those that have made it are removed from the list."""
        for group in groups:
            group.ask(is_every_step=not forward.is_repeatable)
        forward(groups)
        while groups:
            group = groups[0]
            step, facts = forward.decide(group)
            groups.pop(0)
            is_done, is_stuck, is_nan, is_finished, first, accepted = facts.tolist()  # sync: the one question per step
            for row, place in enumerate(group.places):
                place.is_finished, place.unfinished = is_finished[row] > 0, first[row]
                place.num_accepted = accepted[row]
            if group.sampler.speculation is not None:
                num_drafts = group.sampler.speculation.num_drafts * len(accepted)
                self.counts.update({"drafts": num_drafts, "accepted_drafts": sum(accepted)})
            errors = {row: no_progress(group, step, row) for row, stuck in enumerate(is_stuck) if stuck}
            if nans := [row for row, nan in enumerate(is_nan) if nan]:
                errors = dict.fromkeys(nans, explain_nan(self.denoiser, group.canvas.tokens[nans]))
            self._steps.append(step)
            if failed is None:
                self._drop(group, [done > 0 for done in is_done])
                if errors:
                    raise next(iter(errors.values()))
                continue
            failed |= {int(step.rows[row]): error for row, error in errors.items()}
            self._drop(group, [done > 0 or row in errors for row, done in enumerate(is_done)], failed)

    def _step_alone(self, forward: Forward, groups: list[Rows], failed: dict[int, Exception]) -> None:
        """Make the step of each row by itself; those that raise leave."""
        for group in groups:
            singles = group.split()
            self._groups = [other for other in self._groups if other is not group] + singles
            try:
                for single in singles:
                    try:
                        self._step(forward, [single], failed)
                    except Exception as error:
                        if is_out_of_memory(error):
                            raise
                        self._fail(single, error, failed)
            finally:
                present = [single for single in singles if any(single is other for other in self._groups)]
                self._groups = [other for other in self._groups if not any(other is one for one in present[1:])]
                for single in present[1:]:
                    present[0].join(single)

    def _admit(self, failed: dict[int, Exception] | None) -> None:
        """Move waiting rows to the running ones, once their prompts are fed."""
        for forward in dict.fromkeys(self._forward_of(group.sampler) for group in self._waiting):
            waiting = self._sharing(forward, self._waiting)
            try:
                ready = self._prepare(forward, waiting)
            except Exception as error:
                if failed is None or is_out_of_memory(error):
                    raise
                ready = []
                for group in waiting:  # each by itself once
                    try:
                        ready += self._prepare(forward, [group])
                    except Exception as error:
                        if is_out_of_memory(error):
                            raise
                        self._fail(group, error, failed)
            for group in ready:
                self._waiting.remove(group)
                same = [other for other in self._groups if other.sampler is group.sampler]
                for other in same:
                    other.join(group)
                self._groups += [] if same else [group]

    def _prepare(self, forward: Forward, waiting: list[Rows]) -> list[Rows]:
        """Open the first blocks of rows, and feed prompts; return the groups that are ready."""
        for group in waiting:
            group.open_blocks()
        others = [group for group in self._groups + self._waiting if group not in waiting]
        return forward.admit(waiting, self._sharing(forward, others), chunk=self.chunk)

    def _fail(self, group: Rows, error: Exception, failed: dict[int, Exception]) -> None:
        failed |= dict.fromkeys(group.ids.tolist(), error)
        self._drop(group, [True] * len(group.places), failed)

    def _drop(self, group: Rows, is_gone: Sequence[bool], failed: Container[int] = ()) -> None:
        """Remove rows; nothing is kept of what those that failed wrote."""
        if not any(is_gone):
            return
        remaining, gone = ([row for row, is_it in enumerate(is_gone) if is_it is which] for which in (False, True))
        damaged = [row for row in gone if failed and int(group.ids[row]) in failed]
        self._forward_of(group.sampler).leave(group, gone, damaged=damaged)
        if remaining:
            group.keep(remaining)
        else:
            for groups in (self._groups, self._waiting):
                groups[:] = [other for other in groups if other is not group]

    def _sharing(self, forward: Forward, groups: list[Rows]) -> list[Rows]:
        return [group for group in groups if self._forward_of(group.sampler) is forward]

    def _forward_of(self, sampler: Sampler) -> Forward:
        """Find the forward that rows of a sampler take part in."""
        settings = self.denoiser.settings
        kind = sampler.kind_on(settings)
        if kind not in self._forwards:
            used = {rows.sampler.kind_on(settings) for rows in self._groups + self._waiting}
            self._forwards = {key: forward for key, forward in self._forwards.items() if key in used}
            make = Forward if sampler.speculation is None else SpeculatingForward
            self._forwards[kind] = make(self.denoiser, sampler, *self.size, self.counts)
        return self._forwards[kind]


def denoise(
    denoiser: Denoiser, canvas: Canvas, sampler: Sampler, *, row_keys: Int[Tensor, "batch"], batch: Batch | None = None
) -> Iterator[Step]:
    """Denoise a canvas step by step: a batch that these rows join, and that ticks until they are done.

    An empty `batch` may be given that holds keys and values of earlier rows: the next prompt of a chat reuses them.
    Raises ValueError as `Batch.join` and `Batch.tick` do.
    """
    batch = Batch(denoiser) if batch is None else batch
    if len(batch) or batch.denoiser is not denoiser:
        raise ValueError("batch must belong to this model and have no running rows. Use Batch.join to add rows to it.")
    ids = batch.join(canvas, sampler, row_keys=row_keys)
    try:
        while len(batch):
            for step in batch.tick():
                yield replace(step, rows=step.rows - ids[0])
    finally:
        batch.leave(ids)
