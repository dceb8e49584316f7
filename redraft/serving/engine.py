"""The engine: one thread that owns torch, around a `Batch` for each adapter.

A tick of the thread: take what other threads asked for, admit rows, one step of one batch, deliver what is new.
"""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from redraft.language_model import LanguageModel, Prepared
from redraft.likelihood.options import OptionScores, score_options
from redraft.models.adapter import share_weights
from redraft.models.finite import is_out_of_memory
from redraft.prompts import shown_and_raw
from redraft.sampling.batch import Batch, denoise
from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.policies.frontier import Blocks
from redraft.sampling.rows import Place, Rows
from redraft.sampling.sampler import Sampler
from redraft.sampling.step import Step
from redraft.serving.request import (
    Delta,
    Draft,
    DraftToken,
    Draining,
    FinishReason,
    Full,
    Request,
    TokenLogprob,
    Usage,
)
from redraft.serving.text import TextReader, has_byte_tokens

LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON cannot hold."""
DRAFT_SECONDS = 0.1
"""Least time between two drafts of a row."""
MAX_RETRY_SECONDS = 120
"""Longest wait that clients are told; they give up on more."""
COUNTED = ("ticks", "committed_tokens", "cached_tokens", "undelivered")
COUNTED_BY_BATCH = ("forwards", "prefills", "query_tokens", "padding_tokens", "drafts", "accepted_drafts")
WARM_UP_PROMPT, WARM_UP_TOKENS = 2, 16
FORGETTING = 0.98
"""Weight of what was measured before, each time a row ends."""


@dataclass(eq=False, kw_only=True)
class _Row:
    """A row of a request, from its arrival to its end."""

    request: Request
    index: int
    canvas: Canvas
    sampler: Sampler
    reader: TextReader | None
    arrived: float
    num_open: int
    """Positions that may be open at once, whose logits take memory."""
    start: int
    """First new position; of a row with holes, the first one."""
    end: int
    """One past the last position that the client gets."""
    id: int = -1
    """In its batch."""
    place: Place | None = None
    suspended: Rows | None = None
    """Its state, while it waits for the second time."""
    new: list[int]
    """Tokens that were delivered."""
    usage: Usage
    likeliest: dict[int, tuple[tuple[int, float], ...]]
    """By position, the likeliest tokens at the step that placed one there last."""
    revision: int = 0
    drafted: float = 0.0

    @property
    def cost(self) -> int:
        """Estimate the positions that it feeds to the model."""
        return self.canvas.tokens.shape[1]


class Engine:
    """Denoise the rows of many requests together; each gets the tokens that `LanguageModel.generate` gives.

    `submit`, `cancel`, `drain` and `stats` may be called from any thread. `max_rows` rows run at once, `max_queue`
    requests of a key wait. While rows run, prompts are fed in pieces of `chunk` tokens. Rows are admitted first come,
    first served within a key. Between keys, the one that runs the fewest rows comes first, then the one whose finished
    rows have had the fewest query tokens: a key that floods holds up another one by one row at most. `on_tick` is
    called from the engine's thread after the deliveries of each tick.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        max_rows: int = 8,
        max_model_len: int | None = None,
        max_queue: int = 64,
        chunk: int = 128,
        adapters: Mapping[str, LanguageModel] | None = None,
        max_logits_bytes: int = 2**30,
        share_prefixes: bool = False,
        on_tick: Callable[[], None] | None = None,
    ) -> None:
        limit = lm.context_length
        if max_model_len is not None and limit is not None and max_model_len > limit:
            raise ValueError(
                f"max_model_len must be at most the model's context of {limit} tokens; got {max_model_len}."
            )
        least = WARM_UP_PROMPT + (lm.denoiser.settings.block_size or WARM_UP_TOKENS)
        if max_model_len is not None and max_model_len < least:
            raise ValueError(
                f"max_model_len must be at least {least}, a short prompt and a block; got {max_model_len}."
            )
        self.max_rows, self.max_model_len, self.max_queue = max_rows, max_model_len or limit, max_queue
        self.max_logits_bytes, self.share_prefixes, self.on_tick = max_logits_bytes, share_prefixes, on_tick
        self.models: dict[str | None, LanguageModel] = {None: lm}
        self.models.update(adapters or {})
        for other in (adapters or {}).values():
            share_weights(other.model, lm.model)
        self._has_bytes = {
            name: model.tokenizer is not None and has_byte_tokens(model.tokenizer)
            for name, model in self.models.items()
        }
        size = {"max_rows": max_rows, "max_positions": self.max_model_len or 0, "chunk": chunk}
        self._batches = {name: Batch(model.denoiser, **size) for name, model in self.models.items()}
        self._wake = threading.Condition()
        # Guarded by `_wake`; all else belongs to the engine's thread.
        self._queues: dict[str, deque[_Row]] = {}
        self._spent: dict[str, int] = {}  # query tokens of the rows that ended, by key
        self._cancelled: set[str] = set()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._end_at: float | None = None
        self._rate = [0.0, 0.0]  # cost of rows that ended, seconds of ticks; both fade
        self._running: dict[str | None, dict[int, _Row]] = {name: {} for name in self.models}
        self._turns = deque(self.models)
        self._news: dict[str, tuple[Request, list[Delta]]] = {}
        self._counts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="redraft-engine", daemon=True)

    # Called from other threads

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def warm_up(self) -> None:
        """Run a short request on every model, so that the first client does not wait for what is made once.

        Raises RuntimeError if it fails.
        """
        for adapter, lm in self.models.items():
            is_done, deltas = threading.Event(), list[Delta]()

            def deliver(news: Any, deltas: list[Delta] = deltas, is_done: threading.Event = is_done) -> None:
                deltas.extend(news)
                if deltas[-1].finish_reason is not None:
                    is_done.set()

            self.submit(Request(id="warm-up", prepared=_short_row(lm), deliver=deliver, adapter=adapter))
            is_done.wait()
            if deltas[-1].error is not None:
                raise RuntimeError(f"the model cannot denoise a block: {deltas[-1].error}")

    def needed_bytes(self) -> int:
        """Measure on a short row what full batches take beside the weights: keys, values and logits."""
        needed, length = 0, self.max_model_len or 0
        for lm in self.models.values():
            batch, prepared = Batch(lm.denoiser), _short_row(lm)
            for _ in denoise(lm.denoiser, prepared.canvas, prepared.sampler, row_keys=prepared.row_keys, batch=batch):
                pass
            needed += batch.bytes_per_position * self.max_rows * length
        num_open, vocab_size = self.models[None].denoiser.settings.block_size or length, _vocab_size(self.models[None])
        return needed + min(self.max_logits_bytes, self.max_rows * num_open * vocab_size * 4)

    def submit(self, request: Request) -> None:
        """Put a request into the queue of its key.

        Raises ValueError where it can never run, Full where too many wait, and Draining where the engine ends.
        """
        if request.adapter not in self.models:
            names = ", ".join(str(name) for name in self.models if name is not None)
            raise ValueError(f"there is no adapter {request.adapter!r}. Use one of: {names}.")
        rows = self._rows_of(request)
        with self._wake:
            if self._end_at is not None or not self.is_alive:
                raise Draining("the engine takes no new requests.")
            queue = self._queues.setdefault(request.key, deque())
            if len({id(row.request) for row in queue}) >= self.max_queue:
                raise Full(self._retry_after())
            if request.key not in self._spent:  # a key that comes begins with the least that any other has had
                self._spent[request.key] = min(self._spent.values(), default=0)
            queue.extend(rows)
            self._wake.notify()

    def cancel(self, id: str) -> None:
        """End a request before the next forward; it gets nothing more."""
        with self._wake:
            self._cancelled.add(id)
            self._wake.notify()

    def decide(
        self, context: Tensor, options: Sequence[Tensor], *, adapter: str | None = None, seed: int = 0
    ) -> Future[OptionScores]:
        """Score options after a context (`likelihood.options`), between two ticks. Raises Draining."""
        future: Future[OptionScores] = Future()
        denoiser = self.models[adapter].denoiser
        with self._wake:
            if self._end_at is not None or not self.is_alive:
                raise Draining("the engine takes no new requests.")
            self._calls.append((future, lambda: score_options(denoiser, context, options, seed=seed)))
            self._wake.notify()
        return future

    def drain(self, grace: float) -> None:
        """Take no new requests, finish those that are here, for `grace` seconds at most, and end the thread.

        Requests that are not finished by then end with an error.
        """
        with self._wake:
            self._end_at = time.monotonic() + grace
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests are worked on."""
        return self._thread.is_alive()

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._end_at is not None

    def stats(self) -> dict[str, float]:
        """Count what was done since the start, and what there is to do."""
        with self._wake:
            num_waiting = sum(len(queue) for queue in self._queues.values())
        ours = {name: self._counts[name] for name in COUNTED}  # by name: the thread may add others meanwhile
        theirs = {name: sum(batch.counts[name] for batch in self._batches.values()) for name in COUNTED_BY_BATCH}
        now = {"rows_running": self._num_running(), "rows_waiting": num_waiting, "max_rows": self.max_rows}
        return {**ours, **theirs, **now}

    def _retry_after(self) -> int:
        waiting = sum(row.cost for queue in self._queues.values() for row in queue)
        cost, seconds = self._rate
        return max(1, min(MAX_RETRY_SECONDS, math.ceil(waiting * seconds / cost if cost else 1)))

    def _rows_of(self, request: Request) -> list[_Row]:
        prepared, lm = request.prepared, self.models[request.adapter]
        config, canvas, now = prepared.config, prepared.canvas, time.monotonic()
        sampler = replace(prepared.sampler, num_listed=request.top_logprobs or 0)
        lengths = (canvas.status != Status.PAD).sum(dim=1).tolist()
        num_noise = canvas.is_noise.sum(dim=1).tolist()
        if self.max_model_len is not None and max(lengths) > self.max_model_len:
            raise ValueError(
                f"prompt and new tokens must fit into {self.max_model_len} tokens here; got {max(lengths)}. "
                "Shorten the prompt or lower max_new_tokens."
            )
        rows = []
        for index, (prompt, length) in enumerate(zip(prepared.rows, lengths, strict=True)):
            frontier, num_open, reader = sampler.frontier, num_noise[index], None
            if sampler.speculation is not None:
                num_open = sampler.speculation.num_asked
            elif isinstance(frontier, Blocks) and frontier.size is not None and sampler.forwards is None:
                num_open = min(num_open, frontier.size * frontier.in_flight)
            if lm.tokenizer is not None and not prepared.is_infilling:
                stop = config.stop if isinstance(config.stop, tuple) else ()
                has_bytes = self._has_bytes[request.adapter]
                reader = TextReader(
                    lm.tokenizer, prompt.tolist(), stop=stop, dropped=prepared.dropped, has_bytes=has_bytes
                )
            row = _Row(
                request=request,
                index=index,
                canvas=Canvas(**{name: part[index : index + 1, :length] for name, part in vars(canvas).items()}),
                sampler=sampler,
                reader=reader,
                arrived=now,
                num_open=num_open,
                start=0 if prepared.is_infilling else len(prompt),
                end=length if prepared.is_infilling else len(prompt) + config.max_new_tokens,
                new=[],
                likeliest={},
                usage=Usage(prompt_tokens=length - num_noise[index]),
            )
            rows.append(row)
        return rows

    # The engine's thread

    def _run(self) -> None:
        error = "the server shuts down."
        try:
            while self._take_commands():
                self._call()
                self._admit()
                self._tick()
                self._deliver()
        except BaseException as fault:
            error = f"the engine has failed: {type(fault).__name__}."
            raise
        finally:  # whoever waits is told, whatever happened
            with self._wake:
                self._end_at = self._end_at or time.monotonic()
                rows = [row for queue in self._queues.values() for row in queue]
                self._queues.clear()
            for future, _ in self._calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(Draining(error))
            for row in [*rows, *(row for running in self._running.values() for row in running.values())]:
                self._say(row, finish_reason="error", error=error)
            self._deliver()

    def _take_commands(self) -> bool:
        """Wait for work, and end what was cancelled or is late; False if the thread is to end."""
        with self._wake:
            while not (self._is_busy() or self._end_at is not None):
                self._cancelled.clear()
                self._wake.wait()
            now = time.monotonic()
            cancelled, self._cancelled = self._cancelled, set()
            waiting = [row for queue in self._queues.values() for row in queue]
            gone = [row for row in waiting if row.request.id in cancelled or _is_late(row, now)]
            for row in gone:
                self._queues[row.request.key].remove(row)
            is_over = self._end_at is not None and now >= self._end_at
            is_empty = not self._is_busy()
        for row in gone:
            if row.request.id not in cancelled:
                self._end_early(row)
            self._forget(row)
        for name, running in self._running.items():
            for row in list(running.values()):
                if row.request.id in cancelled:
                    self._batches[name].leave([row.id])
                    self._leave(row)
                elif _is_late(row, now):
                    row.suspended = self._batches[name].suspend([row.id])[0]
                    self._end_early(row)
                    self._leave(row)
        return not is_over and not (self._end_at is not None and is_empty)

    def _is_busy(self) -> bool:
        return bool(self._num_running() or any(self._queues.values()) or self._calls)

    def _call(self) -> None:
        """Answer one question that needs no rows."""
        if self._calls:
            future, function = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

    def _admit(self) -> None:
        """Let rows join while there is room: the oldest row of the key that runs the fewest and has had the least."""
        while self._num_running() < self.max_rows:
            with self._wake:
                keys = [key for key, queue in self._queues.items() if queue]
                if not keys:
                    return
                running = Counter(row.request.key for rows in self._running.values() for row in rows.values())
                key = min(keys, key=lambda key: (running[key], self._spent[key]))
                row = self._queues[key][0]
                if self._num_running() and not self._has_room(row):
                    return  # nobody overtakes, so every row runs at some time
                self._queues[key].popleft()
            try:
                self._join(row)
            except Exception as error:
                self._say(row, finish_reason="error", error=_described(error))
                self._forget(row)

    def _has_room(self, row: _Row) -> bool:
        """Tell whether the logits of a row fit, and whether its keys and values find a place.

        Each kind of attention has slots of its own, so a row of another kind waits until these are free.
        """
        lm = self.models[row.request.adapter]
        running = [other for rows in self._running.values() for other in rows.values()]
        beside = [other.sampler for other in running if other.request.adapter == row.request.adapter]
        with_slots = [sampler for sampler in [row.sampler, *beside] if sampler.cache != "none"]
        kinds = {sampler.kind_on(lm.denoiser.settings) for sampler in with_slots}
        num_open = sum(other.num_open for other in [row, *running])
        return num_open * _vocab_size(lm) * 4 <= self.max_logits_bytes and len(kinds) <= 1

    def _join(self, row: _Row) -> None:
        batch, running = self._batches[row.request.adapter], self._running[row.request.adapter]
        if row.suspended is not None:
            batch.resume(row.suspended)
            row.suspended = None
        else:
            keys, salt = row.request.prepared.row_keys, "" if self.share_prefixes else row.request.key
            # Rows of equal samplers are decided together, if they have the same object.
            row.sampler = next((one.sampler for one in running.values() if _is_equal(one, row)), row.sampler)
            [row.id] = batch.join(row.canvas, row.sampler, row_keys=keys[row.index : row.index + 1], salt=salt)
            row.place = batch.place(row.id)
            row.usage = replace(row.usage, queue_seconds=time.monotonic() - row.arrived)
        running[row.id] = row

    def _tick(self) -> None:
        """Make one step of the next batch that has rows."""
        self._turns.rotate(-1)
        busy = [name for name in self._turns if self._running[name]]
        if not busy:
            return
        batch, running, failed = self._batches[busy[0]], self._running[busy[0]], dict[int, Exception]()
        started = time.monotonic()
        try:
            steps = batch.tick(failed)
        except Exception as error:
            if is_out_of_memory(error) and len(running) > 1:
                self._shrink(batch, running)
            else:
                failed |= dict.fromkeys(running, error)
                batch.leave(list(running))
            steps = []
        self._counts["ticks"] += 1
        self._rate[1] += time.monotonic() - started
        for id, fault in failed.items():
            self._say(running[id], finish_reason="error", error=_described(fault))
            self._leave(running[id])
        for step in steps:
            self._read(step, running)

    def _shrink(self, batch: Batch, running: dict[int, _Row]) -> None:
        """Run half as many rows from now on; the youngest wait again, and go on later as they are."""
        self.max_rows = max(1, len(running) // 2)
        rows = [running.pop(id) for id in sorted(running)[self.max_rows :]]
        for row in rows:
            [row.suspended] = batch.suspend([row.id])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with self._wake:
            for row in reversed(rows):
                self._queues.setdefault(row.request.key, deque()).appendleft(row)

    def _read(self, step: Step, running: dict[int, _Row]) -> None:
        """Tell the requests what is new in a step."""
        canvas, num_forwards = step.canvas, step.num_forwards.tolist()
        tokens, status, confidence = canvas.tokens.cpu(), canvas.status.cpu(), canvas.confidence.cpu()
        listed = _listed(step) if step.likeliest is not None else []
        for at, (id, is_done) in enumerate(zip(step.rows.tolist(), step.is_done.tolist(), strict=True)):
            row = running.get(id)
            if row is None:
                continue
            place = row.place
            assert place is not None
            row.likeliest |= {position: tokens for of, position, tokens in listed if of == at}
            row.usage = replace(
                row.usage,
                cached_tokens=min(place.num_copied, row.usage.prompt_tokens),
                forwards=num_forwards[at],
                query_tokens=place.num_fed,
            )
            if is_done:
                self._finish(row, tokens[at], status[at], confidence[at])
                self._leave(row)
                continue
            begin = row.start + len(row.new)
            end = begin if row.request.prepared.is_infilling else max(begin, min(place.unfinished, row.end))
            new = tokens[at, begin:end].tolist()
            self._counts["committed_tokens"] += len(new)
            text = row.reader.push(new) if new and row.reader is not None else ""
            draft = self._draft(row, step, at) if row.request.wants_drafts else None
            if new or draft is not None:
                self._say(row, new, confidence[at], range(begin, end), text=text, draft=draft)

    def _finish(self, row: _Row, tokens: Tensor, status: Tensor, confidence: Tensor, *, is_late: bool = False) -> None:
        prepared, lm = row.request.prepared, self.models[row.request.adapter]
        ids, _, whole = prepared.finish(row.index, tokens, status)
        new, text = ids.tolist(), whole or ""
        missing, begin = new[len(row.new) :], row.start + len(row.new)
        self._counts["committed_tokens"] += len(missing)
        positions: Sequence[int] = range(begin, begin + len(missing))
        if prepared.is_infilling:
            positions = (status == Status.COMMITTED).nonzero()[:, 0].tolist()
        shown = text if row.reader is None else row.reader.finish(text)
        reason: FinishReason = "length"
        if not is_late and _has_stopped(lm, prepared.rows[row.index], new, prepared.config.stop):
            reason = "stop"
        self._say(row, missing, confidence, positions, text=shown, finish_reason=reason)

    def _end_early(self, row: _Row) -> None:
        """Finish a row with what is decided."""
        canvas = row.canvas if row.suspended is None else row.suspended.canvas
        mask = self.models[row.request.adapter].denoiser.settings.mask_token_id
        canvas = canvas.reopen(canvas.is_draft, torch.full_like(canvas.tokens, mask))  # drafts may still change
        end = canvas.tokens.shape[1] if row.request.prepared.is_infilling else row.start + len(row.new)
        tokens, status, confidence = (part[0, :end].cpu() for part in (canvas.tokens, canvas.status, canvas.confidence))
        self._finish(row, tokens, status, confidence, is_late=True)

    def _draft(self, row: _Row, step: Step, at: int) -> Draft | None:
        """Describe the open blocks from the first undecided position on, but not too often."""
        place, lm, now = row.place, self.models[row.request.adapter], time.monotonic()
        assert place is not None
        start, end = max(place.unfinished, row.start), min(place.end, row.end)
        if now - row.drafted < DRAFT_SECONDS or start >= end:
            return None
        row.drafted, row.revision = now, row.revision + 1
        window = slice(start, end)
        is_noise = step.canvas.is_noise[at, window]
        shown = torch.where(is_noise, step.x_0[at, window], step.canvas.tokens[at, window]).tolist()
        sure = torch.where(is_noise, step.confidence[at, window], step.canvas.confidence[at, window]).tolist()
        names = [Status(value).name.lower() for value in step.canvas.status[at, window].tolist()]
        texts = ["" if lm.tokenizer is None else lm.decode([token]) for token in shown]
        tokens = [DraftToken._make(each) for each in zip(shown, texts, names, sure, strict=True)]
        return Draft(revision=row.revision, start=start - row.start, end=end - row.start, tokens=tuple(tokens))

    def _say(
        self,
        row: _Row,
        new: list[int] | None = None,
        confidence: Tensor | None = None,
        positions: Sequence[int] = (),
        *,
        text: str = "",
        draft: Draft | None = None,
        finish_reason: FinishReason | None = None,
        error: str | None = None,
    ) -> None:
        """Note what a request is to be told after this tick."""
        logprobs, new = None, new or []
        row.new += new
        row.usage = replace(row.usage, completion_tokens=len(row.new))
        if row.request.top_logprobs is not None and confidence is not None:
            logprobs = tuple(
                TokenLogprob(token_id=token, logprob=_logarithm(float(confidence[at])), top=row.likeliest.pop(at, ()))
                for token, at in zip(new, positions, strict=True)
            )
        delta = Delta(
            index=row.index,
            token_ids=tuple(new),
            logprobs=logprobs,
            text=text,
            draft=draft,
            finish_reason=finish_reason,
            error=error,
            usage=row.usage,
        )
        self._news.setdefault(row.request.id, (row.request, []))[1].append(delta)

    def _deliver(self) -> None:
        news, self._news = self._news, {}
        for request, deltas in news.values():
            try:
                request.deliver(deltas)
            except Exception:  # whoever should be told is gone
                self._counts["undelivered"] += 1
                self.cancel(request.id)
        if news and self.on_tick is not None:
            self.on_tick()

    def _leave(self, row: _Row) -> None:
        """Forget a row that has left its batch."""
        self._running[row.request.adapter].pop(row.id, None)
        self._counts["cached_tokens"] += row.usage.cached_tokens
        self._rate = [self._rate[0] * FORGETTING + row.cost, self._rate[1] * FORGETTING]
        self._forget(row)

    def _forget(self, row: _Row) -> None:
        """Charge what a row has cost; forget its key if it has no other."""
        key = row.request.key
        with self._wake:
            if key in self._spent:
                self._spent[key] += row.usage.query_tokens
            running = (other.request.key for rows in self._running.values() for other in rows.values())
            if not self._queues.get(key) and key not in running:
                self._queues.pop(key, None)
                self._spent.pop(key, None)

    def _num_running(self) -> int:
        return sum(len(rows) for rows in self._running.values())


def _short_row(lm: LanguageModel) -> Prepared:
    """Prepare what every model can denoise: a short prompt and a block."""
    size = lm.denoiser.settings.block_size or WARM_UP_TOKENS
    return lm.prepare([[0] * WARM_UP_PROMPT], max_new_tokens=size, block_size=None, stop=None)


def _vocab_size(lm: LanguageModel) -> int:
    return int(lm.model.config.get_text_config().vocab_size)


def _is_late(row: _Row, now: float) -> bool:
    return row.request.deadline is not None and now >= row.request.deadline


def _is_equal(one: _Row, other: _Row) -> bool:
    """Tell whether two rows have equal samplers; guides may not know how to compare themselves."""
    return not (one.sampler.guides or other.sampler.guides) and one.sampler == other.sampler


def _has_stopped(lm: LanguageModel, before: Tensor, new: list[int], stop: str | tuple[str, ...] | None) -> bool:
    """Tell whether a row ended by an end token or a stop string."""
    if stop is None or not new:
        return False
    texts = shown_and_raw(lm.tokenizer, before, new) if isinstance(stop, tuple) else ()
    return new[-1] in lm.eos_token_ids or any(string in text for text in texts for string in stop)


def _listed(step: Step) -> list[tuple[int, int, tuple[tuple[int, float], ...]]]:
    """List what a step found likeliest: (row of the step, position, tokens with their log-probabilities)."""
    found = step.likeliest
    assert found is not None
    columns = (found.rows, found.positions, found.tokens, found.log_p)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(row, position, tuple(zip(tokens, log_p, strict=True))) for row, position, tokens, log_p in rows]


def _logarithm(p: float) -> float:
    return math.log(p) if p > 0 else LEAST_LOGPROB


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
