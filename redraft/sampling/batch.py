"""A batch of rows that are denoised together: they join and leave at any forward, and none changes another."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor

from redraft.models.denoiser import Denoiser
from redraft.models.finite import explain_nan
from redraft.sampling.canvas import Canvas
from redraft.sampling.forward import Forward
from redraft.sampling.rows import Rows
from redraft.sampling.sampler import Sampler
from redraft.sampling.step import Step, decide, no_progress


class Batch:
    """Running rows of one denoiser, for one thread: what `generate`, chat and a server drive.

    Rows of samplers with the same attention and cache share a forward; those of one sampler (the same object) are
    decided together. A row gets the same tokens as if it ran alone (bitwise in float64), whichever rows join or leave.
    Keys and values of rows that left stay until their slot is needed. With an exact cache, a row that joins copies
    those of the longest prefix that it shares with any other row.

    Memory is reserved for `max_rows` and `max_positions`; more is allowed and costs a copy. Unused slots hold prefixes
    of rows that left. While others run, the prompts of rows that join are fed alone, up to `chunk` tokens in a tick
    (None: all); these rows take no steps meanwhile.
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

    def __len__(self) -> int:
        return sum(len(group.places) for group in self._groups + self._waiting)

    def join(self, canvas: Canvas, sampler: Sampler, *, row_keys: Int[Tensor, "batch"]) -> list[int]:
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
        group = Rows(sampler, canvas, row_keys, ids=ids, prior=prior)
        if self.denoiser.is_self_conditioned:
            length = (sampler.layout or self.denoiser.settings.layout).block_size or 0
            group.predicted = group.predicted.new_zeros(len(ids), length, prior[1], dtype=self.denoiser.model.dtype)
        self._waiting.append(group)
        self._drop(group, group.num_left.eq(0).tolist())  # sync: a row with nothing to decide is done
        return ids

    def leave(self, ids: Sequence[int]) -> None:
        """Remove rows, done or not; ids of rows that have left already are ignored."""
        for group in [*self._groups, *self._waiting]:
            self._drop(group, [id in ids for id in group.ids.tolist()])

    def tick(self) -> list[Step]:
        """Make one step of every row that is ready: a forward for each kind of attention and cache, if one is needed.

        Returns a step for each sampler; rows that are done have left. If it raises, nothing is lost: the next tick
        returns the steps that were made, and makes the others. Raises ValueError for logits that are NaN, for a policy
        that makes no progress (from a block's last step on, each step must change something), and for a budget with
        fewer forwards than canvases, if the model denoises one canvas at a time.
        """
        self._admit()
        for forward in self._forwards.values():
            if groups := self._sharing(forward):
                self._step(forward, groups)
        steps, self._steps = self._steps, []
        return steps

    def _step(self, forward: Forward, groups: list[Rows]) -> None:
        for group in groups:
            group.ask(is_every_step=not forward.is_repeatable)
        forward(groups)
        for group in groups:
            step, facts = decide(group)
            is_done, is_stuck, is_nan, is_finished, first = facts.tolist()  # sync: the one question per step
            for row, place in enumerate(group.places):
                place.is_finished, place.unfinished = is_finished[row] > 0, first[row]
            error = no_progress(group, step, is_stuck.index(1)) if any(is_stuck) else None
            error = explain_nan(self.denoiser, group.canvas.tokens) if any(is_nan) else error
            self._steps.append(step)
            self._drop(group, [done > 0 for done in is_done])
            if error is not None:
                raise error

    def _admit(self) -> None:
        """Move waiting rows to the running ones, the oldest first, once their prompts are fed."""
        while self._waiting:
            group = self._waiting[0]
            group.open_blocks()
            forward = self._forward_of(group.sampler)
            num_fed = forward.num_fed
            if not forward.admit(group, self._sharing(forward), chunk=self.chunk):
                return
            self._waiting.pop(0)
            others = [other for other in self._groups if other.sampler is group.sampler]
            for other in others:
                other.join(group)
            self._groups += [] if others else [group]
            if self.chunk is not None and forward.num_fed > num_fed:
                return

    def _drop(self, group: Rows, is_gone: Sequence[bool]) -> None:
        if not any(is_gone):
            return
        remaining = [row for row, gone in enumerate(is_gone) if not gone]
        self._forward_of(group.sampler).leave(group, [row for row, gone in enumerate(is_gone) if gone])
        if remaining:
            group.keep(remaining)
        else:
            for groups in (self._groups, self._waiting):
                groups[:] = [other for other in groups if other is not group]

    def _sharing(self, forward: Forward) -> list[Rows]:
        return [group for group in self._groups if self._forward_of(group.sampler) is forward]

    def _forward_of(self, sampler: Sampler) -> Forward:
        """Find the forward that rows of a sampler take part in."""
        layout = sampler.layout or self.denoiser.settings.layout
        kind = (layout, sampler.cache, bool(sampler.cfg_scale))
        if kind not in self._forwards:
            used = {id(self._forward_of(rows.sampler)) for rows in self._groups + self._waiting}
            self._forwards = {key: forward for key, forward in self._forwards.items() if id(forward) in used}
            self._forwards[kind] = Forward(self.denoiser, sampler, *self.size)
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
