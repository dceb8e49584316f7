"""Thoughts written out as words: what token models are trained on, beside the latent ones (docs/latent-thinking.md)."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from redraft.data.chat import Example as Encoded
from redraft.data.config import ThoughtConfig
from redraft.data.packing import PackingReport, Windows, pack_examples
from redraft.data.sources import Split
from redraft.data.tasks import Example, Task, side_of, word_tokenizer
from redraft.data.tokenizer import MASK, Tokenizer

NEXT, ANSWER = "<|next|>", "<|answer|>"


@dataclass(frozen=True, kw_only=True)
class WrittenTask:
    """A task as texts: what is given, what is to be said after it, and the answer that a text says."""

    task: Task
    config: ThoughtConfig

    @cached_property
    def examples(self) -> list[Example]:
        """All examples of the task. Raises ValueError where there is none."""
        if found := list(self.task.examples()):
            return found
        raise ValueError("the task has no examples. Give one that has.")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """One token for every word; the words that part thoughts and answer only where they are needed."""
        words = [word for word, is_used in ((NEXT, not self._block_words), (ANSWER, not self._tells)) if is_used]
        if taken := [word for example in self.examples for text in example.texts() for word in words if word in text]:
            raise ValueError(f"the word {taken[0]!r} parts thoughts from answers. Write another in its place.")
        marks = Example(prompt=" ".join(words), blocks=(), answer="")
        return word_tokenizer([*self.examples, marks] if words else self.examples)

    @cached_property
    def _block_words(self) -> int | None:
        """Words of a block, where all have as many: they need nothing between them."""
        counts = {len(block.split()) for example in self.examples for block in example.blocks}
        return counts.pop() if len(counts) == 1 else None

    @cached_property
    def _tells(self) -> bool:
        """Whether the answer follows from the thoughts."""
        return all(not e.answer or self.task.answer(list(e.blocks)) == e.answer for e in self.examples)

    @cached_property
    def _longest_prompt(self) -> int:
        return max(len(example.prompt.split()) for example in self.examples)

    @cached_property
    def _num_pauses(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for example in self.examples:
            count = sum(len(block.split()) for block in example.blocks)
            found[example.prompt] = max(count, found.get(example.prompt, 0))
        return found

    def given(self, prompt: str) -> str:
        """Return the text that stands before what is learnt: the prompt of an example, its padding, its pauses."""
        padding = self._longest_prompt - len(prompt.split()) if self.config.pad_prompt else 0
        pauses = self._num_pauses[prompt] if self.config.form == "pause" else 0
        return " ".join([*prompt.split(), *[MASK] * (padding + pauses)])

    def said(self, example: Example) -> str:
        """Return the text that is learnt."""
        answer = example.answer or self.task.answer(list(example.blocks))
        if self.config.form != "written":
            return answer
        thoughts = (" " if self._block_words else f" {NEXT} ").join(example.blocks)
        return thoughts if self._tells else f"{thoughts} {ANSWER} {answer}"

    def answer(self, said: str) -> str:
        """Return the answer that a text says."""
        if self.config.form != "written":
            return said
        thoughts, _, answer = said.partition(ANSWER)
        if not self._tells:
            return answer.strip()
        words, width = thoughts.split(), self._block_words
        if width:
            return self.task.answer([" ".join(words[i : i + width]) for i in range(0, len(words), width)])
        return self.task.answer([block.strip() for block in thoughts.split(NEXT)])

    @cached_property
    def _rows(self) -> list[tuple[list[int], list[int]]]:
        """Tokens that are given and tokens that are learnt, of every example."""
        encode = lambda texts: self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # noqa: E731
        given = encode([self.given(example.prompt) for example in self.examples])
        said = encode([self.said(example) for example in self.examples])
        eos = self.tokenizer.eos_token_id
        return [(before, [*after, eos]) for before, after in zip(given, said, strict=True)]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(
            len(before) + (self.longest_said if self.config.fill else len(after)) for before, after in self._rows
        )

    @cached_property
    def longest_said(self) -> int:
        """Tokens of the longest text that is learnt, its EOS among them."""
        return max(len(after) for _, after in self._rows)

    def windows(self, split: Split, *, seq_len: int) -> tuple[Windows, PackingReport]:
        """Encode one side of the task's own split, a row an example.

        Raises ValueError for rows longer than `seq_len`, and where there is none to train on.
        """
        if self.longest > seq_len:
            raise ValueError(
                f"the longest row of the task has {self.longest} tokens; got seq_len={seq_len}. Raise data.seq_len."
            )
        eos, held_out = self.tokenizer.eos_token_id, self.task.held_out
        encoded = []
        for example, (before, after) in zip(self.examples, self._rows, strict=True):
            if side_of(example.prompt, held_out=held_out) == split:
                filled = [*after, *[eos] * (self.longest_said - len(after))] if self.config.fill else after
                is_target = np.arange(len(before) + len(filled)) >= len(before)
                encoded.append(Encoded(np.array([*before, *filled], np.int32), is_target))
        if split == "train" and not encoded:
            raise ValueError(f"the task holds out all of its {len(self.examples)} examples. Give it more prompts.")
        windows = pack_examples(
            encoded, seq_len=seq_len, pad_token_id=self.tokenizer.pad_token_id, one_per_window=True
        )  # fmt: skip
        report = PackingReport(
            num_documents=len(encoded),
            num_tokens=sum(len(one.input_ids) for one in encoded),
            num_windows=len(encoded),
            num_target_tokens=sum(int(one.is_target.sum()) for one in encoded),
        )
        return windows, report
