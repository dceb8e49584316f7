"""Run a model on tasks, item by item: finished items are on disk, and an interrupted run continues after them."""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from redraft.evaluation.metrics import RATIOS, Bin, Interval, bootstrap, calibration, pass_at_k, ratio_score, vote
from redraft.evaluation.tasks import Item, Task, take
from redraft.language_model import LanguageModel
from redraft.likelihood.config import LikelihoodConfig
from redraft.likelihood.estimate import Request, loglikelihoods, rolling_requests, score_questions

Record = dict[str, Any]


def join_processes(device: str | None = None) -> Any:
    """Join the other processes of this job, where there are any: accelerate's PartialState (gloo without a GPU)."""
    from accelerate import PartialState

    is_cpu = device == "cpu" or not torch.accelerator.is_available()
    return PartialState(cpu=is_cpu)


@dataclass(frozen=True, kw_only=True)
class Store:
    """A folder of records, one JSON line per item, in one file per process.

    A line is written whole and flushed to the disk before the next item; a line that a crash cut off is dropped, and
    its item is done again. Another number of processes may continue the evaluation.
    """

    folder: Path
    rank: int = 0

    def open(self, settings: dict[str, Any]) -> None:
        """Make the folder for these settings. Raises ValueError where it holds results of other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, text = self.folder / "settings.json", json.dumps(settings, indent=2, sort_keys=True, default=str)
        results = [file for file in self.folder.glob("*.jsonl") if file.stat().st_size]
        if (results or any(self.folder.glob("answers*"))) and path.exists() and path.read_text() != text:
            raise ValueError(
                f"{self.folder} holds results of other settings (settings.json). Use another --out, or delete it."
            )
        if self.rank == 0:
            (whole := path.with_suffix(".tmp")).write_text(text)
            whole.replace(path)  # atomic: no other process reads half of it
        for mine in self.folder.glob(f"*.{self.rank}.jsonl"):
            os.truncate(mine, mine.read_bytes().rfind(b"\n") + 1)

    def records(self, task: str) -> dict[str, Record]:
        """Read the finished items of a task, of all processes, by id."""
        records = {}
        for path in sorted(self.folder.glob(f"{_file_name(task)}.*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):
                    record = json.loads(line)
                    records[record["id"]] = record
        return records

    def add(self, task: str, record: Record) -> None:
        """Save a finished item."""
        path = self.folder / f"{_file_name(task)}.{self.rank}.jsonl"
        with path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def replace(self, task: str, records: Sequence[Record]) -> None:
        """Save exactly these records of a task."""
        path = self.folder / f"{_file_name(task)}.{self.rank}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _file_name(task: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in task)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The settings that items are evaluated with."""

    sampling: dict[str, Any] = field(default_factory=dict)
    """Settings of `generate` and `infill`, over the checkpoint's own."""
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    batch_size: int = 8
    chat: bool = False


def run_task(
    lm: LanguageModel,
    task: Task,
    store: Store,
    conditions: Conditions,
    *,
    limit: int | None = None,
    world_size: int = 1,
) -> Iterator[Record]:
    """Work on the items of this process that nobody finished yet, and yield each record once it is on disk."""
    finished = store.records(task.name)
    mine = take(task, limit)[store.rank :: world_size]
    todo = [item for item in mine if item.id not in finished]
    for kind, stop in dict.fromkeys((item.kind, item.stop) for item in todo):
        items = [item for item in todo if (item.kind, item.stop) == (kind, stop)]  # a batch has one stop rule
        for start in range(0, len(items), conditions.batch_size):
            batch = items[start : start + conditions.batch_size]
            began = time.perf_counter()
            records = WORKERS[kind](lm, task, batch, conditions)
            seconds = (time.perf_counter() - began) / len(batch)
            for item, record in zip(batch, records, strict=True):
                whole = {"id": item.id, **record, "seconds": seconds}
                store.add(task.name, whole)
                yield whole


def _generate(lm: LanguageModel, task: Task, items: Sequence[Item], conditions: Conditions) -> list[Record]:
    prompts: list[Any] = [item.prompt for item in items]
    if conditions.chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    stop = {"stop": items[0].stop} if items[0].stop else {}
    out = lm.generate(prompts, trace=True, **stop | conditions.sampling)
    if out.texts is None:
        raise ValueError(f"task {task.name} needs text, and this model has no tokenizer. Load one with it.")
    return _scored(task, items, out, out.texts)


def _scored(task: Task, items: Sequence[Item], out: Any, texts: Sequence[str]) -> list[Record]:
    """Score generated texts: `num_samples` per item, one after the other, each with its mean confidence."""
    n = len(texts) // len(items)
    confidence = _confidence(out)
    records = []
    for i, item in enumerate(items):
        rows = slice(i * n, (i + 1) * n)
        outputs = list(texts[rows])
        record = {"output": outputs[0]} if n == 1 else {"outputs": outputs}
        cost = {"forwards": sum(out.forwards[rows]), "tokens": sum(map(len, out.tokens[rows]))}
        scored = [task.score(item, output) for output in outputs]
        pairs = [[fmean(p), next(iter(one.values()))] for p, one in zip(confidence[rows], scored, strict=True) if p]
        scores = _scores(task, item, outputs, scored)
        records.append({**record, "scores": scores, "confidence": pairs, **cost})
    return records


def _confidence(out: Any) -> list[list[float]]:
    """List the probability of each new token of each row when it was last decided, in reading order."""
    rows = []
    for trace, new in zip(out.trace, out.tokens, strict=True):
        decided = {event.position: event.confidence for event in trace.events if event.kind != "reopen"}
        rows.append([decided[position] for position in sorted(decided)[: len(new)]])
    return rows


def _scores(task: Task, item: Item, outputs: Sequence[str], scored: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average each score over the samples of an item; with several, pass@k and vote@n of the task's first score.

    k takes the powers of 2 up to the number of samples, and that number. A sample passes if the first score is 1.
    vote@n is the first score of the first sample with the winning answer.
    """
    scores = {name: fmean(one[name] for one in scored) for name in scored[0]}
    if (n := len(outputs)) == 1:
        return scores
    first = next(iter(scores))
    num_right = sum(one[first] >= 1 for one in scored)
    scores |= {f"pass@{k}": pass_at_k(n, num_right, k) for k in sorted({n, *(2**i for i in range(n.bit_length()))})}
    answers = [task.answer(item, output) for output in outputs]
    if answers[0] is not None:  # the task has a vote; samples without an answer are excluded from it
        winner = vote([answer for answer in answers if answer] or answers)
        scores[f"vote@{n}"] = scored[answers.index(winner)][first]
    return scores


def _infill(lm: LanguageModel, task: Task, items: Sequence[Item], conditions: Conditions) -> list[Record]:
    mask = torch.tensor([lm.denoiser.settings.mask_token_id])
    befores = [lm.encode(item.prompt) for item in items]
    holes = [lm.encode(item.answer, is_inside=len(before) > 0) for item, before in zip(items, befores, strict=True)]
    rows = []
    for item, before, hole in zip(items, befores, holes, strict=True):
        after = lm.encode(item.suffix, is_inside=True)
        rows.append(torch.cat([before, mask.expand(len(hole)), after]))
    out = lm.infill(rows, trace=True, **conditions.sampling)
    n = len(out.tokens) // len(items)
    texts = [lm.decode(tokens, after=befores[i // n]) for i, tokens in enumerate(out.tokens)]
    records = _scored(task, items, out, texts)
    confidence = _confidence(out)
    for i, record in enumerate(records):  # the true tokens are known, so each token's confidence can be judged
        judged = zip(confidence[i * n : (i + 1) * n], out.tokens[i * n : (i + 1) * n], strict=True)
        record["confidence"] = [
            [p, float(token == true)]
            for row, tokens in judged
            for p, token, true in zip(row, tokens.tolist(), holes[i].tolist(), strict=True)
        ]
    return records


def _fill(lm: LanguageModel, task: Task, items: Sequence[Item], conditions: Conditions) -> list[Record]:
    out = lm.infill([item.prompt for item in items], trace=True, **conditions.sampling)
    assert out.texts is not None
    return _scored(task, items, out, out.texts)


def _choose(lm: LanguageModel, task: Task, items: Sequence[Item], conditions: Conditions) -> list[Record]:
    questions = []
    for item in items:
        key = _key(task, item)
        pairs = [lm.encode_pair(item.prompt, choice) for choice in item.choices]
        if (longest := max(len(c) + len(a) for c, a in pairs)) > (lm.context_length or longest):
            raise ValueError(
                f"task {task.name}, item {item.id}: prompt and choice have {longest} tokens, and the model's context "
                f"holds {lm.context_length}. Shorten the prompt."
            )
        questions.append([Request(context=c, continuation=a, key=key) for c, a in pairs])
    records = []
    for item, bounds in zip(items, score_questions(lm.denoiser, questions, conditions.likelihood), strict=True):
        best = max(range(len(bounds)), key=lambda i: bounds[i].nats)
        normed = max(range(len(bounds)), key=lambda i: bounds[i].nats / len(item.choices[i]))
        confidence = 1 / sum(math.exp(one.nats - bounds[best].nats) for one in bounds)  # given that a choice is right
        records.append(
            {
                "scores": {"acc": float(best == item.answer), "acc_norm": float(normed == item.answer)},
                "confidence": [[confidence, float(best == item.answer)]],
                "nats": [one.nats for one in bounds],
                "standard_errors": [one.standard_error for one in bounds],
                "forwards": sum(one.forwards for one in bounds),
            }
        )
    return records


def _perplexity(lm: LanguageModel, task: Task, items: Sequence[Item], conditions: Conditions) -> list[Record]:
    window = min(lm.context_length or 1024, 1024)
    records = []
    for item in items:
        tokens, text = lm.encode(item.prompt), item.prompt
        windows = rolling_requests(tokens, window=window, key=_key(task, item))
        results = loglikelihoods(lm.denoiser, windows, conditions.likelihood)
        nats, num_bytes = sum(one.nats for one in results), len(text.encode())
        sizes = {
            "nats_per_token": len(tokens),
            "bits_per_byte": num_bytes,
            "word_perplexity": max(1, len(text.split())),
        }
        records.append(
            {
                "scores": {name: RATIOS[name](nats / size) for name, size in sizes.items()},
                "ratios": {name: (nats, size) for name, size in sizes.items()},
                "standard_error": math.hypot(*(one.standard_error for one in results)),
                "forwards": sum(one.forwards for one in results),
            }
        )
    return records


def _key(task: Task, item: Item) -> int:
    """Key an item's noise by its name, so that the order of the items does not matter."""
    return int.from_bytes(hashlib.sha256(f"{task.name}:{item.id}".encode()).digest()[:7], "big")


WORKERS = {"generate": _generate, "infill": _infill, "fill": _fill, "choose": _choose, "perplexity": _perplexity}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A task's scores over its items, and what they cost."""

    task: str
    scores: dict[str, Interval]
    """Means over the items; the scores in RATIOS are those of all texts together."""
    num_items: int
    forwards_per_item: float
    seconds_per_item: float
    tokens_per_second: float | None
    forwards_per_token: float | None
    standard_error: float | None = None
    """Of the Monte Carlo, nats per token, where the task measures the likelihood of texts."""
    calibration: list[Bin] = field(default_factory=list)
    """How often the model was right at each confidence: of tokens where the true ones are known, else of answers."""


def summarize(task: str, records: Sequence[Record]) -> Summary:
    """Average over items, each score with a 95 % bootstrap interval. Raises ValueError where nothing was scored."""
    if not records:
        raise ValueError(f"task {task}: no item was scored.")
    seconds, forwards = sum(r["seconds"] for r in records), sum(r["forwards"] for r in records)
    tokens = sum(r.get("tokens", 0) for r in records)
    scored = dict.fromkeys(name for r in records for name in r["scores"])  # a file may mix kinds of items
    scores = {n: bootstrap([r["scores"][n] for r in records if n in r["scores"]]) for n in scored}
    ratios, error = records[0].get("ratios", {}), None
    if "nats_per_token" in ratios:
        num_tokens = sum(r["ratios"]["nats_per_token"][1] for r in records)
        error = math.hypot(*(r["standard_error"] for r in records)) / num_tokens
    return Summary(
        task=task,
        scores=scores | {name: ratio_score(name, [r["ratios"][name] for r in records]) for name in ratios},
        num_items=len(records),
        forwards_per_item=forwards / len(records),
        seconds_per_item=seconds / len(records),
        tokens_per_second=tokens / seconds if tokens else None,
        forwards_per_token=forwards / tokens if tokens else None,
        standard_error=error,
        calibration=calibration([(p, right) for r in records for p, right in r.get("confidence", ())]),
    )
