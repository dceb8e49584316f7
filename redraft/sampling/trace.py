"""The record of a generation: when each token was decided, and how sure the model was."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
    """commit, revise (a draft took another token), or reopen (it became noise again)."""


@dataclass(frozen=True, kw_only=True)
class RowTrace:
    """All decisions of one row, in order, and the canvas they ended in."""

    token_ids: list[int]
    is_given: list[bool]
    is_noise: list[bool]
    """Positions never decided: behind an early end."""
    num_steps: int
    events: list[Event]


@dataclass
class Recorder:
    """Collect steps into one trace per row. Copies each step off the device, so only on request."""

    rows: dict[int, list[Event]] = field(default_factory=dict)
    last: dict[int, tuple[list[int], list[int], int]] = field(default_factory=dict)

    def start(self, canvas: Canvas) -> None:
        """Note the canvas before the first step."""
        for row, (tokens, status) in enumerate(zip(canvas.tokens.tolist(), canvas.status.tolist(), strict=True)):
            self.rows[row] = []
            self.last[row] = (tokens, status, 0)

    def add(self, step: Step) -> None:
        """Note what a step decided."""
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


def to_page(
    traces: list[RowTrace], *, title: str, settings: dict[str, Any], text_of: Callable[[int], str]
) -> dict[str, Any]:
    """Lay traces out for `trace_page.render_page`; `text_of` decodes one token id."""
    return {"title": title, "settings": settings, "rows": [_row(trace, text_of) for trace in traces]}


def _row(trace: RowTrace, text_of: Callable[[int], str]) -> dict[str, Any]:
    kept = [p for p, is_noise in enumerate(trace.is_noise) if not is_noise]
    end = max(kept, default=-1) + 1  # noise behind an early end is not part of the text
    return {
        "num_steps": trace.num_steps,
        "positions": [
            {"given": trace.is_given[p], "id": trace.token_ids[p], "text": text_of(trace.token_ids[p])}
            for p in range(end)
        ],
        "events": [
            {
                "step": event.step + 1,  # on the page, step 0 is the canvas before the first
                "position": event.position,
                "id": event.token_id,
                "text": text_of(event.token_id),
                "confidence": event.confidence,
                "kind": event.kind,
            }
            for event in trace.events
            if event.position < end
        ],
    }
