"""Thoughts written out as words: what token models are trained on, as a comparison for the latent ones.

`prepare_words` gives a training run its rows: `data.kind redraft.latent.words:prepare_words`, and as `data.source` a
task with the form of its rows, e.g. `countdown`, `mine.jsonl:pause` or `composition:written:padded`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from redraft.data.chat import Example as Encoded
from redraft.data.config import DataConfig
from redraft.data.packing import PackingReport, WindowDataset, pack_examples
from redraft.data.prepare import PreparedData
from redraft.data.sources import Split
from redraft.data.tokenizer import MASK, Tokenizer
from redraft.latent.encode import word_tokenizer
from redraft.latent.tasks import ThoughtTask, WorkedExample, find_task, side_of

ANSWER = "<|answer|>"
Form = Literal["written", "direct", "pause"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True, kw_only=True)
class WrittenTask:
    """A task as texts: what is given, what is learnt after it, and the answer that a text holds."""

    task: ThoughtTask
    form: Form = "written"
    """written: the thoughts, then the answer where it does not follow from them. direct: the answer at once. pause: the
    answer after as many pause tokens as the longest thoughts of its prompt have words (arXiv 2310.02226). Pause tokens
    are given and not learnt, also when the model is judged."""
    pads_prompt: bool = False
    """Pad prompts with mask tokens to the length of the longest: each thought has the same position in every row."""
    fills_answer: bool = False
    """Pad every text with EOS, which is learnt, to the length of the longest: masked and uniform diffusion start from a
    canvas of fixed length, and the length of a row must not reveal the length of its answer."""

    @classmethod
    def from_source(cls, source: str, *, fills_answer: bool = False) -> "WrittenTask":
        """Read TASK[:FORM][:padded]. Raises ValueError for an unknown task."""
        rest = source.removesuffix(":padded")
        name, _, form = rest.rpartition(":")
        if form not in FORMS:
            name, form = rest, "written"
        kind: Any = form
        return cls(task=find_task(name), form=kind, pads_prompt=rest != source, fills_answer=fills_answer)

    @cached_property
    def examples(self) -> list[WorkedExample]:
        """All examples of the task."""
        return list(self.task.examples())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """One token for every word, and one that separates thoughts from the answer if that is needed."""
        if self._width is not None:
            return word_tokenizer(self.examples)
        if taken := [text for example in self.examples for text in example.texts() if ANSWER in text]:
            raise ValueError(f"{ANSWER!r} separates thoughts from answers; got it in {taken[0]!r}. Write another word.")
        return word_tokenizer([*self.examples, WorkedExample(prompt=ANSWER, blocks=(), answer="")])

    @cached_property
    def _width(self) -> int | None:
        """Words per block if all blocks have the same number and the answer follows from them, else None."""
        widths = {len(block.split()) for example in self.examples for block in example.blocks}
        follows = all(not e.answer or self.task.answer(list(e.blocks)) == e.answer for e in self.examples)
        return widths.pop() if follows and len(widths) == 1 else None

    @cached_property
    def _longest_prompt(self) -> int:
        return max(len(example.prompt.split()) for example in self.examples)

    @cached_property
    def _num_pauses(self) -> Mapping[str, int]:
        counts: dict[str, int] = {}
        for example in self.examples:
            count = sum(len(block.split()) for block in example.blocks)
            counts[example.prompt] = max(count, counts.get(example.prompt, 0))
        return counts

    def given(self, prompt: str) -> str:
        """Return the text before what is learnt: the prompt of an example, its padding, its pauses."""
        padding = self._longest_prompt - len(prompt.split()) if self.pads_prompt else 0
        pauses = self._num_pauses[prompt] if self.form == "pause" else 0
        return " ".join([*prompt.split(), *[MASK] * (padding + pauses)])

    def target(self, example: WorkedExample) -> str:
        """Return the text that is learnt."""
        answer = example.answer or self.task.answer(list(example.blocks))
        if self.form != "written":
            return answer
        thoughts = " ".join(example.blocks)
        return thoughts if self._width else f"{thoughts} {ANSWER} {answer}"

    def answer(self, text: str) -> str:
        """Return the answer that a text in the form of `target` holds."""
        if self.form != "written":
            return text
        if self._width is None:
            return text.partition(ANSWER)[2].strip()
        words = text.split()
        return self.task.answer([" ".join(words[i : i + self._width]) for i in range(0, len(words), self._width)])

    @cached_property
    def rows(self) -> list[tuple[list[int], list[int]]]:
        """Tokens that are given and tokens that are learnt, for every example."""
        given, targets = (
            self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            for texts in ([self.given(e.prompt) for e in self.examples], [self.target(e) for e in self.examples])
        )
        eos = self.tokenizer.eos_token_id
        rows = [(before, [*after, eos]) for before, after in zip(given, targets, strict=True)]
        if not self.fills_answer:
            return rows
        longest = max(len(after) for _, after in rows)
        return [(before, after + [eos] * (longest - len(after))) for before, after in rows]

    @property
    def longest_target(self) -> int:
        """Tokens of the longest text that is learnt, including its EOS."""
        return max(len(after) for _, after in self.rows)


def prepare_words(config: DataConfig, *, tokenizer: Tokenizer | None, objective: str) -> PreparedData:
    """Write a task's examples out, an example a row; they are made each time, and kept in memory.

    Raises ValueError for a tokenizer, and for rows longer than `data.seq_len`.
    """
    if tokenizer is not None:
        raise ValueError("thoughts in words have a tokenizer of their own; got model.start with another. Leave it out.")
    written = WrittenTask.from_source(config.source, fills_answer=objective in ("masked", "uniform"))
    longest = max(len(before) + len(after) for before, after in written.rows)
    if longest > config.seq_len:
        raise ValueError(
            f"the longest row of the task has {longest} tokens; got seq_len={config.seq_len}. Raise data.seq_len."
        )
    (train, train_report), (validation, report) = (
        _windows(written, split, config.seq_len) for split in ("train", "validation")
    )
    return PreparedData(
        train=train,
        validation=validation,
        tokenizer=written.tokenizer,
        train_report=train_report,
        validation_report=report,
        generation={"max_new_tokens": written.longest_target},
    )


def _windows(written: WrittenTask, split: Split, seq_len: int) -> tuple[WindowDataset, PackingReport]:
    """Put the rows of one side of the task's own split into windows."""
    encoded = [
        Encoded(np.array([*before, *after], np.int32), np.arange(len(before) + len(after)) >= len(before))
        for example, (before, after) in zip(written.examples, written.rows, strict=True)
        if side_of(example.prompt, held_out=written.task.held_out) == split
    ]
    pad = written.tokenizer.pad_token_id
    windows = pack_examples(encoded, seq_len=seq_len, pad_token_id=pad, one_per_window=True)
    report = PackingReport(
        num_documents=len(encoded),
        num_tokens=sum(len(one.input_ids) for one in encoded),
        num_windows=len(encoded),
        num_target_tokens=sum(int(one.is_target.sum()) for one in encoded),
    )
    return WindowDataset(windows=windows, is_trimmed=True), report
