"""The record of a generation: when each token was decided, and how sure the model was."""

from dataclasses import dataclass, field

from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.step import Step


@dataclass(frozen=True, kw_only=True)
class Event:
    """One decision."""

    step: int
    position: int
    token_id: int
    confidence: float
    kind: str = "commit"
    """commit, revise (a draft is replaced by another token) or reopen (a draft becomes noise again)."""


@dataclass(frozen=True, kw_only=True)
class RowTrace:
    """All decisions of one row, in order, and the canvas they ended in."""

    token_ids: list[int]
    is_given: list[bool]
    is_noise: list[bool]
    """Positions that were never decided, as those after an early end."""
    num_steps: int
    events: list[Event]


@dataclass
class Recorder:
    """Collect steps into one trace per row. Each step is copied to the CPU, so this is done on request only."""

    rows: dict[int, list[Event]] = field(default_factory=dict)
    last: dict[int, tuple[list[int], list[int], int]] = field(default_factory=dict)

    def start(self, canvas: Canvas) -> None:
        """Record the canvas before the first step."""
        for row, (tokens, status) in enumerate(zip(canvas.tokens.tolist(), canvas.status.tolist(), strict=True)):
            self.rows[row] = []
            self.last[row] = (tokens, status, 0)

    def add(self, step: Step) -> None:
        """Record the decisions of a step."""
        tokens, status = step.canvas.tokens.tolist(), step.canvas.status.tolist()
        rows, ages = step.rows.tolist(), step.age.tolist()
        for i, row in enumerate(rows):
            self.last[row] = (tokens[i], status[i], ages[i] + 1)
        for kind, where in (("commit", step.is_committed), ("revise", step.is_edited), ("reopen", step.is_reopened)):
            confidence = step.confidence[where].tolist()
            for (i, position), sure in zip(where.nonzero().tolist(), confidence, strict=True):
                event = Event(step=ages[i], position=position, token_id=tokens[i][position], confidence=sure, kind=kind)
                self.rows[rows[i]].append(event)

    def traces(self) -> list[RowTrace]:
        """Return the traces in the order of the batch."""
        return [self._trace(row) for row in sorted(self.rows)]

    def _trace(self, row: int) -> RowTrace:
        tokens, status, num_steps = self.last[row]
        length = len(status) - status[::-1].index(next(s for s in reversed(status) if s != Status.PAD))
        return RowTrace(
            token_ids=tokens[:length],
            is_given=[s == Status.GIVEN for s in status[:length]],
            is_noise=[s == Status.NOISE for s in status[:length]],
            num_steps=num_steps,
            events=self.rows[row],
        )
